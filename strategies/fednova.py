"""Normalised averaging: sites may take unequal numbers of local steps without a louder voice for the busier ones.

Wang, Liu, Liang, Joshi, Poor 2020, "Tackling the Objective Inconsistency Problem in Heterogeneous Federated
Optimization", section 4 (FedNova), with the accumulation vectors a_i of section 3 and appendix for plain, proximal and
momentum steps (https://arxiv.org/abs/2007.07481).
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedclaw.errors import Reason, Setting
from fedclaw.learning.strategy import ClientUpdate, Participation, RoundContext, StepContext, Strategy
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.protocol.arrays import Arrays
from fedclaw.protocol.terms import LocalTraining

if TYPE_CHECKING:
    import torch

    from fedclaw.protocol.terms import Terms

NORM = "~accumulated"
SCALE = 1024.0
"""|a_i| is sent divided by this, a power of two: it is of the size of a number of steps, the deltas are of that of one
change, and a secure sum has one range for both."""


class FedNova(Strategy):
    """d_i = (w0 - w_i) / (rate |a_i|), the mean gradient that site i went along;  w <- w - tau rate (mean of d_i).

    a_i holds what each local gradient counts by in w0 - w_i, and |a_i| is its sum: the number of steps for plain SGD,
    more with momentum, less with a proximal term. tau is the (weighted) mean of |a_i|, so that equal steps at all sites
    give FedAvg, or FedProx if `mu` is not 0.

    For sites of unequal size that train by epochs: FedAvg ends at a point where the busier sites count for more than
    their weight, FedNova at the weighted objective's. It removes this bias alone; that of many steps on unlike data
    stays (see scaffold).

    |a_i| follows from the plan and the number of examples, so what a site sends follows from its delta and what it
    tells anyway. Weight decay is taken as a part of the loss. Under secure aggregation `secure.value_range` (8) times
    1024 has to exceed |a_i|.
    """

    name: ClassVar[str] = "fednova"

    server_learning_rate: float = Field(default=1.0, gt=0)
    """Part of the normalised mean that is taken."""
    mu: float = Field(default=0.0, ge=0)
    """Strength of FedProx's pull towards the round's global model; 0: none."""

    def server_optimizer(self, parameters: "Sequence[torch.Tensor]") -> "torch.optim.Optimizer":
        """Plain gradient descent on the normalised pseudo-gradient."""
        import torch

        return torch.optim.SGD(parameters, lr=self.server_learning_rate)

    def client_fields(self) -> Mapping[str, float]:
        """`mu`, for both parts of the client half."""
        return {"mu": self.mu}

    def aggregate(self, mean: Arrays, state: dict[str, Arrays], participation: Participation) -> Arrays:
        """The mean of the normalised deltas times that of |a_i|."""
        tau = mean.pop(NORM)[0] * np.float32(SCALE)
        return {name: np.multiply(array, tau, out=array) for name, array in mean.items()}

    def refuse(self, terms: "Terms", model: "torch.nn.Module") -> str | None:
        """Adam, and what a secure sum would cut off."""
        training = terms.training
        if training.optimizer == "adam":
            return Reason(
                "divides by what each gradient counts by, which Adam decides anew; take ",
                Setting("training.optimizer", "sgd"),
            )
        if self.mu * training.learning_rate >= 1:
            return f"with mu={self.mu:g} and a learning rate of {training.learning_rate:g} leaps over its start"
        if terms.secure is not None and (limit := mechanism_of(terms).largest_update) is not None:
            steps = training.local_steps(int(terms.secure.largest_weight or 1))
            if accumulated(training, steps, self.mu) > limit * SCALE:
                return f"needs a secure.value_range of more than {limit:g} for {steps} local steps"
        return None

    @classmethod
    def check_fields(cls, fields: Mapping[str, float]) -> None:
        """Raises KeyError if there is no `mu`, and ValueError if it is negative or not finite."""
        if not 0 <= fields["mu"] < math.inf:
            raise ValueError(f"fednova: mu must be a finite number of at least 0, got {fields['mu']}")

    @classmethod
    def extras(cls, parameters: Mapping[str, NDArray[np.float32]]) -> Arrays:
        """|a_i| / 1024."""
        return {NORM: np.zeros(1, np.float32)}

    @classmethod
    def correct_gradients(cls, parameters: "Sequence[torch.Tensor]", context: StepContext) -> None:
        """Add the proximal term's gradient, mu * (w - w0), where there is one."""
        import torch

        mu = context.fields["mu"]
        if mu == 0:
            return
        with torch.no_grad():
            for parameter, origin in zip(parameters, context.start, strict=True):
                if parameter.grad is not None:
                    parameter.grad.add_(parameter - origin, alpha=mu)

    @classmethod
    def client_update(cls, delta: Arrays, context: RoundContext) -> ClientUpdate:
        """The delta over |a_i|, and |a_i|."""
        norm = accumulated(context.training, context.steps, context.fields["mu"])
        for array in delta.values():
            np.divide(array, np.float32(norm), out=array)
        return ClientUpdate(delta, extras={NORM: np.full(1, norm / SCALE, np.float32)})


def accumulated(training: LocalTraining, steps: int, mu: float) -> float:
    """|a_i|: how far gradients of 1 lead in `steps` steps, in units of the learning rate.

    The steps are linear in the gradients, so that is the sum of what each of them counts by.
    """
    pull, velocity, gone = mu * training.learning_rate, 0.0, 0.0
    if pull == 0 and training.momentum == 0:
        return float(steps)
    for _ in range(steps):
        velocity = training.momentum * velocity + 1 - pull * gone
        gone += velocity
    return gone
