"""The sweep in MLflow: a run of its own, above those of its runs."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.sweeps.directory import SweepDirectory, read_overrides
from fedclaw.report.tracking import NO_TRACKING, TrackingSettings, ended_by, known_run, open_store
from fedclaw.startup import unbroken

log = logging.getLogger(__name__)


class Parent:
    """The parent run; the same one when the sweep is continued, by mlflow.json in its directory."""

    def __init__(self, settings: TrackingSettings, runs: Path, sweep: SweepDirectory) -> None:
        """Raises TransportError when the store cannot be used."""
        self._sweep = sweep
        self._store = open_store(settings, runs, sweep.root)
        self._run_id: str | None = self._store.known

    def begin(self) -> None:
        """Begin it or take it up again, with the sweep's overrides as parameters. Raises what MLflow raises.

        A signal waits for all of it: a run whose number nobody has noted yet could not be ended.
        """
        record, new = self._sweep.record(), self._store.known is None
        with unbroken():
            self._run_id = self._store.begin(self._sweep.root, f"sweep {record.name}", {"fedclaw.sweep": record.name})
            for name, value in read_overrides(record.overrides).items() if new else ():
                self._store.client.log_param(self._run_id, name.lstrip("~"), value)

    def broken_off(self, error: BaseException) -> None:
        """Have the store know that the sweep ended early, and every run of it that cannot say so itself any more."""
        if self._run_id is None:
            return
        client, ended = self._store.client, ended_by(error)
        try:
            for member in self._sweep.members():
                root = self._sweep.run_directory(member)
                run = known_run(root) if member.status == "running" and root is not None else None
                if run is not None and client.get_run(run).info.status == "RUNNING":
                    client.set_terminated(run, ended)
            client.set_terminated(self._run_id, ended)
        except Exception as failure:  # every store has its own
            log.warning(
                "MLflow lacks the end of this sweep, which is in %s: %s", self._sweep.root, type(failure).__name__
            )

    def finish(self, artefacts: Sequence[Path], metrics: Mapping[str, float], *, complete: bool) -> None:
        """Note how the sweep came out. A store that fails now loses nothing: all is in the sweep's directory.

        A signal waits, for the sweep is done: broken off here, its run would stay RUNNING.
        """
        if self._run_id is None:
            return
        client = self._store.client
        try:
            with unbroken():
                for path in artefacts:
                    client.log_artifact(self._run_id, str(path))
                for name, value in metrics.items():
                    client.log_metric(self._run_id, name, value)
                client.set_terminated(self._run_id, "FINISHED" if complete else "FAILED")
        except Exception as error:  # every store has its own
            log.warning(
                "MLflow lacks the end of this sweep, which is in %s: %s", self._sweep.root, type(error).__name__
            )


def make_parent(settings: TrackingSettings, runs: Path, sweep: SweepDirectory) -> Parent | None:
    """The parent run, or None for tracking=none. Raises TransportError when the store cannot be used."""
    return None if settings.uri == NO_TRACKING else Parent(settings, runs, sweep)
