"""Where the bodies of this suite compute: on the device that `--device` names, the CPU unless it says otherwise.

`make test` runs them on the CPU, so that they cannot rot; `make test-cuda` on CUDA, with those marked slow.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

CPU = torch.device("cpu")
SAME = 5e-5
"""How far a sum on one device may be from the same on another, by its L2 norm: the two add float32 numbers in another
order, some hundred of them one after another, which moves each by some 1e-6 of its size. A product in TF32 or bfloat16,
whose numbers have 10 or 7 bits behind the point, moves it by 3e-4 or more, and so does a wrong example."""
SAME_MODEL = 1e-3
"""The same for the parameters that several steps lead to: each one begins where the last one's rounding has led to."""


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def wanted(device: torch.device) -> str:
    """As settings ask for it."""
    return "cpu" if device.type == "cpu" else "cuda"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def nothing_drawn(device: torch.device) -> Iterator[None]:
    """Fails if torch's own generator of the device is not afterwards where it was."""
    before = _generator(device)
    yield
    assert torch.equal(_generator(device), before), f"something was drawn from torch's generator on {device}"


def _generator(device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    state: torch.Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


def apart(one: Mapping[str, NDArray[np.float32]], other: Mapping[str, NDArray[np.float32]]) -> float:
    """The L2 distance of arrays by the norm of the second, over all names together."""
    assert one.keys() == other.keys()
    difference = np.concatenate([(one[name] - other[name]).ravel() for name in other]).astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(np.concatenate([own.ravel() for own in other.values()])))
