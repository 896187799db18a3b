"""How settings were chosen: no test row of a hospital is looked at.

The recipe without privacy: by cross-validation inside each hospital's training rows. In each fold, hospitals train on
the rest of their training rows, with statistics of those rows, and are tested on the fold; the score is the one of the
table, the mean over the hospitals. It touches the private rows many times over, which is why private settings are not
chosen like that: they are tried on made-up hospitals, and cost nothing.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import Field, ValidationError
from rich.console import Console

from experiments.heart_disease.cells import run_cell
from experiments.heart_disease.made_up import made_up_rows
from experiments.heart_disease.prepare import Hospitals, folds, prepare
from experiments.heart_disease.settings import (
    Cell,
    HeartSettings,
    Placement,
    plain_cell,
    private_cell,
    quickened,
)
from experiments.workers import in_workers
from fedclaw.errors import UsageError
from fedclaw.protocol.frozen import Frozen, explain


class Tried(Frozen):
    """One candidate: its name in words and its score, the mean over all its runs."""

    name: str
    score: float = Field(ge=0, le=1)
    runs: int


class SearchResult(Frozen):
    """All candidates, the best first."""

    recipe: tuple[Tried, ...]
    private: dict[Placement, tuple[Tried, ...]]


@dataclass(frozen=True)
class _Trial:
    candidate: str
    cell: Cell
    hospitals: Hospitals


def search(settings: HeartSettings, hospitals: Hospitals, console: Console) -> SearchResult:
    """Try every candidate. Raises FedClawError."""
    settings = quickened(settings) if settings.quick else settings
    recipe = _best_first(settings, list(_recipe_trials(settings, hospitals)), "recipe", console)
    placements: Sequence[Placement] = list(settings.private.methods) if settings.private else []
    private = {
        placement: _best_first(settings, list(_private_trials(settings, placement)), f"private {placement}", console)
        for placement in placements
    }
    return SearchResult(recipe=recipe, private=private)


def read_search(path: Path) -> SearchResult | None:
    """What an earlier search found; None if there was none. Raises UsageError for a damaged file."""
    if not path.exists():
        return None
    try:
        return SearchResult.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UsageError(f"{path} is no search of this experiment ({explain(error)}); remove it") from error


def _recipe_trials(settings: HeartSettings, hospitals: Hospitals) -> Iterable[_Trial]:
    chosen = settings.search.recipe
    for repeat in range(chosen.repeats):
        for number, fold in enumerate(folds(hospitals, chosen.folds, repeat)):
            for name, method in chosen.candidates().items():
                cell = plain_cell(settings, "shared", name, method)
                yield _Trial(name, replace(cell, seed=repeat * chosen.folds + number), fold)


def _private_trials(settings: HeartSettings, placement: Placement) -> Iterable[_Trial]:
    chosen = settings.search.private
    for seed in chosen.seeds:
        hospitals = prepare(made_up_rows(seed))
        for name, method in chosen.candidates().items():
            cell = private_cell(settings, placement, method, chosen.epsilon)
            yield _Trial(name, replace(cell, seed=seed), hospitals)


def _best_first(settings: HeartSettings, trials: list[_Trial], what: str, console: Console) -> tuple[Tried, ...]:
    scores: dict[str, list[float]] = {trial.candidate: [] for trial in trials}
    for number, (at, score) in enumerate(in_workers(_score, trials, settings.workers), 1):
        scores[trials[at].candidate].append(score)
        if number % len(scores) == 0 or number == len(trials):
            console.print(f"{what}: {number}/{len(trials)}", markup=False)
    tried = [Tried(name=name, score=statistics.fmean(found), runs=len(found)) for name, found in scores.items()]
    return tuple(sorted(tried, key=lambda one: -one.score))


def _score(trial: _Trial) -> float:
    return run_cell(trial.cell, trial.hospitals).mean
