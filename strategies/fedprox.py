"""Federated averaging with a proximal term at the sites.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith 2020, "Federated Optimization in Heterogeneous Networks", Algorithm 2
(https://arxiv.org/abs/1812.06127).
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fedclaw.learning.strategy import StepContext, Strategy

if TYPE_CHECKING:
    import torch


class FedProx(Strategy):
    """A site minimises its loss + mu/2 * |w - w0|^2, w0 being the global model of the round; the server averages.

    For sites that take many local steps on data unlike the others', or unequal numbers of steps. mu = 0 is
    FedAvg; the paper tries 0.001, 0.01, 0.1 and 1, and a mu times the local learning rate above 1 overshoots w0.
    """

    name: ClassVar[str] = "fedprox"

    server_learning_rate: float = Field(default=1.0, gt=0)
    """Part of the mean delta that is taken, as in FedAvg."""
    mu: float = Field(default=0.01, ge=0)
    """Strength of the pull towards the round's global model, in units of 1 / (local learning rate)."""

    def server_optimizer(self, parameters: "Sequence[torch.Tensor]") -> "torch.optim.Optimizer":
        """The same as FedAvg's: the whole difference is at the sites."""
        import torch

        return torch.optim.SGD(parameters, lr=self.server_learning_rate)

    def client_fields(self) -> Mapping[str, float]:
        """`mu`, for `correct_gradients`."""
        return {"mu": self.mu}

    @classmethod
    def check_fields(cls, fields: Mapping[str, float]) -> None:
        """Raises KeyError if there is no `mu`, and ValueError if it is negative or not finite: a site is not pushed
        away from the global model because a server says so.
        """
        mu = fields["mu"]
        if not 0 <= mu < math.inf:
            raise ValueError(f"fedprox: mu must be a finite number of at least 0, got {mu}")

    @classmethod
    def correct_gradients(cls, parameters: "Sequence[torch.Tensor]", context: StepContext) -> None:
        """Add the proximal term's gradient, mu * (w - w0), to each `.grad`; frozen parameters are left alone."""
        import torch

        mu = context.fields["mu"]
        with torch.no_grad():
            for parameter, origin in zip(parameters, context.start, strict=True):
                if parameter.grad is not None:
                    parameter.grad.add_(parameter - origin, alpha=mu)
