"""Models that requests are read for: their schemas are real, and there is no graph."""

import json
from typing import Any

from fedclaw.export.layout import TensorSpec
from fedclaw.export.pipeline import outputs
from fedclaw.learning.registry import schema_class
from fedclaw.serve.inference.description import ModelDescription

TABLE = {
    "columns": [
        {"name": "age", "kind": "numeric", "center": 50, "scale": 20, "range": [0, 120]},
        {"name": "year", "kind": "numeric", "center": 1990, "scale": 10},
        {"name": "smoker", "kind": "boolean"},
        {"name": "ward", "kind": "categorical", "levels": ["surgery", "médecine"]},
    ],
    "target": {"name": "outcome", "labels": ["benign", "malignant"]},
    "identifiers": ["visit"],
}
IMAGES = {"shape": [1, 8, 8], "labels": ["zero", "one", "two"], "mean": [0.5], "std": [0.25]}


def describe(workload: str, definition: dict[str, Any], threshold: float | None = None) -> ModelDescription:
    """A model of that schema with typed columns."""
    schema = schema_class(workload).parse(json.dumps(definition), "test schema")
    columns = schema.preprocessing().columns
    return ModelDescription("m", "0123456789ab", ("0123456789ab",), columns, outputs(schema.task), schema, threshold)


def prepared() -> ModelDescription:
    """A model of two numbers without a pipeline."""
    schema = schema_class("arrays").parse(json.dumps({"input_shape": [2], "labels": ["a", "b"]}), "test schema")
    given = tuple(TensorSpec(name=name, shape=("batch", 2)) for name in schema.task.head)
    columns = tuple(
        column.model_copy(update={"name": "inputs", "missing": None}) for column in schema.preprocessing().columns
    )
    return ModelDescription("m", "0123456789ab", ("0123456789ab",), columns, given, schema)
