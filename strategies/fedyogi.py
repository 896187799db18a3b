"""Yogi at the server.

Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan 2021, "Adaptive Federated Optimization",
Algorithm 2 with the FedYogi line (https://arxiv.org/abs/2003.00295); the optimiser itself is Zaheer, Reddi,
Sachan, Kale, Kumar 2018, "Adaptive Methods for Nonconvex Optimization", Algorithm 2 (NeurIPS 2018).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fedclaw.learning.strategy import Strategy

if TYPE_CHECKING:
    import torch


class FedYogi(Strategy):
    """Yogi on the mean delta d (g = -d), v = tau^2 at first and tau as epsilon: exactly Reddi et al., Algorithm 2.

    For what FedAdam is for, when some rounds bring little (few sites answered, or the noise of privacy is large
    beside the signal): the step size recovers slowly instead of jumping.
    """

    name: ClassVar[str] = "fedyogi"

    server_learning_rate: float = Field(default=0.03, gt=0)
    """About the largest distance that a coordinate moves in a round; the paper's eta."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the mean delta, a round."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """1 - beta2 is the largest part of d^2 by which v moves, a round."""
    tau: float = Field(default=1e-3, gt=0)
    """Degree of adaptivity: coordinates whose deltas are far below it are scaled by 1 / tau, not to unit size."""

    def server_optimizer(self, parameters: "Sequence[torch.Tensor]") -> "torch.optim.Optimizer":
        """Yogi; its state is two buffers a parameter."""
        from fedclaw.strategies.adaptive import Yogi

        return Yogi(
            parameters,
            lr=self.server_learning_rate,
            betas=(self.beta1, self.beta2),
            eps=self.tau,
            initial_accumulator_value=self.tau**2,
        )
