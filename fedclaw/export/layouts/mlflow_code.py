"""The code of an MLflow model: pipeline.onnx on ONNX Runtime. MLflow runs this file, in an environment without FedClaw.

It is the model as code, which MLflow stores as text: there is no pickle in it.

Legend: N rows.
"""

import json
import unicodedata
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnxruntime
import pandas
from mlflow.pyfunc.model import PythonModel

LONGEST = 1000
"""Characters of a text that is normalised, which takes the square of them at worst; no level is longer."""


class Pipeline(PythonModel):
    """Typed columns in, labels and probabilities or values out."""

    def load_context(self, context: Any) -> None:
        """Open the graph and read what its columns are."""
        onnxruntime.disable_telemetry_events()
        manifest = json.loads(Path(context.artifacts["manifest"]).read_text(encoding="utf-8"))
        self._columns = manifest["pipeline"]["columns"]
        self._labels = manifest["labels"]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(context.artifacts["pipeline"], options, providers=providers)
        self._outputs = [output.name for output in self._session.get_outputs()]

    def predict(self, context: Any, model_input: pandas.DataFrame, params: Any = None) -> Any:
        """A data frame by the columns' names, (N, ...), or an array for the one input of a model of arrays."""
        given = self._session.run(self._outputs, self._fed(model_input))
        found = dict(zip(self._outputs, given, strict=True))
        if isinstance(model_input, np.ndarray):
            return found
        answers = {name: found[name][:, 0] for name in ("label", "values", "refused") if name in found}
        for place, label in enumerate(self._labels):
            answers[f"probability of {label}"] = found["probabilities"][:, place]
        return pandas.DataFrame(answers)

    def _fed(self, model_input: Any) -> dict[str, Any]:
        if isinstance(model_input, np.ndarray):
            (column,) = self._columns
            return {column["name"]: model_input.astype(column["dtype"], copy=False)}
        return {column["name"]: _values(model_input[column["name"]], column) for column in self._columns}


def _values(series: Any, column: dict[str, Any]) -> Any:
    """(N, 1) as the graph takes it: NaN or the agreed text for what is missing."""
    if column["dtype"] != "string":
        return series.to_numpy(dtype=column["dtype"], na_value=np.nan).reshape(-1, 1)
    missing = column["missing"] or ""
    cells = zip(series.tolist(), series.isna().tolist(), strict=True)
    texts = [missing if absent else _text(value, column["name"]) for value, absent in cells]
    return np.array(texts, dtype=object).reshape(-1, 1)


def _text(value: Any, name: str) -> str:
    """As the graph compares it. Raises TypeError for what could be written in more ways than it knows, as a time."""
    if not isinstance(value, str | bool | int | float):
        raise TypeError(f"column {name!r} takes text, and holds a {type(value).__name__}")
    text = str(value)
    return (text if len(text) > LONGEST else unicodedata.normalize("NFC", text)).strip()


mlflow.models.set_model(Pipeline())
