"""A release at the terminal: figures to the digit that their errors leave, and nothing that names can break."""

import io
import math
from datetime import UTC, datetime

import pytest
from rich.console import Console

from fedclaw.privacy.statistics import ColumnStatistics, Estimate, Statistics
from fedclaw.protocol.statistics import StatisticsReceipt
from fedclaw.server.statistics_release import Release, ReleaseMechanism
from fedclaw.statistics import shown, statistics_tables


def figure(value, error=1.0):
    return Estimate(value=value, error=error)


def release(columns, labels):
    receipt = StatisticsReceipt(
        noise_multiplier=3.2,
        delta=1e-5,
        epsilon_run=0.999,
        epsilon_lifetime=None,
        epsilon_left=None,
        ledger_head="ab" * 32,
    )
    mechanism = ReleaseMechanism(
        name="gaussian", placement="sites", trust="nobody", noise={"north": 3.2}, deviation=3.2
    )
    return Release(
        federation="clinic",
        run="statistics-1",
        created=datetime.now(UTC),
        workload="tabular",
        schema_digest="0" * 64,
        epsilon=1.0,
        delta=1e-5,
        mechanism=mechanism,
        sites={"north": receipt},
        statistics=Statistics(count=figure(812.4, 6.4), labels=labels, columns=columns),
    )


def printed(made):
    console = Console(width=160, file=io.StringIO(), record=True)
    for table in statistics_tables(made):
        console.print(table)
    return console.export_text()


def test_every_figure_is_there_with_its_error():
    age = ColumnStatistics(
        missing=figure(80),
        missing_rate=figure(0.1, 0.008),
        mean=figure(54.321, 0.41),
        variance=figure(144, 12),
        quantiles={"0.5": figure(53, 2)},
    )
    ward = ColumnStatistics(
        missing=figure(3), missing_rate=None, levels={"[red]icu": figure(600, 9), "b": figure(200, 9)}
    )
    text = printed(release({"age": age, "ward": ward}, {"no": figure(500, 8), "yes": figure(300, 8)}))
    for words in (
        "812.4 ± 6.4 training examples at 1 sites",
        "54.32 ± 0.41",
        "12.00 ± 0.50",
        "0.1000 ± 0.0080",
        "q0.5",
        "[red]icu",
        "75.0%",
        "62.5%",
        "epsilon 1, delta 1e-05",
        "0.999",
        "unbounded",
        "no limit",
    ):
        assert words in text


def test_what_is_not_known_says_so():
    age = ColumnStatistics(missing=figure(0), missing_rate=None)
    text = printed(release({"age": age}, {}))
    assert text.count("unknown") == 3
    assert "Labels" not in text
    assert "Levels" not in text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (12.345, 0.4, "12.35 ± 0.40"),
        (12345.6, 250.0, "12346 ± 250"),
        (0.5, 0.0, "0.5"),
        (1.0, math.inf, "1"),
        (1e-12, 2e-13, "1e-12 ± 2e-13"),
    ],
)
def test_as_many_digits_as_the_error_leaves(value, error, text):
    assert shown(Estimate.model_construct(value=value, error=error)) == text
