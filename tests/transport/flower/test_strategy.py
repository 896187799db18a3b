"""A FedClaw run in Flower's own loop gives what FedClaw's loop gives."""

import numpy as np
import pytest
from flwr.app import ConfigRecord

from experiments.datasets import DatasetSettings, SitePolicy, write_sites
from fedclaw.errors import UsageError
from fedclaw.protocol.arrays import pack, unpack
from fedclaw.protocol.message_identity import assume_server_identity
from fedclaw.protocol.terms import AdaptiveClip, CentralNoise, LocalTraining, ModelSpec, SecureRequest, StrategyRecord
from fedclaw.server.coordinator import run_rounds
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.session import initial_parameters
from fedclaw.transport.flower.strategy import FlowerStrategy
from fedclaw.transport.in_process import LocalGrid, open_sites
from tests.samples import run_record


@pytest.fixture
def made(tmp_path):
    policy = SitePolicy(epsilon=None, delta=1e-3, allow_training_without_privacy=True)
    sites = open_sites(write_sites(tmp_path, DatasetSettings(name="breast_cancer", sites=2), policy), "clinic")
    assume_server_identity(3)
    record = run_record(
        schema_text=next(iter(sites.values())).workload.schema.to_json(),
        strategy=StrategyRecord(name="fedavgm"),
        rounds=3,
        training=LocalTraining(steps=1, batch_size=1000, learning_rate=0.2),
        privacy=None,
    )
    return record, sites, RunDirectory.create(tmp_path / "run", record)


def test_flowers_loop_and_ours_agree(made):
    record, sites, directory = made
    start = initial_parameters(directory.record())
    ours = run_rounds(LocalGrid(sites, 3), directory, start)
    result = FlowerStrategy(record).start(LocalGrid(sites, 3), pack(start), num_rounds=record.rounds)
    theirs = unpack(result.arrays)
    for name, array in ours.parameters.items():
        assert np.allclose(array, theirs[name], atol=1e-6)
        assert not np.allclose(array, start[name], atol=1e-3)
    assert result.evaluate_metrics_clientapp[3]["accuracy"] == pytest.approx(ours.metrics["accuracy"])


def test_flowers_loop_tells_a_numbers_figures_too(tmp_path):
    policy = SitePolicy(epsilon=None, delta=1e-3, allow_training_without_privacy=True)
    sites = open_sites(write_sites(tmp_path, DatasetSettings(name="diabetes", sites=2), policy), "clinic")
    assume_server_identity(3)
    record = run_record(
        schema_text=next(iter(sites.values())).workload.schema.to_json(),
        model=ModelSpec(name="linear"),
        task="regression",
        metrics=("rmse", "mae", "r2"),
        training=LocalTraining(steps=1, batch_size=1000, learning_rate=0.2),
        privacy=None,
    )
    start = initial_parameters(record)
    ours = run_rounds(LocalGrid(sites, 3), RunDirectory.create(tmp_path / "run", record), start)
    result = FlowerStrategy(record).start(LocalGrid(sites, 3), pack(start), num_rounds=record.rounds)
    # R2 is 1 less a ratio, and sums of 32-bit updates depend on who answered first: its error is one of the 1.
    assert dict(result.evaluate_metrics_clientapp[record.rounds]) == pytest.approx(ours.metrics, rel=1e-6, abs=1e-6)
    assert set(ours.metrics) == {"rmse", "mae", "r2"}


def test_a_round_with_too_few_sites_does_not_count(made):
    record, sites, directory = made
    strategy = FlowerStrategy(record)
    alone = LocalGrid(dict(list(sites.items())[:1]), 3)
    messages = strategy.configure_train(1, pack(initial_parameters(directory.record())), ConfigRecord(), alone)
    assert strategy.aggregate_train(1, list(alone.send_and_receive(messages))) == (None, None)
    assert strategy.trained is not None
    assert strategy.trained.declined[0].code == "cohort"


NOISE = CentralNoise(unit="site", noise_by="server", epsilon=8, delta=1e-3, clip=1, noise_multiplier=2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"secure": SecureRequest()}, "secure aggregation"),
        ({"central": NOISE.model_copy(update={"sample_rate": 0.5})}, "asked at random"),
        ({"central": NOISE.model_copy(update={"adaptive": AdaptiveClip(count_noise=10)})}, "adaptive clipping bound"),
    ],
)
def test_what_flowers_loop_would_leave_out_is_refused(made, changes, reason):
    record, _, _ = made
    uniform = record.model_copy(update={"weighting": "uniform"})
    FlowerStrategy(uniform.model_copy(update={"central": NOISE}))
    with pytest.raises(UsageError, match=reason):
        FlowerStrategy(uniform.model_copy(update=changes))
