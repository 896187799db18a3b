"""hydra/launcher=joblib: jobs in worker processes of this machine."""

import signal
from collections.abc import Iterator, Sequence

from hydra.core.utils import JobReturn

from hydra_plugins.fedclaw_sweeps._libraries import library
from hydra_plugins.fedclaw_sweeps._processes import Job, Numbered, ProcessLauncher


class JoblibLauncher(ProcessLauncher):
    """Options are joblib.Parallel's; the backend is always loky, for Hydra's state is one to a process."""

    def run(self, jobs: Sequence[Job]) -> list[JobReturn]:
        """All at once; after a worker's death, those that are left, each in a pool of its own.

        A pool does not tell which of its jobs killed it.
        """
        library("joblib", "sweeps")
        from joblib.externals.loky.process_executor import BrokenProcessPool

        done: dict[int, JobReturn] = {}
        try:
            for number, result in self._pool(jobs):
                done[number] = result
        except BrokenProcessPool:
            for job in jobs:
                if job.number not in done:
                    done[job.number] = self._alone(job)
        return [done[job.number] for job in jobs]

    def _alone(self, job: Job) -> JobReturn:
        from joblib.externals.loky.process_executor import BrokenProcessPool

        try:
            # Of two workers, for with one joblib would run it in this process.
            ((_, result),) = self._pool([job], n_jobs=2)
        except BrokenProcessPool as error:
            return job.lost(error)
        return result

    def _pool(self, jobs: Sequence[Job], **options: int) -> Iterator[tuple[int, JobReturn]]:
        """(number, what the job returned) as they are done."""
        joblib = library("joblib", "sweeps")
        parallel = joblib.Parallel(**{**self.options, **options}, backend="loky", return_as="generator_unordered")
        # Workers that do not hear Ctrl-C: this process ends them, and is the one to say so.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            results = parallel(joblib.delayed(Numbered(job))() for job in jobs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield from results
