"""FedBuff: whoever answers first makes a step, and what is late counts by its staleness."""

import time

import numpy as np
import pytest

from experiments.datasets import DatasetSettings, SitePolicy, write_sites
from fedclaw.errors import RoundError, UsageError
from fedclaw.protocol.message_identity import assume_server_identity, number_of
from fedclaw.protocol.questions import Outgoing
from fedclaw.protocol.terms import CentralNoise, LocalTraining, RoundRules, SecureRequest, StrategyRecord
from fedclaw.server.coordinator import run_rounds
from fedclaw.server.early_checks import check_combination
from fedclaw.server.exchange import ask
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.session import initial_parameters, make_plan, make_strategy
from fedclaw.server.training import TrainingQuestion
from fedclaw.strategies.fedbuff import FedBuff
from fedclaw.transport.in_process import LocalGrid, open_sites
from tests.samples import run_record

FULL_BATCH = LocalTraining(steps=1, batch_size=10_000, learning_rate=0.5)


class Staggered(LocalGrid):
    """Sites that answer `late` steps after they were asked, or never (None)."""

    def __init__(self, sites, late):
        super().__init__(sites, 9)
        self.late = {number_of(name): steps for name, steps in late.items()}
        self.newest = 0
        self.asked = {}
        self.questions = []

    def push_messages(self, messages):
        messages = list(messages)
        identities = list(super().push_messages(messages))
        for message, identity in zip(messages, identities, strict=True):
            if message.metadata.message_type == "train":
                self.asked[identity] = message
                self.newest = max(self.newest, int(message.metadata.group_id))
                self.questions.append((self.site_name(message.metadata.dst_node_id), int(message.metadata.group_id)))
        return identities

    def pull_messages(self, message_ids):
        return super().pull_messages([identity for identity in message_ids if self._is_done(identity)])

    def _is_done(self, identity):
        if identity not in self.asked:
            return True
        about = self.asked[identity].metadata
        late = self.late.get(about.dst_node_id, 0)
        return late is not None and self.newest >= int(about.group_id) + late


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    policy = SitePolicy(epsilon=None, delta=1e-3, allow_training_without_privacy=True, strategies=("fedbuff", "fedavg"))
    return write_sites(tmp_path_factory.mktemp("sites"), DatasetSettings(name="breast_cancer", sites=3), policy)


@pytest.fixture
def sites(directories):
    return open_sites(directories, "clinic")


@pytest.fixture
def record(sites):
    assume_server_identity(9)
    return run_record(
        schema_text=next(iter(sites.values())).workload.schema.to_json(),
        strategy=StrategyRecord(name="fedbuff", settings={"buffer": 2}),
        rounds=4,
        training=FULL_BATCH,
        privacy=None,
        weighting="uniform",
        rules=RoundRules(minimum=2, deadline=20),
    )


def delta(sites, record, name, parameters):
    """What one site's full-batch step from `parameters` changes: the same each time."""
    plan = make_plan(record, make_strategy(record), 1, 2)
    grid = LocalGrid({name: sites[name]}, 9)
    total = ask(grid, list(grid.get_node_ids()), TrainingQuestion(plan, Outgoing(parameters)), 10).read()
    return {key: array / np.float32(total.weight) for key, array in total.arrays.items()}


def test_the_discount_by_hand():
    assert FedBuff().discount(0) == 1
    assert FedBuff().discount(3) == 0.5
    assert FedBuff(power=0).discount(9) == 1
    assert FedBuff(power=2).discount(1) == 0.25


def test_every_step_is_the_first_answers_with_late_ones_discounted(tmp_path, sites, record):
    fast, other, slow = sorted(sites, key=number_of)
    grid = Staggered(sites, {slow: 2})
    start = initial_parameters(record)
    outcome = run_rounds(grid, RunDirectory.create(tmp_path / "run", record), start)
    models = [start]
    # The first two steps are the fast sites'. In the third the slow one is there, with what it made of the first model,
    # and the first fast one; the other's answer goes into the fourth, one step late, beside the next to be asked.
    steps = [
        [(fast, 0, 1.0), (other, 0, 1.0)],
        [(fast, 1, 1.0), (other, 1, 1.0)],
        [(slow, 0, 3**-0.5), (fast, 2, 1.0)],
        [(other, 2, 2**-0.5), (fast, 3, 1.0)],
    ]
    for answers in steps:
        parts = [(delta(sites, record, name, models[begun]), factor) for name, begun, factor in answers]
        mean = {key: sum(part[key] * factor for part, factor in parts) / 2 for key in start}
        models.append({key: models[-1][key] + mean[key] for key in start})
    for key, array in outcome.parameters.items():
        np.testing.assert_allclose(array, models[-1][key], atol=1e-6)
    assert [(name, step) for name, step in grid.questions if name == slow] == [(slow, 1), (slow, 4)]
    reports = outcome.directory.read_metrics()
    assert [sorted(line["answered"]) for line in reports] == [sorted(name for name, _, _ in step) for step in steps]


def test_too_late_an_answer_is_dropped_and_its_site_goes_on(tmp_path, sites, record):
    _, _, slow = sorted(sites)
    strict = record.model_copy(
        update={"strategy": StrategyRecord(name="fedbuff", settings={"buffer": 2, "most_stale": 1}), "rounds": 5}
    )
    grid = Staggered(sites, {slow: 2})
    outcome = run_rounds(grid, RunDirectory.create(tmp_path / "run", strict), initial_parameters(strict))
    lines = outcome.directory.read_metrics()
    assert len(lines) == 5
    assert all(slow not in line["answered"] for line in lines)
    assert len([name for name, _ in grid.questions if name == slow]) == 2


def test_a_site_that_never_answers_holds_nobody_up(tmp_path, sites, record):
    dead = sorted(sites)[0]
    outcome = run_rounds(
        Staggered(sites, {dead: None}), RunDirectory.create(tmp_path / "run", record), initial_parameters(record)
    )
    assert outcome.metrics["accuracy"] > 0.6
    assert all(dead not in line["answered"] for line in outcome.directory.read_metrics())


class Delayed(LocalGrid):
    """All but one site answer after the first deadline has passed, and before the last."""

    def __init__(self, sites, prompt, seconds):
        super().__init__(sites, 9)
        self.prompt, self.seconds, self.late = prompt, seconds, set()

    def push_messages(self, messages):
        if not (messages := list(messages)):
            return []
        identities = list(super().push_messages(messages))
        self.there = time.monotonic() + self.seconds
        self.late |= {
            identity
            for identity, message in zip(identities, messages, strict=True)
            if message.metadata.message_type == "train" and self.site_name(message.metadata.dst_node_id) != self.prompt
        }
        return identities

    def pull_messages(self, message_ids):
        is_there = time.monotonic() >= self.there
        return super().pull_messages([identity for identity in message_ids if is_there or identity not in self.late])


def test_who_is_at_work_is_waited_for_as_often_as_the_rules_say(tmp_path, sites, record):
    rules = RoundRules(minimum=2, deadline=0.2, attempts=4)
    patient = record.model_copy(update={"rules": rules, "rounds": 1})
    grid = Delayed(sites, sorted(sites)[0], 0.5)
    outcome = run_rounds(grid, RunDirectory.create(tmp_path / "run", patient), initial_parameters(patient))
    assert [len(line["answered"]) for line in outcome.directory.read_metrics()] == [2]
    assert all(site.ledger.rounds(patient.run) <= 1 for site in sites.values())


def test_too_few_that_ever_answer_end_the_run_and_it_can_be_resumed(tmp_path, sites, record):
    first, second, third = sorted(sites)
    rules = RoundRules(minimum=2, deadline=0.2, attempts=2)
    hasty = record.model_copy(update={"rules": rules})
    directory = RunDirectory.create(tmp_path / "run", hasty)
    with pytest.raises(RoundError, match="1 sites trained"):
        run_rounds(Staggered(sites, {first: None, second: None}), directory, initial_parameters(hasty))
    spent = sites[third].ledger.rounds(hasty.run)
    assert spent == 1
    outcome = run_rounds(Staggered(sites, {}), directory, initial_parameters(hasty))
    assert len(outcome.directory.read_metrics()) == 4
    assert all(site.ledger.rounds(hasty.run) <= 4 for site in sites.values())


def test_what_needs_one_beginning_for_all_is_refused(record):
    strategy = FedBuff(buffer=2)
    check_combination(record, strategy, model := _model(record))
    central = CentralNoise(unit="site", noise_by="server", epsilon=8, delta=1e-3, clip=1, noise_multiplier=1)
    for changes, reason in (
        ({"secure": SecureRequest()}, "a secure sum is over answers to one"),
        ({"central": central}, "made for a plain mean"),
        ({"rules": RoundRules(minimum=1)}, "sites.minimum=2"),
    ):
        with pytest.raises(UsageError, match=reason):
            check_combination(record.model_copy(update=changes), strategy, model)


def _model(record):
    return record.make_workload().build(record.model)
