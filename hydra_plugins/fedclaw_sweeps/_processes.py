"""What the launchers share: a job as a value that another process can run, and what a lost one comes to."""

import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One job of a sweep with all that it needs; it is sent to another process and called there."""

    number: int
    overrides: tuple[str, ...]
    context: HydraContext
    config: DictConfig
    task: TaskFunction
    singletons: Any
    """Hydra's own state of the process that launches."""

    def __call__(self) -> JobReturn:
        """Run it, in whatever process this is; an Exception of the task is in the return."""
        setup_globals()
        Singleton.set_state(self.singletons)
        return run_job(
            hydra_context=self.context,
            task_function=self.task,
            config=self.composed(),
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def composed(self) -> DictConfig:
        """The job's own configuration."""
        config = self.context.config_loader.load_sweep_config(self.config, list(self.overrides))
        with open_dict(config):
            config.hydra.job.id = f"{config.hydra.job.name}_{self.number}"
            config.hydra.job.num = self.number
        HydraConfig.instance().set_config(config)
        return config

    def lost(self, error: BaseException) -> JobReturn:
        """What a job comes to whose process died, or was never started.

        Hydra's callbacks are told of it as a failed job. To the sweeper it is not-a-number: an exception there would
        end the sweep for all other jobs too.
        """
        log.error("job #%d was lost: %s: %s", self.number, type(error).__name__, " ".join(str(error).split())[:300])
        failed = JobReturn(overrides=list(self.overrides), status=JobStatus.FAILED)
        failed.return_value = error
        self.context.callbacks.on_job_end(config=self.composed(), job_return=failed)
        result = JobReturn(overrides=list(self.overrides), status=JobStatus.COMPLETED)
        result.return_value = float("nan")
        return result


class Numbered:
    """A job that says which one it is, and that a cluster may stop and start again."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self) -> tuple[int, JobReturn]:
        """Run it: (its number, what it returned)."""
        return self.job.number, self.job()

    def checkpoint(self) -> Any:
        """Submitit's protocol for a job whose time is up: the same again, which continues where the run stopped."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class ProcessLauncher(Launcher):
    """A launcher that runs jobs in other processes."""

    def __init__(self, **options: Any) -> None:
        """`options` are those of conf/hydra/launcher/NAME.yaml."""
        self.options: dict[str, Any] = {
            name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for name, value in options.items()
        }

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what all jobs share."""
        self._shared = (hydra_context, config, task_function)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs and return what they returned, in the same order."""
        setup_globals()
        context, config, task = self._shared
        configure_log(config.hydra.hydra_logging, config.hydra.verbose)
        Path(str(config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        state = Singleton.get_state()
        jobs = [
            Job(initial_job_idx + position, tuple(overrides), context, config, task, state)
            for position, overrides in enumerate(job_overrides)
        ]
        log.info("Launching %d jobs by %s", len(jobs), type(self).__name__)
        for job in jobs:
            log.info("\t#%d : %s", job.number, " ".join(filter_overrides(job.overrides)))
        return self.run(jobs)

    @abstractmethod
    def run(self, jobs: Sequence[Job]) -> list[JobReturn]:
        """Run `jobs`; one that is lost costs no other (`Job.lost`)."""
