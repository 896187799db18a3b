"""Statistics of all sites' training data under differential privacy, charged to each site's ledger.

    python -m fedclaw.statistics federation=DIR workload.schema_file=schema.yaml epsilon=0.5
    python -m fedclaw.statistics federation=DIR workload.schema_file=schema.yaml columns=[age,ward] quantiles=[0.5]
    python -m fedclaw.statistics federation=DIR workload.schema_file=schema.yaml bins=0 labels=false

Counts, means, variances, quantiles and missing rates by column, and label counts. Each site adds noise of its own
before anything leaves it, scaled by the bounds that the schema declares (range: [smallest, largest] of a number).

  epsilon, delta   what the release may cost a site, for one unit of its data; a site's policy has to allow it
                   (statistics: {epsilon: …}), and its budget to have it left
  columns          columns of the schema; null: all
  labels           whether to count the labels
  bins, quantiles  bins of each number's histogram and the quantiles read from it; bins=0: none, less noise elsewhere
  secure           none: each site adds all the noise that it needs by itself, and trusts nobody; secagg: their sum
                   alone is seen, with noise that all of them add together, so that it has far less of it. Set
                   secure.largest_weight to a number of training examples that no site exceeds
  scores           a run's directory, RUNS/NAME: in place of columns and labels, how its model of two classes scores
                   the training rows, by label (scores_bins of them); a policy has to say statistics: {scores: true}.
                   export threshold_statistics=FILE then chooses the threshold of its answers by it
  scores_model     final or compressed: which of that run's models
  run              the name that sites charge it to; with the same again, asked of as many, no site pays twice
  out              the file to write; null: RUNS/RUN/statistics.json

With standardise: federated in the schema, a run takes its constants from that file:
    python -m fedclaw.server federation=DIR workload.schema_file=schema.yaml statistics=runs/NAME/statistics.json
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("fedclaw.statistics", __doc__)

import logging
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedclaw import startup
from fedclaw.cli import make_console, naming, run_main, settings_of
from fedclaw.errors import DataError, UsageError
from fedclaw.identity.federation_home import FederationHome
from fedclaw.learning.workload import Schema, schema_digest
from fedclaw.privacy.statistics import ColumnStatistics, Estimate
from fedclaw.protocol.frozen import Frozen, check_settings
from fedclaw.protocol.statistics import MAX_BINS, MAX_SCORE_BINS
from fedclaw.protocol.terms import SecureRequest
from fedclaw.report.tables import Figures, epsilon_words
from fedclaw.server.run_directory import RUN_NAME
from fedclaw.server.settings import ListenAddress, WorkloadChoice
from fedclaw.server.statistics_release import Release, write_release
from fedclaw.server.waiting import Waiting, wait_for_sites
from fedclaw.transport.grpc.limits import Limits

if TYPE_CHECKING:
    from fedclaw.protocol.arrays import Arrays
    from fedclaw.protocol.statistics import ScoreQuestion

log = logging.getLogger("fedclaw.statistics")


class AskedSites(Waiting):
    """conf/statistics.yaml: sites."""

    minimum: int = Field(default=2, ge=1)
    deadline: float = Field(default=600, gt=0)


class StatisticsSettings(Frozen):
    """conf/statistics.yaml, checked."""

    federation: Path
    workload: WorkloadChoice
    address: ListenAddress | None = None
    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    columns: tuple[str, ...] | None = None
    labels: bool = True
    bins: int = Field(default=64, ge=0, le=MAX_BINS)
    quantiles: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    scores: Path | None = None
    scores_model: Literal["final", "compressed"] = "final"
    scores_bins: int = Field(default=33, ge=3, le=MAX_SCORE_BINS)
    secure: SecureRequest | None = None
    runs: Path = Path("runs")
    run: str | None = None
    out: Path | None = None
    sites: AskedSites = AskedSites()
    limits: Limits = Limits()

    @field_validator("secure", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        """secure=none is a group of nulls."""
        return None if isinstance(value, Mapping) and all(item is None for item in value.values()) else value

    @field_validator("run")
    @classmethod
    def _usable(cls, value: str | None) -> str | None:
        if value is not None and not RUN_NAME.match(value):
            raise ValueError("letters, digits, dot, dash and underscore only")
        return value


def main(arguments: Sequence[str], console: Console | None = None) -> None:
    """Ask for statistics as the command line says. Raises FedClawError."""
    from fedclaw.learning.statistics import design_of
    from fedclaw.server.early_checks import read_schema

    settings = settings_of(arguments, "statistics", StatisticsSettings)
    with naming(federation=settings.federation):
        home = FederationHome.open(settings.federation)
    schema = read_schema(settings.workload)
    run = settings.run or f"statistics-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    out = settings.out or settings.runs / run / "statistics.json"
    if out.exists():
        raise UsageError(f"{out} exists already; choose another run= or out=")
    if settings.scores is not None:
        if settings.secure is not None:
            raise UsageError("scores= is asked for openly, with each site's own noise: leave secure= out")
        _check_scored(settings, home, schema)
        columns: tuple[str, ...] = ()
    else:
        try:
            columns = settings.columns or tuple(column.name for column in schema.statistic_columns())
            design_of(schema, columns, settings.labels, settings.bins)
        except DataError as error:
            raise UsageError(f"{settings.workload.schema_file}: {error}") from error
    serve(settings, home, schema, columns, run, out, console or make_console())


def _check_scored(settings: StatisticsSettings, home: FederationHome, schema: Schema) -> None:
    """Raise UsageError for a run whose model cannot be asked about, before anything heavy is loaded."""
    from fedclaw.server.run_directory import RunDirectory

    assert settings.scores is not None
    record = RunDirectory.open(settings.scores).record()
    if record.federation != home.name or record.schema_text != schema.to_json():
        raise UsageError(f"scores={settings.scores}: a run of another federation, or with another schema")
    if len(schema.labels) != 2:
        raise UsageError(f"scores= is for two classes, and the schema has {len(schema.labels)}")


def _scored(settings: StatisticsSettings) -> "tuple[ScoreQuestion, Arrays] | tuple[None, None]":
    """What is asked of scores, and the parameters of the model whose they are."""
    if settings.scores is None:
        return None, None
    from fedclaw.compress.record import read_compressed
    from fedclaw.protocol.statistics import ScoreQuestion
    from fedclaw.server.run_directory import RunDirectory

    directory = RunDirectory.open(settings.scores)
    directory.require_whole()
    record = directory.record()
    spec, parameters = record.model, directory.read_model()
    if settings.scores_model == "compressed":
        compression, parameters = read_compressed(directory)
        spec = compression.model
    return ScoreQuestion(model=spec, bins=settings.scores_bins, preprocessing=record.preprocessing), parameters


def serve(
    settings: StatisticsSettings,
    home: FederationHome,
    schema: Schema,
    columns: tuple[str, ...],
    run: str,
    out: Path,
    console: Console,
) -> None:
    """Listen, wait for the sites, ask those that are connected, and write what they say to `out`."""
    with startup.loading("torch and Flower"):
        from fedclaw.learning.statistics import design_of
        from fedclaw.protocol.message_identity import number_of
        from fedclaw.protocol.statistics import StatisticsRequest
        from fedclaw.server.statistics import release_statistics, with_session
        from fedclaw.transport.grpc.grid import GrpcGrid

        question, parameters = _scored(settings)
    startup.next_step(f"give the same command again with run={run}: whoever has answered does not pay again")
    run_id = number_of(run)
    sites = settings.sites
    with GrpcGrid(home, address=settings.address, run_id=run_id, limits=settings.limits) as grid:
        log.info("statistics %s: listening on %s", run, settings.address or home.descriptor.address)
        wait_for_sites(grid, sites, sites.minimum, "nobody was asked, and nobody paid")
        nodes = sorted(grid.get_node_ids())
        names = tuple(grid.site_name(node) for node in nodes)
        request = check_settings(
            {
                "federation": home.name,
                "run": run,
                "cohort": len(nodes),
                "workload": settings.workload.name,
                "schema_digest": schema_digest(schema.to_json()),
                "columns": columns,
                "labels": settings.labels and question is None,
                "bins": 0 if question else settings.bins,
                "scores": question,
                "epsilon": settings.epsilon,
                "delta": settings.delta,
            },
            StatisticsRequest,
        )
        if settings.secure is not None:
            design = design_of(schema, columns, settings.labels, settings.bins)
            request = with_session(request, names, settings.secure, design, sites.minimum)
        release = release_statistics(
            *(grid, nodes, schema, request, settings.quantiles),
            minimum=sites.minimum,
            deadline=sites.deadline,
            parameters=parameters,
        )
    write_release(out, release)
    for table in statistics_tables(release):
        console.print(table)
    for sentence in (release.claim.protects, release.claim.against):
        console.print(sentence, markup=False)
    console.print(f"statistics: {out}", markup=False, soft_wrap=True)


def statistics_tables(release: Release) -> Iterator[Table | Figures]:
    """Columns of numbers, columns of levels, labels and the cost by site; those that are empty are left out.

    Each figure is shown with its standard error.
    """
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
    most = "" if release.rows_per_person is None else f" ({release.rows_per_person} of a person at most)"
    title = f"{shown(release.statistics.count)} training examples{most} at {len(release.sites)} sites"
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
    title = f"Cost by site: epsilon {release.epsilon:g}, delta {release.delta:g}"
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


if __name__ == "__main__":
    run_main("fedclaw.statistics", __doc__ or "", main)
