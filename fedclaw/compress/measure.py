"""Cost of a model: multiply-adds and latency.

Legend: N examples, D input shape without the batch.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch
from torch import nn

from fedclaw.compress.prune import layer_calls
from fedclaw.site.device import SMALL_MODEL

WARM_UP = 10
LATENCY_BATCHES = (1, 32)


@contextmanager
def threads_for(parameters: int) -> Iterator[None]:
    """Inside, torch uses one thread for a small model, and its own choice otherwise."""
    usual = torch.get_num_threads()
    if parameters < SMALL_MODEL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def multiply_adds(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Multiply-adds of one example (1, *D) in linear and convolution layers; biases, norms and activations not."""
    example = torch.zeros(1, *input_shape, device=next(model.parameters()).device)
    return sum(outputs * layer.get_parameter("weight")[0].numel() for layer, outputs in layer_calls(model, example))


def compare_latency(
    before: nn.Module, after: nn.Module, inputs: torch.Tensor, repeats: int
) -> tuple[dict[int, float], dict[int, float]]:
    """Median milliseconds of a forward pass by batch size, of both models.

    On the CPU with one thread, alternately, so that both see the same machine. `inputs` (N, *D) are repeated to fill
    the largest batch.
    """
    models = (before.cpu().eval(), after.cpu().eval())
    largest = max(LATENCY_BATCHES)
    rows = inputs.cpu().repeat(-(-largest // len(inputs)), *[1] * (inputs.dim() - 1))
    with threads_for(0), torch.inference_mode():
        timed = {size: _alternate(models, rows[:size].clone(), repeats) for size in LATENCY_BATCHES}
    return {size: pair[0] for size, pair in timed.items()}, {size: pair[1] for size, pair in timed.items()}


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
