"""Robust strategies in runs of the real loop: refused where they cannot be right, resumed with what they know."""

import numpy as np
import pytest
import torch
from torch import nn

from experiments.datasets import DatasetSettings, SitePolicy, write_sites
from fedclaw.errors import RoundError, UsageError
from fedclaw.protocol.message_identity import assume_server_identity
from fedclaw.protocol.terms import CentralNoise, LocalTraining, RandomK, RoundRules, SecureRequest, StrategyRecord
from fedclaw.server import checkpoint
from fedclaw.server.coordinator import run_rounds
from fedclaw.server.early_checks import check_combination
from fedclaw.server.run_directory import RunDirectory, RunRecord
from fedclaw.server.session import initial_parameters, make_strategy
from fedclaw.strategies.centred_clipping import CENTRE
from fedclaw.transport.in_process import LocalGrid, open_sites
from tests.crashes import server_dies
from tests.samples import run_record

ROBUST = ("bulyan", "centred_clipping", "krum", "median", "multi_krum", "norm_bounding", "rfa", "trimmed_mean")


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    policy = SitePolicy(epsilon=None, delta=1e-3, allow_training_without_privacy=True, strategies=ROBUST)
    return write_sites(tmp_path_factory.mktemp("sites"), DatasetSettings(name="breast_cancer", sites=5), policy)


@pytest.fixture
def sites(directories):
    return open_sites(directories, "clinic")


def record_of(sites, name: str, minimum: int = 5, **settings) -> RunRecord:
    assume_server_identity(5)
    return run_record(
        schema_text=next(iter(sites.values())).workload.schema.to_json(),
        strategy=StrategyRecord(name=name, settings=settings),
        rounds=4,
        training=LocalTraining(steps=3, batch_size=1000, learning_rate=0.2),
        privacy=None,
        rules=RoundRules(minimum=minimum),
    )


def run(root, record, sites):
    directory = RunDirectory(root) if (root / "run.json").exists() else RunDirectory.create(root, record)
    return run_rounds(LocalGrid(sites, 5), directory, initial_parameters(directory.record()))


def check(record: RunRecord) -> None:
    check_combination(record, make_strategy(record), nn.Linear(2, 2))


@pytest.mark.parametrize("name", ROBUST)
def test_they_are_refused_with_sums_that_hide_updates(sites, name):
    settings = {"hostile": 0} if name in ("bulyan", "krum", "multi_krum", "trimmed_mean") else {}
    record = record_of(sites, name, **settings)
    check(record)
    with pytest.raises(UsageError, match="which secure aggregation hides"):
        check(record.model_copy(update={"secure": SecureRequest()}))
    central = CentralNoise(unit="site", noise_by="server", epsilon=8, delta=1e-3, clip=1, noise_multiplier=1)
    with pytest.raises(UsageError, match="noise on the sum is made for a mean"):
        check(record.model_copy(update={"central": central}))


@pytest.mark.parametrize(
    ("name", "settings", "fewest"),
    [
        ("krum", {"hostile": 1}, 5),
        ("multi_krum", {"hostile": 2}, 7),
        ("bulyan", {"hostile": 1}, 7),
        ("trimmed_mean", {"hostile": 3}, 7),
        ("median", {}, 3),
        ("rfa", {}, 3),
        ("norm_bounding", {}, 3),
        ("centred_clipping", {}, 3),
    ],
)
def test_rounds_that_may_count_with_too_few_sites_are_refused_at_start(sites, name, settings, fewest):
    check(record_of(sites, name, fewest, **settings))
    with pytest.raises(UsageError, match=f"{name}.*at least {fewest} sites.*set sites.minimum to {fewest}"):
        check(record_of(sites, name, fewest - 1, **settings))


def test_centred_clipping_is_refused_with_positions_that_change(sites):
    record = record_of(sites, "centred_clipping").model_copy(update={"compression": RandomK(method="randk")})
    with pytest.raises(UsageError, match="compression=randk sends other positions"):
        check(record)
    check(record_of(sites, "median").model_copy(update={"compression": RandomK(method="randk")}))


def test_a_round_with_too_few_answers_says_so(tmp_path, sites):
    """Such a record is refused at start; a run that was begun in another way ends at its first round."""
    with pytest.raises(RoundError, match=r"round 1.*bulyan.*at least 7 sites, and 5 came$"):
        run(tmp_path / "run", record_of(sites, "bulyan"), sites)


@pytest.mark.parametrize("name", ROBUST)
def test_they_learn_when_nobody_is_hostile(tmp_path, sites, name):
    settings = {"hostile": 0} if name == "bulyan" else {}
    outcome = run(tmp_path / "run", record_of(sites, name, **settings), sites)
    assert outcome.metrics["accuracy"] > 0.85


def test_centred_clipping_goes_on_from_the_centre_it_had(tmp_path, sites):
    record = record_of(sites, "centred_clipping", radius=0.2)
    straight = run(tmp_path / "straight", record, sites)
    with server_dies(next(iter(sites.values())), in_round=3):
        run(tmp_path / "run", record, sites)
    saved = checkpoint.newest(tmp_path / "run")
    assert saved.round == 2
    assert any(array.any() for array in saved.strategy[CENTRE].values())
    resumed = run(tmp_path / "run", record, sites)
    for name, array in straight.parameters.items():
        assert np.allclose(resumed.parameters[name], array, atol=1e-6)

    forgotten = {name: torch.zeros(array.shape).numpy() for name, array in saved.strategy[CENTRE].items()}
    forgetful = RunDirectory.create(tmp_path / "forgetful", record)
    checkpoint.save(
        forgetful.root, checkpoint.Checkpoint(2, saved.parameters, saved.optimizer, strategy={CENTRE: forgotten})
    )
    other = run(forgetful.root, record, sites)
    assert any(not np.allclose(other.parameters[name], a, atol=1e-4) for name, a in straight.parameters.items())
