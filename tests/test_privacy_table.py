"""The table of docs/privacy_table.md, in small: it is made, it goes on, and its page says what was measured."""

import json
import math

import pytest
from rich.console import Console

from experiments.privacy_table import persons_page
from experiments.privacy_table.__main__ import main, run
from experiments.privacy_table.cells import AuditResult, CellResult, Store
from experiments.privacy_table.page import render
from experiments.privacy_table.results import Results, Row
from experiments.privacy_table.settings import TableSettings, audits, rows
from fedclaw.audit.findings import AuditOptions
from fedclaw.cli import compose_settings
from fedclaw.errors import UsageError
from fedclaw.privacy.claims import Claim
from tests.conftest import run_module

TINY = (
    "seeds=1",
    "epsilons=[8]",
    "audit=null",
    "workers=1",
    "~tasks.digits",
    "tasks.breast_cancer.placements.none.rounds=2",
    "tasks.breast_cancer.placements.local.rounds=2",
    "tasks.breast_cancer.placements.central.rounds=4",
    "tasks.breast_cancer.placements.site.rounds=2",
)


def tiny(root, *more):
    overrides = (*TINY, f"output={root}", f"runs={root / 'runs'}", *more)
    return compose_settings("privacy_table", overrides, TableSettings)


def table_rows(page):
    """The cells of the page's table rows that have six columns."""
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return [line for line in lines if len(line) == 6 and "---" not in line[0] and line[0] != "noise"]


def made_up(accuracies, audit=None):
    """Results whose numbers are known: one task, epsilon 8, these accuracies by placement."""
    settings = compose_settings("privacy_table", (*TINY, f"seeds={len(accuracies['none'])}"), TableSettings)
    options = AuditOptions(confidence=audit.confidence, attacked_rounds=7) if audit else None
    settings = settings.model_copy(update={"audit": options})
    found = []
    for number, cells in enumerate(rows(settings)):
        results = tuple(
            CellResult(
                accuracy=accuracy,
                test_examples=100,
                train_examples=300,
                epsilon=None if cells[0].epsilon is None else cells[0].epsilon - 0.01 * (number + at),
                seconds=1.0,
            )
            for at, accuracy in enumerate(accuracies[cells[0].placement])
        )
        first = cells[0]
        row = Row(task=first.task, placement=first.placement, epsilon=first.epsilon, cells=results, audit=audit)
        found.append(row)
    return Results(settings=settings, rows=tuple(found))


FLAT = dict.fromkeys(("none", "local", "central", "distributed", "site"), (0.5, 0.5))


def test_a_small_table_is_made_and_not_made_twice(tmp_path):
    console = Console(record=True, width=200)
    results = run(tiny(tmp_path), console)
    assert {row.placement for row in results.rows} == {"none", "local", "central", "distributed", "site"}
    assert all(row.mean > 0.5 for row in results.rows if row.placement != "site"), "nothing was learnt"
    for row in results.rows:
        if row.placement == "none":
            assert row.accounted is None
        else:
            assert 7.5 < row.accounted <= 8
    assert (tmp_path / "privacy_table.png").read_bytes().startswith(b"\x89PNG")
    assert Results.read(tmp_path / "runs" / "table.json") == results
    assert (tmp_path / "privacy_table.md").read_text() == render(results, "privacy_table.png")

    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "cells").iterdir()}
    assert len(kept) == 5
    changed = "tasks.breast_cancer.placements.local.training.learning_rate=0.2"
    run(tiny(tmp_path, changed), console)
    assert "5 runs, of which 4 are done" in console.export_text()
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "cells").iterdir()}
    assert kept.items() <= after.items(), "a finished run was run again"
    (new,) = after.keys() - kept.keys()
    assert json.loads(new.read_bytes())["configuration"]["run"]["training"]["learning_rate"] == 0.2


def test_the_page_is_made_from_the_json_alone(tmp_path):
    results = made_up({**FLAT, "local": (0.7, 0.8), "central": (0.9, 0.95)})
    results.write(tmp_path / "runs" / "table.json")
    main(["page", *TINY, f"output={tmp_path}", f"runs={tmp_path / 'runs'}"])
    page = (tmp_path / "privacy_table.md").read_text()
    assert page == render(results, "privacy_table.png")
    lines = {line[0]: line for line in table_rows(page)}
    deviation = 5 * math.sqrt(2)
    assert lines["each site's own"][2:] == ["8", f"75.0 ± {deviation:.1f} %", "7.990", "not run"]
    assert lines["the server's, on the sum"][2:] == ["8", f"92.5 ± {deviation / 2:.1f} %", "7.980", "not run"]
    assert lines["none"][2:] == ["none", "50.0 ± 0.0 %", "unbounded", "not run"]
    # By hand: (40 + 45) / 2 with 2.5 to each side, and (20 + 15) / 2 with 2.5 to each side.
    assert "| Breast cancer | 8 | +42.5 ± 2.5 | +17.5 ± 2.5 |" in page


def test_what_the_audit_found_is_said_and_a_refuted_claim_stands_out():
    honest = AuditResult(epsilon_lower=0.42, confidence=0.9, flagged=(), notes=(), seconds=1)
    page = render(made_up(FLAT, honest), "x.png")
    assert all(line[5] == "≥ 0.42" for line in table_rows(page))
    assert "90% confidence" in page
    assert "at most 7 rounds" in page
    caught = honest.model_copy(update={"flagged": ("noise scale, the sum",)})
    page = render(made_up(FLAT, caught), "x.png")
    assert all(line[5] == "≥ 0.42 **refuted**" for line in table_rows(page))


def test_what_distributed_noise_costs_follows_from_whom_it_counts_on():
    """Of four sites one may drop out and one collude, so the shares of two are enough."""
    page = render(made_up(FLAT), "x.png")
    assert "shares of 2 of the 4 sites are enough" in page
    assert "sqrt(4/2) = 1.41" in page


PERSONS = (
    "seeds=1",
    "epsilons=[3]",
    "audit=null",
    "workers=1",
    "~tasks.digits_by_row.placements.distributed",
    "~tasks.digits_by_person.placements.distributed",
    "~tasks.digits_by_row.placements.local",
    "~tasks.digits_by_person.placements.local",
    "tasks.digits_by_row.placements.none.rounds=1",
    "tasks.digits_by_person.placements.none.rounds=1",
    "tasks.digits_by_row.placements.central.rounds=2",
    "tasks.digits_by_person.placements.central.rounds=2",
)


def of_persons(*more):
    return compose_settings("privacy_table_persons", (*PERSONS, *more), TableSettings)


def made_up_persons(accuracies, found=None):
    """Results by task and placement; guarantees for rows attacked by persons, who found this much."""
    settings, results = of_persons("audit={}"), []
    for cells in rows(settings):
        first = cells[0]
        result = CellResult(
            accuracy=accuracies[first.task],
            test_examples=40,
            train_examples=110,
            train_units=10 if first.task == "digits_by_person" else 110,
            epsilon=None if first.epsilon is None else 2.99,
            seconds=1.0,
        )
        attacked = settings.is_attacked_by_persons(first) and found is not None
        results.append(
            Row(
                task=first.task,
                placement=first.placement,
                epsilon=first.epsilon,
                cells=(result,),
                audit=None,
                by_person=AuditResult(epsilon_lower=found, confidence=0.95, flagged=(), notes=(), seconds=1)
                if attacked
                else None,
            )
        )
    return Results(settings=settings, rows=tuple(results))


def test_the_same_data_by_row_and_by_person(tmp_path):
    """A run of each unit, end to end: the same rows at the same sites, other units in the ledgers."""
    main(["persons", *PERSONS, f"output={tmp_path}", f"runs={tmp_path / 'runs'}"])
    results = Results.read(tmp_path / "runs" / "table.json")
    page = (tmp_path / "privacy_table_persons.md").read_text()
    assert page == persons_page.render(results, "privacy_table_persons.png")
    assert (tmp_path / "privacy_table_persons.png").read_bytes().startswith(b"\x89PNG")
    sizes = {row.task: row.cells[0] for row in results.rows}
    by_row, by_person = sizes["digits_by_row"], sizes["digits_by_person"]
    assert by_row.train_examples == by_row.train_units == by_person.train_examples
    assert by_row.test_examples == by_person.test_examples
    # 1 to 20 rows each.
    assert 6 * by_person.train_units < by_person.train_examples < 15 * by_person.train_units
    assert all(2.8 < row.accounted <= 3 for row in results.rows if row.placement == "central")
    assert f"training rows of {by_person.train_units} persons" in page


def test_what_a_person_costs_is_told():
    page = persons_page.render(made_up_persons({"digits_by_row": 0.9, "digits_by_person": 0.75}), "x.png")
    assert "| Digits | the server's, on the sum | 3 | 90.0 % | 75.0 % | +15.0 |" in page
    assert "| a person | the server's, on the sum | 3 | 75.0 ± 0.0 % | 2.990 | not run |" in page
    assert "about 11 times as large beside the sum" in page
    for unit in ("example", "person"):
        assert Claim(unit).protects in " ".join(page.split())
    assert "## What a row's epsilon says of a person" not in page


@pytest.mark.parametrize(("found", "shown"), [(4.5, "**≥ 4.50**"), (2.0, "≥ 2.00")])
def test_what_persons_find_of_a_guarantee_for_rows_is_no_fault(found, shown):
    page = persons_page.render(made_up_persons({"digits_by_row": 0.9, "digits_by_person": 0.7}, found), "x.png")
    assert f"| Digits | the server's, on the sum | 2.990 | not run | {shown} |" in page
    assert "That is no fault of the mechanism." in " ".join(page.split())
    assert "refuted" not in page
    assert ("In 1 of 1 lines" in page) == (found > 2.99)


def test_persons_attack_the_guarantees_for_rows_that_are_chosen():
    settings = of_persons("audit={canaries: 16}", "epsilons=[1,3]")
    attacks = list(audits(settings))
    by_persons = [(cell, options) for cell, options in attacks if options.rows_together > 1]
    assert [(cell.task, cell.placement, cell.epsilon) for cell, _ in by_persons] == [
        ("digits_by_row", "central", 1),
        ("digits_by_row", "central", 3),
    ]
    assert {options.rows_together for _, options in by_persons} == {20}
    assert len(attacks) - len(by_persons) == len(list(rows(settings)))
    assert list(audits(settings.model_copy(update={"audit": None}))) == []


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("tasks.digits_by_person.dataset.persons.unit=example", "each needs another unit"),
        ("tasks.digits_by_person.dataset.persons.seed=1", "the same deal and model"),
        ("tasks.digits_by_person.dataset.public=0.2", "the same deal and model"),
    ],
)
def test_units_are_compared_on_the_same_deal(override, complaint):
    with pytest.raises(UsageError, match=complaint):
        of_persons(override)


def test_a_damaged_result_is_not_taken_for_one(tmp_path):
    settings = compose_settings("privacy_table", TINY, TableSettings)
    cell = next(rows(settings))[0]
    store = Store(tmp_path)
    result = CellResult(accuracy=0.5, test_examples=1, train_examples=1, epsilon=None, seconds=1)
    assert store.result(cell) is None
    store.write(cell, result)
    assert store.result(cell) == result
    store.path(cell).write_text(store.path(cell).read_text()[:-20])
    assert store.result(cell) is None


def test_central_and_distributed_train_alike():
    with pytest.raises(UsageError, match="train alike"):
        compose_settings(
            "privacy_table",
            ("tasks.digits.placements.distributed=${tasks.digits.placements.none}",),
            TableSettings,
        )


def test_wrong_use_is_one_line(tmp_path):
    done = run_module("experiments.privacy_table", "draw", cwd=tmp_path)
    assert done.code == 2
    assert "unknown command 'draw'; there are: run, page, search" in done.errors
    assert "Traceback" not in done.errors
