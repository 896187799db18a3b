"""How a site answers: by its policy first, then with one task or another on its own data.

The site decides (the policy bounds what leaves, whatever the server asks), pays before it trains (the ledger
holds a reservation before the first gradient), and writes down what leaves (the outbound log).
"""

import logging
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict

from fedclaw.errors import LedgerError
from fedclaw.privacy.accounting import NoiseEvent
from fedclaw.protocol.messages import ABOUT, CHARGE, JSON, RECEIPT, RUN, STAGES
from fedclaw.protocol.questions import Asked
from fedclaw.protocol.refusal import Refusal, RefusalCode
from fedclaw.site.evaluation import EvaluationAnswer, charged_ledger
from fedclaw.site.pipeline import Answering, answer
from fedclaw.site.privacy_budget import Asking, reserve
from fedclaw.site.secure import SecureIdentity, answer_stage, masking
from fedclaw.site.site import Site
from fedclaw.site.statistics import StatisticsAnswer
from fedclaw.site.training import TrainingAnswer

log = logging.getLogger(__name__)

MOST_TOLD = 100
"""Refusals of one run that a site remembers having logged."""


@dataclass
class SiteService(Site):
    """A site that answers messages. Implements `fedclaw.transport.base.SiteHandler`."""

    secure: SecureIdentity | None = None
    """Without one the site takes no part in secure aggregation."""
    kinds: tuple[type[Answering[Any, Any]], ...] = (TrainingAnswer, EvaluationAnswer, StatisticsAnswer)
    """The kinds of questions that are answered here."""
    _told: tuple[str, set[str]] = field(default=("", set()), init=False, repr=False)
    """The run of the last refusal, and what was logged of that run's refusals."""

    def answer(self, message: Message) -> Message:
        """Train or evaluate as asked, or refuse with a reason; never raises for a bad request."""
        try:
            return Message(self._answer(message), reply_to=message)
        except Refusal as refusal:
            reply = _error(refusal, message)
            self._tell(refusal, self._run_name(message, reply))
            return reply
        except Exception:
            log.exception("the task failed")
            return _error(
                Refusal(RefusalCode.FAILED, "the site failed at this task; its operator finds why in its log"), message
            )

    def release(self, message: Message, reply: Message, size: int, digest: str) -> None:
        """Settle what the reply cost, keep what the site remembers of it, and log that it leaves.

        In this order, after the reply was stored. Killed before the first, the site has a charge that is open, for this
        very question, and a state that is staged and counts for nothing: asked again, it sends what it stored, or does
        the work anew from where it began. Killed later, it goes on with the rest when the stored reply is sent.
        """
        receipt = None
        if reply.has_error():
            self._spoiled(message)
        elif RECEIPT in reply.content.config_records:
            receipt = str(reply.content.config_records[RECEIPT][JSON])
            about = reply.content.config_records.get(ABOUT, ConfigRecord())
            charge = str(about[CHARGE]) if CHARGE in about else None
            charged_ledger(self, receipt).settle(message.metadata.message_id, charge)
            if charge is not None and message.metadata.message_type == MessageType.TRAIN:
                self.states.commit(self.federation, str(about[RUN]), charge)
        if self.outbound is not None:
            self.outbound.append(
                federation=self.federation,
                run=self._run_name(message, reply),
                round=message.metadata.group_id,
                kind=message.metadata.message_type,
                message_id=message.metadata.message_id,
                size=size,
                digest=digest,
                receipt=receipt,
                refused=reply.has_error(),
            )

    def _tell(self, refusal: Refusal, run: str) -> None:
        """Log a refusal: as a warning once in a run, since the same may follow in each round; then for debugging."""
        detail = str(refusal.__cause__ or "")
        text = refusal.reason if detail in refusal.reason else f"{refusal.reason} ({detail})"
        last, told = self._told
        if run != last or len(told) >= MOST_TOLD:
            told = set()
            self._told = (run, told)
        log.log(logging.DEBUG if text in told else logging.WARNING, "refused: %s", text)
        told.add(text)

    def _spoiled(self, message: Message) -> None:
        """The question is answered with an error. If it was paid for, that is used up, and nothing of it is kept.

        That the site failed may tell of its data; the next attempt pays anew.
        """
        try:
            for charge in self.ledger.settle_unanswered(message.metadata.message_id):
                log.warning("a task failed after it was charged; the charge stands")
                self.states.discard(charge)
        except LedgerError as error:
            # A refusal has to leave even so. Without a ledger nothing is trained, and what is staged is never kept.
            log.error("%s", error)

    def _answer(self, message: Message) -> RecordDict:
        answering = self._answering(message)
        if message.metadata.message_type in STAGES:
            answered = answer_stage(self.secure, answering)
        else:
            sums = answering.masked and answering.asked.secure is not None
            answered = answer(answering, masking(self.secure, answering) if sums else None)
        run = answering.asked.run
        answered[ABOUT] = ConfigRecord({**answered.config_records.get(ABOUT, {}), RUN: run})
        return answered

    def begin(self, message: Message) -> NoiseEvent | None:
        """Do all that comes before training when `message` asks for it, the charge included, and say what that was.

        For a site whose ledger is a copy: what would happen if a server asked. Raises the Refusal that it would get.
        """
        answering = self._answering(message)
        if not isinstance(answering, TrainingAnswer):
            raise Refusal(RefusalCode.MALFORMED, "no training is asked for")
        with answering.ready() as due:
            reserve(self, due)
            return due.mechanism

    def _answering(self, message: Message) -> Answering[Any, Any]:
        """The answer to be, if what is asked is meant for this site and may be asked of it. Raises Refusal."""
        kind = self._kind_of(message)
        asked = kind.read(message.content)
        self._check_place(asked)
        answering = kind(self, Asking(message, asked.federation, asked.run, asked.round, asked.rounds), asked)
        answering.admit()
        return answering

    def _kind_of(self, message: Message) -> type[Answering[Any, Any]]:
        """By the message's type; in a stage of a secure sum, by what it is over. Raises Refusal."""
        named = message.metadata.message_type
        if not message.has_content():
            raise Refusal(RefusalCode.MALFORMED, "the message holds nothing")
        held = message.content.config_records if named in STAGES else {}
        for kind in self.kinds:
            if kind.kind == named or (kind.masked and kind.record in held):
                return kind
        raise Refusal(RefusalCode.MALFORMED, f"messages of type {named!r} are not answered here")

    def _run_name(self, message: Message, reply: Message) -> str:
        """The run that `reply` belongs to. After a restart `message` has no content, and an error never has any."""
        if reply.has_content() and ABOUT in reply.content.config_records:
            return str(reply.content.config_records[ABOUT][RUN])
        try:
            return self._kind_of(message).read(message.content).run
        except Refusal:
            return f"number {message.metadata.run_id}"

    def _check_place(self, asked: Asked) -> None:
        """That this site is who is meant: of this federation, with this workload and schema."""
        if asked.federation != self.federation:
            raise Refusal(
                RefusalCode.FEDERATION, f"this site is of federation {self.federation!r}, not {asked.federation!r}"
            )
        if asked.workload != self.workload.name:
            raise Refusal(
                RefusalCode.WORKLOAD,
                f"workload {asked.workload!r} is asked for; this site holds {self.workload.name!r} data",
            )
        if asked.schema_digest != self.schema_digest:
            raise Refusal(RefusalCode.SCHEMA, "the server's schema is not this site's: compare the two schema files")


def _error(refusal: Refusal, message: Message) -> Message:
    return Message(Error(code=refusal.code, reason=refusal.reason), reply_to=message)
