"""What a ledger says was spent, against the ledger's own figures and by hand."""

import math
import shutil
from datetime import datetime
from pathlib import Path

import pytest

from fedclaw.privacy.accounting import NoiseEvent, epsilon_of
from fedclaw.site.journal.history import Budget, read_ledger
from fedclaw.site.journal.ledger import Ledger
from fedclaw.site.journal.spending import epsilon_over_time, spending_of
from tests.ledgers import ROUND, Run, make_site

DELTA = 1e-3


def budget_of(_name: str) -> Budget:
    return Budget(8.0, DELTA)


def cost(rounds: int, delta: float = DELTA) -> float:
    return epsilon_of([ROUND] * rounds, delta)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_site(tmp_path_factory.mktemp("original") / "site") / "state" / "ledger.sqlite"


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(original, tmp_path / "ledger.sqlite"))


def test_what_was_spent_by_whom(path: Path) -> None:
    spending = spending_of(*read_ledger(path), budget_of)
    assert [item.name for item in spending.data_sets] == ["ward-4", "outpatients"]
    ward = spending.data_set("ward-4")
    assert ward.epsilon == pytest.approx(cost(9))
    assert ward.left == pytest.approx(8 - cost(9))
    assert (ward.rounds, ward.charges, ward.open) == (9, 9, 1)
    runs = [(run.federation, run.run, run.rounds, run.open) for run in ward.runs]
    assert runs == [("heart", "spring", 4, 0), ("heart", "summer", 3, 1), ("icu", "summer", 2, 0)]
    assert [run.epsilon for run in ward.runs] == [pytest.approx(cost(rounds)) for rounds in (4, 3, 2)]
    assert ward.runs[0].mechanisms == (NoiseEvent(0.08, 1.5, 4 * 13),)
    assert ward.run("summer", "icu") == ward.runs[2]
    assert ward.run("summer", "banks") is None
    assert [(use.fingerprint, use.charges) for use in ward.contents] == [("ab" * 32, 4), ("cd" * 32, 5)]


def test_it_says_what_the_ledger_says(path: Path) -> None:
    spending = spending_of(*read_ledger(path), budget_of)
    with Ledger.open(path, "ward-4") as ledger:
        assert spending.head == ledger.head()
        assert spending.entries == len(ledger.entries())
        assert spending.ledger == ledger.entries()[0].body["ledger"]
        ward = spending.data_set("ward-4")
        assert ward.epsilon == ledger.spent(DELTA)
        for run in ward.runs:
            assert run.epsilon == ledger.spent(DELTA, run.run, run.federation)
            assert run.charges == ledger.rounds(run.run, run.federation)


def test_training_without_privacy_is_unbounded_and_leaves_nothing(path: Path) -> None:
    item = spending_of(*read_ledger(path), budget_of).data_set("outpatients")
    assert item.epsilon == item.runs[0].epsilon == math.inf
    assert item.left == 0
    assert item.runs[0].mechanisms == (None,)
    assert spending_of(*read_ledger(path), lambda _: Budget(None, DELTA)).data_set("outpatients").left is None


def test_an_uncharged_data_set_is_listed_when_asked_for(path: Path) -> None:
    item = spending_of(*read_ledger(path), budget_of, also=["ward-5"]).data_set("ward-5")
    assert (item.epsilon, item.left, item.charges, item.runs) == (0.0, 8.0, 0, ())
    with pytest.raises(KeyError):
        spending_of(*read_ledger(path), budget_of).data_set("ward-5")


def test_a_round_that_was_charged_again_is_one_round(path: Path) -> None:
    with Ledger.open(path, "ward-4", "cd" * 32) as ledger:
        ledger.reserve("heart/summer/1", "heart", "summer", 1, ROUND, Budget(None, DELTA))
    run = spending_of(*read_ledger(path), budget_of).data_set("ward-4").run("summer", "heart")
    assert run is not None
    assert (run.rounds, run.charges, run.open) == (3, 4, 2)


def test_epsilon_over_time_ends_where_the_ledger_is(path: Path) -> None:
    points = epsilon_over_time(*read_ledger(path), "ward-4", DELTA, most=100)
    assert [point.charges for point in points] == list(range(1, 10))
    assert [point.epsilon for point in points] == [pytest.approx(cost(rounds)) for rounds in range(1, 10)]
    assert points[-1].epsilon == spending_of(*read_ledger(path), budget_of).data_set("ward-4").epsilon


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_a_long_history_is_thinned_out_and_keeps_its_ends(path: Path, most: int) -> None:
    points = epsilon_over_time(*read_ledger(path), "ward-4", DELTA, most=most)
    assert len(points) == most
    assert points[0].charges == 1
    if most > 1:
        assert points[-1].charges == 9
    assert epsilon_over_time(*read_ledger(path), "nothing", DELTA, most=most) == []


def test_a_clock_that_was_set_back_changes_no_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Past:
        @staticmethod
        def now(_zone: object) -> datetime:
            return datetime.fromisoformat("1970-01-01T00:00:00+00:00")

    path = make_site(tmp_path / "site", [Run("first", 1)]) / "state" / "ledger.sqlite"
    monkeypatch.setattr("fedclaw.site.journal.ledger.datetime", Past)
    with Ledger.open(path, "ward-4", "ab" * 32) as ledger:
        ledger.reserve("later", "heart", "first", 2, ROUND, Budget(None, DELTA))
    run = spending_of(*read_ledger(path), budget_of).data_set("ward-4").runs[0]
    assert run.first > run.last == "1970-01-01T00:00:00+00:00"
    points = epsilon_over_time(*read_ledger(path), "ward-4", DELTA, most=9)
    assert points[0].epsilon < points[1].epsilon
