"""How often a server may ask: `rounds_per_day` and `minimum_seconds_between_rounds`, by the site's own books.

What counts is written down already, durably and before anything leaves: each charge to the data set in the ledger, and
for evaluations that cost nothing each line of the outbound log. So neither a restart nor another run's name forgets
it. What is kept of both in memory follows them entry by entry. Charges and such evaluations are counted apart, since a
round usually has one of each.

The same question asked again is not another round: a reply that was finished is sent again from the outbox without
asking here, and a charge whose result never left is taken up again.

The books' order is trusted and the clock is not: an entry is taken to be no older than those before it, and a clock
that is set back has to catch up with them. It thus opens nothing.
"""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from fedclaw.protocol.refusal import Refusal, RefusalCode
from fedclaw.site.journal.history import Entry
from fedclaw.site.journal.ledger import Ledger
from fedclaw.site.journal.outbound import OutboundEntry, OutboundLog
from fedclaw.site.policy.policy import Policy

DAY = timedelta(days=1)
_WRITTEN_TO = timedelta(seconds=1)
# The books cut times to whole seconds: what they note may have been so much later.


def check_charge(policy: Policy, ledger: Ledger) -> None:
    """Raise a Refusal with code FREQUENCY if it is too early for another charge to the ledger's data set.

    For a question of several stages before the first: none that was broken off can be taken up again.
    """
    if is_limited(policy):
        check_frequency(policy, ledger.charge_times(policy.rounds_per_day or 1))


def check_evaluation(policy: Policy, outbound: OutboundLog | None) -> None:
    """Raise a Refusal with code FREQUENCY if it is too early for an evaluation that costs nothing.

    A site that keeps no outbound log (a simulation) does not limit them.
    """
    if is_limited(policy) and outbound is not None:
        check_frequency(policy, outbound.evaluation_times(policy.rounds_per_day or 1))


def is_limited(policy: Policy) -> bool:
    """Whether the policy has a limit, for which the outbound log has to be read."""
    return policy.rounds_per_day is not None or policy.minimum_seconds_between_rounds > 0


def check_frequency(policy: Policy, times: Iterable[str], now: datetime | None = None) -> None:
    """Raise a Refusal with code FREQUENCY if another round may not begin now.

    `times` are those of the rounds so far, oldest first, as the outbound log has them.
    """
    began = in_order(times)
    if not began:
        return
    now = now or datetime.now(UTC)
    least = timedelta(seconds=policy.minimum_seconds_between_rounds)
    if least and now < began[-1] + least:
        _refuse(
            f"takes part in a round every {policy.minimum_seconds_between_rounds:g} seconds", began[-1] + least, now
        )
    most = policy.rounds_per_day
    if most is not None and len(began) >= most and now < began[-most] + DAY:
        _refuse(f"takes part in {most} round(s) in 24 hours", began[-most] + DAY, now)


def in_order(times: Iterable[str]) -> list[datetime]:
    """The times as dates, each no earlier than those before it."""
    ordered: list[datetime] = []
    for text in times:
        time = datetime.fromisoformat(text) + _WRITTEN_TO
        ordered.append(max(time, ordered[-1]) if ordered else time)
    return ordered


def _refuse(limit: str, opens: datetime, now: datetime) -> None:
    wait = -(-(opens - now) // timedelta(seconds=1))
    raise Refusal(RefusalCode.FREQUENCY, f"asked too often: this site {limit} at most; ask again in {wait} seconds")


def charge_times(entries: Iterable[Entry], data_set: str) -> list[str]:
    """When the data set was charged, in the ledger's order."""
    bodies = (entry.body for entry in entries)
    return [str(body["time"]) for body in bodies if body["kind"] == "reserve" and body["data_set"] == data_set]


def evaluation_times(lines: Iterable[OutboundEntry]) -> list[str]:
    """When an evaluation was answered at no cost; sent again counts once, refused not at all, charged in the ledger."""
    return [line.time for line in lines if line.is_free_evaluation]
