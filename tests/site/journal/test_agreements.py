"""A run is agreed to as a whole before its first charge, beside all others that are, or it is refused."""

from datetime import datetime, timedelta
from pathlib import Path

import pytest

from fedclaw.errors import BudgetExceeded
from fedclaw.privacy.accounting import NoiseEvent, epsilon_of
from fedclaw.site.journal.ledger import MOST_AGREEMENTS, Budget, Ledger, Remaining

ROUND = NoiseEvent(0.1, 2.0, 10)
DELTA = 1e-5


def cost(rounds: int, mechanism: NoiseEvent = ROUND) -> float:
    return epsilon_of([NoiseEvent(mechanism.sample_rate, mechanism.noise_multiplier, mechanism.steps * rounds)], DELTA)


def budget_of(rounds: int) -> Budget:
    """What so many rounds cost, and not one more."""
    return Budget((cost(rounds) + cost(rounds + 1)) / 2, DELTA)


def ask(ledger: Ledger, run: str, number: int, rounds: int, budget: Budget, mechanism=ROUND, **changes):
    """The charge of round `number` of `rounds`, as a site asks for it."""
    fields = {"charges": rounds - number + 1, "last": rounds, "days": 7.0, **changes}
    return ledger.reserve(f"{run}-{number}", "f", run, number, mechanism, budget, remaining=Remaining(**fields))


@pytest.fixture
def ledger():
    with Ledger.open(":memory:", "data") as opened:
        yield opened


class _Clock(datetime):
    shift = timedelta()

    @classmethod
    def now(cls, tz=None):
        return datetime.now(tz) + cls.shift


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr("fedclaw.site.journal.ledger.datetime", _Clock)
    monkeypatch.setattr(_Clock, "shift", timedelta())
    return _Clock


def test_a_run_that_cannot_be_paid_to_its_end_is_not_begun(ledger: Ledger) -> None:
    with pytest.raises(BudgetExceeded, match=r"the whole run, 5 round\(s\) from here"):
        ask(ledger, "a", 1, 5, budget_of(4))
    assert len(ledger.entries()) == 1
    for number in range(1, 5):
        ask(ledger, "b", number, 4, budget_of(4))


def test_what_is_agreed_to_is_kept_free_of_others(ledger: Ledger) -> None:
    ask(ledger, "a", 1, 6, budget_of(10))
    with pytest.raises(BudgetExceeded, match="beside 1 unfinished run"):
        ask(ledger, "b", 1, 5, budget_of(10))
    with pytest.raises(BudgetExceeded, match="beside 1 unfinished run"):
        ledger.reserve("statistics", "f", "s", 0, NoiseEvent(1.0, 0.9, 1), budget_of(10))
    ask(ledger, "b", 1, 4, budget_of(10))
    with pytest.raises(BudgetExceeded):
        ask(ledger, "c", 1, 1, budget_of(10))
    for number in range(2, 7):
        ask(ledger, "a", number, 6, budget_of(10))
    for number in range(2, 5):
        ask(ledger, "b", number, 4, budget_of(10))
    assert ledger.spent(DELTA) == pytest.approx(cost(10))


def test_the_end_of_a_run_sets_free_what_it_was_not_asked_for(ledger: Ledger) -> None:
    ask(ledger, "a", 1, 6, budget_of(7))
    ask(ledger, "a", 5, 6, budget_of(7))
    with pytest.raises(BudgetExceeded):
        ask(ledger, "b", 1, 5, budget_of(7))
    ask(ledger, "a", 6, 6, budget_of(7))
    for number in range(1, 5):
        ask(ledger, "b", number, 4, budget_of(7))


def test_an_agreement_expires_and_charges_nothing(ledger: Ledger, clock) -> None:
    ask(ledger, "a", 1, 9, budget_of(10))
    clock.shift = timedelta(days=6)
    ask(ledger, "a", 2, 9, budget_of(10))
    clock.shift = timedelta(days=12)
    with pytest.raises(BudgetExceeded):
        ask(ledger, "b", 1, 8, budget_of(10))
    clock.shift = timedelta(days=14)
    ask(ledger, "b", 1, 8, budget_of(10))
    assert ledger.spent(DELTA) == pytest.approx(cost(3))
    with pytest.raises(BudgetExceeded, match="the whole run, 7"):
        ask(ledger, "a", 3, 9, budget_of(10))


def test_a_clock_that_was_ahead_keeps_no_agreement_for_ever(ledger: Ledger, clock) -> None:
    clock.shift = timedelta(days=4000)
    ask(ledger, "a", 1, 9, budget_of(10))
    clock.shift = timedelta()
    ask(ledger, "b", 1, 9, budget_of(10))


def test_agreements_survive_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger.open(path, "data") as ledger:
        ask(ledger, "a", 1, 6, budget_of(7))
    with Ledger.open(path, "data") as ledger:
        with pytest.raises(BudgetExceeded, match="beside 1"):
            ask(ledger, "b", 1, 2, budget_of(7))
        ask(ledger, "a", 2, 6, budget_of(7))
        assert "agreed" in ledger.entries()[1].body
        assert "agreed" not in ledger.entries()[2].body


def test_another_data_set_has_agreements_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger.open(path, "data") as ledger, Ledger.open(path, "data/test") as other:
        ask(ledger, "a", 1, 6, budget_of(6))
        ask(other, "a", 1, 6, budget_of(6))


def test_terms_that_change_are_agreed_to_anew_or_refused(ledger: Ledger) -> None:
    """A server cannot widen what was agreed to under a run's name."""
    ask(ledger, "a", 1, 4, budget_of(6))
    louder = NoiseEvent(0.1, 1.0, 10)
    with pytest.raises(BudgetExceeded, match="the whole run, 3"):
        ask(ledger, "a", 2, 4, budget_of(6), louder)
    ask(ledger, "b", 1, 2, budget_of(6))
    for number in range(2, 5):
        ask(ledger, "a", number, 100, budget_of(6))
    with pytest.raises(BudgetExceeded):
        ask(ledger, "a", 5, 100, budget_of(6))
    ask(ledger, "b", 2, 2, budget_of(6))


def test_quieter_terms_take_the_place_of_what_was_agreed_to(ledger: Ledger) -> None:
    ask(ledger, "a", 1, 8, budget_of(10))
    with pytest.raises(BudgetExceeded):
        ask(ledger, "b", 1, 5, budget_of(10))
    ask(ledger, "a", 2, 3, budget_of(10), NoiseEvent(0.1, 2.5, 10))
    ask(ledger, "b", 1, 5, budget_of(10))


def test_a_round_that_is_charged_twice_uses_up_what_was_agreed_to(ledger: Ledger) -> None:
    for attempt in range(4):
        ledger.reserve(f"a-1-{attempt}", "f", "a", 1, ROUND, budget_of(4), remaining=Remaining(4, 4, 7.0))
    with pytest.raises(BudgetExceeded):
        ask(ledger, "a", 2, 4, budget_of(4))


def test_the_same_question_again_is_no_other_charge(ledger: Ledger) -> None:
    first = ask(ledger, "a", 1, 3, budget_of(3))
    assert ask(ledger, "a", 1, 3, budget_of(3)) == first
    ask(ledger, "a", 2, 3, budget_of(3))
    ask(ledger, "a", 3, 3, budget_of(3))


def test_a_runs_own_limit_is_asked_for_the_whole_run(ledger: Ledger) -> None:
    with pytest.raises(BudgetExceeded, match="by this run"):
        ledger.reserve("a", "f", "a", 1, ROUND, Budget(None, DELTA), budget_of(3), remaining=Remaining(4, 4, 7.0))
    ledger.reserve("a", "f", "a", 1, ROUND, Budget(None, DELTA), budget_of(4), remaining=Remaining(4, 4, 7.0))


def test_part_of_a_run_at_the_operators_word(ledger: Ledger) -> None:
    ask(ledger, "a", 1, 5, budget_of(2), partly=True)
    ask(ledger, "a", 2, 5, budget_of(2), partly=True)
    with pytest.raises(BudgetExceeded, match="the round asked"):
        ask(ledger, "a", 3, 5, budget_of(2), partly=True)
    assert not ledger.index().agreements


def test_promises_are_bounded_in_number(ledger: Ledger) -> None:
    """Tiny runs of many names do not fill the ledger with promises; one that ends makes room."""
    budget, tiny = budget_of(1000), NoiseEvent(0.1, 50.0, 1)
    for number in range(MOST_AGREEMENTS):
        ask(ledger, f"run-{number}", 1, 2, budget, tiny)
    with pytest.raises(BudgetExceeded, match="waits until one of them ends"):
        ask(ledger, "another", 1, 2, budget, tiny)
    ask(ledger, "short", 1, 1, budget, tiny)
    ask(ledger, "run-0", 2, 2, budget, tiny)
    ask(ledger, "another", 1, 2, budget, tiny)


def test_without_a_limit_there_is_nothing_to_agree_to(ledger: Ledger) -> None:
    ask(ledger, "a", 1, 100_000, Budget(None, DELTA))
    ask(ledger, "b", 1, 5, Budget(None, DELTA), None)
    assert not ledger.index().agreements
