"""Where a site computes: checked on a CPU, and on CUDA where there is one."""

import os
from contextlib import nullcontext

import pytest
import torch

from fedclaw.errors import UsageError
from fedclaw.site.device import SMALL_MODEL, choose_device, one_by_one, precision, set_threads


def test_auto_takes_cuda_where_there_is_one():
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu").type == "cpu"


def test_cuda_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="no CUDA device"):
        choose_device("cuda")


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_mixed_precision_only_for_large_models_on_cuda_without_privacy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    entered = []
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype: entered.append((kind, dtype)) or nullcontext())
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for device, size, private in ((cuda, SMALL_MODEL, True), (cuda, SMALL_MODEL - 1, False), (cpu, SMALL_MODEL, False)):
        with precision(device, size, private):
            assert not entered
    with precision(cuda, SMALL_MODEL, private=False):
        assert entered == [("cuda", torch.bfloat16)]


@pytest.mark.parametrize("private", [True, False])
def test_other_steps_on_cuda_have_32_bits(private):
    """torch takes TF32 for convolutions unless told otherwise; afterwards it is as it was."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    assert any(before)
    with precision(torch.device("cuda"), 0, private):
        assert (products.allow_tf32, convolutions.allow_tf32) == (False, False)
    assert (products.allow_tf32, convolutions.allow_tf32) == before


def test_one_thread_for_a_small_model():
    before = torch.get_num_threads()
    try:
        set_threads(SMALL_MODEL - 1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_threads_where_the_system_does_not_tell_which_processors_may_be_used(monkeypatch):
    """macOS has no os.sched_getaffinity."""
    before, asked = torch.get_num_threads(), []
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    set_threads(2 * SMALL_MODEL)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    set_threads(2 * SMALL_MODEL)
    assert asked == [3, 1]
    assert torch.get_num_threads() == before


class Flattened(torch.nn.Module):
    """As many models do it, and as no batch of no rows can be."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.view(len(inputs), -1)


def test_of_no_rows_there_are_outputs_whatever_the_model() -> None:
    with pytest.raises(RuntimeError):
        Flattened()(torch.zeros(0, 2, 3))
    assert one_by_one(Flattened(), torch.zeros(0, 2, 3)).shape == (0, 6)
    assert one_by_one(Flattened(), torch.ones(2, 2, 3)).shape == (2, 6)
