"""What MLServer loads to serve a bundle's pipeline.onnx on ONNX Runtime; it runs where FedClaw is not installed.

The same graph, the same outputs and one thread, as our own node has.
"""

from pathlib import Path
from typing import Any

import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput
from numpy.typing import NDArray


class Model(MLModel):  # type: ignore[misc] # MLServer is not installed here
    """Typed columns in; labels, probabilities and refusals out."""

    async def load(self) -> bool:
        """Open the graph that parameters.uri names."""
        onnxruntime.disable_telemetry_events()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        assert self.settings.parameters is not None
        graph = Path(str(self.settings.parameters.uri)).read_bytes()
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Answer one request, or one batch of MLServer's own."""
        columns = {given.name: NumpyCodec.decode_input(given) for given in payload.inputs}
        found = self._session.run(self._outputs, columns)
        outputs = [_told(name, values) for name, values in zip(self._outputs, found, strict=True)]
        return InferenceResponse(model_name=self.name, outputs=outputs)


def _told(name: str, values: NDArray[Any]) -> ResponseOutput:
    if values.dtype == object:
        return StringCodec.encode_output(name, values.ravel().tolist())
    return NumpyCodec.encode_output(name, values)
