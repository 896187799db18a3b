"""One exchange with a cohort: a question is asked, in the open or in a secure sum, and what comes back is added.

A secure sum is one over sites that the server never sees the parts of: the stages of SecAgg+ over a Flower Grid.

    query.keys      signed keys of each site              <- what is asked
    query.shares    encrypted shares for its neighbours   <- its neighbours' keys
    query.confirm   whose shares are none                 <- its neighbours' shares, and what proves them
    query.dispute   what an accuser had of it             <- who accuses it (of those that are accused, if any)
    (the question)  masked vector, receipt, ...           <- what is asked, whom to mask it with
    query.consent   signature over the survivors          <- the survivors
    query.unmask    shares of masks                       <- survivors, and the neighbours' signatures over them

Each message holds the values of what is asked, its session (`secure`) with them, and, in the record "secure", what the
protocol says (`fedclaw.privacy.secure_aggregation.messages`). A site that does not answer a stage,
or whose answer is wrong, has dropped out; the others go on as long as they are enough. Until the question itself is
asked nobody has put anything into the sum: who lies before costs nobody anything.
"""

import logging
import secrets
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self, TypeVar

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedclaw.errors import SecureAggregationError, UpdateError
from fedclaw.privacy.secure_aggregation import (
    Advertisement,
    Confirmation,
    Consent,
    MaskedInput,
    Opening,
    Roster,
    ServerSession,
    ShareBundle,
    Unmasking,
    neighbours_needed,
)
from fedclaw.privacy.secure_aggregation.messages import Wire
from fedclaw.privacy.secure_aggregation.parameters import complete_graph, parameters_of
from fedclaw.protocol.arrays import unpack_integers
from fedclaw.protocol.messages import CONFIRM, CONSENT, DISPUTE, HEADER_BYTES, KEYS, MASKED, SECURE, SHARES, UNMASK
from fedclaw.protocol.questions import questions
from fedclaw.protocol.records import MessageRecords, hash_of
from fedclaw.protocol.terms import SecureAggregation, SecureRequest
from fedclaw.server.cohort_question import CohortAnswers, CohortQuestion, Declined, part
from fedclaw.server.grids import StreamingGrid, site_name

log = logging.getLogger(__name__)

W = TypeVar("W", bound=Wire)
Q = TypeVar("Q", bound=CohortQuestion[Any, Any])

STAGE_DEADLINE = 120.0
"""Seconds for a stage in which nobody trains, if the exchange's own deadline is not shorter."""


@dataclass
class _Stage(CohortAnswers):
    """One stage: what each answer is handed to."""

    accept: Callable[[str, RecordDict], None] = lambda _site, _content: None

    def add(self, site: str, content: RecordDict) -> None:
        """Hand an answer over; a site whose answer the protocol rejects has dropped out."""
        try:
            self.accept(site, content)
        except SecureAggregationError as error:
            raise UpdateError(str(error)) from error


@dataclass(frozen=True)
class Seats:
    """The sites of a sum, and how many of them may be lost to it."""

    sites: tuple[str, ...]
    dropouts: int
    corrupt: int
    """Sites that may tell the server all they know, and whose noise is not counted."""
    least: int
    """Survivors without whom there is no sum."""

    @classmethod
    def of(cls, names: Sequence[str], request: SecureRequest, minimum: int) -> Self:
        """Seats for the sites `names` as the settings ask."""
        count = len(names)
        dropouts = int(request.dropouts * count + 0.5)
        least = max(minimum, count - dropouts, 2)
        if request.corrupt > 0 and request.corrupt * count < 1:
            _say_none_is_corrupt(request.corrupt, count)
        return cls(tuple(sorted(names)), dropouts, int(request.corrupt * count), least)

    @property
    def tolerated(self) -> int:
        """Drop-outs after which there is a sum, and enough noise in it."""
        return len(self.sites) - self.least

    def session(
        self,
        length: int,
        step: float,
        *,
        value_range: float | None = None,
        largest_weight: float | None = None,
        content: str = "",
    ) -> SecureAggregation:
        """A fresh session over these sites. Raises SecureAggregationError when none is safe.

        Noise by the sites (no `value_range`) counts on all of them being in one sum: only the complete graph promises
        that against a server that chooses who drops out.
        """
        topology = neighbours_needed(len(self.sites), self.dropouts, self.corrupt)
        if value_range is None:
            topology = complete_graph(len(self.sites), self.corrupt)
        return SecureAggregation(
            session=secrets.token_hex(16),
            sites=self.sites,
            threshold=topology.threshold,
            neighbours=topology.neighbours,
            minimum=self.least,
            length=length,
            step=step,
            value_range=value_range,
            largest_weight=largest_weight,
            content=content,
            tolerated=self.tolerated,
            colluding=self.corrupt,
        )


@cache
def _say_none_is_corrupt(share: float, sites: int) -> None:
    """Once, not in every round."""
    log.info("secure.corrupt=%g of %d sites is less than one: none counts as corrupt", share, sites)


class SecureExchange:
    """One attempt at one sum, over `nodes`. What sites say of themselves, and how long it takes, goes to `question`."""

    def __init__(self, grid: Grid, nodes: Sequence[int], question: CohortQuestion[Any, Any], deadline: float) -> None:
        self._grid = grid
        self._question = question
        self._deadline = deadline
        self._nodes = {site_name(grid, node): node for node in nodes}
        parameters = parameters_of(question.asked)
        self._session = ServerSession(parameters, grid.verifier if isinstance(grid, StreamingGrid) else None)
        # A masked number has four bytes; what a stage says beside it is as small as any header.
        self._reply_bytes = HEADER_BYTES + 4 * parameters.length

    def run(self, before_unmasking: Callable[[], None]) -> None:
        """Hand the sum of what the survivors masked to the question, or tell it why there is none."""
        question = self._question
        try:
            total, survivors = self._sum(before_unmasking)
            question.add_sum(total, [question.besides[site] for site in survivors])
            question.answered = survivors
        except SecureAggregationError as error:
            question.failure = str(error)

    def _sum(self, before_unmasking: Callable[[], None]) -> tuple[NDArray[np.uint32], list[str]]:
        """The sum (d,) modulo 2^32, and the sites in it. Raises SecureAggregationError if there is none."""
        session, content = self._session, self._question.content()
        terms = MessageRecords({**content.config_records})
        self._stage(KEYS, terms, dict.fromkeys(self._nodes), self._protocol(Advertisement, session.add_advertisement))
        self._stage(SHARES, terms, session.key_lists(), self._protocol(ShareBundle, session.add_shares))
        deliveries = session.deliveries()
        self._stage(CONFIRM, terms, deliveries, self._protocol(Confirmation, session.add_confirmation))
        if accusations := session.accusations():
            self._stage(DISPUTE, terms, accusations, self._protocol(Opening, session.add_opening))
        rosters = self._rosters()
        self._question.spent = True
        self._ask(self._questions(self._question.kind, content, rosters), self._deadline, self._add_masked)
        survivors = session.survivor_list()
        everyone = dict.fromkeys(survivors.survivors, survivors)
        self._stage(CONSENT, terms, everyone, self._protocol(Consent, session.add_consent))
        requests = session.unmask_requests()
        before_unmasking()
        self._question.unmasking = True
        self._stage(UNMASK, terms, requests, self._protocol(Unmasking, session.add_unmasking))
        return session.result(), list(survivors.survivors)

    def _rosters(self) -> dict[str, Roster]:
        """Who is left, and masks with whom; whoever was found to have lied is named, enough being left or not."""
        try:
            return self._session.rosters()
        finally:
            excluded = self._session.excluded
            self._question.declined += [Declined(site, "unusable", reason) for site, reason in excluded.items()]

    def _add_masked(self, site: str, content: RecordDict) -> None:
        """An answer to the question itself: what goes beside it is checked first."""
        item = MaskedInput.unpack(_said(content))
        self._match(site, item)
        vector = unpack_integers(part(content.array_records, MASKED))
        self._question.besides[site] = self._question.beside(content)
        self._session.add_masked(item, vector)

    def _stage(
        self,
        kind: str,
        content: RecordDict,
        said: Mapping[str, Wire | None],
        accept: Callable[[str, RecordDict], None],
    ) -> None:
        self._ask(self._questions(kind, content, said), min(self._deadline, STAGE_DEADLINE), accept)

    def _questions(self, kind: str, content: RecordDict, said: Mapping[str, Wire | None]) -> list[Message]:
        messages, arrays = [], hash_of(content.array_records)
        for site, item in said.items():
            own = MessageRecords(dict(content))
            own.reply_bytes = self._reply_bytes
            if item is not None:
                own[SECURE] = ConfigRecord(item.pack())
            messages += questions([self._nodes[site]], self._question.asked.round, kind, own, self._deadline, arrays)
        return messages

    def _ask(self, messages: Sequence[Message], deadline: float, accept: Callable[[str, RecordDict], None]) -> None:
        stage = _Stage(accept=accept)
        stage.collect(self._grid, messages, deadline)
        question = self._question
        question.seconds += stage.seconds
        question.declined += stage.declined
        question.silent = sorted({*question.silent, *stage.silent})

    def _protocol(self, kind: type[W], add: Callable[[W], None]) -> Callable[[str, RecordDict], None]:
        def accept(site: str, content: RecordDict) -> None:
            item = kind.unpack(_said(content))
            self._match(site, item)
            add(item)

        return accept

    def _match(self, site: str, item: Wire) -> None:
        """A site speaks for itself: its name is the one that its connection has."""
        if getattr(item, "site", site) != site:
            raise SecureAggregationError(f"{site} answered as {getattr(item, 'site', '')}")


def _said(content: RecordDict) -> Mapping[str, object]:
    return dict(part(content.config_records, SECURE))


class CohortGrid(StreamingGrid):
    """A simulation's Grid: it answers for a whole cohort at once, without messages."""

    @abstractmethod
    def answer_cohort(self, nodes: Sequence[int], question: CohortQuestion[Any, Any]) -> None:
        """Add to `question` what the replies of `nodes` would have added."""


def ask(
    grid: Grid,
    nodes: Sequence[int],
    question: Q,
    deadline: float,
    before_unmasking: Callable[[], None] = lambda: None,
) -> Q:
    """Ask `question` of `nodes`, within `deadline` seconds, and return it with their answers added up.

    Where it has a session, nothing but the sum over its sites is seen, and `before_unmasking` is called at the point
    from which it cannot be asked again. A sum that cannot be made is no error: nobody has `answered` then, and
    `failure` says why.
    """
    if isinstance(grid, CohortGrid):
        grid.answer_cohort(nodes, question)
    elif question.asked.secure is not None:
        SecureExchange(grid, nodes, question, deadline).run(before_unmasking)
    else:
        question.collect(grid, question.messages(nodes, deadline), deadline)
    return question
