"""pipeline.onnx: a bundle's model with its preprocessing before it and the decision behind it, in one graph.

    typed columns -> (the schema's Preprocessing) -> model.onnx -> label, probabilities or values, refused

A server that knows nothing of FedClaw answers from it as FedClaw does. A row that the schema refuses, and one that the
model has no finite answer to, costs itself the answer and nobody else theirs: `refused` is true, the label is '', and
probabilities or values are NaN.

The file holds the weights a second time. Servers load one file each, and some (a browser, a model repository that
takes a single file, our own predictor, which loads the very bytes that it verified) load no weights from beside it.

Legend: N rows, C classes, K outputs of the model (the C classes, or one value).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import compose, helper, numpy_helper
from torch import nn

from fedclaw.errors import BundleError
from fedclaw.export import graph as exact
from fedclaw.export.layout import BATCH, INPUT, InputKind, ParityFigures, PipelineSpec, TensorSpec
from fedclaw.export.onnx_model import OnnxModel
from fedclaw.export.runtime import open_session, run_columns
from fedclaw.learning.preprocessing import LABEL, REFUSED, Columns, Preprocessing, TypedColumn
from fedclaw.learning.tasks.base import Task
from fedclaw.learning.tasks.classification import decide
from fedclaw.learning.workload import Floats

ML_DOMAIN, ML_VERSION = "ai.onnx.ml", 3
"""LabelEncoder with texts and whole numbers."""
LEAST_OPSET = 18
TYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float64": onnx.TensorProto.DOUBLE,
    "string": onnx.TensorProto.STRING,
    "uint8": onnx.TensorProto.UINT8,
    "bool": onnx.TensorProto.BOOL,
}


class Nodes:
    """The nodes and constants of a graph that grows; no name is one of `taken`."""

    def __init__(self, prefix: str) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._prefix = prefix

    def add(self, operator: str, *inputs: str, domain: str = "", output: str = "", **attributes: Any) -> str:
        """See GraphWriter; `output` names the value."""
        name = f"{self._prefix}{len(self.nodes)}/{operator}"
        if operator == "Cast":
            attributes["to"] = helper.np_dtype_to_tensor_dtype(np.dtype(attributes["to"]))
        self.nodes.append(helper.make_node(operator, inputs, [output or name], name=name, domain=domain, **attributes))
        return output or name

    def constant(self, value: NDArray[Any]) -> str:
        """See GraphWriter."""
        name = f"{self._prefix}constant/{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name


def compose_pipeline(model: OnnxModel, preprocessing: Preprocessing, task: Task, threshold: float | None) -> OnnxModel:
    """`model`, that of a bundle, with what is before and behind it.

    Raises BundleError for a graph that onnx's checker refuses.
    """
    prefix = _prefix(preprocessing.columns)
    names = {name: f"{prefix}model/{name}" for name in model.weights}
    message = onnx.ModelProto()
    message.CopyFrom(model.message)
    compose.add_prefix_graph(message.graph, f"{prefix}model/", inplace=True, name_map=dict(names))
    nodes, own = Nodes(prefix), list(message.graph.node)
    prepared = preprocessing.write(nodes)
    nodes.add("Identity", prepared.inputs, output=f"{prefix}model/{INPUT}")
    before, behind = nodes.nodes, Nodes(f"{prefix}answer/")
    _answer(behind, f"{prefix}model/{task.head[1]}", prepared.refused, task, threshold)
    graph = message.graph
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend([*before, *own, *behind.nodes])
    graph.initializer.extend([*nodes.constants, *behind.constants])
    graph.input.extend(_info(column) for column in preprocessing.columns)
    graph.output.extend(_info(output) for output in outputs(task))
    if not any(used.domain == ML_DOMAIN for used in message.opset_import):
        message.opset_import.append(helper.make_opsetid(ML_DOMAIN, ML_VERSION))
    found = OnnxModel(message, {names[name]: tensor for name, tensor in model.weights.items()})
    with exact.as_bundle_error("the preprocessing cannot be written as ONNX"):
        _require_opset(message)
        found.check()
    return found


def outputs(task: Task) -> tuple[TensorSpec, ...]:
    """What a pipeline gives."""
    answer = TensorSpec(name=task.head[1], shape=(BATCH, task.outputs))
    refused = TensorSpec(name=REFUSED, dtype="bool", shape=(BATCH, 1))
    return (*([TensorSpec(name=LABEL, dtype="string", shape=(BATCH, 1))] if task.labels else ()), answer, refused)


def describe(preprocessing: Preprocessing, task: Task, compared_on: InputKind) -> PipelineSpec:
    """For the manifest."""
    return PipelineSpec(
        columns=preprocessing.columns,
        outputs=outputs(task),
        outside_the_graph=preprocessing.outside,
        compared_on=compared_on,
    )


def compare(
    path: Path,
    model: nn.Module,
    preprocessing: Preprocessing,
    columns: Columns,
    task: Task,
    threshold: float | None,
) -> ParityFigures:
    """How the pipeline at `path` differs from the schema's reader and the torch `model` on `columns`.

    Raises BundleError where they refuse different rows, or a label is another than its probabilities amount to.
    """
    session = open_session(path, path.name, "export")
    linked = exact.Linked(model, task).eval()
    inputs, refused = preprocessing.prepare(columns)

    def expected(rows: Floats) -> Sequence[Floats]:
        which = rows[:, 0].astype(np.int64)
        found: Floats = exact.torch_outputs(linked, inputs[which])[1]
        return [np.where(refused[which, None], np.float32(0), found)]

    def given(rows: Floats) -> Sequence[Floats]:
        which = rows[:, 0].astype(np.int64)
        answer = run_columns(session, {name: values[which] for name, values in columns.items()})
        odd = np.flatnonzero(answer[REFUSED][:, 0] != refused[which])
        if len(odd):
            row = int(which[odd[0]]) + 1  # its number alone: its values may be a person's
            raise BundleError(f"{path.name} refuses other rows than the schema's reader, one of them row {row}")
        answered = ~refused[which]
        found: Floats = np.where(answered[:, None], answer[task.head[1]], np.float32(0))
        if task.labels:
            places = np.where(answered, decide(found, threshold), -1)
            if (answer[LABEL][:, 0] != np.array([*task.labels, ""], object)[places]).any():
                raise BundleError(f"{path.name} gives another label than its probabilities amount to")
        return [found]

    return exact.compare(expected, given, np.arange(len(inputs), dtype=np.float32)[:, None])


def _answer(graph: Nodes, given: str, refused: str, task: Task, threshold: float | None) -> None:
    """From probabilities or values (N, K) to the outputs."""
    last = graph.constant(np.array([1], np.int64))
    size = graph.add("Abs", given)
    finite = graph.add("LessOrEqual", size, graph.constant(np.array(np.finfo(np.float32).max, np.float32)))
    worst = graph.add("ReduceMin", graph.add("Cast", finite, to=np.int32), last, keepdims=1)
    unknown = graph.add("Not", graph.add("Cast", worst, to=np.bool_))
    none = graph.add("Or", refused, unknown, output=REFUSED)
    nothing = graph.constant(np.array(np.nan, np.float32))
    graph.add("Where", none, nothing, given, output=task.head[1])
    if not task.labels:
        return
    if threshold is None:
        chosen = graph.add("ArgMax", given, axis=1, keepdims=1)
    else:
        second = graph.add("Gather", given, last, axis=1)
        above = graph.add("GreaterOrEqual", second, graph.constant(np.array(threshold, np.float32)))
        chosen = graph.add("Cast", above, to=np.int64)
    place = graph.add("Where", none, graph.constant(np.array(len(task.labels), np.int64)), chosen)
    texts = graph.constant(np.array([*task.labels, ""], object))
    graph.add("Gather", texts, place, axis=0, output=LABEL)


def _prefix(columns: Sequence[TypedColumn]) -> str:
    """What no column's name begins with."""
    prefix = "fedclaw/"
    while any(column.name.startswith(prefix) for column in columns):
        prefix = f"_{prefix}"
    return prefix


def _info(tensor: TensorSpec | TypedColumn) -> Any:
    return helper.make_tensor_value_info(tensor.name, TYPES[tensor.dtype], list(tensor.shape))


def _require_opset(message: Any) -> None:
    version = next(used.version for used in message.opset_import if used.domain in {"", "ai.onnx"})
    if version < LEAST_OPSET:
        raise BundleError(f"the model is of opset {version}, and a pipeline needs {LEAST_OPSET}")
