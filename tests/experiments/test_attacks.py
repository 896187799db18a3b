"""The attack kit: what each attack sends, worked out by hand; and hostile sites in runs of the real loop."""

import math

import numpy as np
import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from experiments.attacks.base import Round
from experiments.attacks.collusion import InnerProduct, LittleIsEnough, largest_z
from experiments.attacks.data import Backdoor, LabelFlip
from experiments.attacks.federation import AttackedGrid, hostile_names, simulate_attacked
from experiments.attacks.hostile import Gang, HostileSite, delta_in
from experiments.attacks.settings import AttackSettings, NoAttack
from experiments.attacks.updates import GaussianNoise, SignFlip
from experiments.datasets import DatasetSettings, SitePolicy, write_sites
from fedclaw.cli import config_directory
from fedclaw.errors import UsageError
from fedclaw.learning.workload import Table
from fedclaw.protocol.message_identity import assume_server_identity, number_of
from fedclaw.protocol.messages import METRICS, RECEIPT, SUM
from fedclaw.protocol.terms import LocalTraining, ModelSpec, RoundRules, SecureRequest, StrategyRecord
from fedclaw.server.coordinator import run_rounds
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.session import initial_parameters
from fedclaw.simulation.partitions.labels import Dirichlet
from fedclaw.transport.in_process import open_sites, simulate
from tests.samples import run_record

SITES = 7
ATTACK: TypeAdapter = TypeAdapter(AttackSettings)
GENERATOR = np.random.default_rng(0)


def known(*updates: list[float], sites: int = 10, hostile: int = 3) -> Round:
    return Round(np.array(updates, dtype=float), sites, hostile)


def test_each_attack_has_a_conf_file_that_states_its_settings() -> None:
    files = sorted((config_directory() / "attack").glob("*.yaml"))
    found = {file.stem: ATTACK.validate_python(yaml.safe_load(file.read_text())) for file in files}
    assert {name: attack.name for name, attack in found.items()} == {name: name for name in found}
    assert len(found) == 7
    for file in files:
        assert set(yaml.safe_load(file.read_text())) == set(type(found[file.stem]).model_fields)


def test_settings_are_told_apart_by_name_and_checked() -> None:
    assert ATTACK.validate_python({"name": "sign_flip", "scale": 2}) == SignFlip(scale=2)
    for wrong in ({"name": "bribe"}, {"name": "sign_flip", "epsilon": 1}, {"name": "none", "sites": 1}):
        with pytest.raises(ValidationError):
            ATTACK.validate_python(wrong)


def test_label_flip() -> None:
    table = Table(np.zeros((3, 2), np.float32), np.array([0, 1, 3]))
    assert LabelFlip().poison(table, 4, GENERATOR).targets.tolist() == [3, 2, 0]
    assert table.targets.tolist() == [0, 1, 3]


def test_a_backdoor_marks_its_share_of_the_images() -> None:
    images = np.arange(10 * 16, dtype=np.float32).reshape(10, 1, 4, 4)
    attack = Backdoor(target=7, share=0.3, size=1)
    poisoned = attack.poison(Table(images, np.arange(10)), 10, np.random.default_rng(1))
    changed = np.flatnonzero((poisoned.inputs != images).any(axis=(1, 2, 3)) | (poisoned.targets != np.arange(10)))
    assert set(changed) <= set(np.flatnonzero(poisoned.targets == 7))
    assert (poisoned.targets == 7).sum() in (3, 4)
    marked = attack.marked(images)
    assert (marked[:, 0, 3, 3] == images.max()).all()
    assert np.array_equal(np.delete(marked.reshape(10, 16), 15, axis=1), np.delete(images.reshape(10, 16), 15, axis=1))
    assert images[0, 0, 3, 3] == 15


def test_a_backdoor_replaces_the_model() -> None:
    # 3 of 10 send 10/3 of it each: after the mean, the model has moved by the update and the honest sites' share
    own = np.array([3.0, -6.0])
    assert Backdoor().forge(own, known([0, 0]), GENERATOR).tolist() == [10, -20]
    assert Backdoor(scale=1).forge(own, known([0, 0]), GENERATOR).tolist() == [3, -6]


def test_sign_flip() -> None:
    assert SignFlip(scale=2).forge(np.array([1.0, -3.0]), known([0, 0]), GENERATOR).tolist() == [-2, 6]


def test_gaussian_noise_has_the_size_it_is_given() -> None:
    own = np.tile([3.0, -4.0], 50_000)  # root mean square sqrt(12.5)
    sent = GaussianNoise(scale=10).forge(own, known([0, 0]), np.random.default_rng(0))
    assert np.std(sent) == pytest.approx(10 * math.sqrt(12.5), rel=0.02)
    assert abs(np.corrcoef(sent, own)[0, 1]) < 0.02


def test_a_little_is_enough() -> None:
    # means 2 and 5, deviations 1 and 0
    updates = known([1, 5], [3, 5])
    assert LittleIsEnough(z=1.5).forge(np.zeros(2), updates, GENERATOR).tolist() == [0.5, 5]
    # Baruch et al.'s own example: 50 sites, 24 hostile, so s = 2 and z_max = phi^-1(24 / 26) = 1.43
    assert largest_z(50, 24) == pytest.approx(1.426, abs=1e-3)
    assert largest_z(10, 1) == 0
    alone = LittleIsEnough(z=1.5).forge(np.zeros(2), known([1, 5]), GENERATOR)
    assert alone.tolist() == [1, 5]


def test_inner_product() -> None:
    assert InnerProduct(epsilon=0.5).forge(np.zeros(2), known([1, 4], [3, 4]), GENERATOR).tolist() == [-1, -2]


def test_the_same_sites_stay_hostile_when_more_become_so() -> None:
    names = [f"site-{number}" for number in range(10)]
    three = hostile_names(names, SignFlip(sites=3), 4)
    assert hostile_names(names[::-1], SignFlip(sites=1), 4) == three[:1]
    assert len({hostile_names(names, SignFlip(sites=1), seed) for seed in range(30)}) > 5
    assert hostile_names(names, NoAttack(), 4) == ()


# In the real loop


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    policy = SitePolicy(epsilon=None, delta=1e-3, allow_training_without_privacy=True)
    dataset = DatasetSettings(name="breast_cancer", sites=SITES)
    return write_sites(tmp_path_factory.mktemp("sites"), dataset, policy, Dirichlet(alpha=5.0))


@pytest.fixture
def sites(directories):
    return open_sites(directories, "clinic")


def record_of(sites, name: str = "fedavg", rounds: int = 4, **settings):
    return run_record(
        schema_text=next(iter(sites.values())).workload.schema.to_json(),
        strategy=StrategyRecord(name=name, settings=settings),
        rounds=rounds,
        training=LocalTraining(steps=3, batch_size=1000, learning_rate=0.2),
        privacy=None,
        rules=RoundRules(minimum=SITES, attempts=1),
    )


def outcome_of(root, record, sites, attack):
    return simulate_attacked(RunDirectory.create(root, record), sites, attack)


def test_nobody_hostile_is_the_real_thing(tmp_path, sites):
    record = record_of(sites)
    plain = simulate(RunDirectory.create(tmp_path / "plain", record), sites)
    attacked = outcome_of(tmp_path / "none", record, sites, NoAttack())
    for name, array in plain.parameters.items():
        assert np.allclose(attacked.parameters[name], array, atol=1e-6)


def test_two_hostile_sites_of_seven_turn_fedavg_round_and_not_the_robust(tmp_path, directories):
    accuracy = {}
    for name, settings in (("fedavg", {}), ("median", {}), ("multi_krum", {"hostile": 2})):
        sites = open_sites(directories, "clinic")
        outcome = outcome_of(tmp_path / name, record_of(sites, name, **settings), sites, SignFlip(sites=2, scale=50))
        accuracy[name] = outcome.metrics["accuracy"]
    assert accuracy["fedavg"] < 0.6
    assert min(accuracy["median"], accuracy["multi_krum"]) > 0.85


class Catching(AttackedGrid):
    """Keeps, by site, the delta that the server gets."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.caught = {}

    def _answer(self, message):
        reply = super()._answer(message)
        if SUM in reply.content.array_records:
            assert {SUM, RECEIPT, METRICS, "about"} == set(reply.content)
            self.caught[self.site_name(message.metadata.dst_node_id)] = delta_in(reply.content)
        return reply


def caught(root, directories, attack):
    """By site, what the server gets in the first round, and the names of the hostile sites."""
    sites = open_sites(directories, "clinic")
    record, gang = record_of(sites, rounds=1), Gang(attack)
    names = hostile_names(tuple(sites), attack, record.seed)
    hostile = {name: HostileSite(sites[name], gang, np.random.default_rng(0)) for name in names}
    assume_server_identity(number_of(record.run))
    grid = Catching(sites, number_of(record.run), hostile, gang)
    run_rounds(grid, RunDirectory.create(root, record), initial_parameters(record))
    return grid.caught, names


def test_colluding_sites_send_one_lie_made_of_what_they_know(tmp_path, directories):
    honest, _ = caught(tmp_path / "honest", directories, NoAttack())
    sent = {}
    for knows in ("hostile", "all"):
        got, names = caught(tmp_path / knows, directories, InnerProduct(sites=3, epsilon=2, knows=knows))
        expected = -2 * np.mean([honest[name] for name in (names if knows == "hostile" else honest)], axis=0)
        for name, delta in got.items():
            assert np.allclose(delta, expected if name in names else honest[name], atol=1e-5)
        sent[knows] = got[names[0]]
    assert not np.allclose(sent["hostile"], sent["all"], atol=1e-3)


def test_receipts_and_examples_of_hostile_sites_are_their_own(tmp_path, sites):
    outcome = outcome_of(tmp_path / "run", record_of(sites), sites, SignFlip(sites=2))
    assert {name: item.examples for name, item in outcome.receipts.items()} == {
        name: len(service.data.train) for name, service in sites.items()
    }


def test_what_has_no_place_is_refused(tmp_path, sites):
    record = record_of(sites)
    with pytest.raises(UsageError, match="there are 7 sites"):
        outcome_of(tmp_path / "many", record, sites, SignFlip(sites=8))
    secure = record.model_copy(update={"secure": SecureRequest()})
    with pytest.raises(UsageError, match="secure aggregation has masked them"):
        outcome_of(tmp_path / "secure", secure, sites, SignFlip(sites=1))
    with pytest.raises(UsageError, match="a backdoor needs images"):
        outcome_of(tmp_path / "table", record, sites, Backdoor(sites=1))


def test_label_flip_under_secure_aggregation_is_possible(tmp_path, sites):
    """What a site trains on, masking does not hide: nothing that a sum could show."""
    secure = record_of(sites, rounds=1).model_copy(update={"secure": SecureRequest(largest_weight=1000)})
    outcome = outcome_of(tmp_path / "run", secure, sites, LabelFlip(sites=2))
    assert "accuracy" in outcome.metrics


def test_images_can_have_a_backdoor(tmp_path):
    policy = SitePolicy(epsilon=None, delta=1e-3, allow_training_without_privacy=True)
    dataset = DatasetSettings(name="digits", sites=3)
    sites = open_sites(write_sites(tmp_path / "sites", dataset, policy), "clinic")
    before = {name: service.data.train for name, service in sites.items()}
    record = record_of(sites, rounds=1).model_copy(
        update={
            "workload": "vision",
            "model": ModelSpec(name="cnn", args={"channels": [2], "grid": 2, "hidden": None}),
            "rules": RoundRules(minimum=3),
        }
    )
    attack = Backdoor(sites=1)
    outcome_of(tmp_path / "run", record, sites, attack)
    (hostile,) = hostile_names(tuple(sites), attack, record.seed)
    for name, service in sites.items():
        same = np.array_equal(service.data.train.inputs, before[name].inputs)
        assert same == (name != hostile)
