"""A personal model beside the global one, held near it.

Li, Hu, Beirami, Smith 2021, "Ditto: Fair and Robust Federated Learning Through Personalization", Algorithm 1 with
federated averaging as the global solver (https://arxiv.org/abs/2012.04221).
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fedclaw.learning.strategy import StepContext, Strategy

if TYPE_CHECKING:
    import torch

    from fedclaw.protocol.terms import Terms


class Ditto(Strategy):
    """FedAvg, and at each site a model of its own: v <- v - rate (gradient of F_i at v + lambda (v - w0)).

    w0 is the round's global model. lambda = 0 gives purely local models, a large one the global model: |v - w0| is at
    most the gradient's norm over lambda. For sites some of which are unlike the rest, or may send nonsense: their own
    model is only as close to the others' as lambda says. Costs twice the local training, and no more bytes.

    A site is evaluated with its own model. The server's is FedAvg's, whole and fit for export. The personal model is
    trained without noise whatever privacy the run has, since it never leaves; metrics of it, which no epsilon covers,
    leave a site only that allows training without privacy, or says `allow_metrics_of_own_models`.
    """

    name: ClassVar[str] = "ditto"
    personal_model: ClassVar[bool] = True

    server_learning_rate: float = Field(default=1.0, gt=0)
    """Part of the mean delta that is taken, as in FedAvg."""
    regularisation: float = Field(default=0.1, ge=0)
    """The paper's lambda, which tries 0.1, 1 and 2; times the learning rate it has to be at most 1."""

    def server_optimizer(self, parameters: "Sequence[torch.Tensor]") -> "torch.optim.Optimizer":
        """The same as FedAvg's."""
        import torch

        return torch.optim.SGD(parameters, lr=self.server_learning_rate)

    def client_fields(self) -> Mapping[str, float]:
        """lambda, for `correct_personal_gradients`."""
        return {"regularisation": self.regularisation}

    def refuse(self, terms: "Terms", model: "torch.nn.Module") -> str | None:
        """A pull that would throw the personal model over the global one and away."""
        rate = terms.training.learning_rate
        if terms.training.optimizer == "sgd" and self.regularisation * rate > 1:
            return (
                f"with regularisation={self.regularisation:g} needs a learning rate of at most 1 over it, got {rate:g}"
            )
        return None

    @classmethod
    def check_fields(cls, fields: Mapping[str, float]) -> None:
        """Raises KeyError if there is no `regularisation`, and ValueError if it is negative or not finite."""
        if not 0 <= fields["regularisation"] < math.inf:
            raise ValueError(
                f"ditto: regularisation must be a finite number of at least 0, got {fields['regularisation']}"
            )

    @classmethod
    def correct_personal_gradients(cls, parameters: "Sequence[torch.Tensor]", context: StepContext) -> None:
        """Add lambda (v - w0) to each `.grad`; frozen parameters are left alone."""
        import torch

        strength = context.fields["regularisation"]
        with torch.no_grad():
            for parameter, origin in zip(parameters, context.start, strict=True):
                if parameter.grad is not None:
                    parameter.grad.add_(parameter - origin, alpha=strength)
