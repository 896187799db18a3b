"""A bundle's graphs in ONNX Runtime: typed columns or prepared inputs in, the outputs of a pipeline out.

    PipelineGraph     pipeline.onnx: typed columns -> label, probabilities or values, refused
    PreparedGraph     model.onnx, or its 8-bit or 16-bit form: prepared inputs -> the same outputs
    SplitGraph        the preprocessing of pipeline.onnx, and model.onnx: the same, so that versions can share the first
    TypedGraph        a Preprocessing and a PreparedGraph: what pipeline.onnx gives, with another form of the model

All of them answer each row by itself: a row that is refused has `refused` true, no label, and NaN.

Legend: N rows, D input shape without the batch, K outputs of the model.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import BundleError
from fedclaw.export.layout import BATCH, INPUT, TensorSpec
from fedclaw.learning.preprocessing import LABEL, REFUSED, Columns, Preprocessing
from fedclaw.learning.tasks.base import Task
from fedclaw.learning.tasks.classification import decide
from fedclaw.serve.models.batching import Outputs
from fedclaw.serve.models.features import FeatureGraph


class ServingGraph(Protocol):
    """What computes answers. `run` may be called from any thread."""

    def run(self, columns: Columns) -> Outputs:
        """Outputs of N rows, by name. The columns have been checked."""


def pipeline_outputs(task: Task) -> tuple[TensorSpec, ...]:
    """What every graph here gives, in order."""
    label = [TensorSpec(name=LABEL, dtype="string", shape=(BATCH, 1))] if task.labels else []
    answer = TensorSpec(name=task.head[1], shape=(BATCH, task.outputs))
    return (*label, answer, TensorSpec(name=REFUSED, dtype="bool", shape=(BATCH, 1)))


class PipelineGraph:
    """pipeline.onnx, in one session."""

    def __init__(self, session: Any, outputs: Sequence[TensorSpec]) -> None:
        """Raises BundleError where the graph lacks one of the outputs."""
        self._run = session.run
        self._names = [output.name for output in outputs]
        if missing := set(self._names) - {output.name for output in session.get_outputs()}:
            raise BundleError(f"the pipeline does not give {', '.join(sorted(missing))}")

    def run(self, columns: Columns) -> Outputs:
        """See ServingGraph."""
        return dict(zip(self._names, self._run(self._names, columns), strict=True))


class PreparedGraph:
    """The model alone, with the decision behind it."""

    def __init__(self, session: Any, task: Task, threshold: float | None) -> None:
        """Raises BundleError for a graph that does not take `inputs`, or does not give what the task has."""
        taken = [given.name for given in session.get_inputs()]
        self._run, self._wanted = session.run, [task.head[1]]
        if taken != [INPUT] or task.head[1] not in {output.name for output in session.get_outputs()}:
            raise BundleError(f"the model does not take {INPUT!r}, or does not give {task.head[1]!r}")
        self._threshold = threshold
        self._labels = np.array([*task.labels, ""], object) if task.labels else None

    def run(self, columns: Columns) -> Outputs:
        """See ServingGraph. A row of inputs that are not all finite is refused."""
        inputs = columns[INPUT]
        refused = np.logical_not(np.isfinite(inputs.reshape(len(inputs), -1)).all(axis=1))
        return self.run_prepared(inputs, refused)

    def run_prepared(self, inputs: NDArray[np.float32], refused: NDArray[np.bool_]) -> Outputs:
        """Outputs of prepared inputs (N, *D), of which the rows `refused` (N,) get no answer."""
        answer = self._run(self._wanted, {INPUT: inputs})[0]
        none = refused | ~np.isfinite(answer).all(axis=1)
        if none.any():
            answer = np.where(none[:, None], np.float32(np.nan), answer)
        outputs = {self._wanted[0]: answer, REFUSED: none[:, None]}
        if self._labels is None:
            return outputs
        places = decide(answer, self._threshold)
        return {LABEL: self._labels[np.where(none, len(self._labels) - 1, places)][:, None], **outputs}


class SplitGraph:
    """pipeline.onnx in two: the preprocessing, which other versions may share, and the model."""

    def __init__(self, features: FeatureGraph, model: PreparedGraph) -> None:
        self.features = features
        self.model = model

    def run(self, columns: Columns) -> Outputs:
        """See ServingGraph."""
        return self.answer_prepared(self.features.run(columns))

    def answer_prepared(self, prepared: Columns) -> Outputs:
        """Outputs of what `features` gave."""
        return self.model.run_prepared(prepared[INPUT], prepared[REFUSED])


class TypedGraph:
    """Typed columns through the schema's own preprocessing, then a form of the model that has no pipeline."""

    def __init__(self, preprocessing: Preprocessing, model: PreparedGraph) -> None:
        self._preprocessing = preprocessing
        self._model = model

    def run(self, columns: Columns) -> Outputs:
        """See ServingGraph."""
        return self._model.run_prepared(*self._preprocessing.prepare(columns))
