"""hydra/launcher=submitit: jobs on a Slurm cluster, or as processes of this machine."""

import os
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn

from hydra_plugins.fedclaw_sweeps._libraries import library
from hydra_plugins.fedclaw_sweeps._processes import Job, Numbered, ProcessLauncher

_LOOK_AGAIN = 0.2
"""Seconds between two looks at the jobs on this machine."""
_SLURM = "slurm"


class SubmititLauncher(ProcessLauncher):
    """`cluster`: slurm, local or debug (in this process); null takes Slurm where it is installed.

    `parallel` is how many jobs run at a time; `parameters` go to submitit as they are. What a Slurm job has not done
    when its time is up it continues when it is started again.
    """

    def run(self, jobs: Sequence[Job]) -> list[JobReturn]:
        """Submit the jobs and wait for all of them."""
        executor, parallel = self._executor(library("submitit", "sweeps"))
        if executor.cluster == _SLURM:
            handles = _array(executor, jobs)
            try:
                return [_result(job, handle) for job, handle in zip(jobs, handles, strict=True)]
            except KeyboardInterrupt:
                for handle in handles:
                    handle.cancel()
                raise
        return _few_at_a_time(executor, jobs, parallel)

    def _executor(self, submitit: Any) -> tuple[Any, int]:
        options = dict(self.options)
        parallel = options.pop("parallel") or os.cpu_count() or 1
        executor = submitit.AutoExecutor(folder=options.pop("folder"), cluster=options.pop("cluster"))
        parameters = options.pop("parameters") or {}
        if executor.cluster == _SLURM:
            parameters = {"slurm_array_parallelism": parallel, **parameters}
        executor.update_parameters(
            **{name: value for name, value in options.items() if value is not None}, **parameters
        )
        return executor, parallel


def _few_at_a_time(executor: Any, jobs: Sequence[Job], parallel: int) -> list[JobReturn]:
    """Submitit itself would start all at once."""
    waiting, done = deque(jobs), dict[int, JobReturn]()
    running: dict[int, tuple[Job, Any]] = {}
    while waiting or running:
        while waiting and len(running) < parallel:
            job = waiting.popleft()
            running[job.number] = (job, executor.submit(Numbered(job)))
        for number, (job, handle) in list(running.items()):
            if handle.done():
                done[number] = _result(job, handle)
                del running[number]
        time.sleep(_LOOK_AGAIN if running else 0)
    return [done[job.number] for job in jobs]


def _result(job: Job, handle: Any) -> JobReturn:
    try:
        result: JobReturn = handle.result()[1]
    except Exception as error:  # submitit's own for a lost job, the operating system's for a lost file
        return job.lost(error)
    return result


def _array(executor: Any, jobs: Sequence[Job]) -> list[Any]:
    """All jobs as one Slurm array."""
    with executor.batch():
        return [executor.submit(Numbered(job)) for job in jobs]
