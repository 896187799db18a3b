"""pipeline.onnx from typed columns answers as our own reader and model.onnx together do."""

import csv
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedclaw.clients.values import key_of, normal
from fedclaw.export import graph
from fedclaw.export.onnx_model import OnnxModel
from fedclaw.export.pipeline import compose_pipeline
from fedclaw.export.runtime import open_session, run_columns, run_session
from fedclaw.learning.registry import schema_class, workload_class

MISSING = ["", "NA", "-999", "0.1"]
TABLE = {
    "columns": [
        {"name": "age", "kind": "numeric", "center": 50, "scale": 20, "range": [0.1, 119.7]},
        {"name": "raw", "kind": "numeric"},
        {"name": "tiny", "kind": "numeric", "center": 1e-30, "scale": 1e-31, "range": [-1e-28, 1e-28]},
        {"name": "day", "kind": "numeric", "center": 19000, "scale": 30},
        {"name": "label", "kind": "numeric", "scale": 1e30, "missing": ["7"]},
        {"name": "smoker", "kind": "boolean"},
        {"name": "able", "kind": "boolean", "missing": ["n", "?"]},
        {"name": "ward", "kind": "categorical", "levels": ["é", "ß", "01", "1", "-999"]},
        {"name": "blood", "kind": "categorical", "levels": ["A", "", "NA"], "unseen": "missing"},
        {"name": "drug", "kind": "categorical", "levels": ["x", "y"], "unseen": "other"},
        {"name": "fedclaw/0/Cast", "kind": "categorical", "levels": ["other", "z"], "unseen": "other"},
    ],
    "target": {"name": "outcome", "labels": ["gut", "schlecht", "?"]},
    "missing": MISSING,
}
WIDE = {"day"}
"""Columns whose input is float64."""
NUMBERS = {column["name"] for column in TABLE["columns"] if column["kind"] == "numeric"}
NAMES = [column["name"] for column in TABLE["columns"]]
TEXTS = ["é", "ß", "01", "1", "-999", "", "NA", "NaN", "nan", "A", "x", "other", "true", "YES", "n", "N", "?", "TrUe"]


def exported(workload, definition, spec=None, seed=0, threshold=None):
    """(schema, torch model, session of model.onnx, session of pipeline.onnx, path of the pipeline's file)."""
    schema = schema_class(workload).parse(json.dumps(definition), "test")
    work = workload_class(workload)(schema)
    torch.manual_seed(seed)
    model = work.build(spec or work.default_model()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    program = graph.trace(model, schema.task, schema.input_shape)
    onnx_model = graph.to_onnx(program, schema.task, schema.input_shape)
    return schema, model, onnx_model, compose_pipeline(onnx_model, schema.preprocessing(), schema.task, threshold)


def session(model: OnnxModel, path):
    model.write(path)
    return open_session(path.read_bytes(), path.name, "export")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    place = tmp_path_factory.mktemp("pipeline")
    schema, _, exact, pipeline = exported("tabular", TABLE)
    return schema, session(exact, place / "model.onnx"), session(pipeline, place / "pipeline.onnx"), place


EDGES = (0.1, 119.7, 0.0, -0.0, 1e38, -1e38, 3.4028234663852886e38, 1e-45, 1.1754943508222875e-38, -999, 7)


def singles(low, high):
    """Numbers that float32 holds."""
    return st.floats(low, high).map(lambda number: float(np.float32(number)))


GOOD = {
    "age": st.one_of(singles(1, 119), st.sampled_from([0.1, 119.7, np.nan, -999])),
    "raw": st.one_of(singles(-3, 3), st.sampled_from([np.nan, 1e-45, -0.0])),
    "tiny": st.one_of(singles(-9.5e-29, 9.5e-29), st.sampled_from([np.nan, 1e-45])),
    "day": st.floats(18000, 20000),
    "label": st.one_of(singles(-1e30, 1e30), st.sampled_from([7, np.nan])),
    "smoker": st.sampled_from(["true", "YES", "f", "0", "NA", ""]),
    "able": st.sampled_from(["True", "N", "n", "?", "no", "nan"]),
    "ward": st.sampled_from(["é", "ß", "01", "1", "-999", "NA", ""]),
    "blood": st.sampled_from(["A", "", "NA", "NaN", "B", "a"]),
    "drug": st.sampled_from(["x", "y", "z", "other", "NA"]),
    "fedclaw/0/Cast": st.sampled_from(["z", "other", "q", "NA"]),
}
"""Values that do not cost a row its answer, unless they are too large for the model."""
numbers = st.one_of(st.floats(width=32, allow_nan=True), st.sampled_from(EDGES))
texts = st.one_of(
    st.sampled_from(TEXTS),
    st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), max_size=6)
    .map(normal)
    .filter(lambda text: key_of(text) is None),
)


@st.composite
def rows_of(draw):
    """Rows of good values, and in some of them one or two of any kind."""
    row = {name: draw(values) for name, values in GOOD.items()}
    for name in draw(st.one_of(st.just([]), st.lists(st.sampled_from(NAMES), max_size=2))):
        row[name] = draw(numbers if name in NUMBERS else texts)
    return tuple(row.values())


def typed(column, cells):
    """A column of values as a server would give them that knows nothing of FedClaw."""
    if column not in NUMBERS:
        return np.array(cells, object)[:, None]
    return np.array(cells, np.float64 if column in WIDE else np.float32)[:, None]


def written(column, cell):
    """A value as a file has it: a number exactly, and in the declared digits where it is a declared one."""
    if column not in NUMBERS:
        return cell
    if np.isnan(cell):
        return "NaN"
    if column not in WIDE:
        cell = next((known for known in (0.1, 119.7) if np.float32(known) == np.float32(cell)), float(np.float32(cell)))
    return repr(float(cell))


def input_of(column):
    return {"label": "input_label"}.get(column, column)


@given(st.lists(rows_of(), min_size=1, max_size=12))
def test_typed_columns_are_answered_as_the_reader_answers_the_file(table, rows):
    schema, model, pipeline, place = table
    path = place / "rows.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(NAMES)
        writer.writerows([[written(name, cell) for name, cell in zip(NAMES, row, strict=True)] for row in rows])
    read = schema.read_rows(path)
    expected = run_session(model, read.inputs)[1]
    by_hand = {input_of(name): typed(name, cells) for name, cells in zip(NAMES, zip(*rows, strict=True), strict=True)}
    refused = np.array([row in read.refused or not np.isfinite(expected[row]).all() for row in range(len(rows))])
    for columns in (by_hand, schema.preprocessing().read(path).columns):
        found = run_columns(pipeline, columns)
        assert found["refused"][:, 0].tolist() == refused.tolist()
        np.testing.assert_allclose(found["probabilities"][~refused], expected[~refused], atol=1e-5)
        assert np.isnan(found["probabilities"][refused]).all()
        labels = np.array([*schema.labels, ""], object)[np.where(refused, -1, found["probabilities"].argmax(1))]
        assert found["label"][:, 0].tolist() == labels.tolist()
