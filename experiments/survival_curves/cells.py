"""One row of the table: a release by real sites, and draws for what one release does not tell."""

import csv
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from experiments.survival_curves.settings import Cell, CurveSettings, Placement
from experiments.survival_curves.studies import Study
from fedclaw.errors import FedClawError
from fedclaw.learning.statistics import survival_design
from fedclaw.privacy.survival_estimates import Curve, LogRank, NoisedHistogram, curves, log_rank
from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.message_identity import assume_server_identity
from fedclaw.protocol.statistics import StatisticsRequest, SurvivalQuestion
from fedclaw.server.statistics import release_statistics, with_session
from fedclaw.server.statistics_release import Release
from fedclaw.site.service import SiteService
from fedclaw.site.statistics import statistics_vector
from fedclaw.transport.in_process import LocalGrid, open_sites

Doubles = NDArray[np.float64]

FEDERATION = "experiments"
_LEVEL = 0.95


class Spread(Frozen):
    """Of the draws."""

    median: float
    low: float
    """The tenth percentile."""
    high: float
    """The ninetieth."""


class CellResult(Frozen):
    """What one release, and the draws around it, came to."""

    deviation: float
    """Of the noise in each cell of the sum."""
    epsilon: float
    """The largest that a site's ledger holds for the release."""
    released: tuple[Curve, ...]
    """By group."""
    released_distance: float
    released_log_rank: LogRank | None
    reached: float
    """Bins that the curves of the draws reach, in the mean."""
    distance: Spread
    """Largest distance from the pooled curves, over groups and bins; the same rows, the noise drawn anew."""
    coverage: float | None
    """Of 95% bands, over draws, groups and bins that a curve reaches; rows and noise drawn anew. None: none."""
    p_value: Spread | None
    """The same rows, the noise drawn anew; None: too few were at risk to compare in most draws."""
    seconds: float


class StudyResult(Frozen):
    """A study without noise."""

    title: str
    event: str
    group: str
    groups: tuple[str, ...]
    rows: dict[str, int]
    """By site."""
    events: dict[str, int]
    ends: tuple[float, ...]
    """Of the bins, in days."""
    pooled: tuple[Curve, ...]
    """By group."""
    everybody: Curve
    by_site: dict[str, Curve]
    """Everybody's curve at each site by itself."""
    log_rank: LogRank
    binning: float
    """Largest distance between the binned curves and those of the exact times, at the bins' ends."""


def question_of(study: Study, settings: CurveSettings) -> SurvivalQuestion:
    """What the sites are asked."""
    ends = settings.studies[study.name].ends
    return SurvivalQuestion(
        time="days", event="outcome", event_level="event", group="group", ends=ends, smallest=settings.smallest
    )


def histogram(study: Study, ends: Sequence[float], rows: Any = slice(None)) -> Doubles:
    """The rows' cells, (G, K, 2), one row after another."""
    cells = np.zeros((len(study.groups), len(ends), 2))
    for days, died, group in zip(study.days[rows], study.died[rows], study.of_group[rows], strict=True):
        at = next((number for number, end in enumerate(ends) if days <= end), None)
        cells[group, len(ends) - 1 if at is None else at, int(died and at is not None)] += 1
    return cells


def without_noise(study: Study, settings: CurveSettings) -> StudyResult:
    """The study's curves, pooled and by site. Raises FedClawError unless the sites' own sum is the pooled histogram."""
    ends = settings.studies[study.name].ends
    pooled = histogram(study, ends)
    _require_equal(study, settings, pooled)
    found = log_rank(NoisedHistogram(pooled, 0.0))
    if found is None:
        raise FedClawError(f"{study.name}: the groups have nothing to compare")
    by_group = curves(NoisedHistogram(pooled, 0.0, settings.smallest))
    at = [study.of_site == number for number in range(len(study.sites))]
    return StudyResult(
        title=study.title,
        event=study.event,
        group=study.group,
        groups=study.groups,
        rows={name: int(rows.sum()) for name, rows in zip(study.sites, at, strict=True)},
        events={name: int(study.died[rows].sum()) for name, rows in zip(study.sites, at, strict=True)},
        ends=ends,
        pooled=tuple(by_group),
        everybody=_everybody(pooled, settings),
        by_site={
            name: _everybody(histogram(study, ends, rows), settings) for name, rows in zip(study.sites, at, strict=True)
        },
        log_rank=found,
        binning=max(distance(curve.survival, exact_curve(study, group, ends)) for group, curve in enumerate(by_group)),
    )


def _everybody(cells: Doubles, settings: CurveSettings) -> Curve:
    return curves(NoisedHistogram(cells.sum(axis=0)[None], 0.0, settings.smallest))[0]


def exact_curve(study: Study, group: int, ends: Sequence[float]) -> list[float]:
    """Kaplan and Meier's curve of a group's exact times, at the bins' ends."""
    days, died = study.days[study.of_group == group], study.died[study.of_group == group]
    told, share = [], 1.0
    begins = -np.inf
    for end in ends:
        for moment in np.unique(days[died & (days > begins) & (days <= end)]):
            share *= 1 - (died & (days == moment)).sum() / (days >= moment).sum()
        begins = end
        told.append(float(share))
    return told


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest between two curves, in the bins that both reach."""
    both = min(len(one), len(other))
    return float(np.abs(np.subtract(one[:both], other[:both])).max(initial=0.0))


def run_cell(cell: Cell, studies: Sequence[Study], settings: CurveSettings) -> CellResult:
    """Release by real sites, and draw. Raises FedClawError."""
    began = time.monotonic()
    study = next(study for study in studies if study.name == cell.study)
    release = _released(study, settings, cell)
    assert release.survival is not None
    pooled = histogram(study, settings.studies[study.name].ends)
    told = tuple(release.survival.groups.values())
    wanted = curves(NoisedHistogram(pooled, 0.0, settings.smallest))
    return CellResult(
        deviation=release.mechanism.deviation,
        epsilon=max(receipt.epsilon_run or 0.0 for receipt in release.sites.values()),
        released=told,
        released_distance=_farthest(told, wanted),
        released_log_rank=release.survival.log_rank,
        **_drawn(pooled, wanted, release.mechanism.deviation, settings),
        seconds=round(time.monotonic() - began, 2),
    )


def _farthest(found: Sequence[Curve], wanted: Sequence[Curve]) -> float:
    return max(distance(one.survival, other.survival) for one, other in zip(found, wanted, strict=True))


def _drawn(pooled: Doubles, wanted: Sequence[Curve], deviation: float, settings: CurveSettings) -> dict[str, Any]:
    """What the noise alone, and noise and rows together, come to over draws."""
    random = np.random.default_rng(settings.seed)
    distances, p_values, reached, held = [], [], [], []
    for draw in range(settings.draws):
        found = NoisedHistogram(_noised(pooled, deviation, random), deviation, settings.smallest)
        shown = curves(found, level=_LEVEL, seed=draw)
        distances.append(_farthest(shown, wanted))
        reached += [len(curve.survival) for curve in shown]
        if (tested := log_rank(found, seed=draw)) is not None:
            p_values.append(tested.p_value)
        held += _held(pooled, wanted, deviation, settings, random)
    return {
        "reached": float(np.mean(reached)),
        "distance": _spread(distances),
        "coverage": float(np.mean(held)) if held else None,
        "p_value": _spread(p_values) if len(p_values) > settings.draws / 2 else None,
    }


def _noised(cells: Doubles, deviation: float, random: np.random.Generator) -> Doubles:
    return cells + deviation * random.standard_normal(cells.shape)


def _held(
    pooled: Doubles, wanted: Sequence[Curve], deviation: float, settings: CurveSettings, random: np.random.Generator
) -> list[bool]:
    """Whether bands hold the truth, bin by bin: the pooled curves, of which as many rows are drawn as there are."""
    cells = np.stack(
        [random.multinomial(round(group.sum()), group.ravel() / group.sum()).reshape(group.shape) for group in pooled]
    )
    found = NoisedHistogram(_noised(cells, deviation, random), deviation, settings.smallest)
    return [
        low <= truth <= high
        for curve, whole in zip(curves(found, level=_LEVEL), wanted, strict=True)
        for low, high, truth in zip(curve.low, curve.high, whole.survival, strict=False)
    ]


def _spread(values: Sequence[float]) -> Spread:
    low, median, high = np.quantile(values, (0.1, 0.5, 0.9)).tolist()
    return Spread(median=median, low=low, high=high)


# Real sites: their files, policies, ledgers and noise.


def _require_equal(study: Study, settings: CurveSettings, pooled: Doubles) -> None:
    """Raise FedClawError unless the sites' vectors, as each works its own out, add up to the pooled histogram."""
    with tempfile.TemporaryDirectory() as temporary:
        sites = _open(study, Path(temporary))
        design = survival_design(_schema(sites), question_of(study, settings))
        total = np.sum([statistics_vector(site, design) for site in sites.values()], axis=0)
    if not np.array_equal(design.cells(total), pooled):
        raise FedClawError(f"{study.name}: what the sites add up to is not what the pooled rows give")


def _schema(sites: dict[str, SiteService]) -> Any:
    return next(iter(sites.values())).workload.schema


def _released(study: Study, settings: CurveSettings, cell: Cell) -> Release:
    """One release of real sites in this process."""
    with tempfile.TemporaryDirectory() as temporary:
        sites = _open(study, Path(temporary))
        question = question_of(study, settings)
        request = StatisticsRequest(
            federation=FEDERATION,
            run="survival",
            cohort=len(sites),
            workload="tabular",
            schema_digest=next(iter(sites.values())).schema_digest,
            columns=(),
            labels=False,
            bins=0,
            epsilon=cell.epsilon,
            delta=settings.delta,
            survival=question,
        )
        request = _with_noise(request, cell.placement, sites, settings)
        grid = LocalGrid(sites, 1)
        nodes = sorted(grid.get_node_ids())
        return release_statistics(
            *(grid, nodes, _schema(sites), request, ()), minimum=len(sites), deadline=60, level=_LEVEL
        )


def _with_noise(
    request: StatisticsRequest, placement: Placement, sites: dict[str, SiteService], settings: CurveSettings
) -> StatisticsRequest:
    if placement == "own" or request.survival is None:
        return request
    design = survival_design(_schema(sites), request.survival)
    return with_session(request, sorted(sites), settings.secure, design, len(sites))


def _open(study: Study, root: Path) -> dict[str, SiteService]:
    """A site for each of the study's, with its rows in a file and a ledger of its own."""
    logging.getLogger("fedclaw").setLevel(logging.ERROR)
    assume_server_identity(1)
    schema = {
        "columns": [
            {"name": "days", "kind": "numeric"},
            {"name": "group", "kind": "categorical", "levels": list(study.groups)},
        ],
        "target": {"name": "outcome", "labels": ["censored", "event"]},
    }
    policy = {
        "workloads": ["tabular"],
        "strategies": ["fedavg"],
        "epsilon": None,
        "statistics": {"epsilon": 1e3, "survival": True},
        "delta": 1e-3,
    }
    directories = []
    for number, name in enumerate(study.sites):
        directory = root / name.lower().replace(" ", "-")
        directory.mkdir(parents=True)
        _write_rows(directory / "train.csv", study, study.of_site == number)
        (directory / "schema.yaml").write_text(yaml.safe_dump(schema))
        site = {"name": directory.name, "workload": "tabular", "schema_file": "schema.yaml", "policy": policy}
        (directory / "site.yaml").write_text(yaml.safe_dump({**site, "data": {"train": "train.csv"}}))
        directories.append(directory)
    return open_sites(directories, FEDERATION)


def _write_rows(path: Path, study: Study, rows: NDArray[np.bool_]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["days", "group", "outcome"])
        for days, group, died in zip(study.days[rows], study.of_group[rows], study.died[rows], strict=True):
            writer.writerow([repr(float(days)), study.groups[group], "event" if died else "censored"])
