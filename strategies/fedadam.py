"""Adam at the server.

Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan 2021, "Adaptive Federated Optimization",
Algorithm 2 with the FedAdam line (https://arxiv.org/abs/2003.00295); the optimiser itself is Kingma, Ba 2015,
"Adam: A Method for Stochastic Optimization", Algorithm 1 (https://arxiv.org/abs/1412.6980).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fedclaw.learning.strategy import Strategy

if TYPE_CHECKING:
    import torch


class FedAdam(Strategy):
    """m <- beta1 m + (1 - beta1) d;  v <- beta2 v + (1 - beta2) d^2;  w <- w + lr * m^ / (sqrt(v^) + tau).

    d is the mean delta; m and v begin at 0, and m^ = m / (1 - beta1^t), v^ = v / (1 - beta2^t) in round t. That is
    torch's Adam, which corrects both biases as Kingma and Ba do.

    With `bias_correction: false` it is Reddi et al., Algorithm 2, as printed: v begins at tau^2, and m^ = m, v^ = v.
    For deltas well above tau the paper's step in round t is (1 - beta1^t) / sqrt(1 - beta2^t) times the corrected one:
    the same in round 1 and in the long run, and about twice as large around round 10 with the betas below; with
    beta2 = 0.999 it is 3 times as large in round 1.

    For deltas that differ in size from layer to layer, and for longer runs.
    """

    name: ClassVar[str] = "fedadam"

    server_learning_rate: float = Field(default=0.03, gt=0)
    """About the largest distance that a coordinate moves in a round; the paper's eta."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the mean delta, a round."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the mean squared delta, a round."""
    tau: float = Field(default=1e-3, gt=0)
    """Degree of adaptivity: coordinates whose deltas are far below it are scaled by 1 / tau, not to unit size."""
    bias_correction: bool = True
    """Whether m and v are divided by what they lack in the first rounds."""

    def server_optimizer(self, parameters: "Sequence[torch.Tensor]") -> "torch.optim.Optimizer":
        """torch's Adam with tau as its epsilon, or the paper's; two buffers a parameter either way."""
        import torch

        from fedclaw.strategies.adaptive import UncorrectedAdam

        betas = (self.beta1, self.beta2)
        if self.bias_correction:
            return torch.optim.Adam(parameters, lr=self.server_learning_rate, betas=betas, eps=self.tau)
        return UncorrectedAdam(
            parameters,
            lr=self.server_learning_rate,
            betas=betas,
            eps=self.tau,
            initial_accumulator_value=self.tau**2,
        )
