"""Checkpoints: whole, found again, and never silently damaged."""

import hashlib
import json
import tracemalloc

import numpy as np
import pytest
import torch

from fedclaw.errors import CheckpointError
from fedclaw.protocol.arrays import arrays_to_npz
from fedclaw.server import checkpoint
from fedclaw.server.checkpoint import Checkpoint
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.run_state import GlobalModel
from fedclaw.strategies.fedadam import FedAdam
from fedclaw.strategies.fedavg import FedAvg

PARAMETERS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32([1, -1])}


def test_round_trip(tmp_path):
    path = checkpoint.save(tmp_path, Checkpoint(7, PARAMETERS, {"optimizer/0/step": np.float32(7)}))
    back = checkpoint.load(path)
    assert back.round == 7
    assert all(np.array_equal(back.parameters[name], PARAMETERS[name]) for name in PARAMETERS)
    assert back.optimizer["optimizer/0/step"] == 7


def test_the_newest_is_found_and_the_oldest_go(tmp_path):
    for number in range(12):
        checkpoint.save(tmp_path, Checkpoint(number, PARAMETERS, {}))
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.round == 11
    assert len(list(tmp_path.iterdir())) == checkpoint.KEPT


def test_the_ten_thousandth_round_is_newer_than_the_one_before(tmp_path):
    for number in (9998, 9999, 10000, 10001):
        checkpoint.save(tmp_path, Checkpoint(number, PARAMETERS, {}))
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.round == 10001


def test_none_when_there_is_none(tmp_path):
    assert checkpoint.newest(tmp_path) is None


@pytest.mark.parametrize("where", [0, 25, 60, -1])
def test_one_changed_byte_is_found_and_the_file_named(tmp_path, where):
    path = checkpoint.save(tmp_path, Checkpoint(3, PARAMETERS, {}))
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint-0003\.ckpt is damaged"):
        checkpoint.newest(tmp_path)


def test_a_cut_file_is_found(tmp_path):
    path = checkpoint.save(tmp_path, Checkpoint(3, PARAMETERS, {}))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(path)


@pytest.mark.parametrize("strategy", [FedAvg(), FedAdam()], ids=lambda strategy: strategy.name)
def test_a_restored_optimiser_goes_on_as_if_nothing_had_happened(tmp_path, strategy):
    deltas = [{name: np.full_like(array, step) for name, array in PARAMETERS.items()} for step in (0.1, -0.3, 0.2)]
    through = GlobalModel(PARAMETERS, strategy)
    for delta in deltas[:2]:
        through.step({name: array.copy() for name, array in delta.items()})
    checkpoint.save(tmp_path, Checkpoint(2, through.parameters, through.optimizer_state()))
    through.step({name: array.copy() for name, array in deltas[2].items()})

    saved = checkpoint.newest(tmp_path)
    assert saved is not None
    resumed = GlobalModel(saved.parameters, strategy)
    resumed.restore_optimizer(saved.optimizer)
    resumed.step(deltas[2])
    assert all(np.array_equal(resumed.parameters[name], through.parameters[name]) for name in PARAMETERS)


def test_fedavg_moves_by_the_mean_delta():
    model = GlobalModel(PARAMETERS, FedAvg())
    norm = model.step({"w": np.ones((2, 3), np.float32), "b": np.zeros(2, np.float32)})
    assert np.array_equal(model.parameters["w"], PARAMETERS["w"] + 1)
    assert norm == pytest.approx(6**0.5)
    assert torch.from_numpy(model.parameters["b"]).tolist() == [1, -1]


MEGABYTE = 1 << 20


def peak(action):
    """Megabytes that `action` holds at its worst beside what there was before, and what it returns."""
    tracemalloc.start()
    try:
        result = action()
        return tracemalloc.get_traced_memory()[1] / MEGABYTE, result
    finally:
        tracemalloc.stop()


def test_a_checkpoint_holds_no_array_a_second_time(tmp_path):
    """Parameters and two moments of 32 MB each: a part of one array at a time is written, not copies of all."""
    arrays = {name: np.full(8 * MEGABYTE, value, np.float32) for value, name in enumerate("abc")}
    saved = Checkpoint(1, {"w": arrays["a"]}, {"optimizer/0/m": arrays["b"], "optimizer/0/v": arrays["c"]})
    written, path = peak(lambda: checkpoint.save(tmp_path, saved))
    assert written < 40, f"{written:.0f} MB beside 96 MB"
    read, back = peak(lambda: checkpoint.load(path))
    assert read < 110, f"{read:.0f} MB for 96 MB"
    assert all(np.array_equal(back.optimizer[name], saved.optimizer[name]) for name in saved.optimizer)


def test_so_does_a_model(tmp_path):
    directory, model = RunDirectory(tmp_path), {"w": np.ones(16 * MEGABYTE, np.float32)}
    written, _ = peak(lambda: directory.write_model(model))
    assert written < 40, f"{written:.0f} MB beside 64 MB"
    read, back = peak(directory.read_model)
    assert read < 80, f"{read:.0f} MB for 64 MB"
    assert np.array_equal(back["w"], model["w"])


def test_a_checkpoint_of_the_version_before_is_read(tmp_path):
    """Its archive was made in memory, and it does not say what its round came to."""
    about = np.frombuffer(json.dumps({"round": 4, "clip": 0.5}).encode(), dtype=np.uint8)
    body = arrays_to_npz({"about": about, **{f"parameters/{name}": array for name, array in PARAMETERS.items()}})
    path = tmp_path / "checkpoint-0004.ckpt"
    path.write_bytes(b"FEDCLAW-CHECKPOINT-1\n" + hashlib.sha256(body).digest() + body)
    found = checkpoint.newest(tmp_path)
    assert (found.round, found.clip, found.came) == (4, 0.5, None)
    assert all(np.array_equal(found.parameters[name], array) for name, array in PARAMETERS.items())


def test_an_interrupted_checkpoint_leaves_the_one_before(tmp_path):
    class Broken:
        def __array__(self, *_, **__):
            raise OSError("the disk is full")

    checkpoint.save(tmp_path, Checkpoint(3, PARAMETERS, {}))
    with pytest.raises(OSError, match="full"):
        checkpoint.save(tmp_path, Checkpoint(4, {"w": Broken()}, {}))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-0003.ckpt"]
    assert checkpoint.newest(tmp_path).round == 3
