"""How a site takes part in secure aggregation: the stages before and after training, and the masked answer.

What is secret (its keys of the session, its shares of others') is in memory alone: a site that restarts in mid-round
has dropped out of it. That a round was unmasked is written down, and survives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray
from pydantic import ValidationError

from fedclaw.errors import PrivacyError, SecureAggregationError
from fedclaw.privacy.secure_aggregation import (
    Accusations,
    KeyList,
    Roster,
    Sessions,
    ShareDelivery,
    Signer,
    SiteSession,
    SurvivorList,
    UnmaskRequest,
    Verifier,
)
from fedclaw.privacy.secure_aggregation.messages import Wire
from fedclaw.privacy.secure_aggregation.parameters import parameters_of
from fedclaw.protocol.arrays import pack_integers
from fedclaw.protocol.frozen import explain
from fedclaw.protocol.messages import CONFIRM, CONSENT, DISPUTE, KEYS, MASKED, SECURE, SHARES, UNMASK
from fedclaw.protocol.questions import Asked
from fedclaw.protocol.refusal import Refusal, RefusalCode
from fedclaw.site.pipeline import Answering, Mask, ReplyRecords
from fedclaw.site.privacy_budget import check_charge


@dataclass(frozen=True)
class SecureIdentity:
    """What a site needs to take part: its own key, a way to check the others', and its open sessions."""

    signer: Signer
    verifier: Verifier
    sessions: Sessions


def answer_stage(identity: SecureIdentity | None, answering: Answering[Any, Any]) -> RecordDict:
    """The site's part in a stage in which it works nothing out from its data. Raises Refusal."""
    try:
        return RecordDict({SECURE: ConfigRecord(_answer(_known(identity), answering).pack())})
    except SecureAggregationError as error:
        raise Refusal(RefusalCode.SECURE_AGGREGATION, str(error)) from error


def masking(identity: SecureIdentity | None, answering: Answering[Any, Any]) -> Mask:
    """How a vector of integers is masked in the session that the question opened, with the peers in its message.

    Raises Refusal, before anything is paid for, if the site is in no such session or does not hold the shares of those
    peers; so does the mask itself.
    """
    try:
        session = _session(_known(identity), answering.asked)
        roster = Roster.unpack(_said(answering.content))
        session.check_roster(roster)
    except SecureAggregationError as error:
        raise Refusal(RefusalCode.SECURE_AGGREGATION, str(error)) from error

    def mask(vector: NDArray[np.uint32]) -> ReplyRecords:
        try:
            masked = session.mask(vector, roster)
        except SecureAggregationError as error:
            raise Refusal(RefusalCode.SECURE_AGGREGATION, str(error)) from error
        return {MASKED: pack_integers(vector), SECURE: ConfigRecord(masked.pack())}

    return mask


def _answer(identity: SecureIdentity, answering: Answering[Any, Any]) -> Wire:
    kind, content = answering.asking.message.metadata.message_type, answering.content
    if kind == KEYS:
        return _join(identity, answering).advertise()
    session = _session(identity, answering.asked)
    answers: dict[str, Callable[[], Wire]] = {
        SHARES: lambda: session.share(KeyList.unpack(_said(content))),
        CONFIRM: lambda: session.confirm(ShareDelivery.unpack(_said(content))),
        DISPUTE: lambda: session.open_for(Accusations.unpack(_said(content))),
        CONSENT: lambda: session.consent(SurvivorList.unpack(_said(content))),
        UNMASK: lambda: session.unmask(UnmaskRequest.unpack(_said(content))),
    }
    return answers[kind]()


def _join(identity: SecureIdentity, answering: Answering[Any, Any]) -> SiteSession:
    """A new session, if what is asked is what this site would do."""
    site, asked = answering.site, answering.asked
    if asked.secure is None:
        raise SecureAggregationError("the message names no session")
    try:
        answering.check_session(asked.secure)
    except PrivacyError as error:
        raise SecureAggregationError(str(error)) from error
    check_charge(site.policy, site.ledger)
    try:
        parameters = parameters_of(asked)
    except ValidationError as error:
        raise SecureAggregationError(f"the session is not safe: {explain(error)}") from error
    if asked.cohort != len(parameters.sites):
        raise SecureAggregationError(f"the plan says {asked.cohort} sites and its session {len(parameters.sites)}")
    return identity.sessions.start(parameters, site.name, identity.signer, identity.verifier)


def _session(identity: SecureIdentity, asked: Asked) -> SiteSession:
    """The session that this very plan or request opened."""
    if asked.secure is None:
        raise SecureAggregationError("the message names no session")
    session = identity.sessions.get(asked.federation, asked.run, asked.round, asked.secure.session)
    try:
        changed = parameters_of(asked) != session.parameters
    except ValidationError as error:
        raise SecureAggregationError(f"the session is not safe: {explain(error)}") from error
    if changed:
        raise SecureAggregationError("the session's terms have changed since this site joined it")
    return session


def _known(identity: SecureIdentity | None) -> SecureIdentity:
    if identity is None:
        raise SecureAggregationError("this site has no certificate at hand to take part in secure aggregation with")
    return identity


def _said(content: RecordDict) -> dict[str, object]:
    if SECURE not in content.config_records:
        raise SecureAggregationError(f"the message lacks its record {SECURE!r}")
    return dict(content.config_records[SECURE])
