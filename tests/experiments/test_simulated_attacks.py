"""Attacks by simulated clients: what they send is what hostile sites send, whoever trains."""

import numpy as np
import pytest

from experiments.attacks.base import Attack
from experiments.attacks.collusion import InnerProduct
from experiments.attacks.data import Backdoor, LabelFlip
from experiments.attacks.federation import hostile_names, simulate_attacked
from experiments.attacks.settings import NoAttack
from experiments.attacks.simulated import simulate_attacked_cohorts
from experiments.attacks.updates import SignFlip
from experiments.datasets import DatasetSettings, SitePolicy, write_sites
from fedclaw.errors import UsageError
from fedclaw.learning.workload import Table
from fedclaw.protocol.terms import LocalTraining, RoundRules, StrategyRecord
from fedclaw.server.run_directory import RunDirectory
from fedclaw.simulation import SimulatedFederation, SimulationSettings, simulate_cohorts, simulated
from fedclaw.simulation.partitions.labels import Dirichlet
from fedclaw.transport.in_process import open_sites
from tests.samples import run_record

SETTINGS = SimulationSettings(mode="many")
SITES = 5


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    policy = SitePolicy(epsilon=None, delta=1e-3, allow_training_without_privacy=True)
    dataset = DatasetSettings(name="breast_cancer", sites=SITES)
    return write_sites(tmp_path_factory.mktemp("sites"), dataset, policy, Dirichlet(alpha=5.0))


@pytest.fixture
def sites(directories):
    return dict(sorted(open_sites(directories, "clinic").items()))


@pytest.fixture
def federation(sites):
    """The sites' data; client k is the k-th site by name."""
    tables = [service.data.train for service in sites.values()]
    table = Table(np.concatenate([t.inputs for t in tables]), np.concatenate([t.targets for t in tables]))
    ends = np.cumsum([len(t) for t in tables])
    shares = [np.arange(end - len(t), end) for end, t in zip(ends, tables, strict=True)]
    return SimulatedFederation(next(iter(sites.values())).workload, table, shares)


def record_of(sites, strategy: str, rounds: int = 3, **settings):
    """Full batches: the order of the examples does not matter."""
    return run_record(
        schema_text=next(iter(sites.values())).workload.schema.to_json(),
        strategy=StrategyRecord(name=strategy, settings=settings),
        rounds=rounds,
        training=LocalTraining(steps=2, batch_size=1000, learning_rate=0.2),
        privacy=None,
        rules=RoundRules(minimum=SITES),
        metrics=(),
    )


def simulate(root, sites, federation, attack: Attack, strategy="fedavg", workers=1, **settings):
    record = simulated(record_of(sites, strategy, **settings), SETTINGS, SITES)
    chosen = SETTINGS.model_copy(update={"workers": workers})
    return simulate_attacked_cohorts(RunDirectory.create(root, record), federation, attack, chosen).parameters


def apart(one, other) -> float:
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def test_nobody_hostile_is_the_plain_simulation(tmp_path, sites, federation):
    record = simulated(record_of(sites, "fedavg"), SETTINGS, SITES)
    plain = simulate_cohorts(RunDirectory.create(tmp_path / "plain", record), federation, SETTINGS).parameters
    assert apart(simulate(tmp_path / "none", sites, federation, NoAttack()), plain) < 1e-6


@pytest.mark.parametrize("strategy", ["fedavg", "median"])
@pytest.mark.parametrize(
    "attack", [SignFlip(sites=2, scale=3), LabelFlip(sites=2), InnerProduct(sites=2, epsilon=4, knows="all")]
)
def test_simulated_clients_do_what_hostile_sites_do(tmp_path, sites, federation, attack, strategy):
    ours = simulate(tmp_path / "simulated", sites, federation, attack, strategy)
    honest = simulate(tmp_path / "honest", sites, federation, NoAttack(), strategy)
    # The same two are hostile: in sorted order, sites and clients are called differently and lie alike.
    order = [sorted(sites).index(name) for name in hostile_names(tuple(sites), attack, 0)]
    clients = [federation.name(client) for client in range(SITES)]
    assert [clients.index(name) for name in hostile_names(tuple(clients), attack, 0)] == order
    directory = RunDirectory.create(tmp_path / "sites", record_of(sites, strategy))
    theirs = simulate_attacked(directory, sites, attack).parameters
    assert apart(ours, theirs) < 1e-5
    assert apart(ours, honest) > 1e-2


def test_workers_do_not_show(tmp_path, sites, federation):
    attack = InnerProduct(sites=2, epsilon=4)
    alone = simulate(tmp_path / "one", sites, federation, attack, "trimmed_mean", hostile=1)
    together = simulate(tmp_path / "two", sites, federation, attack, "trimmed_mean", workers=2, hostile=1)
    assert apart(alone, together) == 0


def test_poisoning_leaves_the_federation_as_it_was(tmp_path, sites, federation):
    before = federation.table.targets.copy()
    simulate(tmp_path / "run", sites, federation, LabelFlip(sites=2), rounds=1)
    assert np.array_equal(federation.table.targets, before)


def test_a_backdoor_needs_images(tmp_path, sites, federation):
    with pytest.raises(UsageError, match="a backdoor needs images"):
        simulate(tmp_path / "run", sites, federation, Backdoor(sites=1))
