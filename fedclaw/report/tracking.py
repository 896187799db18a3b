"""A run in MLflow: parameters, metrics by round, epsilons by site, and the model file."""

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedclaw.errors import FedClawError, UsageError
from fedclaw.federation.coordinator import Outcome, RoundReport
from fedclaw.federation.run_directory import RunDirectory, RunRecord
from fedclaw.files import write_atomic
from fedclaw.frozen import Frozen

if TYPE_CHECKING:
    from mlflow import MlflowClient

NO_TRACKING = "none"
_ID_FILE = "mlflow.json"


class TrackingSettings(Frozen):
    """conf/tracking/*.yaml. A null `uri` is an embedded SQLite store beside the runs; "none" is no tracking."""

    uri: str | None = None
    experiment: str = "fedclaw"


class MlflowTracker:
    """Observer that writes to MLflow; a resumed run goes on in the same MLflow run."""

    def __init__(
        self, settings: TrackingSettings, runs: Path, directory: RunDirectory, parent: str | None = None
    ) -> None:
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from mlflow.store.db import utils  # noqa: F401  (sets its own log level when it is imported)

        for name in ("mlflow", "mlflow.store.db.utils", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        uri = settings.uri or f"sqlite:///{(runs / 'mlflow.db').resolve()}"
        try:
            self._client = MlflowClient(tracking_uri=uri)
            experiment = _experiment(self._client, settings, runs)
        except MlflowException as error:
            raise UsageError(f"tracking.uri={uri} cannot be used: {' '.join(str(error).split())}") from error
        self._directory = directory
        self._experiment = experiment
        self._parent = parent
        self._run_id = self._known_run()

    def started(self, record: RunRecord, first_round: int) -> None:
        """Begin, or take up again, the MLflow run and note what was asked."""
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        if self._run_id is None:
            tags = {MLFLOW_PARENT_RUN_ID: self._parent} if self._parent else {}
            run = self._client.create_run(self._experiment, run_name=record.run, tags=tags)
            self._run_id = run.info.run_id
            write_atomic(self._directory.root / _ID_FILE, json.dumps({"run_id": self._run_id}).encode())
            for name, value in _flat(record.model_dump(mode="json", exclude={"schema_text", "version"})):
                self._client.log_param(self._run_id, name, value)
        else:
            self._client.update_run(self._run_id, status="RUNNING")

    def finished_round(self, report: RoundReport) -> None:
        """Metrics and epsilons at this round."""
        assert self._run_id is not None
        values = dict(report.metrics) | {
            "update_norm": report.update_norm,
            "train_seconds": report.train_seconds,
            "evaluate_seconds": report.evaluate_seconds,
            "sites": float(len(report.answered)),
        }
        for site, item in report.receipts.items():
            if item.receipt.epsilon_run is not None:
                values[f"epsilon/{site}"] = item.receipt.epsilon_run
        for name, value in values.items():
            self._client.log_metric(self._run_id, name, value, step=report.round)

    def finished(self, outcome: Outcome) -> None:
        """The model, the record and the receipts as artefacts."""
        assert self._run_id is not None
        for path in (
            outcome.directory.model_path,
            outcome.directory.root / "run.json",
            outcome.directory.root / "receipts.json",
        ):
            self._client.log_artifact(self._run_id, str(path))
        self._client.set_terminated(self._run_id, "FINISHED")

    def failed(self) -> None:
        """Mark the run as failed; resuming takes it up again."""
        if self._run_id is not None:
            self._client.set_terminated(self._run_id, "FAILED")

    def _known_run(self) -> str | None:
        path = self._directory.root / _ID_FILE
        if not path.is_file():
            return None
        run_id = str(json.loads(path.read_text())["run_id"])
        try:
            self._client.get_run(run_id)
        except Exception:  # the store is another one now: begin anew there
            return None
        return run_id


def make_tracker(
    settings: TrackingSettings, runs: Path, directory: RunDirectory, parent: str | None = None
) -> MlflowTracker | None:
    """A tracker, or None for tracking=none. Raises UsageError when the store cannot be used."""
    return None if settings.uri == NO_TRACKING else MlflowTracker(settings, runs, directory, parent)


def _experiment(client: "MlflowClient", settings: TrackingSettings, runs: Path) -> str:
    found = client.get_experiment_by_name(settings.experiment)
    if found is not None:
        if found.lifecycle_stage != "active":
            raise FedClawError(
                f"the MLflow experiment {settings.experiment!r} was deleted; restore it or choose another"
            )
        return str(found.experiment_id)
    location = (runs / "mlartifacts").resolve().as_uri() if settings.uri is None else None
    return str(client.create_experiment(settings.experiment, artifact_location=location))


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            flat += _flat(value, f"{prefix}{name}.")
        else:
            flat.append((prefix + name, value))
    return flat
