"""Hydra's callback that makes runs a sweep: a directory and an MLflow run above them, a table and plots at the end."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from rich.console import Console

from experiments.settings import ExperimentSettings, with_own_data
from experiments.sweeps import PROGRAM
from experiments.sweeps.directory import SweepDirectory, SweepRecord, read_overrides
from experiments.sweeps.identity import digest_of, identify, is_relevant
from experiments.sweeps.parent import Parent, make_parent
from fedclaw.cli import make_console, report_failure, start_logging
from fedclaw.protocol.frozen import check_settings
from fedclaw.report.tracking import TrackingSettings
from fedclaw.startup import end_all

_begun: list[Parent] = []
"""The MLflow run of the sweep that this process began, until it has its end."""

_DIRECTORY = "hydra.sweep.dir"
_LONGEST = 60
_PATIENCE = 2.0
"""Seconds that the runs' processes have to end by themselves."""


class Sweep(Callback):
    """conf/run.yaml: hydra.callbacks. Sent to other processes with each job, it holds nothing there."""

    def __init__(self) -> None:
        self._parent: Parent | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_parent": None}

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Begin the sweep, or take up the one that this command began earlier.

        Hydra turns exceptions of a callback into warnings, so an error ends the process here.
        """
        console = make_console(stderr=True)
        start_logging(console)
        try:
            self._begin(config, console)
        except Exception as error:
            sys.exit(report_failure(PROGRAM, error, console))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Note a job that could not note itself: only such a one ends as failed."""
        if job_return.status is JobStatus.FAILED:
            from experiments.sweeps.job import note_lost

            error = job_return._return_value
            note_lost(config, f"its process was lost: {type(error).__name__}")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write and show what the sweep came to; exit code 1 if a run failed."""
        console = make_console(stderr=True)
        from experiments.sweeps.report import write_report

        try:
            sweep = SweepDirectory.open(Path(config.hydra.sweep.dir))
            report = write_report(sweep, make_console())
            _begun.clear()
            if self._parent is not None:
                self._parent.finish(report.files, report.metrics, complete=not report.failed)
        except Exception as error:
            sys.exit(report_failure(PROGRAM, error, console))
        if report.failed:
            words = f"{report.failed} of {report.runs} runs failed; the same command tries them again"
            console.print(f"{PROGRAM}: {words}", style="bold red", markup=False)
            sys.exit(1)

    def _begin(self, config: DictConfig, console: Console) -> None:
        # Without what the sweep varies: what is wrong with all of its runs is told once, and before they are begun.
        with_own_data(check_settings(OmegaConf.to_container(_own(config), resolve=True), ExperimentSettings))
        overrides = tuple(str(override) for override in config.hydra.overrides.task)
        runs, name = Path(str(config.runs)), _name(config, overrides)
        _settle_directory(config, runs / "sweeps" / name)
        sweep = SweepDirectory(Path(str(config.hydra.sweep.dir)))
        sweep.begin(SweepRecord(name=name, overrides=overrides))
        if done := sum(member.status == "finished" for member in sweep.members()):
            console.print(f"continuing the sweep in {sweep.root}: {done} runs are finished", markup=False)
        tracking = check_settings(OmegaConf.to_container(config.tracking, resolve=True), TrackingSettings)
        self._parent = make_parent(tracking, runs, sweep)
        if self._parent is not None:
            _begun.append(self._parent)
            self._parent.begin()


def break_off(error: BaseException) -> None:
    """End the processes of a sweep that `error` ended, then have MLflow know it."""
    if not _begun:
        return
    end_all(_PATIENCE)
    for parent in _begun:
        parent.broken_off(error)
    _begun.clear()


def _settle_directory(config: DictConfig, default: Path) -> None:
    """Have the sweep and all of its jobs know one directory, unless the command names another.

    As an override of Hydra's own, for a job's configuration is composed again from those, wherever it runs.
    """
    if any(str(override).startswith(f"{_DIRECTORY}=") for override in config.hydra.overrides.hydra):
        return
    quoted = str(default).replace("\\", "\\\\").replace("'", "\\'")
    with read_write(config), open_dict(config):
        config.hydra.sweep.dir = str(default)
        config.hydra.overrides.hydra.append(f"{_DIRECTORY}='{quoted}'")


def _own(config: DictConfig) -> DictConfig:
    """The experiment's settings without Hydra's."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def _name(config: DictConfig, overrides: Sequence[str]) -> str:
    """What the sweep is called: the settings that it varies, and digits of everything that determines its runs."""
    plain = OmegaConf.to_container(_own(config))
    asked = [text for text in overrides if is_relevant(text.lstrip("+~").partition("=")[0])]
    assert isinstance(plain, dict)
    base = identify({str(key): value for key, value in plain.items()}).digest
    swept = [key for key, value in read_overrides(asked).items() if re.search(r"[,(]", value)]
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(swept))[:_LONGEST].strip("-.") or "sweep"
    return f"{words}-{digest_of([base, sorted(asked)])}"
