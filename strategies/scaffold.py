"""Stochastic controlled averaging: local steps without client drift.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
Algorithm 1 with option II for the control variates (https://arxiv.org/abs/1910.06378).
"""

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

CONTROL, EVERYONE = "control", "everyone"
EXTRA = "~"


class Scaffold(Strategy):
    """A site steps along g - c_i + c: its gradient, less what it knows of its own, plus what is known of everybody's.

        c_i+ = c_i - c + (w0 - w) / (K rate)      K local steps, rate the local learning rate (option II)
        w <- w + server_learning_rate * (mean of w_i - w0)
        c <- c + |S| / N * (mean of c_i+ - c_i)    over the sites S that answered, of N

    For many local steps on data that differ: what FedAvg loses to sites that walk to their own optima, this does not.
    It costs a second model's worth of bytes each way, and a site keeps c_i. It says little where a site is asked once
    or twice in a run.

    Every mean is weighted as the run weights it, so that c is the sites' weighted mean and the fixed point is that of
    the weighted objective; with equal weights this is the paper's algorithm to the letter. A site that trained and
    whose answer was lost leaves c off by its last change.

    Control variates are kept and sent in steps (c times the local learning rate), the scale of the deltas, which a
    secure sum's range is set for. What a site sends besides its delta, -c - delta / (K rate), follows from its delta
    and c alone: under local differential privacy it is post-processing.
    """

    name: ClassVar[str] = "scaffold"
    client_state: ClassVar[tuple[str, ...]] = (CONTROL,)
    broadcast_kinds: ClassVar[tuple[str, ...]] = (CONTROL,)

    server_learning_rate: float = Field(default=1.0, gt=0)
    """Part of the mean delta that is taken; the paper's global step size."""

    def server_optimizer(self, parameters: "Sequence[torch.Tensor]") -> "torch.optim.Optimizer":
        """Plain gradient descent on the pseudo-gradient: what is remembered is in `server_state`."""
        import torch

        return torch.optim.SGD(parameters, lr=self.server_learning_rate)

    def server_state(self, parameters: Mapping[str, NDArray[np.float32]]) -> dict[str, Arrays]:
        """The sum of the sites' weights times their control variates, and the weight of all sites: c in two parts."""
        return {
            CONTROL: {name: np.zeros_like(array) for name, array in parameters.items()},
            EVERYONE: {EVERYONE: np.ones(1, np.float32)},
        }

    def broadcast(self, state: Mapping[str, Arrays]) -> Mapping[str, Arrays]:
        """c."""
        everyone = state[EVERYONE][EVERYONE][0]
        return {CONTROL: {name: array / everyone for name, array in state[CONTROL].items()}}

    def aggregate(self, mean: Arrays, state: dict[str, Arrays], participation: Participation) -> Arrays:
        """The mean delta; what came with it goes into c."""
        for name, total in state[CONTROL].items():
            total += np.float32(participation.weight) * mean.pop(EXTRA + name)
        state[EVERYONE] = {EVERYONE: np.full(1, participation.total_weight, np.float32)}
        return mean

    def refuse(self, terms: "Terms", model: "torch.nn.Module") -> str | None:
        """Local optimisers for which option II's c_i is no mean of gradients."""
        if terms.training.optimizer != "sgd" or terms.training.momentum:
            return Reason(
                "reads a site's mean gradient off the distance it went, which plain steps alone tell; take ",
                Setting("training.optimizer", "sgd"),
                " and ",
                Setting("training.momentum", 0),
            )
        return None

    @classmethod
    def extras(cls, parameters: Mapping[str, NDArray[np.float32]]) -> Arrays:
        """How much each site's control variate changed."""
        return {EXTRA + name: np.zeros_like(array) for name, array in parameters.items()}

    @classmethod
    def correct_gradients(cls, parameters: "Sequence[torch.Tensor]", context: StepContext) -> None:
        """Add c - c_i to each `.grad`; frozen parameters are left alone."""
        import torch

        scale = 1 / context.learning_rate
        with torch.no_grad():
            for parameter, control, own in zip(
                parameters, context.broadcast[CONTROL], context.state[CONTROL], strict=True
            ):
                if parameter.grad is not None:
                    parameter.grad.add_(control - own, alpha=scale)

    @classmethod
    def client_update(cls, delta: Arrays, context: RoundContext) -> ClientUpdate:
        """The delta, the change of c_i, and c_i for the next time."""
        steps, own, control = np.float32(context.steps), context.state[CONTROL], context.broadcast[CONTROL]
        change = {name: -control[name] - array / steps for name, array in delta.items()}
        return ClientUpdate(
            delta,
            extras={EXTRA + name: array for name, array in change.items()},
            state={CONTROL: {name: own[name] + array for name, array in change.items()}},
        )
