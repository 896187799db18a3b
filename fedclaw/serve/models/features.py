"""The preprocessing of a bundle as a graph of its own, so that versions that prepare their inputs alike do it once.

It is cut out of pipeline.onnx: the nodes that the model's prepared inputs and the refused rows come from. Two versions
share it if what was cut out is the same, byte for byte, constants included; the schemas' texts prove less.

Legend: N rows, D input shape without the batch.
"""

import asyncio
import hashlib
from collections import OrderedDict
from typing import Any

from numpy.typing import NDArray

from fedclaw.errors import BundleError
from fedclaw.export.layout import INPUT
from fedclaw.export.runtime import Device, open_session
from fedclaw.learning.preprocessing import REFUSED, Columns
from fedclaw.serve.models.batching import EagerBatcher, Outputs

_RECENT = 64
"""Requests whose prepared inputs are kept for versions that ask for them a little later."""


class FeatureGraph:
    """From typed columns to prepared inputs. `digest` is equal where it computes the same."""

    def __init__(self, session: Any, digest: str) -> None:
        self._run = session.run
        self._names = [output.name for output in session.get_outputs()]
        self.digest = digest

    def run(self, columns: Columns) -> dict[str, NDArray[Any]]:
        """Prepared `inputs` (N, *D) of checked columns, and which rows are `refused` (N,)."""
        inputs, refused = self._run(self._names, columns)
        return {INPUT: inputs, REFUSED: refused[:, 0]}


class _Preparing:
    """A request whose inputs are being prepared, or were just now, and who waits for it."""

    __slots__ = ("columns", "task", "waiting")

    def __init__(self, columns: Columns, task: "asyncio.Task[Outputs]") -> None:
        self.columns = columns
        self.task = task
        self.waiting = 0


class SharedFeatures:
    """One preprocessing for all versions and models that have it: their requests are prepared in the same batches.

    A request that several versions are to answer (the one that was chosen, and those that mirror it) is prepared once:
    they give the same `columns`.
    """

    def __init__(self, digest: str, batcher: EagerBatcher) -> None:
        self.digest = digest
        self.batcher = batcher
        self.versions = 0
        """How many share it."""
        self._recent: OrderedDict[int, _Preparing] = OrderedDict()

    async def prepare(self, columns: Columns, rows: int, deadline: float | None = None) -> Outputs:
        """What `FeatureGraph.run` gives. Raises what `EagerBatcher.answer` does."""
        if self.versions < 2:
            return await self.batcher.answer(columns, rows, deadline)
        found = self._recent.get(id(columns))
        if found is None or found.columns is not columns or found.task.cancelled():
            task = asyncio.get_running_loop().create_task(self.batcher.answer(columns, rows, deadline))
            task.add_done_callback(_retrieve)
            found = self._recent[id(columns)] = _Preparing(columns, task)
            if len(self._recent) > _RECENT:
                self._recent.popitem(last=False)
        found.waiting += 1
        try:
            return await asyncio.shield(found.task)
        except asyncio.CancelledError:
            if found.waiting == 1:
                found.task.cancel()
            raise
        finally:
            found.waiting -= 1


def _retrieve(task: "asyncio.Task[Outputs]") -> None:
    """Whoever waited has the error; nobody has to."""
    if not task.cancelled():
        task.exception()


def cut_features(pipeline: bytes, threads: int = 1, device: Device = "cpu") -> FeatureGraph | None:
    """The preprocessing in the bytes of a verified pipeline.onnx.

    None where it cannot be cut out: the package onnx is not installed, or the graph is another program's.
    """
    try:
        import onnx
    except ImportError:
        return None
    model = onnx.load_model_from_string(pipeline)
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    last = makers.get(REFUSED)
    inputs = [name for name in makers if name.endswith(f"/model/{INPUT}")]
    if last is None or last.op_type != "Or" or len(inputs) != 1:
        return None
    targets = {inputs[0]: onnx.TensorProto.FLOAT, last.input[0]: onnx.TensorProto.BOOL}
    needed = _behind(list(targets), makers)
    nodes = [node for node in graph.node if needed.intersection(node.output)]
    constants = [constant for constant in graph.initializer if constant.name in needed]
    outputs = [onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in targets.items()]
    cut = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "features", list(graph.input), outputs, constants),
        opset_imports=list(model.opset_import),
        ir_version=model.ir_version,
    )
    content = cut.SerializeToString(deterministic=True)
    try:
        session = open_session(content, "the preprocessing of pipeline.onnx", "serve", device, threads)
    except BundleError:
        return None
    return FeatureGraph(session, hashlib.sha256(content).hexdigest())


def _behind(targets: list[str], makers: dict[str, Any]) -> set[str]:
    """The names of the values that the targets are computed from, and theirs."""
    found, waiting = set[str](), targets
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(makers[name].input if name in makers else ())
    return found
