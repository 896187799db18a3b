"""Statistics over real sites in one process: right figures, honest errors, and what they are used for."""

import json
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedclaw.errors import DataError, RoundError, UsageError
from fedclaw.learning.workload import schema_digest
from fedclaw.privacy.claims import Claim, claim_of
from fedclaw.protocol.arrays import pack
from fedclaw.protocol.message_identity import assume_server_identity
from fedclaw.protocol.statistics import StatisticsRequest
from fedclaw.protocol.terms import LocalTraining, PrivacyRequest, RoundRules
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.session import make_record
from fedclaw.server.settings import RunSettings, WorkloadChoice
from fedclaw.server.statistics import StatisticsQuestion, release_statistics
from fedclaw.server.statistics_release import constants_from, read_release, write_release
from fedclaw.transport.in_process import LocalGrid, open_sites, simulate
from tests.made_tables import make_sites

QUANTILES = (0.25, 0.5, 0.75)


def schema_of(sites):
    return next(iter(sites.values())).workload.schema


def request_for(sites, **changes):
    fields = {
        "federation": "clinic",
        "run": "statistics-1",
        "cohort": len(sites),
        "workload": "tabular",
        "schema_digest": schema_digest(schema_of(sites).to_json()),
        "columns": ("dose", "age", "smoker", "ward"),
        "epsilon": 8.0,
        "delta": 1e-4,
        **changes,
    }
    return StatisticsRequest(**fields)


def released(sites, *, minimum=2, **changes):
    assume_server_identity(1)
    grid = LocalGrid(sites, 1)
    nodes = sorted(grid.get_node_ids())
    return release_statistics(
        grid, nodes, schema_of(sites), request_for(sites, **changes), QUANTILES, minimum=minimum, deadline=10
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_sites(tmp_path_factory.mktemp("sites"), epsilon=None)


@pytest.fixture
def sites(made):
    return open_sites(made.directories, "clinic")


def test_at_a_large_epsilon_the_figures_are_those_of_the_pooled_data(made, sites):
    policy = {"statistics": sites["north"].policy.statistics.model_copy(update={"epsilon": 1e4})}
    for site in sites.values():
        site.policy = site.policy.model_copy(update=policy)
    told = released(sites, epsilon=5000.0, bins=256).statistics
    assert told.count.value == pytest.approx(800, abs=2)
    assert told.labels["yes"].value == pytest.approx(made.labels.sum(), abs=2)
    for name, pooled in (("dose", made.dose), ("age", made.age)):
        column = told.columns[name]
        assert column.mean.value == pytest.approx(np.nanmean(pooled), rel=0.01)
        assert column.variance.value == pytest.approx(np.nanvar(pooled), rel=0.05)
        assert column.missing.value == pytest.approx(np.isnan(pooled).sum(), abs=2)
        for probability in QUANTILES:
            wanted = np.nanquantile(pooled, probability)
            assert column.quantiles[f"{probability:g}"].value == pytest.approx(
                wanted, abs=0.03 * np.nanstd(pooled) + 100
            )
    assert sum(level.value for level in told.columns["ward"].levels.values()) < 790, "some wards are missing"


def test_the_errors_told_are_those_made(made, sites):
    """60 releases: the mean's error, in its own standard errors, has a deviation of 1 (within 6.9 of its errors)."""
    releases = [released(sites, run=f"statistics-{number}", epsilon=2.0).statistics for number in range(60)]
    told = [one.columns[name].mean for one in releases for name in ("dose", "age")]
    pooled = [np.nanmean(made.dose), np.nanmean(made.age)] * 60
    scores = [(mean.value - true) / mean.error for mean, true in zip(told, pooled, strict=True)]
    assert 0.6 < np.std(scores) < 1.45
    counts = [(one.count.value - 800) / one.count.error for one in releases]
    assert np.abs(counts).max() < 6.5


def test_a_release_says_what_it_cost_and_whom_and_comes_back_from_its_file(sites, tmp_path):
    release = released(sites, epsilon=1.0)
    assert list(release.sites) == sorted(sites)
    assert (release.epsilon, release.delta) == (1.0, 1e-4)
    claim = Claim("example", "zero-out", "nobody")
    assert {claim_of(receipt) for receipt in release.sites.values()} == {claim}
    assert (release.unit, release.claim) == (claim.protects, claim)
    assert release.mechanism.noise == {name: one.noise_multiplier for name, one in release.sites.items()}
    assert release.mechanism.deviation == pytest.approx(2 * release.sites["north"].noise_multiplier)
    for name, receipt in release.sites.items():
        assert 0.95 < receipt.epsilon_run <= 1.0
        assert receipt.ledger_head in sites[name].ledger.index().heads
    write_release(tmp_path / "statistics.json", release)
    assert read_release(tmp_path / "statistics.json") == release


def test_a_release_is_for_one_unit_and_names_the_weakest_relation(sites):
    name, *others = sorted(sites)
    for other in others:
        sites[other].data = replace(sites[other].data, public_examples=250)
    release = released(sites)
    assert release.sites[others[0]].relation == "add-or-remove"
    assert release.claim == Claim("example", "zero-out")
    assert (release.use.relation, release.use.trust) == ("zero-out", "nobody")
    sites[name].data = replace(sites[name].data, public_examples=250)
    assert released(sites, run="statistics-2").unit == Claim("example", "add-or-remove").protects


def test_a_site_that_says_another_unit_than_the_schemas_is_in_no_release(sites):
    name = sorted(sites)[0]
    train = sites[name].data.train
    sites[name].data = replace(sites[name].data, train=replace(train, persons=np.arange(len(train))))
    with pytest.raises(RoundError, match=rf"{name}.*the unit person, and the schema makes it example"):
        released(sites, minimum=4)


def test_the_same_question_has_the_same_identity_and_another_run_another(sites):
    def identities(**changes):
        messages = StatisticsQuestion(request_for(sites, **changes), schema_of(sites)).messages([1, 2], 10)
        return [message.metadata.message_id for message in messages]

    assert identities() == identities()
    assert len({*identities(), *identities(run="statistics-2"), *identities(epsilon=1.0)}) == 6


def test_sites_that_decline_are_left_out_and_too_few_are_an_error(sites):
    sites["north"].policy = sites["north"].policy.model_copy(update={"statistics": None})
    assert list(released(sites).sites) == ["east", "south", "west"]
    with pytest.raises(RoundError, match=r"3 sites.*4 are needed \(north: statistics were asked for"):
        released(sites, run="statistics-2", minimum=4)


class Liar:
    """A site that answers with `content`, whatever it is asked."""

    def __init__(self, content):
        self.content = content

    def answer(self, message):
        return Message(self.content, reply_to=message)

    def release(self, *_):
        pass


def test_answers_that_cannot_be_added_are_left_out(sites):
    (name, honest), *_ = sites.items()
    assume_server_identity(1)
    grid = LocalGrid({name: honest}, 1)
    question = StatisticsQuestion(request_for(sites), schema_of(sites))
    (good,) = grid.send_and_receive(question.messages(list(grid.get_node_ids()), 10))
    receipt = good.content["receipt"]
    size = good.content["sum"]["statistics"].shape[0]

    def answer(vector, receipt=receipt):
        return RecordDict({"sum": pack({"statistics": vector.astype(np.float32)}), "receipt": receipt})

    spoilt = np.zeros(size)
    spoilt[0] = np.nan
    huge = np.full(size, 1e20)
    lies = {
        "a": answer(np.zeros(size + 1)),
        "b": answer(spoilt),
        "c": answer(huge),
        "d": answer(np.zeros(size), ConfigRecord({"json": "{}"})),
        "e": RecordDict({"sum": ArrayRecord(), "receipt": receipt}),
        "f": RecordDict(),
    }
    everybody = {**sites, **{lie: Liar(content) for lie, content in lies.items()}}
    assert list(released(everybody, cohort=10).sites) == sorted(sites)


@pytest.mark.parametrize(
    "lie",
    [
        {"noise_multiplier": 1e300},
        {"noise_multiplier": 1e-300},
        {"delta": 0.5},
        {"trust": "aggregation"},
        {"epsilon_run": -1.0},
        {"epsilon_lifetime": None, "epsilon_left": 3.0},
        {"ledger_head": "<script>"},
        {"ledger_head": "a" * (8 << 20)},
    ],
    ids=lambda lie: "-".join(lie),
)
def test_a_receipt_that_no_site_has_is_left_out(sites, lie):
    """The errors told of all figures are made of the sites' noise multipliers, which the request determines."""

    class Lying:
        def answer(self, message):
            reply = sites["north"].answer(message)
            told = json.loads(reply.content["receipt"]["json"]) | lie
            reply.content["receipt"] = ConfigRecord({"json": json.dumps(told)})
            return reply

        def release(self, *_):
            pass

    others = {name: site for name, site in sites.items() if name != "north"}
    release = released({**others, "north": Lying()})
    assert list(release.sites) == ["east", "south", "west"]
    assert release.mechanism.deviation == pytest.approx(3**0.5 * release.sites["east"].noise_multiplier)


def settings_for(made, statistics=None, **changes):
    fields = {
        "workload": WorkloadChoice(name="tabular", schema_file=made.schema_file, model={"name": "logistic"}),
        "strategy": {"name": "fedavg"},
        "training": LocalTraining(epochs=3, batch_size=16, learning_rate=0.3),
        "privacy": PrivacyRequest(epsilon=6, delta=1e-3, max_grad_norm=1),
        "rounds": 4,
        "seed": 0,
        "statistics": statistics,
        **changes,
    }
    return RunSettings(**fields)


def test_a_run_needs_constants_exactly_if_its_schema_takes_them(made, sites, tmp_path):
    path = tmp_path / "statistics.json"
    write_release(path, released(sites))
    rules = RoundRules()
    with pytest.raises(UsageError, match=r"python -m fedclaw\.statistics"):
        make_record(settings_for(made), "clinic", None, rules)
    with pytest.raises(UsageError, match="cannot be read"):
        make_record(settings_for(made, tmp_path / "none.json"), "clinic", None, rules)
    record = make_record(settings_for(made, path), "clinic", None, rules)
    assert not record.make_schema().data_dependent
    assert record.schema_digest == schema_digest(schema_of(sites).to_json()), "sites compare the agreed schema"
    other = make_sites(tmp_path / "other", standardise="schema")
    with pytest.raises(UsageError, match="this one does not"):
        make_record(settings_for(other, path), "clinic", None, rules)
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{}")
    with pytest.raises(DataError, match=r"not a statistics\.json"):
        make_record(settings_for(made, damaged), "clinic", None, rules)


def test_statistics_of_another_schema_are_not_taken(sites, tmp_path):
    path = tmp_path / "statistics.json"
    write_release(path, released(sites).model_copy(update={"schema_digest": "0" * 64}))
    with pytest.raises(DataError, match="another schema"):
        constants_from(path, schema_of(sites))


def accuracy_of(made, tmp_path, name, statistics=None):
    record = make_record(settings_for(made, statistics), "clinic", name, RoundRules(minimum=4))
    directory = RunDirectory.create(tmp_path / name, record)
    outcome = simulate(directory, open_sites(made.directories, "clinic"))
    return outcome.metrics["accuracy"]


def test_federated_standardisation_is_as_good_as_pooled_and_better_than_each_site_s_own(tmp_path):
    """Where a site lies tells the outcome; a site's own mean takes that away. Private runs at epsilon 6, end to end."""
    federated = make_sites(tmp_path / "federated")
    write_release(tmp_path / "statistics.json", released(open_sites(federated.directories, "clinic"), epsilon=1.0))
    pooled = make_sites(tmp_path / "pooled", standardise="schema", constants=federated.constants)
    own = make_sites(tmp_path / "own", standardise="site", allow_data_dependent_preprocessing=True)
    accuracy = {
        "federated": accuracy_of(federated, tmp_path / "runs", "federated", tmp_path / "statistics.json"),
        "pooled": accuracy_of(pooled, tmp_path / "runs", "pooled"),
        "own": accuracy_of(own, tmp_path / "runs", "own"),
    }
    assert accuracy["pooled"] > 0.83
    assert accuracy["federated"] > accuracy["pooled"] - 0.06
    assert accuracy["federated"] > accuracy["own"] + 0.15
