"""Where a site computes, with what precision and how many threads, and one row without regard to the others."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from fedclaw.errors import UsageError
from fedclaw.processors import usable

SMALL_MODEL = 1_000_000
"""Parameters under which one thread is faster than several, and 32 bits faster than mixed precision."""


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """CUDA where there is one, unless told otherwise. Raises UsageError when `cuda` is wanted and absent."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("the device cuda is asked for, but torch sees no CUDA device here; use auto or cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def set_threads(parameters: int) -> None:
    """One thread for a small model: more only wait for one another (17 times slower beside a busy process)."""
    torch.set_num_threads(1 if parameters < SMALL_MODEL else usable())


@contextmanager
def precision(device: torch.device, parameters: int, private: bool) -> Iterator[None]:
    """bfloat16 where it pays: a large model on CUDA. Never under differential privacy. Else 32 bits, on CUDA too, whose
    convolutions torch would have in TF32 otherwise: numbers with 10 bits behind the point.

    Rounding a gradient after its norm was taken could lift it over the clipping bound, so a private step stays
    in 32 bits.
    """
    if device.type != "cuda":
        yield
    elif parameters >= SMALL_MODEL and not private and torch.cuda.is_bf16_supported():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            yield
    else:
        with _without_tf32():
            yield


@contextmanager
def _without_tf32() -> Iterator[None]:
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = False
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def one_by_one(model: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """The outputs (N, C) of inputs (N, *D), each row on its own, whatever else is there, and wherever it stands.

    In a batch, how the products of one row are rounded can depend on how many rows there are, and on where in memory
    it lies: so each has memory of its own. With parameters that leave little but rounding, one row more would otherwise
    turn the outputs of many.
    """
    # Not every model takes a batch of no rows; whether there are any must not decide if the site answers.
    rows = torch.split(inputs, 1) if len(inputs) else (inputs.new_zeros(1, *inputs.shape[1:]),)
    with torch.no_grad():
        return torch.cat([model(row.clone()) for row in rows])[: len(inputs)]
