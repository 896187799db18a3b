"""Adagrad at the server.

Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan 2021, "Adaptive Federated Optimization",
Algorithm 2 with the FedAdagrad line (https://arxiv.org/abs/2003.00295).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fedclaw.learning.strategy import Strategy

if TYPE_CHECKING:
    import torch


class FedAdagrad(Strategy):
    """v <- v + d^2;  m <- beta1 m + (1 - beta1) d;  w <- w + server_learning_rate * m / (sqrt(v) + tau).

    d is the mean delta, m = 0 and v = tau^2 at first. For sparse gradients (rare features, embeddings) and short runs:
    its steps only shrink. With beta1 = 0, which is what the paper's experiments use for Adagrad, m is d itself.
    """

    name: ClassVar[str] = "fedadagrad"

    server_learning_rate: float = Field(default=0.1, gt=0)
    """About the distance a coordinate moves in the first round, times 1 - beta1; the paper's eta."""
    beta1: float = Field(default=0.0, ge=0, lt=1)
    """Decay of the mean delta, a round."""
    tau: float = Field(default=1e-3, gt=0)
    """Degree of adaptivity: deltas far below it are taken unscaled (divided by 2 tau), those far above it by sign."""

    def server_optimizer(self, parameters: "Sequence[torch.Tensor]") -> "torch.optim.Optimizer":
        """The paper's: with beta1 = 0 torch's Adagrad, given tau as its epsilon and tau^2 as its first accumulator."""
        import torch

        from fedclaw.strategies.adaptive import AdagradWithMomentum

        if self.beta1 == 0:
            return torch.optim.Adagrad(
                parameters,
                lr=self.server_learning_rate,
                eps=self.tau,
                initial_accumulator_value=self.tau**2,
            )
        return AdagradWithMomentum(
            parameters,
            lr=self.server_learning_rate,
            betas=(self.beta1, 0.0),
            eps=self.tau,
            initial_accumulator_value=self.tau**2,
        )
