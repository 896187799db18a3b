"""Fair federated averaging: sites that are served badly count for more.

Li, Sanjabi, Beirami, Smith 2020, "Fair Resource Allocation in Federated Learning", Algorithm 2, q-FedAvg
(https://arxiv.org/abs/1905.10497).
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedclaw.errors import Reason, Setting
from fedclaw.learning.strategy import ClientUpdate, Participation, RoundContext, Strategy
from fedclaw.protocol.arrays import Arrays

if TYPE_CHECKING:
    import torch

    from fedclaw.protocol.terms import Terms

CURVATURE = "~curvature"
LEAST_LOSS = 1e-10
"""A loss below it counts as this: with q < 1 a power of it would be infinite at 0."""


class QFedAvg(Strategy):
    """Minimises the mean of F_i^(q+1) / (q+1), F_i being a site's loss: the larger it is, the more the site counts.

        D_i = L F_i^q (w0 - w_i)                            L = 1 / local learning rate
        h_i = q F_i^(q-1) L^2 |w0 - w_i|^2 + L F_i^q
        w <- w - (mean of D_i) / (mean of h_i)

    h_i bounds how fast the site's own objective can bend, so that the step needs no tuning as q changes. q = 0 is
    FedAvg; a larger q makes the sites' losses more equal, at some cost to their mean. The paper goes up to 5, mostly 1.
    Both means are weighted as the run weights them.

    What leaves depends on F_i, the loss over all of the site's training data, which nothing covers: refused with
    differential privacy of either kind, and not for a site that keeps its training loss to itself. Under secure
    aggregation `secure.value_range` has to exceed h_i / L.
    """

    name: ClassVar[str] = "qfedavg"
    uses_training_loss: ClassVar[bool] = True

    q: float = Field(default=1.0, ge=0)
    """How much fairness counts; 0: not at all."""

    def server_optimizer(self, parameters: "Sequence[torch.Tensor]") -> "torch.optim.Optimizer":
        """Takes the whole step that `aggregate` says."""
        import torch

        return torch.optim.SGD(parameters, lr=1.0)

    def client_fields(self) -> Mapping[str, float]:
        """`q`, for `client_update`."""
        return {"q": self.q}

    def aggregate(self, mean: Arrays, state: dict[str, Arrays], participation: Participation) -> Arrays:
        """The ratio of the two means; L is in both."""
        curvature = mean.pop(CURVATURE)[0]
        return {name: np.divide(array, curvature, out=array) for name, array in mean.items()}

    def refuse(self, terms: "Terms", model: "torch.nn.Module") -> str | None:
        """Differential privacy, whose noise does not cover the losses."""
        if terms.privacy is not None or terms.central is not None:
            return Reason(
                "weights each site by its loss on the training data, which no noise covers; take ",
                Setting("privacy", "none"),
            )
        return None

    @classmethod
    def check_fields(cls, fields: Mapping[str, float]) -> None:
        """Raises KeyError if there is no `q`, and ValueError if it is negative or not finite."""
        if not 0 <= fields["q"] < math.inf:
            raise ValueError(f"qfedavg: q must be a finite number of at least 0, got {fields['q']}")

    @classmethod
    def extras(cls, parameters: Mapping[str, NDArray[np.float32]]) -> Arrays:
        """h_i / L."""
        return {CURVATURE: np.zeros(1, np.float32)}

    @classmethod
    def client_update(cls, delta: Arrays, context: RoundContext) -> ClientUpdate:
        """F_i^q times the delta, and h_i / L."""
        q = context.fields["q"]
        loss = max(context.loss(), LEAST_LOSS) if q else 1.0
        square = sum(float(np.vdot(array, array)) for array in delta.values())
        curvature = q * loss ** (q - 1) * square / context.training.learning_rate + loss**q
        for array in delta.values():
            np.multiply(array, np.float32(loss**q), out=array)
        return ClientUpdate(delta, extras={CURVATURE: np.full(1, curvature, np.float32)})
