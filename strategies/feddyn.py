"""Dynamic regularisation: each site's loss is bent so that its optimum comes to be the federation's.

Acar, Zhao, Matas Navarro, Mattina, Whatmough, Saligrama 2021, "Federated Learning Based on Dynamic Regularization",
Algorithm 1 (https://arxiv.org/abs/2111.04263).
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedclaw.errors import Reason, Setting
from fedclaw.learning.strategy import ClientUpdate, Participation, RoundContext, StepContext, Strategy
from fedclaw.protocol.arrays import Arrays

if TYPE_CHECKING:
    import torch

    from fedclaw.protocol.terms import Terms

MOVED, EVERYONE = "moved", "everyone"


class FedDyn(Strategy):
    """A site minimises its loss - <g_i, w> + alpha/2 |w - w0|^2, where g_i <- g_i - alpha (w_i - w0) afterwards.

    The server takes w <- (mean of w_i) - h / alpha with h <- h - alpha |S| / N (mean of w_i - w0).

    g_i comes to be the gradient of the site's loss at the common point, so that no local step is worth taking there:
    the fixed point is a stationary point of the global objective, however many local steps there are. For runs of many
    rounds with many local steps, and sites that come and go. It sends no more than FedAvg; a site keeps g_i. A small
    alpha learns faster and is less stable: above all in the first rounds, where the server steps further than the sites
    went. The paper tries 0.1, 0.01 and 0.001.

    Means are weighted as the run weights them. g_i and h are kept as sums of deltas (g_i = -alpha x its sum), so that a
    site's memory, too, follows from its deltas: post-processing under local differential privacy. Noise on the sum and
    compression are refused: what a site remembers would not be what the server got of it. An answer that was lost after
    the site trained leaves h off by it.
    """

    name: ClassVar[str] = "feddyn"
    client_state: ClassVar[tuple[str, ...]] = (MOVED,)

    alpha: float = Field(default=0.1, gt=0)
    """Strength of the regulariser; times the learning rate it has to be below 1."""

    def server_optimizer(self, parameters: "Sequence[torch.Tensor]") -> "torch.optim.Optimizer":
        """Takes the whole step that `aggregate` says."""
        import torch

        return torch.optim.SGD(parameters, lr=1.0)

    def client_fields(self) -> Mapping[str, float]:
        """`alpha`, for `correct_gradients`."""
        return {"alpha": self.alpha}

    def server_state(self, parameters: Mapping[str, NDArray[np.float32]]) -> dict[str, Arrays]:
        """-h / alpha in two parts: the sites' weights times their deltas, over all rounds; the weight of all sites."""
        return {
            MOVED: {name: np.zeros_like(array) for name, array in parameters.items()},
            EVERYONE: {EVERYONE: np.ones(1, np.float32)},
        }

    def aggregate(self, mean: Arrays, state: dict[str, Arrays], participation: Participation) -> Arrays:
        """The mean delta - h / alpha."""
        everyone = np.float32(participation.total_weight)
        state[EVERYONE] = {EVERYONE: np.full(1, everyone, np.float32)}
        for name, total in state[MOVED].items():
            total += np.float32(participation.weight) * mean[name]
            mean[name] += total / everyone
        return mean

    def refuse(self, terms: "Terms", model: "torch.nn.Module") -> str | None:
        """What changes an update on its way, and steps that a site's regulariser would throw about."""
        if terms.central is not None:
            return Reason(
                "remembers at each site what it sent, which noise on the sum changes; take ", Setting("privacy", "dp")
            )
        if terms.compression is not None:
            return "remembers at each site what it sent, which compression changes; take compression=none"
        if terms.training.optimizer == "sgd" and self.alpha * terms.training.learning_rate >= 1:
            rate = terms.training.learning_rate
            return f"with alpha={self.alpha:g} and a learning rate of {rate:g} leaps over the point it is held at"
        return None

    @classmethod
    def check_fields(cls, fields: Mapping[str, float]) -> None:
        """Raises KeyError if there is no `alpha`, and ValueError if it is not a positive finite number."""
        if not 0 < fields["alpha"] < math.inf:
            raise ValueError(f"feddyn: alpha must be a positive finite number, got {fields['alpha']}")

    @classmethod
    def correct_gradients(cls, parameters: "Sequence[torch.Tensor]", context: StepContext) -> None:
        """Add alpha (w - w0) - g_i to each `.grad`; frozen parameters are left alone."""
        import torch

        alpha = context.fields["alpha"]
        with torch.no_grad():
            for parameter, origin, moved in zip(parameters, context.start, context.state[MOVED], strict=True):
                if parameter.grad is not None:
                    parameter.grad.add_(parameter - origin + moved, alpha=alpha)

    @classmethod
    def client_update(cls, delta: Arrays, context: RoundContext) -> ClientUpdate:
        """The delta, which is also added to what the site moved by before."""
        moved = context.state[MOVED]
        return ClientUpdate(delta, state={MOVED: {name: moved[name] + array for name, array in delta.items()}})
