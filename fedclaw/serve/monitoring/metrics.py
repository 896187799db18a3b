"""The Prometheus metrics of a node: what workers count, what the control process knows, and how both are read.

    worker    WorkerMetrics.open(directory, worker), then request(), batch(), ... as things happen: 0.5 us a number
    control   NodeMetrics(directory).render() for GET /metrics, over all workers; set_routing(), set_windows(), ...

Labels come from the configuration, never from a client: a request for a model or version that the node does not serve
is counted under an empty name, an unknown protocol as `other`. So nobody can make series by asking for names.

`WORKER_METRICS` and `CONTROL_METRICS` are all there is; the table in docs/serving-monitoring.md is made of them.
"""

import logging
import os
import platform
import threading
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from typing import Literal, get_args

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from fedclaw.serve.monitoring.processes import gpu_figures, process_figures
from fedclaw.serve.monitoring.series import (
    Place,
    SeriesError,
    SeriesFile,
    SeriesName,
    alive,
    read_series,
    series_files,
)
from fedclaw.serve.refusals import STATUS, Code

log = logging.getLogger(__name__)

PREFIX = "fedclaw_serve_"
PROTOCOLS = ("rest", "predict", "grpc", "feedback", "admin")
OTHER = "other"
NOBODY = ""
"""The label of what the node does not have: for Prometheus as if there were no label."""

LATENCY = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
ROWS = tuple(float(2**power) for power in range(13))
LOADING = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)

Kind = Literal["counter", "gauge", "histogram"]
BreakerState = Literal["closed", "open", "half_open"]


@dataclass(frozen=True)
class Definition:
    """One metric: its name without the prefix, what it means, its labels in their order, the ends of its bins."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    bins: tuple[float, ...] = ()
    per_worker: bool = False
    """Whether each worker's number is shown by itself, with the label `worker`; else their sum."""

    @property
    def full_name(self) -> str:
        """As Prometheus knows it."""
        return PREFIX + self.name

    @property
    def cells(self) -> int:
        """Numbers that it takes: of a histogram one for each bin, one for all above, and the sum."""
        return len(self.bins) + 2 if self.kind == "histogram" else 1

    @property
    def shown_labels(self) -> tuple[str, ...]:
        """Labels of the exposed metric."""
        return (*self.labels, "worker") if self.per_worker else self.labels


_MODEL = ("model", "version")

WORKER_METRICS = (
    Definition("requests_total", "counter", "Requests answered or refused.", (*_MODEL, "protocol", "status")),
    Definition("request_duration_seconds", "histogram", "From a request's head to its answer.", _MODEL, LATENCY),
    Definition("refusals_total", "counter", "Requests refused, by the code in the answer.", ("model", "code")),
    Definition("rate_limited_total", "counter", "Requests over their principal's rate."),
    Definition("rows_total", "counter", "Rows of batches, mirrored ones too.", _MODEL),
    Definition("rows_refused_total", "counter", "Rows that the schema refused, of requests answered.", _MODEL),
    Definition("queue_rows", "gauge", "Rows that wait for a batch now.", _MODEL),
    Definition("queue_wait_seconds", "histogram", "From its queue to its batch, of a batch's oldest.", _MODEL, LATENCY),
    Definition("batch_rows", "histogram", "Rows of a batch.", _MODEL, ROWS),
    Definition("inference_duration_seconds", "histogram", "A batch in ONNX Runtime.", _MODEL, LATENCY),
    Definition("mirrored_total", "counter", "Requests that a version saw and nobody was answered from.", _MODEL),
    Definition("models_loaded", "gauge", "Workers that hold the version in memory.", _MODEL),
    Definition("model_memory_bytes", "gauge", "Memory of the version in all workers.", _MODEL),
    Definition("model_load_duration_seconds", "histogram", "Load and warm-up of a version.", _MODEL, LOADING),
    Definition("token_cache_total", "counter", "Bearer tokens looked up among those verified.", ("result",)),
    Definition("audit_lines_total", "counter", "Lines written to the audit log."),
    Definition("audit_missed_total", "counter", "Answers that left without a line in the audit log."),
    Definition("feedback_total", "counter", "Feedback, by what became of it.", ("model", "result")),
    Definition("breaker_trips_total", "counter", "Breakers that a worker opened at once by itself.", _MODEL),
    Definition("worker_starts_total", "counter", "Starts of a worker; each but the first is a restart.", (), (), True),
    Definition("worker_start_time_seconds", "gauge", "When a living worker started, in Unix time.", (), (), True),
    Definition("worker_ready", "gauge", "1 while a living worker answers.", (), (), True),
    Definition("worker_pid", "gauge", "The process of a living worker.", (), (), True),
)
"""What workers count, in their files."""

CONTROL_METRICS = (
    Definition("build_info", "gauge", "1, with the versions of the software.", ("version", "python", "onnxruntime")),
    Definition("workers", "gauge", "Workers that are alive."),
    Definition("workers_wanted", "gauge", "Workers that the configuration asks for."),
    Definition("version_share", "gauge", "Share of the model's keys that a version is to answer.", _MODEL),
    Definition("canary_share", "gauge", "Share of keys that the candidate answers; 0 without one.", ("model",)),
    Definition("breaker_state", "gauge", "1 for the state that a version's breaker is in.", (*_MODEL, "state")),
    Definition(
        "decisions_total",
        "counter",
        "Decisions about versions since this process began, whoever took them.",
        ("model", "kind"),
    ),
    Definition("audit_valid", "gauge", "1 if the audit log's chain was whole when it was last verified."),
    Definition("state_store_errors_total", "counter", "Failed calls of the state store."),
    Definition("feedback_window_seconds", "gauge", "Length of the feedback windows."),
    Definition("feedback_outcomes", "gauge", "Feedback within the window.", _MODEL),
    Definition("feedback_accuracy", "gauge", "Accuracy within the window.", _MODEL),
    Definition("feedback_precision", "gauge", "Precision within the window.", _MODEL),
    Definition("feedback_recall", "gauge", "Recall within the window.", _MODEL),
    Definition("feedback_f1", "gauge", "F1 within the window.", _MODEL),
    Definition("feedback_false_positive_rate", "gauge", "False-positive rate within the window.", _MODEL),
    Definition("feedback_completion", "gauge", "Share of tasks completed within the window.", _MODEL),
    Definition("feedback_satisfaction", "gauge", "Mean satisfaction within the window.", _MODEL),
    Definition("drift_psi", "gauge", "Population stability index of a feature's inputs.", (*_MODEL, "feature")),
    Definition("drift_ks", "gauge", "Kolmogorov-Smirnov distance of a feature's inputs.", (*_MODEL, "feature")),
    Definition(
        "drift_alarm", "gauge", "1 while a feature's drift is more than chance and noise.", (*_MODEL, "feature")
    ),
    Definition("drift_rows", "gauge", "Sampled rows that the drift figures are of.", _MODEL),
    Definition("process_cpu_seconds_total", "counter", "Processor time of a process.", ("process",)),
    Definition("process_resident_memory_bytes", "gauge", "Resident memory of a process.", ("process",)),
    Definition("process_open_fds", "gauge", "Open files and sockets of a process.", ("process",)),
    Definition("process_max_fds", "gauge", "Files and sockets that a process may open.", ("process",)),
    Definition("process_threads", "gauge", "Threads of a process.", ("process",)),
    Definition("gpu_memory_used_bytes", "gauge", "Memory used on a GPU, by all its processes.", ("gpu",)),
    Definition("gpu_memory_total_bytes", "gauge", "Memory of a GPU.", ("gpu",)),
    Definition("gpu_utilisation_ratio", "gauge", "Share of time that a GPU was busy.", ("gpu",)),
)
"""What the control process adds."""

DEFINITIONS: Mapping[str, Definition] = {one.name: one for one in (*WORKER_METRICS, *CONTROL_METRICS)}
STATES = get_args(BreakerState)
_STATUSES = {number: str(number) for number in range(100, 600)}
_OF_A_BATCH = ("batch_rows", "queue_wait_seconds", "inference_duration_seconds", "rows_total")


class WorkerMetrics:
    """What one worker counts. The methods are for its event loop: of two threads at one number, one may be lost.

    Legend: `status` is the HTTP status, or that which a gRPC status stands for (`fedclaw.serve.refusals.STATUS`).
    """

    def __init__(self, file: SeriesFile) -> None:
        self._file = file
        self._known: Mapping[str, frozenset[str]] = {}
        self._making = threading.RLock()
        self._forget_places()

    @classmethod
    def open(cls, directory: Path, worker: int) -> "WorkerMetrics":
        """Take the worker's place in `directory` and go on with its counts; its gauges begin anew.

        Raises SeriesError when another living process has that place.
        """
        metrics = cls(SeriesFile(directory, worker, _outlives_its_process))
        metrics._add("worker_starts_total")
        # Prometheus sees a counter rise only from a number that it has seen.
        metrics._add("audit_missed_total", amount=0.0)
        metrics._set("worker_start_time_seconds", time.time())
        metrics._set("worker_pid", float(os.getpid()))
        return metrics

    def serves(self, versions: Mapping[str, Iterable[str]]) -> None:
        """The models and versions, by model, that the node has now. Only they become labels; series of versions that
        are gone end."""
        known = {model: frozenset(found) for model, found in versions.items()}
        with self._making:
            if known != self._known:
                self._known = known
                self._file.keep(self._still_served)
                self._forget_places()

    # The hot path.

    def request(self, model: str, version: str, protocol: str, status: int, seconds: float | None) -> None:
        """A request that was answered or refused; None: it was refused before anybody looked at the clock."""
        found = self._requests.get((model, version, protocol, status))
        if found is None:
            found = self._request_places(model, version, protocol, status)
        (cells, counter), (_, histogram) = found
        cells[counter] += 1.0
        if seconds is None:
            return
        cells[histogram + bisect_left(LATENCY, seconds)] += 1.0
        cells[histogram + _LATENCY_SUM] += seconds

    def batch(self, model: str, version: str, rows: int, wait_seconds: float, seconds: float | None = None) -> None:
        """A batch that was answered: how long its oldest request waited, and how long it was in ONNX Runtime."""
        found = self._batches.get((model, version))
        if found is None:
            found = self._batch_places(model, version)
        (cells, sizes), (_, waits), (_, runs), (_, answered) = found
        cells[sizes + bisect_left(ROWS, rows)] += 1.0
        cells[sizes + _ROWS_SUM] += rows
        cells[waits + bisect_left(LATENCY, wait_seconds)] += 1.0
        cells[waits + _LATENCY_SUM] += wait_seconds
        cells[answered] += rows
        if seconds is not None:
            cells[runs + bisect_left(LATENCY, seconds)] += 1.0
            cells[runs + _LATENCY_SUM] += seconds

    def token(self, hit: bool) -> None:
        """A bearer token was among the verified ones, or had to be verified."""
        self._add("token_cache_total", "hit" if hit else "miss")

    def audit_line(self, written: bool = True) -> None:
        """An answer has its line in the audit log; or left without one, where that was asked for."""
        self._add("audit_lines_total" if written else "audit_missed_total")

    def queue(self, model: str, version: str, rows: int) -> None:
        """So many rows wait now."""
        self._set("queue_rows", float(rows), *self._named(model, version))

    # Seldom.

    def rows_refused(self, model: str, version: str, rows: int) -> None:
        """Rows of an answered request that the schema does not take."""
        self._add("rows_refused_total", *self._named(model, version), amount=float(rows))

    def refused(self, model: str | None, code: Code) -> None:
        """A request was refused; None: before it was known for which model."""
        known = self._named(model or NOBODY)[0]
        self._add("refusals_total", known, code if code in STATUS else OTHER)

    def rate_limited(self) -> None:
        """A principal asked more often than it may."""
        self._add("rate_limited_total")

    def mirrored(self, model: str, version: str) -> None:
        """A version saw a request that another one answered."""
        self._add("mirrored_total", *self._named(model, version))

    def loaded(self, model: str, version: str, seconds: float, memory: int) -> None:
        """A version was loaded and warmed; it takes `memory` bytes."""
        labels = self._named(model, version)
        self._set("models_loaded", 1.0, *labels)
        self._set("model_memory_bytes", float(memory), *labels)
        self._observe("model_load_duration_seconds", seconds, *labels)

    def unloaded(self, model: str, version: str) -> None:
        """A version is no longer in memory."""
        labels = self._named(model, version)
        self._set("models_loaded", 0.0, *labels)
        self._set("model_memory_bytes", 0.0, *labels)
        self._set("queue_rows", 0.0, *labels)

    def feedback(self, model: str, result: Literal["credited", "repeated", "refused"]) -> None:
        """Feedback came in: its first for that prediction, one more, or one that was not believed."""
        self._add("feedback_total", self._named(model)[0], result)

    def tripped(self, model: str, version: str) -> None:
        """The worker opened a breaker without waiting for a decision."""
        self._add("breaker_trips_total", *self._named(model, version))

    def ready(self, ready: bool) -> None:
        """Whether the worker answers."""
        self._set("worker_ready", float(ready))

    def close(self) -> None:
        """Give the place up: gauges end, counts stay."""
        self._file.close()

    def _named(self, model: str, version: str | None = None) -> tuple[str, ...]:
        """The labels: of a model or version that is not served, none."""
        versions = self._known.get(model)
        if version is None:
            return (NOBODY,) if versions is None else (model,)
        if versions is None:
            return NOBODY, NOBODY
        return model, version if version in versions else NOBODY

    def _still_served(self, name: SeriesName) -> bool:
        definition = DEFINITIONS[name.metric]
        found = dict(zip(definition.labels, name.labels, strict=True))
        model = found.get("model", NOBODY)
        of_a_version = found.get("version", NOBODY)
        return model == NOBODY or (
            model in self._known and (of_a_version == NOBODY or of_a_version in self._known[model])
        )

    def _forget_places(self) -> None:
        self._requests: dict[tuple[str, str, str, int], tuple[Place, Place]] = {}
        self._batches: dict[tuple[str, str], tuple[Place, ...]] = {}
        self._single: dict[tuple[str, ...], Place] = {}

    def _place(self, metric: str, *labels: str) -> Place:
        """Kept by labels, which are never a client's words."""
        found = self._single.get((metric, *labels))
        if found is None:
            with self._making:
                found = self._file.place(SeriesName(metric, labels), DEFINITIONS[metric].cells)
                self._single[metric, *labels] = found
        return found

    def _request_places(self, model: str, version: str, protocol: str, status: int) -> tuple[Place, Place]:
        with self._making:
            named = self._named(model, version)
            spoken = protocol if protocol in PROTOCOLS else OTHER
            shown = _STATUSES.get(status, "500")
            found = (
                self._place("requests_total", *named, spoken, shown),
                self._place("request_duration_seconds", *named),
            )
            if (*named, spoken, shown) == (model, version, protocol, str(status)):
                self._requests[model, version, protocol, status] = found
            return found

    def _batch_places(self, model: str, version: str) -> tuple[Place, ...]:
        with self._making:
            named = self._named(model, version)
            found = tuple(self._place(metric, *named) for metric in _OF_A_BATCH)
            if named == (model, version):
                self._batches[model, version] = found
            return found

    def _add(self, metric: str, *labels: str, amount: float = 1.0) -> None:
        cells, place = self._place(metric, *labels)
        cells[place] += amount

    def _set(self, metric: str, value: float, *labels: str) -> None:
        cells, place = self._place(metric, *labels)
        cells[place] = value

    def _observe(self, metric: str, value: float, *labels: str) -> None:
        cells, place = self._place(metric, *labels)
        bins = DEFINITIONS[metric].bins
        cells[place + bisect_left(bins, value)] += 1.0
        cells[place + len(bins) + 1] += value


_LATENCY_SUM = len(LATENCY) + 1
_ROWS_SUM = len(ROWS) + 1


def _outlives_its_process(name: SeriesName) -> bool:
    """Whether a worker that is started again goes on with the number."""
    definition = DEFINITIONS.get(name.metric)
    return definition is not None and definition.kind != "gauge" and len(name.labels) == len(definition.labels)


@dataclass(frozen=True)
class FeedbackFigures:
    """What feedback within a window says of a version; None: too little is known."""

    outcomes: int
    accuracy: float | None = None
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None
    false_positive_rate: float | None = None
    completion: float | None = None
    satisfaction: float | None = None


@dataclass(frozen=True)
class RoutingFigures:
    """How a model's requests are shared out."""

    shares: Mapping[str, float]
    """By version, the share of keys that it is to answer."""
    breakers: Mapping[str, BreakerState] = field(default_factory=dict)
    candidate: str | None = None
    """The version on trial."""


class NodeMetrics:
    """All metrics of a node, for its control process: what the workers count and what it knows itself.

    `set_…` replaces what was said of that kind before, so that nothing is shown of what is gone.
    """

    def __init__(self, directory: Path, workers_wanted: int = 0, processes: Mapping[str, int] | None = None) -> None:
        """`directory` is that of the workers' files, `processes` the ids of others by name, as `supervisor`."""
        self._directory = directory
        self._processes = {**(processes or {}), "control": os.getpid()}
        self._counted: dict[SeriesName, float] = {}
        self._said: dict[str, dict[SeriesName, float]] = {}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self._said["build"] = {SeriesName("build_info", _build()): 1.0}
        self._said["wanted"] = {SeriesName("workers_wanted"): float(workers_wanted)}

    def render(self, accept: str | None = None) -> tuple[bytes, str]:
        """The page for GET /metrics and its content type, in the format that the `Accept` header asks for."""
        encode, content_type = choose_encoder(accept or "")
        return encode(self._registry), content_type

    def set_routing(self, models: Mapping[str, RoutingFigures]) -> None:
        """Shares, breakers and canaries of all models."""
        said: dict[SeriesName, float] = {}
        for model, routing in models.items():
            for one, share in routing.shares.items():
                said[SeriesName("version_share", (model, one))] = share
            for one, state in routing.breakers.items():
                for each in STATES:
                    said[SeriesName("breaker_state", (model, one, each))] = float(each == state)
            share = routing.shares.get(routing.candidate, 0.0) if routing.candidate is not None else 0.0
            said[SeriesName("canary_share", (model,))] = share
        self._said["routing"] = said

    def set_windows(self, seconds: float, figures: Mapping[tuple[str, str], FeedbackFigures]) -> None:
        """What feedback says, by model and version."""
        said = {SeriesName("feedback_window_seconds"): seconds}
        for version_of, found in figures.items():
            for name, value in vars(found).items():
                if value is not None:
                    said[SeriesName(f"feedback_{name}", version_of)] = float(value)
        self._said["windows"] = said

    def set_drift(
        self, figures: Mapping[tuple[str, str], Mapping[str, tuple[float | None, float | None, bool]]]
    ) -> None:
        """By model and version, and by feature: PSI, KS distance (None: there is none) and whether it is an alarm.

        Figures over few rows are not to be given: they would say what a single request held.
        """
        said: dict[SeriesName, float] = {}
        for version_of, features in figures.items():
            for feature, (psi, distance, alarm) in features.items():
                if psi is not None:
                    said[SeriesName("drift_psi", (*version_of, feature))] = psi
                said[SeriesName("drift_alarm", (*version_of, feature))] = float(alarm)
                if distance is not None:
                    said[SeriesName("drift_ks", (*version_of, feature))] = distance
        self._said["drift"] = said

    def set_drift_rows(self, rows: Mapping[tuple[str, str], int]) -> None:
        """By model and version, how many rows the drift figures are of."""
        self._said["drift rows"] = {SeriesName("drift_rows", one): float(count) for one, count in rows.items()}

    def set_audit_valid(self, valid: bool) -> None:
        """What the last verification of the audit log said."""
        self._said["audit"] = {SeriesName("audit_valid"): float(valid)}

    def decided(self, model: str, kind: str) -> None:
        """A decision was taken; `kind` is one of ours, as `canary_grows`."""
        self._count(SeriesName("decisions_total", (model, kind)))

    def state_store_failed(self) -> None:
        """A call of the state store failed."""
        self._count(SeriesName("state_store_errors_total"))

    def audit_missed(self) -> None:
        """An answer of the admin port left without a line in the audit log."""
        self._count(SeriesName("audit_missed_total"))

    def set_process(self, name: str, pid: int) -> None:
        """Another process of the node to show the resources of."""
        self._processes[name] = pid

    def collect(self) -> Iterator[Metric]:
        """All metrics, for prometheus_client's registry."""
        living = [worker for worker in series_files(self._directory) if alive(self._directory, worker)]
        values = self._workers(living)
        found: dict[SeriesName, tuple[float, ...]] = {
            name: (value + values.get(name, (0.0,))[0],) for name, value in list(self._counted.items())
        }
        for said in list(self._said.values()):
            found.update({name: (value,) for name, value in said.items()})
        found[SeriesName("workers")] = (float(len(living)),)
        found.update(self._resources(values))
        yield from _families({**values, **found})

    def _count(self, name: SeriesName) -> None:
        self._counted[name] = self._counted.get(name, 0.0) + 1.0

    def _workers(self, living: Iterable[int]) -> dict[SeriesName, tuple[float, ...]]:
        """The sums over the workers; gauges of the living ones alone."""
        total: dict[SeriesName, tuple[float, ...]] = {}
        for worker, path in series_files(self._directory).items():
            for name, values in _read(path).items():
                definition = DEFINITIONS.get(name.metric)
                if definition is None or (definition.kind == "gauge" and worker not in living):
                    continue
                shown = SeriesName(name.metric, (*name.labels, str(worker))) if definition.per_worker else name
                total[shown] = _sum(total.get(shown, (0.0,) * len(values)), values)
        return total

    def _resources(self, values: Mapping[SeriesName, tuple[float, ...]]) -> Iterator[tuple[SeriesName, tuple[float]]]:
        pids = {f"worker-{name.labels[0]}": int(pid[0]) for name, pid in values.items() if name.metric == "worker_pid"}
        for process, pid in {**self._processes, **pids}.items():
            for metric, value in process_figures(pid).items():
                yield SeriesName(metric, (process,)), (value,)
        for gpu, figures in gpu_figures().items():
            for metric, value in figures.items():
                yield SeriesName(metric, (gpu,)), (value,)


def clear(directory: Path) -> None:
    """Forget what an earlier node counted; for the supervisor, before it starts the first worker."""
    for path in series_files(directory).values():
        path.unlink(missing_ok=True)


def _read(path: Path) -> Mapping[SeriesName, tuple[float, ...]]:
    try:
        return read_series(path)
    except SeriesError as error:
        log.warning("a worker's metrics are left out: %s", error)
        return {}


def _sum(one: tuple[float, ...], other: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(left + right for left, right in zip(one, other, strict=True))


def _families(values: Mapping[SeriesName, tuple[float, ...]]) -> Iterator[Metric]:
    by_metric: dict[str, list[tuple[tuple[str, ...], tuple[float, ...]]]] = {}
    for name, numbers in values.items():
        by_metric.setdefault(name.metric, []).append((name.labels, numbers))
    for metric, definition in DEFINITIONS.items():
        if metric in by_metric:
            yield _family(definition, sorted(by_metric[metric]))


def _family(definition: Definition, series: Iterable[tuple[tuple[str, ...], tuple[float, ...]]]) -> Metric:
    name, labels = definition.full_name, definition.shown_labels
    if definition.kind == "histogram":
        histogram = HistogramMetricFamily(name, definition.help, labels=labels)
        for values, (*counts, total) in series:
            ends = [*map(repr, definition.bins), "+Inf"]
            histogram.add_metric(values, list(zip(ends, accumulate(counts), strict=True)), sum_value=total)
        return histogram
    family = CounterMetricFamily if definition.kind == "counter" else GaugeMetricFamily
    made = family(name, definition.help, labels=labels)
    for values, (number,) in series:
        made.add_metric(values, number)
    return made


def _build() -> tuple[str, str, str]:
    return _installed("fedclaw"), platform.python_version(), _installed("onnxruntime")


def _installed(name: str) -> str:
    with suppress(PackageNotFoundError):
        return version(name)
    return "unknown"
