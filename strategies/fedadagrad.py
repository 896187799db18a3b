"""Adagrad at the server.

Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan 2021, "Adaptive Federated Optimization",
Algorithm 2 with the FedAdagrad line (https://arxiv.org/abs/2003.00295).
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from fedclaw.federation.strategy import Strategy


class FedAdagrad(Strategy):
    """v <- v + d^2;  w <- w + server_learning_rate * d / (sqrt(v) + tau), with d the mean delta and v = tau^2 at first.

    For sparse gradients (rare features, embeddings) and short runs: its steps only shrink. This is the paper's
    algorithm with beta_1 = 0, which is what the paper uses for Adagrad.
    """

    name: ClassVar[str] = "fedadagrad"

    server_learning_rate: float = Field(default=0.1, gt=0)
    """About the distance a coordinate moves in the first round; the paper's eta."""
    tau: float = Field(default=1e-3, gt=0)
    """Degree of adaptivity: deltas far below it are taken unscaled (divided by 2 tau), those far above it by sign."""

    def server_optimizer(self, parameters: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
        """torch's Adagrad is the paper's, given tau as its epsilon and tau^2 as its first accumulator."""
        return torch.optim.Adagrad(
            parameters,
            lr=self.server_learning_rate,
            eps=self.tau,
            initial_accumulator_value=self.tau**2,
        )
