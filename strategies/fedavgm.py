"""Federated averaging with momentum at the server.

Hsu, Qi, Brown 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", section 4.3 (https://arxiv.org/abs/1909.06335).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fedclaw.learning.strategy import Strategy

if TYPE_CHECKING:
    import torch


class FedAvgM(Strategy):
    """v <- momentum * v + mean delta;  w <- w + server_learning_rate * v.

    For sites whose data differ so much that the mean delta swings from round to round. A constant delta is
    amplified by up to 1 / (1 - momentum): lower `server_learning_rate` as `momentum` goes up.
    """

    name: ClassVar[str] = "fedavgm"

    server_learning_rate: float = Field(default=1.0, gt=0)
    """Step along the accumulated delta."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Part of the previous rounds' direction that is kept; 0 is FedAvg."""
    nesterov: bool = False
    """Step along momentum * v + mean delta instead of v (Nesterov's look-ahead, as torch's SGD has it)."""

    def server_optimizer(self, parameters: "Sequence[torch.Tensor]") -> "torch.optim.Optimizer":
        """SGD with heavy-ball momentum and no dampening; its state is one buffer a parameter."""
        import torch

        return torch.optim.SGD(
            parameters,
            lr=self.server_learning_rate,
            momentum=self.momentum,
            nesterov=self.nesterov and self.momentum > 0,
        )
