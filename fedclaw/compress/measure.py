"""What a model weighs and how long it takes: parameters, multiply-adds, latency.

Legend: N examples, D input shape without the batch.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from fedclaw.compress.prune import PRUNABLE

WARM_UP = 10
SMALL_MODEL = 2_000_000
"""Parameters below which torch's second thread costs more than it brings (measured: up to 17 times slower)."""

LATENCY_BATCHES = (1, 32)


@dataclass(frozen=True)
class Latency:
    """Median milliseconds of a forward pass, by batch size."""

    before: dict[int, float]
    after: dict[int, float]


@contextmanager
def threads_for(parameters: int, single: bool = False) -> Iterator[None]:
    """Let torch use one thread inside, for a small model or when `single`; otherwise leave its own choice."""
    usual = torch.get_num_threads()
    if single or parameters < SMALL_MODEL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def multiply_adds(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Multiply-adds of one example (1, *D) in linear and convolution layers; biases, norms and activations not."""
    total = 0

    def count(layer: nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        assert isinstance(layer.weight, torch.Tensor)
        total += output.numel() * layer.weight[0].numel()

    layers = [module for module in model.modules() if isinstance(module, PRUNABLE)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        with torch.no_grad():
            model(torch.zeros(1, *input_shape, device=next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return total


def compare_latency(before: nn.Module, after: nn.Module, inputs: torch.Tensor, repeats: int) -> Latency:
    """Forward passes of both models on the CPU with one thread, alternately, so that both see the same machine.

    `inputs` (N, *D) are repeated to fill the largest batch.
    """
    models = (before.cpu().eval(), after.cpu().eval())
    largest = max(LATENCY_BATCHES)
    rows = inputs.cpu().repeat(-(-largest // len(inputs)), *[1] * (inputs.dim() - 1))
    with threads_for(0, single=True), torch.inference_mode():
        timed = {size: _alternate(models, rows[:size].clone(), repeats) for size in LATENCY_BATCHES}
    return Latency({size: pair[0] for size, pair in timed.items()}, {size: pair[1] for size, pair in timed.items()})


def _alternate(models: tuple[nn.Module, nn.Module], batch: torch.Tensor, repeats: int) -> tuple[float, float]:
    """Median milliseconds of each model on `batch`."""
    for model in models * WARM_UP:
        model(batch)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for model, times in zip(models, seconds, strict=True):
            start = time.perf_counter()
            model(batch)
            times.append(time.perf_counter() - start)
    return 1e3 * median(seconds[0]), 1e3 * median(seconds[1])
