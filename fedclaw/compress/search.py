"""The smallest of many compressions within a stated loss: over pruning ratio, recovery and precision.

Each candidate is a run's model pruned to one fraction and recovered in one way. It is measured in every precision as it
would be served: the ONNX file's bytes, its latency by that of the uncompressed model, and its score. The score is on
inputs that recovery did not see and that no reported figure is of: a labelled file, or the teacher's answers on inputs
kept back. What survives is the Pareto front; the smallest form within the loss is taken.

A candidate that was measured is kept in <run>/search, so a search that was stopped goes on where it was.

Legend: N examples, K outputs, D input shape without the batch.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import nn

from fedclaw.compress.inputs import Inputs, PublicFile, apart_from, read_labelled, schema_inputs
from fedclaw.compress.measure import Examples, Scored, answered_by, examples_of
from fedclaw.compress.models import Student, Teacher, load_teacher
from fedclaw.compress.proxy import FEWEST_INPUTS
from fedclaw.compress.record import (
    Compression,
    CompressSettings,
    Mode,
    Precision,
    SearchChoice,
    SitesReport,
    StepInputs,
    require_room,
)
from fedclaw.compress.search_figures import plot
from fedclaw.compress.search_record import (
    CANDIDATES,
    DIRECTORY,
    PLOT,
    RESULT,
    ROUNDING,
    Candidate,
    FrontPoint,
    PrecisionForm,
    SearchResult,
    weigh,
)
from fedclaw.compress.stage import Given, Made, finish, read_given, recover, student_of
from fedclaw.errors import BundleError, CompressionError, FedClawError, UsageError
from fedclaw.files import PUBLIC_MODE, write_atomic
from fedclaw.learning.workload import Floats
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.server.round_report import Observer
from fedclaw.server.run_directory import RunDirectory

log = logging.getLogger(__name__)

EXACT: Precision = "float32"


class Runtime(Protocol):
    """Writes a model as it would be served, and runs that."""

    def forms(self, model: nn.Module, precisions: Sequence[Precision]) -> dict[Precision, bytes]:
        """The model's file in each of these precisions that it can have; float32 it always can. Raises BundleError."""

    def outputs(self, content: bytes, inputs: Floats) -> Floats:
        """Inputs (N, *D) to the raw outputs (N, K)."""

    def milliseconds(self, contents: Sequence[bytes], inputs: Floats) -> list[dict[str, float]]:
        """The median latency of each by batch size, timed in turns on one thread of the CPU."""

    @property
    def calibration(self) -> StepInputs:
        """What the ranges of int8 are taken from."""


# What it is measured on


@dataclass(frozen=True)
class SharedSetting:
    """What all candidates share."""

    settings: CompressSettings
    teacher: Teacher
    given: Given
    """Without the rows that candidates are chosen by."""
    examples: Examples
    """Those rows."""
    looked_at: StepInputs


def prepare(settings: CompressSettings) -> SharedSetting:
    """Read the run and the files, and keep back what candidates are chosen by. Raises FedClawError."""
    teacher = load_teacher(settings.run, settings.encryption.keyring())
    words = dict.fromkeys(word for mode in modes_of(settings) for word in mode)
    given = read_given(settings.model_copy(update={"mode": tuple(words)}), teacher)
    if settings.search.selection is not None:
        file = _selection_file(settings, teacher, given)
        looked_at = file.inputs.looked_at_in("search", "whose labels candidates were chosen by")
        return SharedSetting(settings, teacher, given, examples_of(file, teacher), looked_at)
    given, kept = _kept_back(settings, teacher, given, "proxy" in words)
    looked_at = kept.looked_at_in("search", "which recovery did not see: agreement with the teacher on them")
    return SharedSetting(settings, teacher, given, answered_by(teacher, kept.values), looked_at)


def modes_of(settings: CompressSettings) -> tuple[tuple[Mode, ...], ...]:
    """The ways of recovery to try: those that were named, else all at the coordinator."""
    if settings.search.modes is not None:
        return settings.search.modes
    return (("none",), ("synthetic",), *((("proxy",),) if settings.inputs or settings.labelled else ()))


def require_fractions(settings: CompressSettings) -> None:
    """Raise UsageError where another target would make all fractions one and the same model."""
    kind = settings.pruning.target(settings.fraction).kind
    if kind != "parameters":
        raise UsageError(
            f"pruning.{kind}= is the target of one compression, and a search tries search.fractions of the parameters; "
            "leave it out"
        )


def _selection_file(settings: CompressSettings, teacher: Teacher, given: Given) -> PublicFile:
    """The labelled file, which may share no row with one that is learnt from or reported."""
    assert settings.search.selection is not None
    file = read_labelled("search.selection", settings.search.selection, teacher)
    for other in (given.public.evaluation, given.public.inputs, given.public.labelled):
        if other is not None:
            apart_from(other, file, "refuse")
    return file


def _kept_back(settings: CompressSettings, teacher: Teacher, given: Given, proxy: bool) -> tuple[Given, Inputs]:
    """Some of the public inputs, if recovery learns from those and from no labels of them; else made from the schema.

    Labels are learnt row by row, and the same rows among the inputs would not be held out.
    """
    if not proxy or given.public.known is None or given.labelled is not None:
        return given, schema_inputs(teacher, settings.search.examples, settings.seed + 2)
    values = given.proxy.values
    apart = round(settings.recovery.held_out * len(values))
    if apart < 1 or len(values) - apart < FEWEST_INPUTS:
        raise CompressionError(
            f"{len(values)} public inputs are too few to learn from and to choose by; give more, or search.selection="
        )
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(settings.seed + 2))
    kept, left = (replace(given.proxy, values=values[rows]) for rows in (order[:apart], order[apart:]))
    return replace(given, proxy=left), kept


# What it may cost


def require_allowed(settings: CompressSettings, run: RunDirectory) -> str:
    """What candidates recovered at the sites would spend, in a sentence; '' without such.

    Raises UsageError unless search.epsilon allows all of them together: each has its own charge on the ledgers.
    """
    count = sum("federated" in mode for mode in modes_of(settings)) * len(settings.search.fractions)
    if not count:
        return ""
    if settings.federation is None:
        raise UsageError("search.modes names federated, which needs federation=DIR, the coordinator's directory")
    record, asked = run.record(), settings.sites.epsilon
    if not mechanism_of(record).claims_privacy:
        told = f"{count} candidates are recovered at the sites, without differential privacy: no epsilon bounds it"
        if settings.search.epsilon is None:
            raise UsageError(f"{told}; search.epsilon=… (any number) says that you mean it")
        return told
    noise = record.privacy or record.central
    each = asked or (noise.epsilon if noise is not None else None) or float("inf")
    total = count * each
    told = (
        f"{count} candidates are recovered at the sites, for up to {each:g} epsilon each: up to {total:g} at every "
        "site, beyond the run"
    )
    if settings.search.epsilon is None or total > settings.search.epsilon * (1 + 1e-9):
        raise UsageError(f"{told}; search.epsilon={total:g} allows that, sites.epsilon= less each")
    return told


def _spent(made: Made, pruning: Sequence[StepInputs] = ()) -> float | None:
    """The highest of all sites, of the recovery at the sites and of the charged statistics that pruning or recovery
    looked at, each counted once."""
    releases = dict.fromkeys(looked.release for looked in (*pruning, *made.looked_at) if looked.release is not None)
    total = sum(release.epsilon for release in releases)
    for report in made.reports:
        if isinstance(report, SitesReport):
            spent = list(report.epsilon.values())
            if not spent or None in spent:
                return None
            total += max(value for value in spent if value is not None)
    return float(total)


# Candidates


def search(
    settings: CompressSettings,
    runtime_of: Callable[[Teacher], Runtime],
    observers: Sequence[Observer] = (),
    tell: Callable[[SearchResult], None] = lambda _: None,
) -> SearchResult:
    """Measure every candidate, and write <run>/search and, of the one that is chosen, <run>/compressed.

    Args:
        settings: `fraction` and `mode` are replaced by those of `search`.
        runtime_of: from the teacher to the `Runtime` that it and the candidates are measured in.
        observers: watch the rounds of candidates that are recovered at the sites.
        tell: is called with the result before the chosen candidate is written.

    Raises CompressionError when no candidate is within the loss; <run>/search is written all the same.
    """
    require_fractions(settings)
    run = RunDirectory.open(settings.run, settings.encryption.keyring())
    require_room(run, settings.overwrite)
    if told := require_allowed(settings, run):
        log.warning("%s", told)
    shared = prepare(settings)
    measuring = Measuring(shared, runtime_of(shared.teacher))
    found = list(_candidates(measuring, run.root / DIRECTORY, observers))
    result = _result(measuring, found)
    write_result(run.root / DIRECTORY, result)
    tell(result)
    if result.chosen is None:
        best = max(result.points, key=lambda point: point.form.score, default=None)
        raise CompressionError(
            "no candidate could be made: " + "; ".join(result.failed.values())
            if best is None
            else f"no candidate is within search.loss={settings.search.loss:g}: the best one loses "
            f"{-best.form.difference.value:.4f} (fraction {best.fraction:g}, {'+'.join(best.mode)}, "
            f"{best.form.precision}); allow more, or try larger fractions; all of them are in {run.root / DIRECTORY}"
        )
    at_sites = [candidate.at_sites for candidate in found if candidate.at_sites is not None]
    _write_chosen(measuring, result, result.chosen, at_sites, observers)
    return result


class Measuring:
    """Measures models beside the uncompressed one."""

    def __init__(self, shared: SharedSetting, runtime: Runtime) -> None:
        self.shared, self.runtime = shared, runtime
        self._inputs: Floats = shared.examples.inputs.numpy()
        self._whole = runtime.forms(shared.teacher.model, (EXACT,))[EXACT]
        self._before = self._score(self._whole)
        self.teacher = self._form(EXACT, self._whole)

    def forms(self, model: nn.Module) -> tuple[PrecisionForm, ...]:
        """The model's figures in every precision that is asked for and that it can have."""
        files = self.runtime.forms(model, self.shared.settings.search.precisions)
        return tuple(self._form(precision, content) for precision, content in files.items())

    def _score(self, content: bytes) -> Scored:
        outputs: NDArray[np.float64] = self.runtime.outputs(content, self._inputs).astype(np.float64)
        return self.shared.examples.score_outputs(outputs)

    def _form(self, precision: Precision, content: bytes) -> PrecisionForm:
        scored = self._score(content)
        whole, own = self.runtime.milliseconds([self._whole, content], self._inputs)
        return PrecisionForm(
            precision=precision,
            file_bytes=len(content),
            latency_ms=own,
            latency_ratio={batch: took / whole[batch] for batch, took in own.items()},
            score=scored.metrics[self.shared.examples.task.score],
            interval=scored.interval,
            difference=self.shared.examples.difference(scored, self._before),
        )


def _candidates(measuring: Measuring, directory: Path, observers: Sequence[Observer]) -> Iterator[Candidate]:
    """Every candidate, the largest first; one that was measured before is not made again."""
    settings = measuring.shared.settings
    directory.mkdir(exist_ok=True)
    known = read_candidates(directory / CANDIDATES)
    pairs = [
        (fraction, mode) for fraction in sorted(settings.search.fractions, reverse=True) for mode in modes_of(settings)
    ]
    for number, (fraction, mode) in enumerate(pairs, start=1):
        name = f"candidate {number} of {len(pairs)}: fraction {fraction:g}, {'+'.join(mode)}"
        own = settings.model_copy(update={"fraction": fraction, "mode": mode})
        digest = _digest(measuring, own)
        if digest in known:
            log.info("%s: known from before", name)
            yield known[digest]
            continue
        log.info("%s", name)
        found = _candidate(measuring, own, digest, observers)
        _append(directory / CANDIDATES, found)
        yield found


def _candidate(
    measuring: Measuring, settings: CompressSettings, digest: str, observers: Sequence[Observer]
) -> Candidate:
    shared = measuring.shared
    about: dict[str, Any] = {"digest": digest, "fraction": settings.fraction, "mode": settings.mode}
    try:
        student = student_of(settings, shared.teacher, shared.given)
    except CompressionError as error:
        return _left_out(error, about)
    try:
        # No candidate is chosen by what the sites' tests say, and each answer about them may cost.
        made = recover(settings, shared.teacher, student, shared.given, observers, measured=False)
    except CompressionError as error:
        if "federated" in settings.mode:  # the sites may have been charged, and that is not to be forgotten
            raise
        return _left_out(error, about)
    about |= {
        "parameters": student.parameters_after,
        "epsilon": _spent(made, student.looked_at),
        "at_sites": next((report for report in made.reports if isinstance(report, SitesReport)), None),
    }
    try:
        return Candidate(**about, forms=measuring.forms(made.model))
    except (BundleError, CompressionError) as error:
        return _left_out(error, about)


def _left_out(error: FedClawError, about: dict[str, Any]) -> Candidate:
    log.warning("left out: %s", error)
    return Candidate(**about, failed=str(error))


_NOT_OF_A_CANDIDATE = {
    "search",
    "encryption",
    "overwrite",
    "run",
    "federation",
    "address",
    "controls",
    "latency_repeats",
}


def _digest(measuring: Measuring, settings: CompressSettings) -> str:
    """SHA-256 of all that a candidate's figures depend on, but for the machine."""
    shared = measuring.shared
    public = shared.given.public
    files = [file.sha256 for file in (public.inputs, public.labelled, public.evaluation) if file is not None]
    about = {
        "settings": settings.model_dump(mode="json", exclude=_NOT_OF_A_CANDIDATE),
        "precisions": settings.search.precisions,
        "teacher": shared.teacher.sha256,
        "selection": shared.looked_at.model_dump(mode="json"),
        "calibration": measuring.runtime.calibration.model_dump(mode="json"),
        "files": [*files, shared.given.synthetic.sha256],
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def read_candidates(path: Path) -> dict[str, Candidate]:
    """The candidates that were measured, by digest; a line that a stop cut short is none."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            candidate = Candidate.model_validate_json(line)
        except ValidationError:
            continue
        found[candidate.digest] = candidate
    return found


def _append(path: Path, candidate: Candidate) -> None:
    """Add a line; one that was cut short before it is ended first."""
    with path.open("ab") as file:
        if file.tell() and not path.read_bytes().endswith(b"\n"):
            file.write(b"\n")
        file.write(candidate.model_dump_json().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _result(measuring: Measuring, candidates: Sequence[Candidate]) -> SearchResult:
    shared = measuring.shared
    points = [
        FrontPoint(
            fraction=candidate.fraction,
            mode=candidate.mode,
            parameters=candidate.parameters,
            epsilon=candidate.epsilon,
            form=form,
        )
        for candidate in candidates
        for form in candidate.forms
    ]
    return SearchResult(
        run=shared.teacher.record.run,
        score=shared.examples.task.score,
        measure=shared.examples.measure if shared.settings.search.selection is None else "selection file",
        loss=shared.settings.search.loss,
        selection=shared.looked_at,
        calibration=measuring.runtime.calibration,
        teacher=measuring.teacher,
        points=weigh(points, shared.settings.search.loss),
        failed={
            f"fraction {candidate.fraction:g}, {'+'.join(candidate.mode)}": candidate.failed
            for candidate in candidates
            if candidate.failed
        },
    )


def write_result(directory: Path, result: SearchResult) -> None:
    """search.json and search.png in `directory`."""
    write_atomic(directory / RESULT, result.model_dump_json(indent=2).encode(), PUBLIC_MODE)
    write_atomic(directory / PLOT, plot(result), PUBLIC_MODE)


def _others_looked_at(shared: SharedSetting, result: SearchResult, choice: SearchChoice) -> Iterator[StepInputs]:
    """What the choice depends on by way of the candidates that were not chosen, and a site was charged for."""
    if shared.given.synthetic.release is not None and any(point.mode != ("proxy",) for point in result.points):
        yield shared.given.synthetic.looked_at_in("search", "which candidates were made with")
    for report in choice.at_sites:
        told = f"the sites' own training data, in run {report.run} on their ledgers: of a candidate that was not chosen"
        yield StepInputs(step="search", origin="sites", description=told)


def _write_chosen(
    measuring: Measuring,
    result: SearchResult,
    chosen: FrontPoint,
    at_sites: Sequence[SitesReport],
    observers: Sequence[Observer],
) -> Compression:
    """Make the chosen candidate again, from the same seed, and write it with its ordinary record.

    Raises CompressionError when it comes out beyond the loss this time, as it may on another machine.
    """
    shared = measuring.shared
    mode: Any = chosen.mode
    settings = shared.settings.model_copy(update={"fraction": chosen.fraction, "mode": mode})
    log.info("making the chosen one again: fraction %g, %s", chosen.fraction, "+".join(chosen.mode))
    student: Student = student_of(settings, shared.teacher, shared.given)
    made = recover(settings, shared.teacher, student, shared.given, observers)
    again = {form.precision: form for form in measuring.forms(made.model)}.get(chosen.form.precision)
    remade = f"remove {shared.teacher.directory.root / DIRECTORY} and search again"
    if again is None:
        raise CompressionError(f"the chosen candidate has no {chosen.form.precision} when it is made again; {remade}")
    if again.difference.value < -result.loss - ROUNDING:
        raise CompressionError(
            f"the chosen candidate loses {-again.difference.value:.4f} when it is made again, more than "
            f"search.loss={result.loss:g}; {remade}"
        )
    own = {report.run for report in made.reports if isinstance(report, SitesReport)}
    choice = SearchChoice(
        precision=chosen.form.precision,
        loss=result.loss,
        candidates=len(result.points),
        measure=result.measure,
        score=again.score,
        difference=again.difference,
        at_sites=tuple(report for report in at_sites if report.run not in own),
    )
    looked = (*made.looked_at, shared.looked_at, *_others_looked_at(shared, result, choice), result.calibration)
    made = replace(made, looked_at=looked, search=choice)
    return finish(settings, shared.teacher, student, shared.given, made)
