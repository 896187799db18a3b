"""Yogi at the server.

Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan 2021, "Adaptive Federated Optimization",
Algorithm 2 with the FedYogi line (https://arxiv.org/abs/2003.00295); the optimiser itself is Zaheer, Reddi,
Sachan, Kale, Kumar 2018, "Adaptive Methods for Nonconvex Optimization", Algorithm 2 (NeurIPS 2018).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch
from pydantic import Field

from fedclaw.federation.strategy import Strategy


class Yogi(torch.optim.Optimizer):
    """Yogi as in Zaheer et al. 2018, Algorithm 2, without bias correction; torch has no optimiser of that name.

    m <- beta1 m + (1 - beta1) g
    v <- v - (1 - beta2) sign(v - g^2) g^2
    p <- p - lr m / (sqrt(v) + eps)

    m begins at 0 and v at `initial_accumulator_value`. v moves by at most (1 - beta2) g^2 a step, up or down, where
    Adam's can fall by a fixed factor however small g is: so a quiet round does not make the next one explode.
    The state (`exp_avg`, `exp_avg_sq`) has the parameter's shape, dtype and device.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-3,
        initial_accumulator_value: float = 1e-6,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "initial_accumulator_value": initial_accumulator_value}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step along the parameters' `.grad`; those without one stay. Returns the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                mean, square = self._moments(parameter, group["initial_accumulator_value"])
                gradient_squared = parameter.grad.square()
                mean.mul_(beta1).add_(parameter.grad, alpha=1 - beta1)
                square.addcmul_(torch.sign(square - gradient_squared), gradient_squared, value=beta2 - 1)
                parameter.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-group["lr"])
        return loss

    def _moments(self, parameter: torch.Tensor, initial: float) -> tuple[torch.Tensor, torch.Tensor]:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.full_like(parameter, initial, memory_format=torch.preserve_format)
        return state["exp_avg"], state["exp_avg_sq"]


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

    def server_optimizer(self, parameters: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
        """Yogi; its state is two buffers a parameter."""
        return Yogi(
            parameters,
            lr=self.server_learning_rate,
            betas=(self.beta1, self.beta2),
            eps=self.tau,
            initial_accumulator_value=self.tau**2,
        )
