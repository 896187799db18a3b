"""One result, whoever computes it: workers, modes, and a real site."""

import numpy as np
import pytest
import torch

from fedclaw.protocol.terms import LocalTraining, RoundRules, StrategyRecord
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.session import make_plan, make_strategy
from fedclaw.simulation import SimulationSettings
from fedclaw.site.journal.ledger import Ledger
from fedclaw.site.service import SiteService
from fedclaw.site.site import SiteData
from fedclaw.transport.in_process import simulate
from tests.simulation.conftest import SIZES, make_federation, make_record


def largest_difference(one, other):
    assert one.parameters.keys() == other.parameters.keys()
    return max(float(np.abs(one.parameters[name] - other.parameters[name]).max()) for name in one.parameters)


def identical(one, other):
    return all(np.array_equal(one.parameters[name], other.parameters[name]) for name in one.parameters)


@pytest.mark.parametrize("mode", ["one", "many"])
@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_the_number_of_workers_changes_no_bit(run, kind, mode):
    outcomes = [run(kind, SimulationSettings(workers=workers, mode=mode)) for workers in (1, 2, 3)]
    assert identical(outcomes[0], outcomes[1])
    assert identical(outcomes[0], outcomes[2])
    assert outcomes[0].metrics == outcomes[2].metrics


@pytest.mark.parametrize(
    ("optimizer", "more"),
    [
        ("sgd", {}),
        ("sgd", {"momentum": 0.9, "weight_decay": 0.01}),
        ("sgd", {"weight_decay": 0.05}),
        ("adam", {"weight_decay": 0.01}),
    ],
)
@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_many_at_once_is_one_at_a_time(run, kind, optimizer, more):
    rate = 0.01 if optimizer == "adam" else 0.1
    training = LocalTraining(epochs=2, batch_size=8, learning_rate=rate, optimizer=optimizer, **more)
    one, many = (run(kind, SimulationSettings(mode=mode), training=training) for mode in ("one", "many"))
    tolerance = 2e-3 if optimizer == "adam" else 2e-5
    assert 0 < largest_difference(one, many) < tolerance


def test_many_residual_networks_at_once_are_one_at_a_time(run):
    """Two steps: among many ReLUs, one whose input rounding alone keeps from 0 goes either way."""
    training = LocalTraining(steps=2, batch_size=8, learning_rate=0.1)
    one, many = (run("resnet", SimulationSettings(mode=mode), training=training, rounds=1) for mode in ("one", "many"))
    assert 0 < largest_difference(one, many) < 2e-5


@pytest.mark.parametrize("strategy", ["fedprox", "fedadam", "scaffold", "fednova", "feddyn", "median", "krum"])
def test_strategies_do_not_notice(run, strategy):
    """Corrections, state at server and clients, extras and single updates; over processes too."""
    settings = {"median": {}, "krum": {"hostile": 1}}.get(strategy, {})
    record = {"strategy": StrategyRecord(name=strategy, settings=settings)}
    one = run("mlp", SimulationSettings(mode="one"), **record)
    many = run("mlp", SimulationSettings(mode="many"), **record)
    two = run("mlp", SimulationSettings(mode="many", workers=2), **record)
    assert largest_difference(one, many) < 5e-4
    assert identical(many, two)


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "scaffold", "ditto", "fedbn"])
@pytest.mark.parametrize("mode", ["one", "many"])
def test_a_real_site_comes_to_the_same(run, tmp_path, strategy, mode):
    """Full batches, so that there is no order to draw: the same model after three rounds."""
    kind = "cnn"
    federation = make_federation(kind)
    momentum = 0.0 if strategy == "scaffold" else 0.5  # which Scaffold refuses
    training = LocalTraining(epochs=3, batch_size=max(SIZES), learning_rate=0.1, momentum=momentum)
    changes = {"training": training, "strategy": StrategyRecord(name=strategy)}
    if strategy == "fedbn":
        changes["personal"] = tuple(
            f"blocks.{block}.normalisation.{part}" for block in range(2) for part in ("weight", "bias")
        )
    ours = run(kind, SimulationSettings(mode=mode), **changes)
    record = make_record(federation, kind, **changes)
    directory = RunDirectory.create(tmp_path / "sites", record)
    theirs = simulate(directory, dict(real_sites(federation, record)))
    assert largest_difference(ours, theirs) < 1e-4


def real_sites(federation, record):
    policy = federation.policy(make_plan(record, make_strategy(record), 1, len(federation)))
    for client in range(len(federation)):
        rows, name = federation.share(client), federation.name(client)
        train = federation.table.take(rows)
        yield (
            name,
            SiteService(
                name=name,
                federation=record.federation,
                workload=federation.workload,
                schema_digest=record.schema_digest,
                data=SiteData(train, train, name),
                policy=policy,
                ledger=Ledger.open(":memory:", name),
            ),
        )


def test_a_cohort_is_a_part_of_the_clients(run):
    lines = run("mlp", rules=RoundRules(minimum=1, fraction=0.4), rounds=4).directory.read_metrics()
    cohorts = {tuple(line["answered"]) for line in lines}
    assert all(len(cohort) == 4 for cohort in cohorts)
    assert len(cohorts) > 1


def test_torch_keeps_its_threads(run):
    before = torch.get_num_threads()
    run("mlp", rounds=1)
    assert torch.get_num_threads() == before
