"""The one way by which an answer leaves a site, whatever is asked of its data.

    policy, refuse      is this allowed here, and can it be right? Nothing is paid for a question that is not
    reserve             the ledger is charged, durably, before anything is worked out from the data
    answer              from the data: a contribution whose type says where it comes from (`fedclaw.privacy.provenance`)
    bound, noise        by the mechanism that was asked for; what it cannot cover is refused
    encode, mask        as integers under the session's masks, where only a sum is to be seen
    receipt             what it cost

The service then stores the reply, settles the charge, logs that it leaves, and hands it to what seals it.

A kind of question is a class (`Answering`): training, statistics, evaluation. It has no other way out. Its other half
is a class at the server; `SiteService.kinds` has those that are answered here.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from fedclaw import __version__
from fedclaw.errors import PrivacyError
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.provenance import Part, Permitted, Released, leaving
from fedclaw.protocol.frozen import explain
from fedclaw.protocol.messages import (
    ABOUT,
    CHARGE,
    JSON,
    PLAN,
)
from fedclaw.protocol.questions import Asked
from fedclaw.protocol.refusal import Refusal, RefusalCode
from fedclaw.protocol.terms import PLAN_VERSION, Plan, SecureAggregation
from fedclaw.site.policy.checks import check_request
from fedclaw.site.privacy_budget import Asking, Due, reserve
from fedclaw.site.site import Site, check_constants

A = TypeVar("A")
L = TypeVar("L")

ReplyRecords = Mapping[str, ArrayRecord | MetricRecord | ConfigRecord]

Mask = Callable[[NDArray[np.uint32]], ReplyRecords]
"""Masks a vector (d,), in place, and returns the records that leave."""


@dataclass
class Answering(ABC, Generic[A, L]):
    """One question on its way through a site: `A` is worked out from the data, and `L` leaves."""

    site: Site
    asking: Asking
    asked: Asked
    kind: ClassVar[str]
    """The type of the message that asks."""
    record: ClassVar[str]
    """Its record that holds what is asked, in the stages of a secure sum too."""
    masked: ClassVar[bool] = True
    """Whether an answer is masked where what is asked has a session."""

    @property
    def content(self) -> RecordDict:
        """The records of the message that asks."""
        return self.asking.message.content

    @classmethod
    @abstractmethod
    def read(cls, content: RecordDict) -> Asked:
        """What a message with these records asks. Raises Refusal."""

    @abstractmethod
    def admit(self) -> None:
        """Raise Refusal for what the policy does not let anybody ask, in the stages of a secure sum too."""

    def check_session(self, secure: SecureAggregation) -> None:
        """Check, before a session is joined, that the site would put its answer into its sum.

        Raises Refusal or PrivacyError.
        """
        raise PrivacyError("a secure sum of this was not asked for")

    @contextmanager
    def ready(self) -> Iterator[Due | None]:
        """Check whether the question may be answered, and yield what it is to be charged, if anything.

        Raises Refusal; nothing is paid then. What was prepared is cleaned up at the end.
        """
        yield self.prepare()

    @abstractmethod
    def prepare(self) -> Due | None:
        """See `ready`; for a question with nothing to clean up."""

    @abstractmethod
    def answer(self, charge: str) -> Part[A]:
        """Work out the answer from the data. `charge` is the hash of its ledger entry; empty if nothing was charged."""

    @abstractmethod
    def let_out(self, contribution: Part[A]) -> Released[L] | Permitted[L]:
        """Bound the contribution and add its noise. Raises PrivacyError for what the mechanism does not cover."""

    @abstractmethod
    def pack(self, left: L) -> ReplyRecords:
        """The records of an answer that leaves as it is."""

    def encode(self, contribution: Part[A]) -> Released[NDArray[np.uint32]] | Permitted[NDArray[np.uint32]]:
        """The same, as the integers that secure aggregation adds. Raises PrivacyError."""
        raise PrivacyError("a secure sum of this was not asked for")

    @abstractmethod
    def beside(self) -> ReplyRecords:
        """What goes with the answer, masked or not: its weight, its cost. Called last."""


def answer(asked: Answering[A, L], mask: Mask | None = None) -> RecordDict:
    """The reply to a question, masked by `mask` if it is for a secure sum. Raises Refusal.

    A refusal before the reservation costs nothing.
    """
    with asked.ready() as due:
        charge = "" if due is None else reserve(asked.site, due).hash
        contribution = asked.answer(charge)
    policy = asked.site.policy
    try:
        if mask is None:
            records = asked.pack(leaving(asked.let_out(contribution), policy))
        else:
            records = mask(leaving(asked.encode(contribution), policy))
    except PrivacyError as error:
        raise Refusal(RefusalCode.PRIVACY_REQUIRED, str(error)) from error
    paid = {ABOUT: ConfigRecord({CHARGE: charge})} if charge else {}
    return RecordDict({**records, **asked.beside(), **paid})


class PlanAnswer(Answering[A, L]):
    """An answer to a plan, training or evaluation: a plan is read and admitted the same way for both."""

    asked: Plan
    record: ClassVar[str] = PLAN

    @classmethod
    def read(cls, content: RecordDict) -> Plan:
        """The plan. Raises Refusal, of one of another version before anything else of it is read."""
        try:
            text = str(content.config_records[PLAN][JSON])
            _check_version(text)
            plan = Plan.model_validate_json(text)
        except (KeyError, ValueError) as error:
            reason = explain(error) if isinstance(error, ValidationError) else f"the message lacks {error}"
            raise Refusal(RefusalCode.MALFORMED, f"the plan cannot be read: {reason}") from error
        if wrong := mechanism_of(plan).contradiction():
            raise Refusal(RefusalCode.MALFORMED, f"the plan cannot be read: {wrong}")
        return plan

    def admit(self) -> None:
        """See Answering."""
        check_request(self.site.policy, self.asked)
        check_constants(self.site, self.asked.preprocessing)


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
