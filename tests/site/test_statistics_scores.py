"""How a model scores the training rows, asked as statistics: charged, noised, and one row moves it by one at most."""

import json

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedclaw.errors import BundleError, DataError
from fedclaw.export.threshold import threshold_of_release
from fedclaw.learning.statistics import SPAN, design_for, edges
from fedclaw.privacy.accounting import calibrate
from fedclaw.protocol.arrays import pack, unpack
from fedclaw.protocol.message_identity import assign_message_id, assume_server_identity
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.protocol.statistics import STATISTICS, ScoreQuestion, StatisticsRequest
from fedclaw.protocol.terms import ModelSpec
from fedclaw.server.statistics import release_statistics
from fedclaw.server.statistics_release import read_release, write_release
from fedclaw.site.directory import open_service
from fedclaw.site.policy.policy import StatisticsAllowance, sentences
from fedclaw.site.settings import load_site_settings
from fedclaw.site.statistics import scores_of
from fedclaw.transport.in_process import LocalGrid, open_sites
from tests.chance import scale_is_right
from tests.made_tables import make_sites

BINS = 9
ALLOWED = StatisticsAllowance(epsilon=20, scores=True)


def opened(root):
    assume_server_identity(1)
    site = open_service(root, load_site_settings(root), "clinic", durable=False)
    site.policy = site.policy.model_copy(update={"statistics": ALLOWED, "epsilon": None, "epsilon_per_run": None})
    return site


def question_for(site):
    return ScoreQuestion(
        model=ModelSpec(name="binary_logistic"), bins=BINS, preprocessing=site.workload.schema.shared_constants({})
    )


def request_for(site, cohort=3, **changes):
    fields = {
        "federation": "clinic",
        "run": "scores-1",
        "cohort": cohort,
        "workload": "tabular",
        "schema_digest": site.schema_digest,
        "columns": (),
        "labels": False,
        "bins": 0,
        "epsilon": 8.0,
        "delta": 1e-4,
    }
    if "scores" not in changes:
        fields["scores"] = question_for(site)
    return StatisticsRequest(**{**fields, **changes})


def parameters_of(site, seed=0):
    (width,) = site.workload.schema.input_shape
    random = np.random.default_rng(seed)
    return {
        "head.weight": random.normal(size=(1, width)).astype(np.float32),
        "head.bias": np.zeros(1, np.float32),
    }


def ask(site, request, parameters, identity="message-1"):
    content = RecordDict({"request": ConfigRecord({"json": request.model_dump_json()}), "arrays": pack(parameters)})
    message = Message(content, dst_node_id=7, message_type=STATISTICS, group_id="0")
    assign_message_id(message, identity)
    return site.answer(message)


@pytest.fixture
def root(tmp_path):
    return make_sites(tmp_path, count=1).directories[0]


def vector(site, parameters):
    asked = question_for(site)
    model = site.model(asked.model, parameters).eval()
    return design_for(site.workload.schema, request_for(site)).vector([scores_of(site, asked, model)])


def hostile(site):
    """Parameters that a dishonest server might send: not finite, saturated, all rows at the edge of a bin."""
    usual = parameters_of(site)
    edge = np.float32(edges(BINS)[3])
    return {
        "usual": usual,
        "nan": {name: np.full_like(array, np.nan) for name, array in usual.items()},
        "infinite": {name: np.full_like(array, np.inf) for name, array in usual.items()},
        "huge": {name: array * np.float32(1e38) for name, array in usual.items()},
        "edge": {"head.weight": usual["head.weight"] * np.float32(1e-7), "head.bias": np.full(1, edge)},
    }


@pytest.mark.parametrize("kind", ["usual", "nan", "infinite", "huge", "edge"])
def test_one_row_less_moves_what_is_noised_by_one_at_most(root, kind):
    path = root / "train.csv"
    lines = path.read_text().splitlines()
    parameters = hostile(opened(root))[kind]
    before = vector(opened(root), parameters)
    for gone in (1, len(lines) // 2, len(lines) - 1):
        path.write_text("\n".join([*lines[:gone], *lines[gone + 1 :]]) + "\n")
        moved = np.linalg.norm(vector(opened(root), parameters) - before)
        assert 0.5 < moved <= 1 + 1e-9


def test_rows_are_scored_one_at_a_time(root):
    """How a row's products are rounded in a batch depends on how many rows there are."""
    site, sizes = opened(root), set()
    asked = question_for(site)
    model = site.model(asked.model, parameters_of(site)).eval()
    model.register_forward_hook(lambda _model, inputs, _outputs: sizes.add(len(inputs[0])))
    scores_of(site, asked, model)
    assert sizes == {1}


def test_it_is_charged_and_noised_like_any_release(root):
    """40 answers of 18 counts: a scale that is a quarter off is 8 standard errors off."""
    site = opened(root)
    parameters = parameters_of(site)
    exact, noise = vector(site, parameters), []
    for number in range(40):
        reply = ask(site, request_for(site, epsilon=1.0, run=f"scores-{number}"), parameters, f"message-{number}")
        assert not reply.has_error(), reply.error.reason
        if number == 0:
            assert 0.95 < site.ledger.spent(1e-4) <= 1.0
        noise.append(unpack(reply.content["sum"])["statistics"] - exact)
    assert scale_is_right(noise, calibrate(1.0, 1e-4, 1.0, 1)), "epsilon 1 at delta 1e-4 takes noise of about 3.7"


REFUSED = {
    "no-scores": (
        {"policy": StatisticsAllowance(epsilon=20)},
        RefusalCode.STATISTICS,
        "does not say statistics: scores",
    ),
    "no-statistics": ({"policy": None}, RefusalCode.STATISTICS, "does not allow them"),
    "too-dear": ({"epsilon": 30.0}, RefusalCode.EPSILON, "epsilon"),
    "parameters": ({"parameters": {"head.bias": np.zeros(1, np.float32)}}, RefusalCode.MODEL, "not those of model"),
    "constants": ({"question": {"preprocessing": None}}, RefusalCode.SCHEMA, "brings no constants"),
    "model": ({"question": {"model": ModelSpec(name="transformer")}}, RefusalCode.MODEL, "no model is called"),
}


@pytest.mark.parametrize(("changes", "code", "words"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_refused_before_anything_is_paid(root, changes, code, words):
    site, changes = opened(root), dict(changes)
    if "policy" in changes:
        site.policy = site.policy.model_copy(update={"statistics": changes.pop("policy")})
    if "question" in changes:
        changes["scores"] = question_for(site).model_copy(update=changes.pop("question"))
    parameters = changes.pop("parameters", parameters_of(site))
    reply = ask(site, request_for(site).model_copy(update=changes), parameters)
    assert reply.has_error()
    assert RefusalCode(reply.error.code) is code
    assert words in reply.error.reason
    assert site.ledger.spent(1e-4) == 0


def test_constants_of_the_sites_own_would_make_one_row_move_all_scores(tmp_path):
    root = make_sites(tmp_path, count=1, standardise="site", allow_data_dependent_preprocessing=True).directories[0]
    site = opened(root)
    question = ScoreQuestion(model=ModelSpec(name="binary_logistic"), bins=BINS)
    reply = ask(site, request_for(site, scores=question), parameters_of(site))
    assert reply.has_error()
    assert "standardises by this site's own statistics" in reply.error.reason
    assert site.ledger.spent(1e-4) == 0


def test_scores_are_asked_for_alone_and_older_sites_read_every_other_request(root):
    site = opened(root)
    for changes in ({"columns": ("age",)}, {"labels": True}, {"bins": 4}):
        with pytest.raises(ValueError, match="asked for alone"):
            request_for(site, **changes)
    assert "scores" not in json.loads(request_for(site, scores=None).model_dump_json())
    assert "scores" in json.loads(request_for(site).model_dump_json())


def test_the_policy_says_it_in_words(root):
    site = opened(root)
    assert any("how a model scores" in said for said in sentences(site.policy, "north"))
    careful = site.policy.model_copy(update={"statistics": StatisticsAllowance(epsilon=1)})
    assert not any("how a model scores" in said for said in sentences(careful, "north"))


def scored(sites, epsilon, **changes):
    """The release of how a first model scores the rows of `sites`, at an epsilon."""
    first, grid = next(iter(sites.values())), LocalGrid(sites, 1)
    request = request_for(first, len(sites), epsilon=epsilon, **changes)
    nodes, schema = sorted(grid.get_node_ids()), first.workload.schema
    return release_statistics(
        *(grid, nodes, schema, request, ()), minimum=2, deadline=30, parameters=parameters_of(first)
    )


@pytest.fixture(scope="module")
def scored_sites(tmp_path_factory):
    """Three, whose policies let scores leave at any epsilon."""
    assume_server_identity(1)
    sites = open_sites(make_sites(tmp_path_factory.mktemp("sites"), epsilon=None).directories, "clinic")
    for site in sites.values():
        site.policy = site.policy.model_copy(update={"statistics": StatisticsAllowance(epsilon=1e6, scores=True)})
    return sites


@pytest.fixture(scope="module")
def release(scored_sites, tmp_path_factory):
    """Of three sites, with next to no noise; and the exact counts."""
    sites = scored_sites
    parameters = parameters_of(next(iter(sites.values())))
    asked = scored(sites, 5e3)
    exact = []
    for site in sites.values():
        question = question_for(site)
        exact.append(scores_of(site, question, site.model(question.model, parameters).eval()).columns["scores"])
    path = tmp_path_factory.mktemp("release") / "statistics.json"
    write_release(path, asked)
    return read_release(path), parameters, np.concatenate(exact).astype(int)


def test_the_threshold_is_where_f1_is_largest_over_all_sites(release):
    told, parameters, cells = release
    labels, bins = cells // BINS, cells % BINS
    best = []
    for cut in range(1, BINS):
        chosen = bins >= cut
        hits = (chosen & (labels == 1)).sum()
        best.append(2 * hits / (chosen.sum() + labels.sum()))
    decision = threshold_of_release(told, parameters)
    margin = np.log(decision.threshold / (1 - decision.threshold))
    place = int(np.argmin(np.abs(np.linspace(-SPAN, SPAN, BINS - 1) - margin)))
    # Noise decides between cuts that are as good as each other.
    assert best[place] == pytest.approx(max(best), abs=0.01)
    assert decision.value == pytest.approx(max(best), abs=0.02)
    assert decision.examples == pytest.approx(len(cells), abs=2)
    assert (decision.chosen_on, decision.release) == ("training data, by statistics", "scores-1")


def test_noise_does_not_add_up_to_rows_that_nobody_has(scored_sites, release):
    """The counts of a class are added up over the bins, so none of them is put back to 0.

    Each of 18 is below 0 with a probability of 0.4 or more: of three releases not one is once in 10^12.
    """
    releases = [scored(scored_sites, 0.02, run=f"loud-{number}") for number in range(3)]
    counts = [level.value for one in releases for level in one.statistics.columns["scores"].levels.values()]
    assert min(counts) < 0 < max(counts)


def test_scores_of_another_model_choose_nothing(release):
    told, parameters, _ = release
    other = {**parameters, "head.bias": np.ones(1, np.float32)}
    with pytest.raises(DataError, match="the scores are of another model"):
        threshold_of_release(told, other)
    with pytest.raises(DataError, match="the statistics hold no scores"):
        threshold_of_release(told.model_copy(update={"scores": None}), parameters)


def test_too_much_noise_chooses_nothing(release):
    told, parameters, _ = release
    column = told.statistics.columns["scores"]
    loud = {name: figure.model_copy(update={"error": 1e3}) for name, figure in column.levels.items()}
    statistics = told.statistics.model_copy(update={"columns": {"scores": column.model_copy(update={"levels": loud})}})
    with pytest.raises(BundleError, match="leaves too little of a class"):
        threshold_of_release(told.model_copy(update={"statistics": statistics}), parameters)
