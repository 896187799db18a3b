"""Checkpoints: whole, found again, and never silently damaged."""

import numpy as np
import pytest
import torch

from fedclaw.errors import CheckpointError
from fedclaw.federation import checkpoint
from fedclaw.federation.checkpoint import Checkpoint
from fedclaw.federation.global_model import GlobalModel
from strategies.fedadam import FedAdam
from strategies.fedavg import FedAvg

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
