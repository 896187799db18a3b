"""`GET /openapi.json`: what a client may ask of a node, as an OpenAPI 3.1 document.

It is made from the served models' schemas: columns, levels, ranges, shapes. Examples are made from the schema alone,
never from anybody's data. It lists the models that its reader may ask, and no others.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from fedclaw import __version__
from fedclaw.errors import NotInGraph
from fedclaw.learning.preprocessing import Columns
from fedclaw.serve.inference.description import ModelDescription
from fedclaw.serve.inference.metadata import model_metadata
from fedclaw.serve.inference.rest import BINARY, JSON
from fedclaw.serve.inference.tables import CSV, NPZ, TAKEN
from fedclaw.serve.inference.tensors import OF_COLUMN

Document = dict[str, Any]

MAX_EXAMPLE = 256
"""Values of an example; larger inputs have none."""
TRIED = 64
"""Rows that are made until one of them is answered and has no value missing."""
_TEXT: Document = {"type": "string"}
_ERROR: Document = {
    "type": "object",
    "properties": {"error": {**_TEXT, "description": "For people."}, "code": {**_TEXT, "description": "For programs."}},
    "required": ["error", "code"],
}
_SHARED_HEADERS = {
    "fedclaw-version": {"description": "The version that answered.", "schema": _TEXT},
    "fedclaw-prediction": {"description": "The receipt, for POST /feedback.", "schema": _TEXT},
}
_FORMAT: dict[str, Document] = {
    "delimiter": {"enum": [",", ";", "\t", "|"]},
    "decimal": {"enum": [".", ","]},
    "encoding": {"enum": ["utf-8", "utf-16", "latin-1", "windows-1252"]},
    "title_lines": {"type": "integer", "minimum": 0, "maximum": 100},
    "identifiers": {**_TEXT, "description": "Columns to hand through, separated by commas."},
}
_ASKED = [
    {
        "name": "fedclaw-key",
        "in": "header",
        "description": "Equal keys are answered by the same version.",
        "schema": {**_TEXT, "maxLength": 256},
    },
    {
        "name": "fedclaw-deadline-ms",
        "in": "header",
        "description": "Milliseconds after which the answer is of no use.",
        "schema": {"type": "integer", "minimum": 1},
    },
]
_FEEDBACK: Document = {
    "type": "object",
    "description": "What became of an answer; it is credited once.",
    "properties": {
        "receipt": {**_TEXT, "description": "The answer's header fedclaw-prediction."},
        "label": {**_TEXT, "description": "The truth of one row."},
        "labels": {"type": "array", "items": {"type": ["string", "null"]}, "description": "Of several rows."},
        "value": {"type": "number"},
        "values": {"type": "array", "items": {"type": ["number", "null"]}},
        "reward": {"type": "number", "minimum": 0, "maximum": 1},
        "completed": {"type": "boolean"},
        "satisfaction": {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 5}, {"enum": ["up", "down"]}]},
    },
    "required": ["receipt"],
}


def openapi_document(models: Sequence[ModelDescription]) -> Document:
    """The document of a node with these models."""
    paths: Document = {
        "/v2/health/live": _health("Whether the node works at all."),
        "/v2/health/ready": _health("Whether its models are loaded."),
        "/v2": _get("Name, version and extensions of the node.", "node"),
        "/feedback": {"post": _operation("feedback", "node", "Tell what became of an answer.", _content(_FEEDBACK))},
    }
    for model in models:
        paths |= _model_paths(model)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "FedClaw node",
            "version": __version__,
            "description": "Models from signed bundles. The Open Inference Protocol v2 is under /v2, over gRPC too; "
            "/predict takes rows as they lie in a table.",
        },
        "tags": [{"name": "node"}, *({"name": model.name, "description": _told(model)} for model in models)],
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
            "schemas": {"Error": _ERROR},
        },
    }


def table_columns(model: ModelDescription) -> Document:
    """JSON Schema of each column of a row, by the name that it has in a table."""
    told = _accounts(model)
    return {column.column: _cell(told.get(column.column, {}), column.meaning) for column in model.columns}


def example_columns(model: ModelDescription) -> Columns | None:
    """One row of the model's columns, made from the schema alone; None where it is too large, or none is answered."""
    if sum(prod(size for size in column.shape if isinstance(size, int)) for column in model.columns) > MAX_EXAMPLE:
        return None
    generator = np.random.default_rng(0)
    try:
        preprocessing = model.schema.preprocessing()
    except NotInGraph:
        return {model.columns[0].name: model.schema.synthetic_inputs(1, generator)}
    made = dict(preprocessing.synthetic(TRIED, generator))
    accounts = _accounts(model)
    for column in model.columns:
        if column.dtype == "string":
            made[column.name][:] = accounts.get(column.column, {}).get("levels", ("true",))[0]
    _, refused = preprocessing.prepare(made)
    for row in np.flatnonzero(~refused):
        found = {name: values[row : row + 1] for name, values in made.items()}
        if not any(np.isnan(values).any() for values in found.values() if values.dtype != object):
            return found
    return None


def _accounts(model: ModelDescription) -> Mapping[str, Mapping[str, Any]]:
    """What a table's schema says of each column; nothing of other inputs."""
    return {column["name"]: column for column in model.schema.describe_inputs().get("columns", ())}


def _model_paths(model: ModelDescription) -> Document:
    name, base = model.name, f"/v2/models/{model.name}"
    return {
        f"/predict/{name}": {
            "post": {
                **_operation(
                    f"predict-{name}", name, "Answer rows as they lie in a table.", _sent(model), _answered(model)
                ),
                "parameters": [
                    *({"name": field, "in": "query", "schema": told} for field, told in _FORMAT.items()),
                    *_ASKED,
                ],
            }
        },
        f"{base}/infer": {
            "post": {
                **_operation(f"infer-{name}", name, "Open Inference Protocol: answer tensors.", _tensors(model)),
                "parameters": _ASKED,
            }
        },
        base: _get("Open Inference Protocol: versions, inputs and outputs.", name),
        f"{base}/ready": _get("Whether the model answers.", name, "ready"),
    }


def _told(model: ModelDescription) -> str:
    what = (
        f"one of {', '.join(map(repr, model.labels))}" if model.labels else f"the number {model.schema.target_name!r}"
    )
    return f"Answers {what}. Version {model.version}."


def _sent(model: ModelDescription) -> Document:
    """The content of a request to /predict."""
    content: Document = {}
    for kind in TAKEN[model.schema.modality]:
        if kind == JSON:
            content[kind] = _rows_content(model)
        elif kind == CSV:
            content[kind] = {"schema": {**_TEXT, "description": "With a header that names the columns."}}
        else:
            array = f" with the array {model.columns[0].column!r}" if kind == NPZ else ""
            content[kind] = {"schema": {**_TEXT, "contentMediaType": kind, "description": f"A file{array}."}}
    return content


def _rows_content(model: ModelDescription) -> Document:
    columns = table_columns(model)
    row: Document = {
        "type": "object",
        "properties": columns,
        "required": list(columns),
        "description": "What is not known is null. Columns that only say which row is which may be there too.",
    }
    by_column = {"type": "object", "additionalProperties": {"type": "array"}}
    content: Document = {
        "schema": {
            "anyOf": [
                {"type": "object", "properties": {"rows": {"type": "array", "items": row}}, "required": ["rows"]},
                {"type": "object", "properties": {"columns": by_column}, "required": ["columns"]},
            ]
        }
    }
    example = example_columns(model)
    if example is not None:
        told = {column.column: _plain(columns[column.column], example[column.name]) for column in model.columns}
        content["example"] = {"rows": [told]}
    return content


def _plain(schema: Mapping[str, Any], values: Any) -> Any:
    """One value of an example as a row has it."""
    value = values.reshape(-1)[0]
    if "boolean" in schema.get("type", ()):
        return str(value).lower() in {"true", "t", "yes", "y", "1"}
    if isinstance(value, str):
        return value
    short = float(f"{value:.3g}")
    return min(max(short, schema.get("minimum", short)), schema.get("maximum", short))


_UNSEEN = {"refuse_row": "refuses the row", "missing": "counts as not known", "other": "counts as 'other'"}


def _cell(told: Mapping[str, Any], meaning: str) -> Document:
    """JSON Schema of a column's values, from the schema's own account of it."""
    kind = told.get("kind")
    if kind == "numeric":
        low, high = told.get("range") or (None, None)
        if low is None:
            return {"type": ["number", "null"], "description": "A number."}
        within = f"A number from {low:g} to {high:g}; another refuses the row."
        return {"type": ["number", "null"], "minimum": low, "maximum": high, "description": within}
    if kind == "boolean":
        return {"type": ["boolean", "null"], "description": "True or false."}
    if kind == "categorical":
        unseen = told.get("unseen", "refuse_row")
        described = {"description": f"A level; any other value {_UNSEEN[unseen]}."}
        if unseen == "refuse_row":
            return {"enum": [*told["levels"], None], **described}
        return {"type": ["string", "null"], "examples": list(told["levels"]), **described}
    return {"description": meaning}


def _tensors(model: ModelDescription) -> Document:
    """The content of a request of the Open Inference Protocol."""
    schema = {
        "type": "object",
        "properties": {
            "id": {**_TEXT, "maxLength": 128},
            "parameters": {"type": "object"},
            "inputs": {
                "type": "array",
                "minItems": len(model.columns),
                "items": {
                    "type": "object",
                    "properties": {
                        "name": {"enum": [column.name for column in model.columns]},
                        "datatype": {"enum": sorted({OF_COLUMN[column.dtype] for column in model.columns})},
                        "shape": {"type": "array", "items": {"type": "integer"}},
                        "data": {"type": "array"},
                        "parameters": {"type": "object"},
                    },
                    "required": ["name", "datatype", "shape"],
                },
            },
            "outputs": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"name": {"enum": [output.name for output in model.outputs]}},
                    "required": ["name"],
                },
            },
        },
        "required": ["inputs"],
    }
    content: Document = {JSON: {"schema": schema}, BINARY: {"schema": {**_TEXT, "contentMediaType": BINARY}}}
    example = example_columns(model)
    if example is not None:
        content[JSON]["example"] = {
            "inputs": [
                {
                    "name": told["name"],
                    "datatype": told["datatype"],
                    "shape": list(example[told["name"]].shape),
                    "data": example[told["name"]].ravel().tolist(),
                }
                for told in model_metadata(model)["inputs"]
            ]
        }
    return content


def _answered(model: ModelDescription) -> Document:
    """The content of an answer of /predict."""
    row: Document = {
        "row": {"type": "integer", "minimum": 1},
        "identifiers": {"type": "object", "additionalProperties": _TEXT},
        "refused": {**_TEXT, "description": "Why the row has no answer."},
    }
    if model.labels:
        chance = {"type": "number", "minimum": 0, "maximum": 1}
        row["label"] = {"enum": list(model.labels)}
        row["probabilities"] = {"type": "object", "properties": dict.fromkeys(model.labels, chance)}
    else:
        row["value"] = {"type": "number", "description": model.schema.target_name}
    rows = {"type": "array", "items": {"type": "object", "properties": row, "required": ["row"]}}
    named = {"model_name": _TEXT, "model_version": {"type": ["string", "null"]}, "id": _TEXT, "rows": rows}
    return {JSON: {"schema": {"type": "object", "properties": named, "required": ["rows"]}}, CSV: {"schema": _TEXT}}


def _operation(identity: str, tag: str, summary: str, sent: Document, answered: Document | None = None) -> Document:
    content = answered or _content({"type": "object"})
    headers = {} if identity == "feedback" else {"headers": _SHARED_HEADERS}
    return {
        "operationId": identity,
        "tags": [tag],
        "summary": summary,
        "requestBody": {"required": True, "content": sent},
        "responses": {"200": {"description": "The answer.", "content": content, **headers}, "default": _refused()},
    }


def _get(summary: str, tag: str, what: str = "metadata") -> Document:
    answer = {"description": "The answer.", "content": _content({"type": "object"})}
    return {
        "get": {
            "operationId": f"{what}-{tag}",
            "tags": [tag],
            "summary": summary,
            "responses": {"200": answer, "default": _refused()},
        }
    }


def _health(summary: str) -> Document:
    return {
        "get": {
            "operationId": summary.lower().removesuffix(".").replace(" ", "-"),
            "tags": ["node"],
            "summary": summary,
            "security": [],
            "responses": {"200": {"description": "Yes."}, "503": {"description": "No."}},
        }
    }


def _content(schema: Document) -> Document:
    return {JSON: {"schema": schema}}


def _refused() -> Document:
    return {"description": "A refusal.", "content": _content({"$ref": "#/components/schemas/Error"})}
