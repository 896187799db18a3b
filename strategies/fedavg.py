"""Federated averaging.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas 2017, "Communication-Efficient Learning of Deep Networks from
Decentralized Data", Algorithm 1 (https://arxiv.org/abs/1602.05629), as the case of Reddi et al. 2021, "Adaptive
Federated Optimization", section 3 (https://arxiv.org/abs/2003.00295), whose server optimiser is SGD.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fedclaw.learning.strategy import Strategy

if TYPE_CHECKING:
    import torch


class FedAvg(Strategy):
    """w <- w + server_learning_rate * (weighted mean of the sites' deltas).

    The place to start, and the baseline that every other strategy has to beat.
    """

    name: ClassVar[str] = "fedavg"

    server_learning_rate: float = Field(default=1.0, gt=0)
    """Part of the mean delta that is taken; 1 sets the model to the weighted mean of the sites' models."""

    def server_optimizer(self, parameters: "Sequence[torch.Tensor]") -> "torch.optim.Optimizer":
        """Plain gradient descent on the pseudo-gradient: stateless."""
        import torch

        return torch.optim.SGD(parameters, lr=self.server_learning_rate)
