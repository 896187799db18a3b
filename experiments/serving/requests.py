"""The same question in each form that a server takes: rows of one input, as bytes.

The input's name and type are those of the bundles here: `images` of UINT8, or `inputs` of FP32.
"""

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAMES = {"uint8": ("images", "UINT8"), "float32": ("inputs", "FP32")}
Rows = NDArray[Any]


def json_request(rows: Rows, **more: Any) -> bytes:
    """Open Inference Protocol v2 over REST; `more` are fields of the request."""
    name, datatype = NAMES[rows.dtype.name]
    tensor = {"name": name, "datatype": datatype, "shape": list(rows.shape), "data": rows.ravel().tolist()}
    return json.dumps({**more, "inputs": [tensor]}).encode()


def binary_request(rows: Rows) -> tuple[bytes, dict[str, str]]:
    """The same with the tensor's bytes behind the JSON, answers too; and the headers that say so."""
    name, datatype = NAMES[rows.dtype.name]
    packed = np.ascontiguousarray(rows).tobytes()
    size = {"binary_data_size": len(packed)}
    tensor = {"name": name, "datatype": datatype, "shape": list(rows.shape), "parameters": size}
    told = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(len(told))}
    return told + packed, headers


def grpc_request(model: str, rows: Rows) -> tuple[bytes, str]:
    """The same over gRPC, with the tensor as raw bytes: the message, and the path of the call."""
    from fedclaw.serve.inference.protocol.open_inference_pb2 import ModelInferRequest

    name, datatype = NAMES[rows.dtype.name]
    tensor = ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=rows.shape)
    packed = [np.ascontiguousarray(rows).tobytes()]
    message = ModelInferRequest(model_name=model, inputs=[tensor], raw_input_contents=packed)
    return message.SerializeToString(), "/inference.GRPCInferenceService/ModelInfer"


def mlflow_request(rows: Rows) -> bytes:
    """MLflow's own form."""
    return json.dumps({"inputs": rows.tolist()}).encode()
