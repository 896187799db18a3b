"""A run in MLflow: parameters, metrics by round, epsilons by site, and the model file."""

import logging
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from pydantic import ValidationError

from fedclaw.errors import CheckpointError, TransportError, UsageError
from fedclaw.files import write_atomic
from fedclaw.protocol.frozen import Frozen, explain
from fedclaw.server.run_directory import RunDirectory, RunRecord
from fedclaw.startup import unbroken

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from fedclaw.server.round_report import Outcome, RoundReport

log = logging.getLogger(__name__)

NO_TRACKING = "none"
_ID_FILE = "mlflow.json"
_ALWAYS = "update_norm"
"""A figure that every round has, with metrics or without."""
_FIGURES = ("train_seconds", "evaluate_seconds", "bytes_up", "bytes_down")
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""So that a tracking server that has gone costs a round seconds; MLflow's own defaults cost it minutes."""
FIRST_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
"""While the store is tried out, before anything has begun: a wrong one is told at once."""
_PROBE = 5.0
"""Seconds in which the store's host must take a connection."""
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
"""Of the stores that are behind a network: MLflow tries a database ten times, for minutes, before it gives up."""
_NOISY = {
    "mlflow": logging.WARNING,
    "mlflow.store.db.utils": logging.WARNING,
    "alembic": logging.WARNING,
    "urllib3.connectionpool": logging.ERROR,
}


_TELL_EVERY, _TELL_AT_LATEST = 2.0, 30.0
"""Seconds: rounds that follow one another faster are told to the store together, by class of the last one alone."""
_SHARE_OF_TELLING = 0.03
"""Of a run's time that goes into telling, at most, between those bounds: on a busy machine a store takes longer, and so
do rounds, so that it would be told more often the more that costs."""
_MOST_METRICS, _MOST_PARAMETERS = 1000, 100
"""Of one call, by MLflow's own limits."""


class TrackingSettings(Frozen):
    """conf/tracking/*.yaml. A null `uri` is an embedded SQLite store beside the runs; "none" is no tracking."""

    uri: str | None = None
    experiment: str = "fedclaw"


class _KnownRun(Frozen):
    """mlflow.json in a directory: which MLflow run is this directory's."""

    run_id: str


@dataclass(frozen=True)
class Store:
    """An MLflow store that was tried out, and the experiment in it that runs are noted under."""

    client: "MlflowClient"
    experiment: str
    known: str | None
    """The MLflow run that the directory asked about has in this store already."""

    def begin(self, directory: Path, name: str, tags: Mapping[str, str]) -> str:
        """The directory's MLflow run, which is running from now on and has these tags: the one that it has, or new."""
        if self.known is None:
            run_id = str(self.client.create_run(self.experiment, run_name=name, tags=dict(tags)).info.run_id)
            write_atomic(directory / _ID_FILE, _KnownRun(run_id=run_id).model_dump_json().encode())
            return run_id
        self.client.update_run(self.known, status="RUNNING")
        self.tag(tags)
        return self.known

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags on the run that the store has already."""
        assert self.known is not None
        for tag, value in tags.items():
            self.client.set_tag(self.known, tag, value)

    def is_finished(self) -> bool:
        """Whether the store has the run already, with its end."""
        return self.known is not None and self.client.get_run(self.known).info.status == "FINISHED"


def open_store(settings: TrackingSettings, runs: Path, directory: Path) -> Store:
    """Try the store out for `directory`, which need not exist yet; the embedded store is made in `runs`.

    Raises TransportError, within seconds, when the store cannot be reached or used, UsageError when its experiment was
    deleted, CheckpointError for a damaged mlflow.json.
    """
    check_reachable(settings)
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    from mlflow import MlflowClient
    from mlflow.store.db import utils  # noqa: F401  (sets its own log level when it is imported)

    for name, level in _NOISY.items():
        logging.getLogger(name).setLevel(level)
    if not settings.uri:
        runs.mkdir(parents=True, exist_ok=True)
    known = known_run(directory)
    try:
        with settings_of_mlflow(FIRST_PATIENCE):
            client = MlflowClient(tracking_uri=settings.uri or f"sqlite:///{(runs / 'mlflow.db').resolve()}")
            experiment = _experiment(client, settings, runs)
            return Store(client, experiment, known if known and _holds(client, known) else None)
    except store_errors() as error:
        uri = settings.uri or f"sqlite:///{runs / 'mlflow.db'}"
        raise TransportError(f"tracking.uri={public(uri)} cannot be used: {reason_of(error)}") from error


def check_reachable(settings: TrackingSettings) -> None:
    """Raise TransportError unless the host of the store, where it names one, takes a connection; a proxy is trusted to.

    Asked before MLflow is imported.
    """
    if settings.uri and settings.uri != NO_TRACKING:
        check_address(settings.uri, "tracking.uri", "; correct it, or use tracking=none")


def check_address(uri: str, setting: str, advice: str = "") -> None:
    """The same for the store at `uri`, which `setting` names."""
    named = f"{setting}={public(uri)}"
    try:
        parts = urlsplit(uri)
        scheme, host, port = parts.scheme.partition("+")[0], parts.hostname, parts.port
    except ValueError as error:
        raise TransportError(f"{named} is not a usable address: {error}") from error
    if scheme in {"http", "https"} and not host:
        raise TransportError(f"{named} names no host; it is written http://HOST:PORT")
    if scheme not in _PORTS or not host or (scheme in getproxies() and not proxy_bypass(host)):
        return
    try:
        socket.create_connection((host, port or _PORTS[scheme]), timeout=_PROBE).close()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TransportError(f"{named} cannot be reached: {reason}{advice}") from error


def known_run(directory: Path) -> str | None:
    """The MLflow run that `directory` says is its own. Raises CheckpointError for a damaged mlflow.json."""
    path = directory / _ID_FILE
    if not path.is_file():
        return None
    try:
        return _KnownRun.model_validate_json(path.read_bytes()).run_id
    except ValidationError as error:
        raise CheckpointError(f"{path} is damaged: {explain(error)}; remove it to begin a new MLflow run") from error


class MlflowTracker:
    """Observer that writes to MLflow; a resumed run goes on in the same MLflow run.

    A store that fails later does not stop the run, which has cost privacy: what could not be noted is counted, said
    once when it begins and once at the end, and is in the run directory in any case.
    """

    def __init__(
        self,
        settings: TrackingSettings,
        directory: RunDirectory,
        tags: Mapping[str, str] | None = None,
        files: Sequence[str] = (),
    ) -> None:
        """Try the store out; `directory` need not exist yet. `tags` are set on the MLflow run.

        `files` are names in the run directory that become artefacts at the end, beside the model and the records.

        Raises what `open_store` does.
        """
        self._store = open_store(settings, directory.root.parent, directory.root)
        self._directory = directory
        self._tags = dict(tags or {})
        self._files = tuple(files)
        self._asked = 0
        self._lost = 0
        self._run_id: str | None = None
        self._waiting: list[tuple[str, float, int, int]] = []
        """(metric, value, milliseconds since the epoch, round) that the store has not been told yet."""
        self._by_class: list[tuple[str, float, int, int]] = []
        """The same by class, of the last round alone: they are most of a round's figures, and each costs the same."""
        self._next = 0.0
        """When the store is told again, by the monotonic clock."""
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)

    def started(self, record: RunRecord, first_round: int) -> None:
        """Begin, or take up again, the MLflow run and note what was asked, and the rounds before that it lacks."""
        with self._forgiving():
            run_id = self._begin(record)
            if first_round > 1:
                self._fill_in(run_id)

    def finished_round(self, report: "RoundReport") -> None:
        """Metrics and epsilons at this round."""
        with self._forgiving():
            self._note(report.round, report.as_line())
            if report.round >= report.rounds or time.monotonic() >= self._next:
                self._tell(self._run_id or self._begin())

    def catch_up(self, outcome: "Outcome") -> None:
        """Have the store hold a run that has finished, tags and all, whatever it holds of it so far."""
        if self._store.is_finished():
            with self._forgiving():
                self._store.tag(self._tags)
            return
        record = outcome.directory.record()
        self.started(record, record.rounds + 1)
        self.finished(outcome)

    def finished(self, outcome: "Outcome") -> None:
        """The model, the record and the receipts as artefacts."""
        with self._forgiving():
            run_id = self._run_id or self._begin()
            self._tell(run_id)
            for path in (
                outcome.directory.model_path,
                outcome.directory.root / "run.json",
                outcome.directory.root / "receipts.json",
                *(outcome.directory.root / name for name in self._files),
            ):
                self._store.client.log_artifact(run_id, str(path))
            self._store.client.set_terminated(run_id, "FINISHED")
        self._say_what_was_lost()

    def failed(self, error: BaseException | None = None) -> None:
        """Mark the run as failed, or as killed where somebody stopped it; resuming takes it up again."""
        if self._run_id is not None:
            with self._forgiving():
                self._tell(self._run_id)
                self._store.client.set_terminated(self._run_id, ended_by(error))
        self._say_what_was_lost()

    def _begin(self, record: RunRecord | None = None) -> str:
        """The MLflow run, which is running from now on; its record is read where it is not given."""
        record = record or self._directory.record()
        self._run_id = self._store.begin(self._directory.root, record.run, self._tags)
        if self._store.known is None:
            plain = record.model_dump(mode="json", exclude={"schema_text", "version", "software"})
            self._describe(self._run_id, _flat(plain))
        return self._run_id

    def _fill_in(self, run_id: str) -> None:
        """Note the rounds in the run's directory that the store has not: who notes a round may stop before it does."""
        noted = {point.step for point in self._store.client.get_metric_history(run_id, _ALWAYS)}
        for line in self._directory.read_metrics():
            if line["round"] not in noted and _ALWAYS in line:
                self._note(line["round"], line)
        self._tell(run_id)

    def _note(self, number: int, line: Mapping[str, Any]) -> None:
        now = int(time.time() * 1000)
        self._waiting += [(name, value, now, number) for name, value in _values(line).items()]
        self._by_class = [(name, value, now, number) for name, value in _by_class(line).items()]

    def _tell(self, run_id: str) -> None:
        """The store all that is waiting: in few transactions, each of which costs as much as a small round."""
        from mlflow.entities import Metric

        waiting = self._waiting + self._by_class
        self._waiting, self._by_class = [], []
        began = time.monotonic()
        try:
            for start in range(0, len(waiting), _MOST_METRICS):
                part = waiting[start : start + _MOST_METRICS]
                self._store.client.log_batch(run_id, metrics=[Metric(*note) for note in part])
        except Exception:
            # Each round is a note of its own, and whoever forgives this counts one.
            self._lost += max(0, len({number for *_, number in waiting}) - 1)
            raise
        finally:
            ended = time.monotonic()
            self._next = ended + min(max((ended - began) / _SHARE_OF_TELLING, _TELL_EVERY), _TELL_AT_LATEST)

    def _describe(self, run_id: str, values: Sequence[tuple[str, Any]]) -> None:
        from mlflow.entities import Param

        for start in range(0, len(values), _MOST_PARAMETERS):
            part = values[start : start + _MOST_PARAMETERS]
            self._store.client.log_batch(run_id, params=[Param(name, str(value)) for name, value in part])

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        """Count what the store did not take; the first time, say so.

        Every Exception, because the stores of artefacts raise those of their own client libraries. A signal waits: a
        transaction that is broken off in the middle may keep the store locked for whoever notes the run's end.
        """
        self._asked += 1
        try:
            with unbroken():
                yield
        except Exception as error:
            if not self._lost:
                log.warning("MLflow failed and the run goes on without it: %s", reason_of(error))
            self._lost += 1

    def _say_what_was_lost(self) -> None:
        if self._lost:
            log.warning(
                "MLflow lacks %d of %d notes of this run; they are all in %s",
                *(self._lost, self._asked, self._directory.root),
            )


def ended_by(error: BaseException | None) -> str:
    """MLflow's word for how a run ended that `error` ended."""
    return "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"


def make_tracker(
    settings: TrackingSettings,
    directory: RunDirectory,
    tags: Mapping[str, str] | None = None,
    files: Sequence[str] = (),
) -> MlflowTracker | None:
    """A tracker, or None for tracking=none. Raises TransportError when the store cannot be used."""
    return None if settings.uri == NO_TRACKING else MlflowTracker(settings, directory, tags, files)


@contextmanager
def settings_of_mlflow(values: dict[str, str]) -> Iterator[None]:
    """MLflow reads its settings from the environment; those that the user made there are left alone."""
    made = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in made})
    try:
        yield
    finally:
        for name in made:
            del os.environ[name]


def _experiment(client: "MlflowClient", settings: TrackingSettings, runs: Path) -> str:
    found = client.get_experiment_by_name(settings.experiment)
    if found is not None:
        if found.lifecycle_stage != "active":
            raise UsageError(f"the MLflow experiment {settings.experiment!r} was deleted; restore it or choose another")
        return str(found.experiment_id)
    location = (runs / "mlartifacts").resolve().as_uri() if settings.uri is None else None
    return str(client.create_experiment(settings.experiment, artifact_location=location))


def _holds(client: "MlflowClient", run_id: str) -> bool:
    """Whether the store has that run; a store that is another one by now has not."""
    from mlflow.exceptions import MlflowException

    try:
        client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return True


def store_errors() -> tuple[type[Exception], ...]:
    """What MLflow's stores raise, a missing database driver included; imported late, for they take a second."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, RequestException, SQLAlchemyError, OSError, ImportError, ValueError)


def reason_of(error: BaseException) -> str:
    """One line, without the parts of a URL that may be a password."""
    return f"{type(error).__name__}: {public(' '.join(str(error).split()))[:300]}"


def public(text: str) -> str:
    """`text` with the user part of every URL in it replaced."""
    return re.sub(r"://[^/\s@]*@", "://...@", text)


def _values(line: Mapping[str, Any]) -> dict[str, float]:
    """What MLflow is told of a round, from its line in the run's metrics."""
    return {
        **line["metrics"],
        **_beside(line),
        **{name: line[name] for name in (_ALWAYS, *_FIGURES) if name in line},
        "sites": float(len(line["answered"])),
        **{f"epsilon/{site}": value for site, value in line["epsilon"].items() if value is not None},
    }


def _beside(line: Mapping[str, Any]) -> dict[str, float]:
    """The figures beside a round's metrics: means over the sites, the AUROC's bounds, the majority class."""
    values: dict[str, float] = {}
    for name, own in (line.get("over_sites") or {}).items():
        values |= {f"over_sites/{name}": own["mean"], f"over_sites/{name}_spread": own["spread"]}
    if area := line.get("auroc"):
        values |= {"auroc_low": area["interval"][0], "auroc_high": area["interval"][1]}
    if majority := line.get("majority"):
        values["majority_class"] = majority["accuracy"]
    return values


def _by_class(line: Mapping[str, Any]) -> dict[str, float]:
    """The figures of each class."""
    return {
        f"class/{_label(label)}/{name}": value
        for label, own in (line.get("by_class") or {}).items()
        for name, value in own.items()
    }


def _label(text: str) -> str:
    """A class's name in letters that MLflow takes for a metric's."""
    return re.sub(r"[^A-Za-z0-9_. -]", "_", text)[:100]


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            flat += _flat(value, f"{prefix}{name}.")
        else:
            flat.append((prefix + name, value))
    return flat
