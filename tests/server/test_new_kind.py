"""A kind of question that the house does not know: a class at the site and one at the server, and nothing else.

Counts of one input within public edges. One example is in one cell, so that it moves the counts by 1 in L2 norm.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from fedclaw.errors import UpdateError
from fedclaw.learning.workload import schema_digest
from fedclaw.privacy.distributed import choose_step
from fedclaw.privacy.mechanisms.local_noise import Doubles, OwnNoise
from fedclaw.privacy.mechanisms.shared_noise import SharedStatistics, session_shares
from fedclaw.privacy.provenance import Bounded, Part, Permitted, Released
from fedclaw.protocol.arrays import pack, unpack
from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.messages import JSON, MASKED, RECEIPT, SUM
from fedclaw.protocol.receipt import BudgetSpent
from fedclaw.protocol.records import MessageRecords
from fedclaw.protocol.refusal import Refusal, RefusalCode
from fedclaw.protocol.terms import SecureAggregation, SecureRequest
from fedclaw.server.cohort_question import CohortQuestion, part, receipt_in
from fedclaw.server.exchange import Seats, ask
from fedclaw.site.pipeline import Answering, ReplyRecords
from fedclaw.site.policy.checks import check_session
from fedclaw.site.privacy_budget import Account, Due
from fedclaw.site.service import SiteService
from fedclaw.transport.in_process import LocalGrid, local_grid, open_sites
from tests.made_tables import make_sites

HISTOGRAM, COUNTS = "histogram", "counts"
KIND = "query.histogram"
EDGES = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
DELTA = 1e-4


class HistogramRequest(Frozen):
    """The frozen question. Without `epsilon` the counts are to leave as they are."""

    federation: str
    run: str
    round: int = 0
    rounds: int = 1
    cohort: int
    workload: str
    schema_digest: str
    column: int = Field(ge=0)
    edges: tuple[float, ...] = Field(min_length=2)
    epsilon: float | None = Field(gt=0)
    delta: float = DELTA
    secure: SecureAggregation | None = None

    @property
    def cells(self) -> int:
        return len(self.edges) - 1

    @property
    def mechanism(self) -> OwnNoise | SharedStatistics | None:
        if self.epsilon is None:
            return None
        own = OwnNoise.calibrated(self.epsilon, self.delta)
        return own if self.secure is None else SharedStatistics(session_shares(self.secure, 1.0, own.noise_multiplier))


class HistogramReceipt(BudgetSpent):
    mechanism: Literal["histogram"] = "histogram"
    noise_multiplier: float = Field(ge=0)


@dataclass
class HistogramAnswer(Answering[Doubles, Doubles]):
    """The site's half."""

    asked: HistogramRequest
    kind: ClassVar[str] = KIND
    record: ClassVar[str] = HISTOGRAM

    @classmethod
    def read(cls, content: RecordDict) -> HistogramRequest:
        try:
            return HistogramRequest.model_validate_json(str(content.config_records[HISTOGRAM][JSON]))
        except (KeyError, ValidationError) as error:
            raise Refusal(RefusalCode.MALFORMED, f"the request cannot be read: {error}") from error

    def admit(self) -> None:
        secure = self.asked.secure
        if secure is not None:
            check_session(self.site.policy, secure, noised=True)
        elif self.site.policy.require_secure_aggregation:
            raise Refusal(RefusalCode.SECURE_AGGREGATION, "counts in the clear were asked for")

    def check_session(self, secure: SecureAggregation) -> None:
        if secure.length != self.asked.cells:
            raise Refusal(RefusalCode.SECURE_AGGREGATION, "the secure sum is of another length than the counts")

    def prepare(self) -> Due:
        mechanism = self.asked.mechanism
        return Due(self.asking, None if mechanism is None else mechanism.event, Account.training(self.site))

    def answer(self, charge: str) -> Part[Doubles]:
        values = self.site.data.train.inputs[:, self.asked.column]
        return Bounded(histogram(values, self.asked.edges), 1.0)

    def let_out(self, contribution: Part[Doubles]) -> Released[Doubles] | Permitted[Doubles]:
        mechanism = self.asked.mechanism
        if mechanism is None:
            return Permitted(contribution.value, "allow_training_without_privacy")
        return mechanism.let_out(contribution, self.site.source)

    def encode(self, contribution: Part[Doubles]) -> Released[NDArray[np.uint32]]:
        mechanism = self.asked.mechanism
        assert isinstance(mechanism, SharedStatistics)
        return mechanism.encode(contribution, self.site.source)

    def pack(self, left: Doubles) -> ReplyRecords:
        return {SUM: pack({COUNTS: left.astype(np.float32)})}

    def beside(self) -> ReplyRecords:
        mechanism = self.asked.mechanism
        receipt = HistogramReceipt(
            noise_multiplier=0.0 if mechanism is None else mechanism.event.noise_multiplier,
            **Account.training(self.site).spent(self.asking, self.asked.delta),
        )
        return {RECEIPT: ConfigRecord({JSON: receipt.model_dump_json()})}


@dataclass
class HistogramQuestion(CohortQuestion[HistogramReceipt, Doubles]):
    """The server's half."""

    asked: HistogramRequest
    total: Doubles = field(init=False)
    kind: ClassVar[str] = KIND

    def __post_init__(self) -> None:
        self.total = np.zeros(self.asked.cells)

    def content(self) -> MessageRecords:
        return MessageRecords({HISTOGRAM: ConfigRecord({JSON: self.asked.model_dump_json()})})

    def beside(self, content: RecordDict) -> HistogramReceipt:
        receipt, mechanism = receipt_in(content, HistogramReceipt), self.asked.mechanism
        if receipt.noise_multiplier != (0.0 if mechanism is None else mechanism.event.noise_multiplier):
            raise UpdateError("the privacy receipt contradicts what was asked")
        return receipt

    def add_open(self, content: RecordDict, beside: HistogramReceipt) -> None:
        counts = unpack(part(content.array_records, SUM)).get(COUNTS)
        if counts is None or counts.shape != self.total.shape or not np.all(np.abs(counts) < 1e9):
            raise UpdateError(f"the answer holds no counts of {len(self.total)} cells")
        self.total += counts

    def add_sum(self, total: NDArray[np.uint32], besides: Sequence[HistogramReceipt]) -> None:
        mechanism = self.asked.mechanism
        assert isinstance(mechanism, SharedStatistics)
        self.total += mechanism.shares.decode(total)

    def read(self) -> Doubles:
        return self.total


def histogram(values: np.ndarray, edges: Sequence[float]) -> Doubles:
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].astype(np.float64)


class Watching(LocalGrid):
    """A server that keeps every answer to the question itself."""

    seen: list[RecordDict]

    def _answer(self, message):
        reply = super()._answer(message)
        if message.metadata.message_type == KIND and reply.has_content():
            self.seen.append(reply.content)
        return reply


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    constants = {"dose": (5000.0, 3000.0), "age": (60.0, 20.0)}
    root: Path = tmp_path_factory.mktemp("sites")
    return make_sites(
        root, standardise="schema", constants=constants, epsilon=None, allow_training_without_privacy=True
    )


@pytest.fixture
def sites(made) -> dict[str, SiteService]:
    opened = open_sites(made.directories, "clinic")
    for site in opened.values():
        site.kinds = (*site.kinds, HistogramAnswer)
    return opened


def asked(sites: dict[str, SiteService], epsilon: float | None, **changes: Any) -> HistogramQuestion:
    first = next(iter(sites.values()))
    grid = local_grid(sites, "counts")
    watching = Watching(sites, grid.run.run_id, grid.verifier)
    watching.seen = []
    request = HistogramRequest(
        **{
            "federation": "clinic",
            "run": "counts",
            "cohort": len(sites),
            "workload": "tabular",
            "schema_digest": schema_digest(first.workload.schema.to_json()),
            "column": 0,
            "edges": EDGES,
            "epsilon": epsilon,
            **changes,
        }
    )
    question = ask(watching, sorted(watching.get_node_ids()), HistogramQuestion(request), 10.0)
    question.seen = watching.seen  # type: ignore[attr-defined]
    return question


def session(sites: dict[str, SiteService], epsilon: float) -> SecureAggregation:
    seats = Seats.of(sorted(sites), SecureRequest(dropouts=0.25, corrupt=0.0), 3)
    noise = OwnNoise.calibrated(epsilon, DELTA).noise_multiplier
    cells = len(EDGES) - 1
    return seats.session(cells, choose_step(1.0, cells, len(sites), noise, honest=seats.least))


def pooled(sites: dict[str, SiteService]) -> Doubles:
    values = np.concatenate([site.data.train.inputs[:, 0] for site in sites.values()])
    assert len(values) == 800
    return histogram(values, EDGES)


def test_in_the_open_the_counts_are_those_of_the_pooled_data_and_cost_without_bound(sites):
    question = asked(sites, None)
    np.testing.assert_array_equal(question.read(), pooled(sites))
    assert sorted(question.answered) == sorted(question.besides) == sorted(sites)
    for name, site in sites.items():
        assert question.besides[name].epsilon_run is None
        assert site.ledger.spent(DELTA) == np.inf


def test_exact_counts_leave_by_the_clause_of_the_policy_alone(sites):
    for site in sites.values():
        site.policy = site.policy.model_copy(update={"allow_training_without_privacy": False})
    question = asked(sites, None)
    assert not question.read().any()
    assert {item.code for item in question.declined} == {"privacy_required"}
    assert not question.seen


def test_the_sites_own_noise_has_the_right_scale_and_is_paid_for(sites):
    """30 sums of 6 cells over 4 sites: the deviation is within 4.5 of its errors."""
    noise = OwnNoise.calibrated(1.0, DELTA).noise_multiplier
    found = np.array([asked(sites, 1.0, run=f"counts-{number}").read() for number in range(30)]) - pooled(sites)
    assert np.std(found) == pytest.approx(2 * noise, rel=4.5 / np.sqrt(2 * found.size))
    for site in sites.values():
        assert site.ledger.rounds("counts-7") == 1
        assert 0.9 < site.ledger.spent(DELTA, run="counts-7", federation="clinic") <= 1.0


def test_a_secure_sum_shows_no_sites_counts(sites):
    epsilon = 8.0
    question = asked(sites, epsilon, secure=session(sites, epsilon))
    assert question.failure is None
    assert sorted(question.answered) == sorted(sites)
    noise = OwnNoise.calibrated(epsilon, DELTA).noise_multiplier
    assert np.abs(question.read() - pooled(sites)).max() < 8 * noise
    assert len(question.seen) == len(sites)
    for content in question.seen:
        assert set(content.array_records) == {MASKED}
    for site in sites.values():
        assert 0.9 * epsilon < site.ledger.spent(DELTA) <= epsilon


def test_a_session_that_the_policy_does_not_accept_is_not_joined_and_costs_nothing(sites):
    for site in sites.values():
        site.policy = site.policy.model_copy(update={"minimum_cohort": 5})
    question = asked(sites, 8.0, secure=session(sites, 8.0))
    assert question.failure is not None
    assert not question.answered
    assert all(site.ledger.spent(DELTA) == 0 for site in sites.values())


def test_what_is_meant_for_others_or_is_not_known_here_is_refused(sites):
    assert {item.code for item in asked(sites, 1.0, federation="another").declined} == {"federation"}
    assert {item.code for item in asked(sites, 1.0, schema_digest="0" * 64).declined} == {"schema"}
    for site in sites.values():
        site.kinds = site.kinds[:-1]
    assert {item.code for item in asked(sites, 1.0).declined} == {"malformed"}
    assert all(site.ledger.spent(DELTA) == 0 for site in sites.values())
