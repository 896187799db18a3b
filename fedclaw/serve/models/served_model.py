"""One version of a model, loaded from verified bytes, and what a request to it must look like."""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedclaw.compress.record import Precision
from fedclaw.errors import BundleError
from fedclaw.export.check import Verified
from fedclaw.export.layout import FORMS, INPUT, ONNX, PIPELINE, SCHEMA, Manifest, TensorSpec
from fedclaw.export.predictor import graph_of, schema_of
from fedclaw.export.runtime import Device, open_session
from fedclaw.learning.preprocessing import Columns, TypedColumn
from fedclaw.learning.workload import Schema
from fedclaw.serve.models.batching import (
    BatchFigures,
    BatchMoments,
    EagerBatcher,
    Execution,
    Infer,
    Outputs,
    QueueLimits,
)
from fedclaw.serve.models.features import SharedFeatures, cut_features
from fedclaw.serve.models.graphs import (
    PipelineGraph,
    PreparedGraph,
    ServingGraph,
    SplitGraph,
    TypedGraph,
    pipeline_outputs,
)
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.requests import InferenceRequest, InferenceResponse

ServedPrecision = Precision | Literal["recommended"]
KEPT = (PIPELINE, SCHEMA, *FORMS.values())
"""The files of a bundle that serving can need: what to keep when it is verified."""
_SHOWN = 60
_TEXT = np.dtype(object)


@dataclass(frozen=True, slots=True)
class _Expected:
    """What a request's column must be."""

    name: str
    dtype: np.dtype[Any]
    tail: tuple[int, ...]
    """The shape without the batch."""

    @classmethod
    def of(cls, column: TypedColumn) -> "_Expected":
        tail = column.shape[1:]
        if not all(isinstance(size, int) for size in tail):
            raise BundleError(f"the column {column.name!r} has a shape that is not fixed")
        dtype = _TEXT if column.dtype == "string" else np.dtype(column.dtype)
        return cls(column.name, dtype, tuple(map(int, tail)))

    def problem(self, values: NDArray[Any], rows: int) -> str | None:
        """Why the values are not N rows of the column, as the end of a sentence; None: they are."""
        if values.dtype != self.dtype:
            return f"has values of type {_type_name(values.dtype)}; the model takes {_type_name(self.dtype)}"
        if values.shape != (rows, *self.tail):
            return f"has the shape {list(values.shape)}; the model takes {[rows, *self.tail]} for {rows} rows"
        if self.dtype is not _TEXT:
            return None
        try:
            "".join(values.ravel().tolist()).encode()
        except (TypeError, UnicodeEncodeError):
            return "has a value that is not Unicode text"
        return None


@dataclass(frozen=True, slots=True)
class ModelInterface:
    """What a model takes and gives."""

    columns: tuple[TypedColumn, ...]
    """The columns of a request: those of pipeline.onnx, or the prepared `inputs` alone where the bundle has none."""
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...]
    """Names of the classes, in the order of the probabilities; none where the task has no classes."""
    threshold: float | None
    """The probability from which the second of two classes is the answer; None: the likeliest class is."""
    task: str
    _expected: tuple[_Expected, ...] = field(repr=False)
    _outputs: frozenset[str] = field(repr=False)

    @classmethod
    def of(cls, manifest: Manifest, schema: Schema) -> "ModelInterface":
        """The interface of a verified bundle. Raises BundleError for one that no request can be checked against."""
        columns = manifest.pipeline.columns if manifest.pipeline else (_prepared_column(manifest),)
        outputs = pipeline_outputs(schema.task)
        return cls(
            columns,
            outputs,
            schema.labels,
            manifest.decision.threshold if manifest.decision else None,
            manifest.task,
            tuple(map(_Expected.of, columns)),
            frozenset(output.name for output in outputs),
        )

    def check(self, request: InferenceRequest) -> None:
        """Raise ServeRefusal, naming the column, unless the model can answer the request.

        What its rows hold is not looked at: a row that the model does not take costs itself the answer.
        """
        columns, rows = request.columns, request.rows
        if rows < 1:
            raise ServeRefusal("bad_request", "the request has no rows")
        for expected in self._expected:
            values = columns.get(expected.name)
            if values is None:
                raise ServeRefusal("unprocessable", f"the column {expected.name!r} is missing")
            if (problem := expected.problem(values, rows)) is not None:
                raise ServeRefusal("unprocessable", f"the column {expected.name!r} {problem}")
        if len(columns) != len(self._expected):
            known = {expected.name for expected in self._expected}
            unknown = next(name for name in columns if name not in known)
            raise ServeRefusal("unprocessable", f"the model has no column {unknown[:_SHOWN]!r}")
        if request.outputs is not None and (odd := [name for name in request.outputs if name not in self._outputs]):
            raise ServeRefusal("bad_request", f"the model has no output {odd[0][:_SHOWN]!r}")


class ServedModel:
    """A version of a model, in memory: it answers requests through its batcher."""

    def __init__(
        self,
        name: str,
        version: str,
        digest: str,
        schema: Schema,
        interface: ModelInterface,
        graph: ServingGraph,
        batcher: EagerBatcher,
        features: SharedFeatures | None = None,
    ) -> None:
        """`batcher` takes what `features` gives, or a request's columns where there are none."""
        self.name = name
        self.version = version
        self.digest = digest
        """SHA-256 of the bundle's SHA256SUMS, 64 hex digits."""
        self.schema = schema
        self.interface = interface
        self.graph = graph
        self.batcher = batcher
        self.features = features
        self._in_flight = 0
        self._idle: asyncio.Future[None] | None = None

    @property
    def in_flight(self) -> int:
        """Requests that are not answered yet."""
        return self._in_flight

    async def answer(self, request: InferenceRequest, moments: BatchMoments | None = None) -> InferenceResponse:
        """The answer to each row of a request; `moments` is filled in as they come.

        Raises ServeRefusal: `unprocessable` or `bad_request` for one that does not fit the model, and what
        `EagerBatcher.answer` raises.
        """
        self.interface.check(request)
        self._in_flight += 1
        try:
            outputs = await self._compute(request.columns, request.rows, request.deadline, moments)
        finally:
            self._in_flight -= 1
            if self._idle is not None and not self._in_flight and not self._idle.done():
                self._idle.set_result(None)
        if request.outputs is not None:
            outputs = {name: outputs[name] for name in request.outputs}
        return InferenceResponse(self.name, self.version, request.identity, outputs)

    async def _compute(
        self, columns: Columns, rows: int, deadline: float | None, moments: BatchMoments | None
    ) -> Outputs:
        if self.features is not None:
            if moments is not None:
                moments.preparing = monotonic()
            columns = await self.features.prepare(columns, rows, deadline)
        return await self.batcher.answer(columns, rows, deadline, moments)

    def infer(self, columns: Mapping[str, NDArray[Any]]) -> Outputs:
        """The outputs of N checked rows, at once and in this thread, past the batcher."""
        return self.graph.run(columns)

    async def drain(self) -> None:
        """Wait until every request is answered."""
        while self._in_flight:
            if self._idle is None or self._idle.done():
                self._idle = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._idle)


@dataclass(frozen=True, slots=True)
class LoadedGraph:
    """A graph that is in memory and not yet served."""

    schema: Schema
    interface: ModelInterface
    graph: ServingGraph
    file: str
    """Which of the bundle's files computes."""
    typed: bool
    """Whether it takes typed columns; else the prepared inputs."""

    def serve(
        self,
        name: str,
        version: str,
        digest: str,
        execution: Execution,
        limits: QueueLimits | None = None,
        executor: Executor | None = None,
        observe: Callable[[BatchFigures], None] | None = None,
        features: SharedFeatures | None = None,
    ) -> ServedModel:
        """The model that answers from the graph. `observe` is told of each batch.

        `features` are for a SplitGraph; `execution` is then that of its model.
        """
        run: Infer = self.graph.run
        if features is not None:
            assert isinstance(self.graph, SplitGraph)
            run = self.graph.answer_prepared
        batcher = EagerBatcher(run, execution, limits, executor, observe)
        return ServedModel(name, version, digest, self.schema, self.interface, self.graph, batcher, features)


def files_for(precision: ServedPrecision) -> tuple[str, ...]:
    """The files that have to be kept to serve a bundle in that precision, as far as it has them."""
    if precision == "recommended":
        return KEPT
    return (SCHEMA, PIPELINE, ONNX) if precision == "float32" else (SCHEMA, FORMS[precision])


def load_graph(
    verified: Verified, precision: ServedPrecision = "float32", threads: int = 1, device: Device = "cpu"
) -> LoadedGraph:
    """Load a verified bundle of which `files_for` were kept: pipeline.onnx, or the form of the model that is asked for.

    Raises BundleError where its files contradict each other or it lacks the form, PluginError when its workload is not
    installed here, UsageError when ONNX Runtime is missing.
    """
    manifest, schema = verified.manifest, schema_of(verified)
    interface = ModelInterface.of(manifest, schema)
    form = graph_of(manifest, precision)
    file = PIPELINE if manifest.pipeline and form == ONNX else form
    if file not in verified.contents:
        raise BundleError(f"{verified.path} has no {file}: precision={precision} needs it")
    session = open_session(verified.contents[file], file, "serve", device, threads)
    if file == PIPELINE:
        _require_columns(session, interface)
        return LoadedGraph(schema, interface, PipelineGraph(session, interface.outputs), file, True)
    model = PreparedGraph(session, schema.task, interface.threshold)
    graph = TypedGraph(schema.preprocessing(), model) if manifest.pipeline else model
    return LoadedGraph(schema, interface, graph, file, manifest.pipeline is not None)


def split_graph(verified: Verified, loaded: LoadedGraph, threads: int = 1, device: Device = "cpu") -> SplitGraph | None:
    """The pipeline in two, its preprocessing and model.onnx; None where it cannot be cut, or the bundle has none."""
    if loaded.file != PIPELINE or ONNX not in verified.contents:
        return None
    if (features := cut_features(verified.contents[PIPELINE], threads, device)) is None:
        return None
    session = open_session(verified.contents[ONNX], ONNX, "serve", device, threads)
    return SplitGraph(features, PreparedGraph(session, loaded.schema.task, loaded.interface.threshold))


def _prepared_column(manifest: Manifest) -> TypedColumn:
    """The one column of a bundle without a pipeline."""
    shape = manifest.inputs[0].shape
    meaning = f"prepared inputs, as the bundle's schema makes them; {manifest.no_pipeline or 'no pipeline.onnx'}"
    return TypedColumn(name=INPUT, column=INPUT, dtype="float32", shape=shape, meaning=meaning)


def _require_columns(session: Any, interface: ModelInterface) -> None:
    told, taken = {column.name for column in interface.columns}, {given.name for given in session.get_inputs()}
    if told != taken:
        odd = ", ".join(sorted(told ^ taken))
        raise BundleError(f"{PIPELINE} and the manifest disagree about the columns: {odd}")


def _type_name(dtype: np.dtype[Any]) -> str:
    return "string" if dtype == _TEXT else dtype.name
