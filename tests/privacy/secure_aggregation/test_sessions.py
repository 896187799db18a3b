"""One secure sum a round: a second is never unmasked, not in this process and not in the next."""

import os
import stat
from pathlib import Path

import pytest

from fedclaw.errors import SecureAggregationError
from fedclaw.privacy.secure_aggregation import Parameters, Sessions, UnmaskRequest
from tests.disks import full_after
from tests.privacy.secure_aggregation.rehearsal import FEDERATION, Exchange, identities, parameters

ME = "site-a"


def start(sessions: Sessions, given: Parameters) -> Exchange:
    """An exchange whose site a is the one of `sessions`."""
    exchange = Exchange(given)
    signers, verifier = identities()
    exchange.sites[ME] = sessions.start(given, ME, signers[ME], verifier)
    return exchange


def ready(sessions: Sessions, given: Parameters) -> tuple[Exchange, UnmaskRequest]:
    """The same, up to the request to unmask."""
    exchange = start(sessions, given)
    return exchange, exchange.consents()[ME]


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "unmasked.jsonl"


def test_a_round_is_not_started_again_once_unmasked() -> None:
    sessions = Sessions()
    start(sessions, parameters(3)).run()
    with pytest.raises(SecureAggregationError, match="round 3 of 'spring' has been unmasked before"):
        start(sessions, parameters(3))
    for other in ({"round": 4}, {"round": 2}, {"run": "summer"}):
        start(sessions, parameters(3, **other)).run()


def test_a_round_that_failed_may_be_tried_again() -> None:
    sessions = Sessions()
    start(sessions, parameters(3)).masked()
    start(sessions, parameters(3)).run()


def test_of_two_sums_of_a_round_the_earlier_is_closed() -> None:
    sessions = Sessions()
    first, request = ready(sessions, parameters(3))
    second, _ = ready(sessions, parameters(3))
    with pytest.raises(SecureAggregationError, match="is closed at site-a"):
        first.sites[ME].unmask(request)
    assert sessions.get(FEDERATION, "spring", 3, second.parameters.session) is second.sites[ME]
    with pytest.raises(SecureAggregationError, match="has no open secure sum with the id"):
        sessions.get(FEDERATION, "spring", 3, first.parameters.session)


def test_the_rule_outlives_the_process(journal: Path) -> None:
    start(Sessions(journal), parameters(3)).run()
    assert stat.S_IMODE(journal.stat().st_mode) == 0o600
    later = Sessions(journal)
    with pytest.raises(SecureAggregationError, match="has been unmasked before"):
        start(later, parameters(3))
    start(later, parameters(3, round=4)).run()
    assert len(journal.read_text().splitlines()) == 2


def test_nothing_is_unmasked_that_cannot_be_written_down(tmp_path: Path) -> None:
    sessions = Sessions(tmp_path / "no-such-directory" / "unmasked.jsonl")
    exchange, request = ready(sessions, parameters(3))
    with pytest.raises(SecureAggregationError, match=r"unmasked\.jsonl cannot be written"):
        exchange.sites[ME].unmask(request)


def test_shares_leave_only_after_the_line_is_on_disk(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies while it writes: no shares have left; a torn line is no line."""
    sessions = Sessions(journal)
    start(sessions, parameters(3, round=2)).run()
    exchange, request = ready(sessions, parameters(3))

    def die(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", die)
        with pytest.raises(KeyboardInterrupt):
            exchange.sites[ME].unmask(request)
    journal.write_bytes(journal.read_bytes()[:-5])
    later = Sessions(journal)
    start(later, parameters(3)).run()
    assert len(journal.read_text().splitlines()) == 2
    with pytest.raises(SecureAggregationError, match="has been unmasked before"):
        start(Sessions(journal), parameters(3))


@pytest.mark.parametrize("room", [0, 16, 40])
def test_nothing_is_unmasked_of_which_a_full_disk_took_a_part(journal: Path, room: int) -> None:
    """The kernel writes what has room, says so, and raises nothing: 16 bytes of a line are no line after a restart."""
    sessions = Sessions(journal)
    start(sessions, parameters(3, round=2)).run()
    whole = journal.read_bytes()
    exchange, request = ready(sessions, parameters(3))
    with (
        full_after(len(whole) + room),
        pytest.raises(SecureAggregationError, match=r"unmasked\.jsonl cannot be written \(File too large\)"),
    ):
        exchange.sites[ME].unmask(request)
    assert journal.read_bytes() == whole
    exchange.sites[ME].unmask(request)
    with pytest.raises(SecureAggregationError, match="has been unmasked before"):
        start(Sessions(journal), parameters(3))


def test_nothing_is_added_to_half_a_line(journal: Path) -> None:
    sessions = Sessions(journal)
    start(sessions, parameters(3, round=2)).run()
    exchange, request = ready(sessions, parameters(3))
    with journal.open("ab") as file:
        file.write(b'{"federation"')
    with pytest.raises(SecureAggregationError, match="ends within a line; start the site again"):
        exchange.sites[ME].unmask(request)
    start(Sessions(journal), parameters(3)).run()


def test_a_damaged_journal_is_named_by_line(journal: Path) -> None:
    start(Sessions(journal), parameters(3)).run()
    journal.write_text("{}\n" + journal.read_text())
    with pytest.raises(SecureAggregationError, match=r"unmasked\.jsonl, line 1, is no unmasked round"):
        Sessions(journal)


def test_the_oldest_of_too_many_is_closed() -> None:
    sessions = Sessions(capacity=2)
    exchanges = [start(sessions, parameters(3, round=number)) for number in range(3)]
    with pytest.raises(SecureAggregationError, match="is closed"):
        exchanges[0].sites[ME].advertise()
    for exchange in exchanges[1:]:
        exchange.sites[ME].advertise()
    sessions.close()
    with pytest.raises(SecureAggregationError, match="has no open secure sum"):
        sessions.get(FEDERATION, "spring", 2, exchanges[2].parameters.session)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedclaw.privacy.secure_aggregation.sessions.MAX_UNMASKED", 1)
    sessions = Sessions()
    start(sessions, parameters(3)).run()
    with pytest.raises(SecureAggregationError, match="remembers no more"):
        start(sessions, parameters(3, round=4))


def test_nothing_to_see() -> None:
    sessions = Sessions()
    start(sessions, parameters(3))
    assert repr(sessions) == "Sessions(1 open, 0 unmasked)"
