"""How a site answers: by its policy first, then with one task or another on its own data.

The site decides (the policy bounds what leaves, whatever the server asks), pays before it trains (the ledger
holds a reservation before the first gradient), and writes down what leaves (the outbound log).
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict
from pydantic import BaseModel, Field, ValidationError

from fedclaw import __version__
from fedclaw.errors import LedgerError
from fedclaw.privacy.accounting import NoiseEvent
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.protocol.frozen import explain
from fedclaw.protocol.messages import ABOUT, CHARGE, JSON, PLAN, RECEIPT, RUN, STAGES
from fedclaw.protocol.plan import PLAN_VERSION, Plan
from fedclaw.protocol.questions import Asked
from fedclaw.protocol.refusal import Refusal, RefusalCode
from fedclaw.protocol.statistics import REQUEST, STATISTICS, StatisticsRequest
from fedclaw.site import pipeline
from fedclaw.site.data import check_constants
from fedclaw.site.evaluation import EvaluationAnswer, charged_ledger
from fedclaw.site.journal.outbound import OutboundLog
from fedclaw.site.pipeline import Answering
from fedclaw.site.policy.checks import check_request
from fedclaw.site.privacy_budget import Asking, reserve
from fedclaw.site.secure import SecureIdentity, answer_stage, masking
from fedclaw.site.site import Site
from fedclaw.site.statistics import StatisticsAnswer, request_of
from fedclaw.site.training import TrainingAnswer

log = logging.getLogger(__name__)

MOST_TOLD = 100
"""Refusals of one run that a site remembers having logged."""


@dataclass
class SiteService(Site):
    """A site that answers messages. Implements `fedclaw.transport.base.SiteHandler`."""

    outbound: OutboundLog | None = None
    secure: SecureIdentity | None = None
    """Without one the site takes no part in secure aggregation."""
    _told: tuple[str, set[str]] = field(default=("", set()), init=False, repr=False)
    """The run of the last refusal, and what was logged of that run's refusals."""

    def answer(self, message: Message) -> Message:
        """Train or evaluate as asked, or refuse with a reason; never raises for a bad request."""
        try:
            return Message(self._answer(message), reply_to=message)
        except Refusal as refusal:
            reply = _error(refusal, message)
            self._tell(refusal, _run_name(message, reply))
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
                run=_run_name(message, reply),
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
        asked, kind = self._asked(message), message.metadata.message_type
        asking = _asking(message, asked)
        if kind in STAGES:
            answered = answer_stage(self, self.secure, asked, asking)
        elif (make := _KINDS.get((type(asked), kind))) is None:
            raise Refusal(RefusalCode.MALFORMED, f"messages of type {kind!r} are not answered here")
        else:
            answering = make(self, asking, asked)
            sums = answering.masked and asked.secure is not None
            mask = masking(self.secure, asked, message.content) if sums else None
            answered = pipeline.answer(answering, mask)
        answered[ABOUT] = ConfigRecord({**answered.config_records.get(ABOUT, {}), RUN: asked.run})
        return answered

    def begin(self, message: Message) -> NoiseEvent | None:
        """Do all that comes before training when `message` asks for it, the charge included, and say what that was.

        For a site whose ledger is a copy: what would happen if a server asked. Raises the Refusal that it would get.
        """
        asked = self._asked(message)
        if not isinstance(asked, Plan):
            raise Refusal(RefusalCode.MALFORMED, "no training is asked for")
        with TrainingAnswer(self, _asking(message, asked), asked).ready() as due:
            reserve(self, due)
            return due.mechanism

    def _asked(self, message: Message) -> Asked:
        """What `message` asks, if it is meant for this site and its policy allows it to be asked. Raises Refusal."""
        if _is_for_statistics(message):
            request = request_of(message.content)
            self._check_place(request)
            return request
        plan = _plan_of(message)
        self._check_place(plan)
        check_request(self.policy, plan)
        check_constants(self, plan.preprocessing)
        return plan

    def _check_place(self, asked: Plan | StatisticsRequest) -> None:
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


_KINDS: Mapping[tuple[type, str], Callable[[SiteService, Asking, Any], Answering[Any, Any]]] = {
    (Plan, MessageType.TRAIN): TrainingAnswer,
    (Plan, MessageType.EVALUATE): lambda site, asking, plan: EvaluationAnswer(site, asking, plan, site.outbound),
    (StatisticsRequest, STATISTICS): StatisticsAnswer,
}
"""What is worked out from a site's data, by what asks for it and the message's type."""


def _asking(message: Message, asked: Asked) -> Asking:
    rounds = asked.rounds if isinstance(asked, Plan) else 1
    return Asking(message, asked.federation, asked.run, asked.round, rounds)


def _is_for_statistics(message: Message) -> bool:
    """By its type or by what it holds; after a restart a message has no content."""
    if not message.has_content():
        return False
    return message.metadata.message_type == STATISTICS or REQUEST in message.content.config_records


def _plan_of(message: Message) -> Plan:
    """The plan in `message`. Raises Refusal, of one of another version before anything else of it is read."""
    try:
        text = str(message.content.config_records[PLAN][JSON])
        _check_version(text)
        plan = Plan.model_validate_json(text)
    except (KeyError, ValueError) as error:
        reason = explain(error) if isinstance(error, ValidationError) else f"the message lacks {error}"
        raise Refusal(RefusalCode.MALFORMED, f"the plan cannot be read: {reason}") from error
    if wrong := mechanism_of(plan).contradiction():
        raise Refusal(RefusalCode.MALFORMED, f"the plan cannot be read: {wrong}")
    return plan


class _Version(BaseModel):
    """All that is read of a plan before its version is known to be this one."""

    version: int = Field(default=0, ge=0, le=10**6)


def _check_version(plan: str) -> None:
    version = _Version.model_validate_json(plan).version
    if version != PLAN_VERSION:
        raise Refusal(
            RefusalCode.MALFORMED,
            f"plan version {version} is asked for; this site speaks {PLAN_VERSION} (fedclaw {__version__}): install "
            "the same version at the server and its sites",
        )


def _run_name(message: Message, reply: Message) -> str:
    """The run that `reply` belongs to. After a restart, `message` has no content, and an error never has any."""
    if reply.has_content() and ABOUT in reply.content.config_records:
        return str(reply.content.config_records[ABOUT][RUN])
    try:
        asked = request_of(message.content) if _is_for_statistics(message) else _plan_of(message)
        return asked.run
    except Refusal:
        return f"number {message.metadata.run_id}"


def _error(refusal: Refusal, message: Message) -> Message:
    return Message(Error(code=refusal.code, reason=refusal.reason), reply_to=message)
