"""A release of statistics, as a person at the terminal sees it: each figure with its standard error."""

import math
from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from fedclaw.privacy.statistics import ColumnStatistics, Estimate
from fedclaw.report.tables import Figures, epsilon_words
from fedclaw.server.statistics_release import Release


def statistics_tables(release: Release) -> Iterator[Table | Figures]:
    """Columns of numbers, columns of levels, labels and the cost by site; those that are empty are left out."""
    numbers = {name: column for name, column in release.statistics.columns.items() if not column.levels}
    levels = {name: column.levels for name, column in release.statistics.columns.items() if column.levels}
    if release.scores is not None:
        # Bins are for a threshold, not for the eye.
        levels = {}
    if numbers:
        yield _numbers(release, numbers)
    if levels:
        yield _levels(levels)
    if release.statistics.labels:
        yield _labels(release.statistics.labels)
    yield _cost(release)


def _numbers(release: Release, columns: dict[str, ColumnStatistics]) -> Figures:
    quantiles = list(dict.fromkeys(key for column in columns.values() for key in column.quantiles))
    title = f"{shown(release.statistics.count)} training examples at {len(release.sites)} sites"
    table = Figures(("column", "missing", "mean", "deviation", *(f"q{key}" for key in quantiles)), title=title)
    for name, column in columns.items():
        table.add_row(
            name,
            shown(column.missing_rate),
            shown(column.mean),
            shown(_deviation(column.variance)),
            *(shown(column.quantiles.get(key)) for key in quantiles),
        )
    return table


def _deviation(variance: Estimate | None) -> Estimate | None:
    if variance is None:
        return None
    deviation = math.sqrt(variance.value)
    # Near 0 the root has no tangent; there its error is that of the root of the variance's own.
    error = min(variance.error / (2 * deviation), math.sqrt(variance.error)) if deviation else math.sqrt(variance.error)
    return Estimate(value=deviation, error=error)


def _levels(columns: dict[str, dict[str, Estimate]]) -> Table:
    table = Table("column", "level", title="Levels", title_justify="left")
    _add_counts(table, [((name,), levels) for name, levels in columns.items()])
    return table


def _labels(counts: dict[str, Estimate]) -> Table:
    table = Table("label", title="Labels", title_justify="left")
    _add_counts(table, [((), counts)])
    return table


def _add_counts(table: Table, groups: list[tuple[tuple[str, ...], dict[str, Estimate]]]) -> None:
    table.add_column("examples", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    for before, counts in groups:
        total = sum(count.value for count in counts.values())
        for name, count in counts.items():
            share = f"{count.value / total:.1%}" if total else "unknown"
            table.add_row(*map(escape, before), escape(name), shown(count), share)


def _cost(release: Release) -> Figures:
    title = f"Cost by site: epsilon {release.epsilon:g}, delta {release.delta:g}, {release.unit}"
    table = Figures(("site", "noise", "epsilon: this run", "lifetime", "left"), title=title)
    for site, receipt in release.sites.items():
        table.add_row(
            site,
            f"{receipt.noise_multiplier:.3g}",
            epsilon_words(receipt.epsilon_run),
            epsilon_words(receipt.epsilon_lifetime),
            epsilon_words(receipt.epsilon_left, "no limit"),
        )
    return table


def shown(figure: Estimate | None) -> str:
    """The value to the digit that its standard error leaves: 12.3 ± 0.4."""
    if figure is None:
        return "unknown"
    if figure.error <= 0 or not math.isfinite(figure.error):
        return f"{figure.value:.6g}"
    digits = max(0, 1 - math.floor(math.log10(figure.error)))
    if digits > 9:
        return f"{figure.value:.4g} ± {figure.error:.1g}"
    return f"{figure.value:.{digits}f} ± {figure.error:.{digits}f}"
