"""Buffered asynchronous aggregation.

Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba 2022, "Federated Learning with Buffered Asynchronous Aggregation",
Algorithm 1 (https://arxiv.org/abs/2106.06639); the discount for staleness is the polynomial one of Xie, Koyejo, Gupta
2019, "Asynchronous Federated Optimization", section 5.2 (https://arxiv.org/abs/1903.03934).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fedclaw.learning.strategy import Buffered

if TYPE_CHECKING:
    import torch


class FedBuff(Buffered):
    """w <- w + server_learning_rate * (sum of s(t_i) weight_i delta_i) / (sum of weight_i), s(t) = (1 + t)^-power.

    The sum is over the first `buffer` answers, and t_i is the number of steps that the server has taken since site i
    was asked. For sites whose speeds differ by a lot: nobody waits for the slowest. With sites of one speed FedAvg
    makes more of a round, and slow sites that hold other data than the fast ones have a smaller share in the model.

    Where this differs from the paper: weights are the run's (weighting=uniform gives the paper's 1 / buffer), a site
    contributes to a step once at most, and an answer that is more than `most_stale` steps late is dropped.
    """

    name: ClassVar[str] = "fedbuff"

    server_learning_rate: float = Field(default=1.0, gt=0)
    """Part of the mean delta that is taken."""
    buffer: int = Field(default=2, ge=1)
    """Answers that make a step."""
    power: float = Field(default=0.5, ge=0)
    """How fast late answers lose weight; 0 counts them in full."""
    most_stale: int = Field(default=100, ge=0)
    """Steps by which an answer may be late and still count."""

    @property
    def size(self) -> int:
        """`buffer`."""
        return self.buffer

    @property
    def oldest(self) -> int:
        """`most_stale`."""
        return self.most_stale

    def discount(self, staleness: int) -> float:
        """(1 + staleness)^-power."""
        return float((1 + staleness) ** -self.power)

    def server_optimizer(self, parameters: "Sequence[torch.Tensor]") -> "torch.optim.Optimizer":
        """Plain gradient descent on the pseudo-gradient, as in the paper."""
        import torch

        return torch.optim.SGD(parameters, lr=self.server_learning_rate)
