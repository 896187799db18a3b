"""What Hydra runs: one experiment by itself, or as a member of a sweep, in whatever process the launcher chose."""

import fcntl
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from experiments.resumed import resumed
from experiments.settings import ExperimentSettings, check_experiment, with_own_data
from experiments.sweeps import AGAIN, PROGRAM
from experiments.sweeps.directory import Member, SweepDirectory, read_overrides
from experiments.sweeps.identity import EXPERIMENT_FILE, identify, is_relevant
from fedclaw import startup
from fedclaw.cli import describe_failure, make_console, report_failure, start_logging
from fedclaw.errors import FedClawError, UsageError
from fedclaw.files import write_atomic
from fedclaw.learning.tasks.installed import BUILT_IN
from fedclaw.protocol.frozen import check_settings
from fedclaw.report.tracking import NO_TRACKING, known_run, make_tracker
from fedclaw.server.run_directory import RunDirectory

log = logging.getLogger(__name__)

_FAILED = float("nan")
"""The objective of a run that failed: sweepers know it for what it is, and go on."""
_HERE = "BasicLauncher"


def run_job(config: DictConfig) -> float:
    """Run the experiment that `config` describes and return its last accuracy; not a number if it failed in a sweep.

    By itself, an experiment that fails ends the process with its exit code.
    """
    console = make_console(stderr=True)
    start_logging(console)
    hydra = HydraConfig.get()
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    try:
        if OmegaConf.is_missing(hydra.job, "num"):
            return _objective(_run_single(_read(plain), list(hydra.overrides.task)))
        return _run_member(plain, console)
    except Exception as error:
        sys.exit(report_failure(PROGRAM, error, console))


def _read(plain: dict[str, Any]) -> ExperimentSettings:
    return with_own_data(check_settings(plain, ExperimentSettings))


def _run_single(settings: ExperimentSettings, overrides: list[str]) -> dict[str, float]:
    """A run by itself: a new one, or one to go on with."""
    if settings.resume is None:
        return _run(settings)
    root = settings.resume
    settings = resumed(settings, root, overrides)
    directory = RunDirectory(root)
    if directory.model_path.is_file():
        make_console().print(f"run {root.name} is finished: {directory.model_path}", markup=False, soft_wrap=True)
        return dict(directory.read_metrics()[-1]["metrics"])
    return _run(settings, resume=True)


def _run(settings: ExperimentSettings, **options: Any) -> dict[str, float]:
    """The last metrics of an experiment; what can be told to be wrong without torch is told before that is loaded."""
    check_experiment(settings)
    with startup.loading("torch, Opacus and Flower"):
        from experiments.experiment import run_experiment
    return run_experiment(settings, **options).metrics


def note_lost(config: DictConfig, reason: str) -> None:
    """Note a run of the sweep as failed whose process could not say so itself."""
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    plain.pop("hydra", None)
    sweep, member = _member_of(plain)
    sweep.note(member.model_copy(update={"status": "failed", "reason": reason}))


def _run_member(plain: dict[str, Any], console: Console) -> float:
    sweep, member = _member_of(plain)
    sweep.note(member)
    try:
        settings = _read(plain)
        if settings.resume is not None:
            raise UsageError("resume= is of one run; a sweep goes on when its command is given again")
        name = run_name(settings, member.digest)
        root = settings.runs / name
        member = member.model_copy(update={"run": sweep.relative(root)})
        sweep.note(member)
        metrics = _run_once(settings.model_copy(update={"run": name}), sweep, console)
    except KeyboardInterrupt:
        # The run by itself would say how it alone goes on.
        startup.next_step(AGAIN)
        raise
    except Exception as error:
        reason = describe_failure(error)
        log.debug("%s", type(error).__name__, exc_info=error)
        sweep.note(member.model_copy(update={"status": "failed", "reason": reason}))
        console.print(f"failed: {_words(member)}: {reason}", style="bold red", markup=False)
        return _FAILED
    sweep.note(member.model_copy(update={"status": "finished"}))
    return _objective(metrics)


def _member_of(plain: dict[str, Any]) -> tuple[SweepDirectory, Member]:
    """The sweep that this job belongs to, and the job in it, about to run."""
    hydra = HydraConfig.get()
    try:
        values = _read(plain).model_dump(mode="json")
    except FedClawError:
        values = plain
    overrides = read_overrides(list(hydra.overrides.task))
    settings = {key: value for key, value in overrides.items() if is_relevant(key)}
    digest = identify(values).digest
    sweep = SweepDirectory(Path(hydra.sweep.dir))
    return sweep, Member(digest=digest, number=hydra.job.num, settings=settings, status="running")


def run_name(settings: ExperimentSettings, digest: str) -> str:
    """What a sweep calls a run: the same name for the same configuration, so that it is found again."""
    return f"{settings.run or settings.strategy.get('name', 'run')}-{digest}"


def _run_once(settings: ExperimentSettings, sweep: SweepDirectory, console: Console) -> dict[str, float]:
    """The last metrics of the run: from its directory if it is finished, else of the rest of it."""
    assert settings.run is not None
    root = settings.runs / settings.run
    with _alone(root):
        directory = RunDirectory(root)
        tags = _tags(sweep, settings)
        if directory.model_path.is_file():
            metrics = directory.read_metrics()[-1]["metrics"]
            console.print(f"run {settings.run} is finished already", style="dim", markup=False)
            _conclude(settings, directory, metrics, tags)
            return dict(metrics)
        identity = identify(settings.model_dump(mode="json"))
        write_atomic(root / EXPERIMENT_FILE, identity.model_dump_json(indent=2).encode())
        quiet = not HydraConfig.get().launcher._target_.endswith(_HERE)
        metrics = _run(settings, resume=True, tags=tags, quiet=quiet)
        if quiet:
            shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            console.print(f"run {settings.run} is finished: {shown}", markup=False)
        return metrics


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Hold the run's directory: another process with the same run waits, and finds it finished."""
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _tags(sweep: SweepDirectory, settings: ExperimentSettings) -> dict[str, str]:
    """The tag that makes an MLflow run a child of the sweep's, if that has one."""
    parent = None if settings.tracking.uri == NO_TRACKING else known_run(sweep.root)
    return {"mlflow.parentRunId": parent} if parent else {}


def _conclude(
    settings: ExperimentSettings, directory: RunDirectory, metrics: dict[str, float], tags: dict[str, str]
) -> None:
    """Have MLflow know that a finished run is finished, and of this sweep.

    The process may have ended between the two; and a run is the child of the sweep that used it last.
    """
    from fedclaw.server.round_report import Outcome

    if (tracker := make_tracker(settings.tracking, directory, tags)) is not None:
        tracker.catch_up(Outcome(directory, directory.read_model(), metrics, directory.read_receipts()))


def _objective(metrics: dict[str, float]) -> float:
    """The score by which two models are compared: the larger, the better."""
    return next((metrics[task.score] for task in BUILT_IN if task.score in metrics), 0.0)


def _words(member: Member) -> str:
    return " ".join(f"{key}={value}" for key, value in member.settings.items())
