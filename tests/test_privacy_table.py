"""The table of docs/privacy_table.md, in small: it is made, it goes on, and its page says what was measured."""

import json
import math

import pytest
from rich.console import Console

from experiments.privacy_table.__main__ import main, run
from experiments.privacy_table.cells import AuditResult, CellResult, Store
from experiments.privacy_table.page import render
from experiments.privacy_table.results import Results, Row
from experiments.privacy_table.settings import TableSettings, rows
from fedclaw.audit.findings import AuditOptions
from fedclaw.cli import compose_settings
from fedclaw.errors import UsageError
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
