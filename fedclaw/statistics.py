"""Statistics of all sites' training data under differential privacy, charged to each site's ledger.

    python -m fedclaw.statistics federation=DIR workload.schema_file=schema.yaml epsilon=0.5
    python -m fedclaw.statistics federation=DIR workload.schema_file=schema.yaml columns=[age,ward] quantiles=[0.5]
    python -m fedclaw.statistics federation=DIR workload.schema_file=schema.yaml bins=0 labels=false
    python -m fedclaw.statistics survival federation=DIR workload.schema_file=schema.yaml \
        survival.time=days survival.event=dead survival.group=arm

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
  encryption.key   the key of that run, where it is encrypted at rest (docs/encryption.md)
  survival         the word, in place of columns and labels: Kaplan-Meier curves of all sites' rows, medians, numbers at
                   risk and, between the groups, the log-rank test, with the noise in their bands and p-values; the
                   curves are drawn beside the file. A policy has to say statistics: {survival: true}
  survival.time, survival.event, survival.event_level, survival.group
                   columns: how long a row was followed; whether the event ended that, and which level of it is the
                   event; and by whose levels curves are told apart (null: one curve)
  survival.bins, survival.ends
                   as many equal bins of time, over the range of the column, or where each ends; fewer have less noise
  survival.smallest, survival.level
                   a curve ends where fewer are at risk, by the noised number; with what probability a band holds
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
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedclaw import startup
from fedclaw.cli import compose_settings, make_console, naming, run_main, split
from fedclaw.errors import DataError, UsageError
from fedclaw.identity.data_keys import EncryptionSettings
from fedclaw.identity.federation_home import FederationHome
from fedclaw.learning.workload import Schema, schema_digest
from fedclaw.privacy.statistics import ColumnStatistics, Estimate
from fedclaw.protocol.frozen import Frozen, check_settings
from fedclaw.protocol.statistics import MAX_BINS, MAX_SCORE_BINS, MAX_SURVIVAL_BINS, SurvivalQuestion
from fedclaw.protocol.terms import SecureRequest
from fedclaw.report.survival import draw, survival_tables
from fedclaw.report.tables import Figures, epsilon_words
from fedclaw.server.run_directory import RUN_NAME
from fedclaw.server.settings import ListenAddress, WorkloadChoice
from fedclaw.server.statistics_release import STATISTICS_FILE, Release, write_release
from fedclaw.server.waiting import Waiting, wait_for_sites
from fedclaw.transport.grpc.limits import Limits

if TYPE_CHECKING:
    from fedclaw.protocol.arrays import Arrays
    from fedclaw.protocol.statistics import ScoreQuestion

log = logging.getLogger("fedclaw.statistics")

SURVIVAL = "survival"
"""The word that asks for survival curves."""


SURVIVAL_ALONE = ("time", "event", "group", "ends")
"""Settings that are null unless survival curves are wanted."""


class AskedSites(Waiting):
    """conf/statistics.yaml: sites."""

    minimum: int = Field(default=2, ge=1)
    deadline: float = Field(default=600, gt=0)


class SurvivalSettings(Frozen):
    """conf/statistics.yaml: survival."""

    time: str | None = None
    event: str | None = None
    event_level: str = "true"
    group: str | None = None
    bins: int = Field(default=20, ge=1, le=MAX_SURVIVAL_BINS)
    ends: tuple[float, ...] | None = Field(default=None, max_length=MAX_SURVIVAL_BINS)
    smallest: float = Field(default=10, ge=0)
    level: float = Field(default=0.95, gt=0, lt=1)

    def question(self) -> SurvivalQuestion:
        """What sites are asked. Raises UsageError."""
        if self.time is None or self.event is None:
            raise UsageError("survival needs survival.time and survival.event, columns of the schema")
        bins = {"ends": self.ends} if self.ends is not None else {"bins": self.bins}
        asked = self.model_dump(include={"time", "event", "event_level", "group", "smallest"})
        return check_settings({**asked, **bins}, SurvivalQuestion)


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
    survival: SurvivalSettings = SurvivalSettings()
    secure: SecureRequest | None = None
    runs: Path = Path("runs")
    run: str | None = None
    out: Path | None = None
    sites: AskedSites = AskedSites()
    limits: Limits = Limits()
    encryption: EncryptionSettings = EncryptionSettings()

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


@dataclass(frozen=True)
class _Question:
    """What of the training data is asked for."""

    columns: tuple[str, ...] = ()
    labels: bool = False
    bins: int = 0
    survival: SurvivalQuestion | None = None


def main(arguments: Sequence[str], console: Console | None = None) -> None:
    """Ask for statistics as the command line says. Raises FedClawError."""
    from fedclaw.server.early_checks import read_schema

    line = split(arguments)
    if line.words not in ((), (SURVIVAL,)):
        raise UsageError(
            f"unknown command {' '.join(line.words)!r}; settings are written key=value, and the one word that there "
            f"is, {SURVIVAL}, asks for survival curves"
        )
    settings = compose_settings("statistics", line.overrides, StatisticsSettings)
    with naming(federation=settings.federation):
        home = FederationHome.open(settings.federation)
    schema = read_schema(settings.workload)
    run = settings.run or f"statistics-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    out = settings.out or settings.runs / run / STATISTICS_FILE
    _check_new(out, drawn=bool(line.words))
    asked = _checked_question(settings, home, schema, survival=bool(line.words))
    serve(settings, home, schema, asked, run, out, console or make_console())


def _check_new(out: Path, *, drawn: bool) -> None:
    """Raise UsageError where a file that is there, or the release itself, would be written over."""
    picture = _picture_of(out)
    if drawn and picture == out:
        raise UsageError(
            f"out={out}: the picture of the curves goes there; name the file of the release, {out.stem}.json"
        )
    for path in (out, picture) if drawn else (out,):
        if path.exists():
            raise UsageError(f"{path} exists already; choose another run= or out=")


def _picture_of(out: Path) -> Path:
    """Where survival curves are drawn, beside their release."""
    return out.with_suffix(".png")


def _checked_question(
    settings: StatisticsSettings, home: FederationHome, schema: Schema, *, survival: bool
) -> _Question:
    """What the settings ask for, but for scores, which need more than is loaded yet. Raises UsageError."""
    from fedclaw.learning.statistics import design_of, survival_design

    asked = settings.survival.model_dump()
    if not survival and (set_ := [name for name in SURVIVAL_ALONE if asked[name] is not None]):
        raise UsageError(
            f"survival.{set_[0]}= goes with the word {SURVIVAL}: python -m fedclaw.statistics {SURVIVAL} …"
        )
    if survival and settings.columns is not None:
        raise UsageError(f"columns= and {SURVIVAL} are two questions: ask one after the other")
    if settings.scores is not None:
        if survival:
            raise UsageError(f"scores= and {SURVIVAL} are two questions: ask one after the other")
        if settings.secure is not None:
            raise UsageError("scores= is asked for openly, with each site's own noise: leave secure= out")
        _check_scored(settings, home, schema)
        return _Question()
    try:
        if survival:
            question = settings.survival.question()
            survival_design(schema, question)
            return _Question(survival=question)
        columns = settings.columns or tuple(column.name for column in schema.statistic_columns())
        design_of(schema, columns, settings.labels, settings.bins)
    except DataError as error:
        raise UsageError(f"{settings.workload.schema_file}: {error}") from error
    return _Question(columns, settings.labels, settings.bins)


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

    directory = RunDirectory.open(settings.scores, settings.encryption.keyring())
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
    asked: _Question,
    run: str,
    out: Path,
    console: Console,
) -> None:
    """Listen, wait for the sites, ask those that are connected, and write what they say to `out`."""
    with startup.loading("torch and Flower"):
        from fedclaw.learning.statistics import design_for
        from fedclaw.protocol.message_identity import number_of
        from fedclaw.protocol.statistics import StatisticsRequest
        from fedclaw.server.statistics import release_statistics, with_session
        from fedclaw.transport.grpc.grid import GrpcGrid

        scores, parameters = _scored(settings)
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
                "columns": asked.columns,
                "labels": asked.labels,
                "bins": asked.bins,
                "scores": scores,
                "survival": asked.survival,
                "epsilon": settings.epsilon,
                "delta": settings.delta,
            },
            StatisticsRequest,
        )
        if settings.secure is not None:
            design = design_for(schema, request)
            request = with_session(request, names, settings.secure, design, sites.minimum)
        release = release_statistics(
            *(grid, nodes, schema, request, settings.quantiles),
            minimum=sites.minimum,
            deadline=sites.deadline,
            parameters=parameters,
            level=settings.survival.level,
        )
    write_release(out, release)
    for table in statistics_tables(release):
        console.print(table)
    for sentence in (release.claim.protects, release.claim.against):
        console.print(sentence, markup=False)
    console.print(f"statistics: {out}", markup=False, soft_wrap=True)
    if release.survival is not None:
        plot = _picture_of(out)
        draw(release.survival, plot)
        console.print(f"plot: {plot}", markup=False, soft_wrap=True)


def statistics_tables(release: Release) -> Iterator[Table | Figures]:
    """Columns of numbers, columns of levels, labels, survival curves and the cost by site; no empty ones.

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
    if release.survival is not None:
        yield from survival_tables(release.survival)
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
