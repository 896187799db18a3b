"""hydra/launcher=ray: jobs as tasks of a Ray cluster, or of a Ray of this machine that ends with the sweep."""

import os
import sys
from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn

from hydra_plugins.fedclaw_sweeps._libraries import library
from hydra_plugins.fedclaw_sweeps._processes import Job, Numbered, ProcessLauncher


class RayLauncher(ProcessLauncher):
    """`init` are the arguments of ray.init, `job` those that a task is given (num_cpus and the like)."""

    def run(self, jobs: Sequence[Job]) -> list[JobReturn]:
        """Hand the jobs to Ray and wait for all of them."""
        for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
            os.environ.setdefault(name, "0")
        ray = library("ray", "ray")
        begun = not ray.is_initialized()
        if begun:
            ray.init(**self._init())
        try:
            task = ray.remote(Numbered.__call__).options(**(self.options["job"] or {}))
            handles = [task.remote(Numbered(job)) for job in jobs]
            return [_result(ray, job, handle) for job, handle in zip(jobs, handles, strict=True)]
        finally:
            if begun:
                ray.shutdown()

    def _init(self) -> dict[str, Any]:
        options = dict(self.options["init"] or {})
        if options.get("address") is None:
            # A Ray of our own: its workers find what this process finds.
            environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            options = {"include_dashboard": False, "runtime_env": {"env_vars": environment}, **options}
        return options


def _result(ray: Any, job: Job, handle: Any) -> JobReturn:
    try:
        result: JobReturn = ray.get(handle)[1]
    except ray.exceptions.RayError as error:
        return job.lost(error)
    return result
