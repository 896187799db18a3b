"""Tables and lines in a narrow terminal: every number whole, every name told apart, nothing wider than it is."""

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from fedclaw.report.tables import Figures, parts_in_lines, shortened
from fedclaw.report.terminal import TerminalProgress, receipt_table
from fedclaw.server.cohort_question import Declined
from fedclaw.server.round_report import RoundReport
from fedclaw.server.run_directory import SiteReceipt
from tests.samples import receipt

WIDTHS = [200, 132, 100, 80, 60, 40, 30]
NAMES = [f"university-hospital-of-the-{where}-{n:02}" for n, where in enumerate(("north", "south", "far-away-east"))]


def drawn(renderable, width, soft_wrap=True):
    console = Console(file=io.StringIO(), width=width, soft_wrap=soft_wrap, highlight=False)
    console.print(renderable)
    return console.file.getvalue()


def receipts():
    kinds = (("dp-sgd", "nobody"), ("distributed", "aggregation"), ("none", "everybody"))
    return {
        name: SiteReceipt(
            examples=1234567 + n,
            receipt=receipt(mechanism=kind, trust=trust, epsilon_run=123.4567 + n, epsilon_lifetime=2345.678, rounds=n),
        )
        for n, (name, (kind, trust)) in enumerate(zip(NAMES, kinds, strict=True))
    }


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("soft_wrap", [True, False])
def test_what_a_run_cost_fits_and_has_every_figure_whole(width, soft_wrap):
    text = drawn(receipt_table(receipts()), width, soft_wrap)
    assert max(map(cell_len, text.splitlines())) <= width
    for n in range(3):
        assert str(1234567 + n) in text
        assert f"{123.4567 + n:.3f}" in text
    assert "2345.678" in text
    assert "1e-05" in text
    for name in NAMES:
        assert name in text or any(
            re.search(rf"{name[:5]}[\w-]*…[\w-]*{name[-2:]}\b", line) for line in text.splitlines()
        ), text


def test_names_are_cut_in_the_middle():
    assert shortened("university-hospital-north", 13) == "univer…-north"
    assert shortened("short", 13) == "short"
    assert [cell_len(shortened("大学病院北", width)) <= width for width in range(1, 11)] == [True] * 10
    assert len({shortened(name, 13) for name in NAMES}) == 3


def test_markup_in_a_name_is_text():
    table = Figures(("site", "n"), [("[red]north[/] [/]", "1")])
    for width in WIDTHS:
        assert "[red]north[/] [/]" in drawn(table, width)


def report(number, **changes):
    fields = {
        "round": number,
        "rounds": 20,
        "answered": ("north", "south"),
        "declined": (),
        "silent": (),
        "update_norm": 0.1,
        "train_seconds": 12.3,
        "evaluate_seconds": 0.2,
        "metrics": dict.fromkeys(("loss", "accuracy", "precision", "recall", "f1", "auroc"), 0.1234),
        "test_examples": 10,
        "receipts": {"north": SiteReceipt(examples=9, receipt=receipt())},
    }
    return RoundReport(**{**fields, **changes})


def told(*reports, width=80):
    console = Console(file=io.StringIO(), width=width, soft_wrap=True, highlight=False)
    progress = TerminalProgress(console)
    for one in reports:
        progress.finished_round(one)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [132, 80, 40])
def test_a_rounds_line_breaks_between_its_figures(width):
    text = told(report(7, silent=("a-hospital",)), width=width)
    assert max(map(len, text.splitlines())) <= width
    for figure in ("round   7/20", "2 of 3 sites", "accuracy 0.1234", "auroc 0.1234", "epsilon <= 2.000", "12.5 s"):
        assert figure in text
    assert "without a-hospital (silent)" in text


def test_who_is_missing_is_named_when_that_is_new():
    budget = {"declined": (Declined("east", "budget", "no"),)}
    back = {"answered": ("north", "south", "east")}
    lines = told(
        *(report(number, **changes) for number, changes in enumerate((budget, budget, back, budget), 1)),
        report(5, silent=("east",)),
        report(6),
        report(7, silent=("east",)),
    )
    rounds = lines.split("round ")[1:]
    assert ["without east (budget)" in text for text in rounds] == [True, False, False, True, False, False, False]
    assert ["without east (silent)" in text for text in rounds] == [False] * 4 + [True, False, False]
    assert ["2 of 3 sites" in text for text in rounds] == [True, True, False, True, True, False, True]


def test_parts_longer_than_a_line_have_one_to_themselves():
    assert parts_in_lines(["a" * 5, "b" * 30, "c"], 20) == "aaaaa\n    " + "b" * 30 + "\n    c"
