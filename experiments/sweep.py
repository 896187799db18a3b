"""What a sweep of experiments.run found, as one table at its end."""

from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.table import Table

from fedclaw.report.console import make_console


class Summary(Callback):
    """Hydra callback (conf/run.yaml): collects each run's overrides and accuracy, prints them after the last."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, str]] = []

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Note one run."""
        done = job_return.status is JobStatus.COMPLETED
        accuracy = f"{job_return.return_value:.4f}" if done else "failed"
        self._rows.append((" ".join(job_return.overrides or ()), accuracy))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table."""
        table = Table(title=f"Sweep of {len(self._rows)} runs", title_justify="left")
        table.add_column("settings")
        table.add_column("accuracy", justify="right")
        for settings, accuracy in self._rows:
            table.add_row(settings, accuracy)
        make_console().print(table)
