"""ONNX Runtime by itself, in a process without a server: the limit of what any server could answer.

    python -m experiments.serving.raw GRAPH INPUT SECONDS

GRAPH is an ONNX file with one input, INPUT an .npy file of rows for it. Prints one line of JSON: rows a second, by
batch size.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

BATCHES = (1, 32)


def main(graph: str, rows: str, seconds: str) -> None:
    """Measure both batch sizes for half of the time each, on one thread."""
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(Path(graph).read_bytes(), options, providers=["CPUExecutionProvider"])
    inputs, name = np.load(rows), session.get_inputs()[0].name
    found = {str(size): _rate(session, name, inputs[:size], float(seconds) / len(BATCHES)) for size in BATCHES}
    print(json.dumps(found), flush=True)


def _rate(session: onnxruntime.InferenceSession, name: str, batch: NDArray[Any], seconds: float) -> float:
    session.run(None, {name: batch})
    began, calls = time.perf_counter(), 0
    while (took := time.perf_counter() - began) < seconds:
        session.run(None, {name: batch})
        calls += 1
    return calls * len(batch) / took


if __name__ == "__main__":
    main(*sys.argv[1:])
