"""The adaptive server step that FedAdagrad, FedAdam and FedYogi have in common.

Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan 2021, "Adaptive Federated Optimization", Algorithm 2
(https://arxiv.org/abs/2003.00295).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import torch


class AdaptiveOptimizer(torch.optim.Optimizer, ABC):
    """Algorithm 2 as printed, on the pseudo-gradient g = -delta and without bias correction.

    m <- beta1 m + (1 - beta1) g
    v <- `accumulate`
    p <- p - lr m / (sqrt(v) + eps)

    m begins at 0 and v at `initial_accumulator_value` (the paper's tau^2, with eps = tau). The state (`exp_avg`,
    `exp_avg_sq`) has the parameter's shape, dtype and device.
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

    @abstractmethod
    def accumulate(self, square: torch.Tensor, gradient: torch.Tensor, beta2: float) -> None:
        """Take the gradient into v, which is `square`, in place."""

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
                mean.mul_(beta1).add_(parameter.grad, alpha=1 - beta1)
                self.accumulate(square, parameter.grad, beta2)
                parameter.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-group["lr"])
        return loss

    def _moments(self, parameter: torch.Tensor, initial: float) -> tuple[torch.Tensor, torch.Tensor]:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.full_like(parameter, initial, memory_format=torch.preserve_format)
        return state["exp_avg"], state["exp_avg_sq"]


class AdagradWithMomentum(AdaptiveOptimizer):
    """v <- v + g^2, and Algorithm 2's m in the place of g; torch's Adagrad has no m."""

    def accumulate(self, square: torch.Tensor, gradient: torch.Tensor, beta2: float) -> None:
        """See AdaptiveOptimizer."""
        square.addcmul_(gradient, gradient)


class UncorrectedAdam(AdaptiveOptimizer):
    """v <- beta2 v + (1 - beta2) g^2, without the bias correction that torch's Adam has."""

    def accumulate(self, square: torch.Tensor, gradient: torch.Tensor, beta2: float) -> None:
        """See AdaptiveOptimizer."""
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)


class Yogi(AdaptiveOptimizer):
    """Yogi as in Zaheer et al. 2018, Algorithm 2, without bias correction; torch has no optimiser of that name.

    v <- v - (1 - beta2) sign(v - g^2) g^2

    v moves by at most (1 - beta2) g^2 a step, up or down, where Adam's can fall by a fixed factor however small g is:
    so a quiet round does not make the next one explode.
    """

    def accumulate(self, square: torch.Tensor, gradient: torch.Tensor, beta2: float) -> None:
        """See AdaptiveOptimizer."""
        gradient_squared = gradient.square()
        square.addcmul_(torch.sign(square - gradient_squared), gradient_squared, value=beta2 - 1)
