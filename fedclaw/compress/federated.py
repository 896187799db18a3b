"""Recovery at the sites: more rounds of training, under differential privacy and on the sites' own ledgers.

It is a run of its own, with its own name, plan and checkpoints, in a directory inside the teacher's. Its name is
derived from the settings. So the same compression, started again, resumes where it stopped and no site pays twice; a
different one is a different run on the ledgers.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from flwr.serverapp import Grid
from torch import nn

from fedclaw.compress.inputs import content_digest
from fedclaw.compress.measure import SitesFigures, at_sites
from fedclaw.compress.models import Student, Teacher, arrays_of, load_arrays
from fedclaw.compress.pruning_record import PruningSettings
from fedclaw.compress.record import CompressSettings, SitesReport
from fedclaw.errors import CompressionError, RoundError, UsageError
from fedclaw.identity.federation_home import FederationHome
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.protocol.arrays import Arrays
from fedclaw.protocol.frozen import fields_of
from fedclaw.protocol.message_identity import number_of
from fedclaw.protocol.terms import CentralNoise, CentralRequest, Distillation, ModelSpec, PrivacyRequest
from fedclaw.server.coordinator import run_rounds
from fedclaw.server.evaluation import EvaluationQuestion
from fedclaw.server.exchange import ask
from fedclaw.server.round_report import Observer
from fedclaw.server.run_directory import RunDirectory, RunRecord
from fedclaw.server.session import calibrated, make_plan, make_strategy
from fedclaw.server.waiting import wait_for_cohort

log = logging.getLogger(__name__)

DIRECTORY = "distillation"


@dataclass(frozen=True)
class RecoveredAtSites:
    """A student recovered at the sites."""

    model: nn.Module
    report: SitesReport
    figures: SitesFigures | None
    """None: the sites were not asked to measure."""


def recover_at_sites(
    settings: CompressSettings,
    teacher: Teacher,
    student: Student,
    start: nn.Module,
    observers: Sequence[Observer] = (),
    *,
    measured: bool = True,
) -> RecoveredAtSites:
    """Listen as the federation's server, wait for the sites, and recover `start`, the student so far, there.

    Raises UsageError for a federation that is not the run's, RoundError when too few sites come.
    """
    from fedclaw.transport.grpc.grid import GrpcGrid
    from fedclaw.transport.grpc.limits import Limits

    assert settings.federation is not None
    home = FederationHome.open(settings.federation)
    if home.name != teacher.record.federation:
        raise UsageError(
            f"{teacher.directory.root} is a run of federation {teacher.record.federation!r}, not of {home.name!r}"
        )
    record = distillation_record(settings, teacher, student)
    directory = _open(teacher, record)
    run_id = number_of(record.run)
    with GrpcGrid(home, address=settings.address, run_id=run_id, limits=Limits()) as grid:
        log.info("listening on %s", settings.address or home.descriptor.address)
        wait_for_cohort(grid, directory, settings.sites)
        return recover_by_rounds(grid, settings, teacher, student, start, observers, measured=measured)


def recover_by_rounds(
    grid: Grid,
    settings: CompressSettings,
    teacher: Teacher,
    student: Student,
    start: nn.Module,
    observers: Sequence[Observer] = (),
    *,
    measured: bool = True,
) -> RecoveredAtSites:
    """Train `start`, a model of the student's shapes, with the teacher beside it at the sites of `grid`.

    `measured`: have the sites evaluate teacher, pruned and recovered student. Raises RoundError when too few sites take
    part; begun again it goes on from its last checkpoint.
    """
    record = distillation_record(settings, teacher, student)
    directory = _open(teacher, record)
    try:
        outcome = run_rounds(grid, directory, arrays_of(start), teacher=teacher.parameters, observers=observers)
    except RoundError as error:
        raise RoundError(
            f"the recovery at the sites stopped: {error} (for a recovery, run the same python -m fedclaw.compress "
            "command again: it goes on where it stopped)"
        ) from error
    model = teacher.workload.build(student.spec)
    load_arrays(model, outcome.parameters)
    figures = None
    if measured:
        figures = _compare_at_sites(grid, record, teacher, arrays_of(student.model), outcome.parameters)
    report = SitesReport(
        run=record.run,
        directory=str(directory.root.relative_to(teacher.directory.root)),
        rounds=record.rounds,
        epsilon={site: item.receipt.epsilon_run for site, item in sorted(outcome.receipts.items())},
    )
    return RecoveredAtSites(model.eval(), report, figures)


def distillation_record(settings: CompressSettings, teacher: Teacher, student: Student) -> RunRecord:
    """The record of the recovery's own run: the teacher's, with another model, its own rounds and budget."""
    asked, run = settings.sites, teacher.record
    privacy, central = _guarantees(run, asked.epsilon, asked.rounds)
    changes = {
        "model": student.spec,
        "rounds": asked.rounds,
        "privacy": privacy,
        "central": central,
        "distillation": Distillation(teacher=run.model, temperature=asked.temperature, weight=asked.weight),
        "seed": settings.seed,
        "created": datetime.now(UTC),
    }
    record = run.model_copy(update=changes)
    return record.model_copy(update={"run": f"{run.run[:80]}-distil-{_digest(record, teacher, _before(settings))}"})


def _guarantees(
    run: RunRecord, epsilon: float | None, rounds: int
) -> tuple[PrivacyRequest | None, CentralNoise | None]:
    """The teacher's, with noise on the sum made for `rounds`; `epsilon` replaces that of the sites' own noise, and that
    of the sum's where they bring none. Raises CompressionError, UsageError."""
    privacy, central, mechanism = run.privacy, run.central, mechanism_of(run)
    if not mechanism.claims_privacy and epsilon is not None:
        raise CompressionError(
            f"sites.epsilon={epsilon:g}, but run {run.run} was trained without differential privacy and sets "
            "neither delta nor a clipping bound; leave sites.epsilon out"
        )
    if central is not None:
        asked = CentralRequest(**fields_of(central, CentralRequest))
        if not mechanism.noises_steps and epsilon is not None:
            asked = asked.model_copy(update={"epsilon": epsilon})
        central = calibrated(asked, rounds)
    if privacy is not None and epsilon is not None:
        privacy = privacy.model_copy(update={"epsilon": epsilon})
    return privacy, central


def _before(settings: CompressSettings) -> dict[str, Any]:
    """All that the student which the sites get to train depends on beside the teacher and its own shapes."""
    earlier = settings.mode[: settings.mode.index("federated")] if "federated" in settings.mode else ()
    pruned = {} if settings.pruning == PruningSettings() else {"pruning": settings.pruning.model_dump(mode="json")}
    if not earlier and settings.pruning.steps > 1 and settings.mode != ("federated",):
        earlier = settings.mode  # a recovery that comes after the sites is the one between the steps of pruning, too
    if not earlier:
        # A spread shows in the widths, and those are in the model's spec; which channels are left does not.
        ranked = settings.pruning.importance in ("taylor", "teacher")
        return pruned | ({"looked": _used(settings, {"synthetic"}, ("statistics",))} if ranked else {})
    used = _used(settings, _AT_COORDINATOR, ("inputs", "labelled", "evaluation", "statistics"))
    return {"before": {"modes": earlier, **pruned, **used}}


_AT_COORDINATOR = {"recovery", "synthetic", "generator", "overlap"}


def _used(settings: CompressSettings, values: set[str], files: Sequence[str]) -> dict[str, Any]:
    """The values of these settings, and the digests of what is in these files."""
    paths = {name: getattr(settings, name) for name in files}
    digests = {name: content_digest(path) for name, path in paths.items() if path is not None}
    return {"files": digests, **settings.model_dump(mode="json", include=values)}


def _digest(record: RunRecord, teacher: Teacher, before: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits of all that distinguishes this recovery from another."""
    asked = record.model_dump(mode="json", exclude={"created", "software"})
    about = {"record": asked, "teacher": teacher.sha256, **before}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]


def _open(teacher: Teacher, record: RunRecord) -> RunDirectory:
    """The recovery's directory; made if it does not exist."""
    root = teacher.directory.root / DIRECTORY / record.run
    keys = teacher.directory.keys
    return RunDirectory.open(root, keys) if (root / "run.json").exists() else RunDirectory.create(root, record, keys)


def _compare_at_sites(
    grid: Grid, record: RunRecord, teacher: Teacher, pruned: Arrays, recovered: Arrays
) -> SitesFigures:
    """Evaluate all three models on the test data of the same sites."""
    nodes = sorted(grid.get_node_ids())
    before = _ask(grid, nodes, record, teacher.record.model, teacher.parameters)
    start = _ask(grid, nodes, record, record.model, pruned)
    after = _ask(grid, nodes, record, record.model, recovered)
    if not before.answered == start.answered == after.answered:
        names = sorted({*before.answered, *start.answered, *after.answered})
        raise RoundError(
            f"not every site evaluated all three models (of {', '.join(names)}), so they cannot be compared; the "
            "recovery is kept: run the same command again to evaluate it"
        )
    score = teacher.workload.task.score
    return SitesFigures(
        after.examples,
        *(at_sites(asked.read().metrics, score, asked.examples, asked.noised) for asked in (before, start, after)),
    )


def _ask(
    grid: Grid, nodes: Sequence[int], record: RunRecord, model: ModelSpec, parameters: Arrays
) -> EvaluationQuestion:
    about = record.model_copy(update={"model": model, "distillation": None})
    plan = make_plan(about, make_strategy(about), record.rounds, len(nodes))
    task = record.make_schema().task
    evaluated = ask(grid, nodes, EvaluationQuestion(plan, parameters, task), record.rules.deadline)
    evaluated.answered.sort()
    if task.score not in evaluated.read().metrics:
        refused = "; ".join(f"{item.site}: {item.reason}" for item in evaluated.declined) or "nobody answered"
        raise RoundError(f"the sites sent no {task.score} ({refused})")
    return evaluated
