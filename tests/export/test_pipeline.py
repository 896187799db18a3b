"""pipeline.onnx from typed columns answers as our own reader and model.onnx together do."""

import csv
import json
import tracemalloc
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedclaw.clients.values import key_of, normal
from fedclaw.errors import BundleError, NotInGraph
from fedclaw.export import graph, layout, onnx_model
from fedclaw.export.bundle import Request, export_bundle
from fedclaw.export.onnx_model import OnnxModel
from fedclaw.export.pipeline import TYPES, Nodes, compare, compose_pipeline
from fedclaw.export.predictor import Predictor
from fedclaw.export.runtime import open_session, run_columns, run_session
from fedclaw.learning.registry import schema_class, workload_class
from fedclaw.learning.tasks.classification import Classification
from fedclaw.learning.workload import FileFormat, Schema

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


MESSY = [
    "1.0",
    "+1",
    "01.0",
    "1e0",
    "TRUE",
    "t",
    "-9.99e2",
    "nan",
    "inf",
    "1_000",
    "0,1",
    "e\u0301",
    "2024-01-31",
    "7.0",
]


@given(
    st.lists(
        st.tuples(rows_of(), st.dictionaries(st.sampled_from(NAMES), st.sampled_from([*MESSY, *TEXTS]), max_size=2)),
        min_size=1,
        max_size=12,
    )
)
def test_however_cells_are_written_the_columns_say_what_the_reader_took_them_for(table, rows):
    schema, _, _, place = table
    path = place / "messy.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(NAMES)
        for row, messy in rows:
            cells = dict(zip(NAMES, row, strict=True))
            writer.writerow([messy.get(name, written(name, cells[name])) for name in NAMES])
    read, preprocessing = schema.read_rows(path), schema.preprocessing()
    typed_rows = preprocessing.read(path)
    inputs, refused = preprocessing.prepare(typed_rows.columns)
    assert typed_rows.refused == read.refused
    assert np.flatnonzero(refused).tolist() == sorted(read.refused)
    expected, good = read.inputs.astype(np.float64)[~refused], inputs.astype(np.float64)[~refused]
    assert (np.abs(good - expected) <= 2**-17 + 2**-22 * np.abs(expected)).all()


def features_of(preprocessing, columns):
    """The model's inputs (N, D) and which rows are refused (N, 1), by the graph of the preprocessing alone."""
    nodes = Nodes("n/")
    prepared = preprocessing.write(nodes)
    inputs = [onnx.helper.make_tensor_value_info(c.name, TYPES[c.dtype], list(c.shape)) for c in preprocessing.columns]
    outputs = [
        onnx.helper.make_tensor_value_info(prepared.inputs, onnx.TensorProto.FLOAT, ["batch", "features"]),
        onnx.helper.make_tensor_value_info(prepared.refused, onnx.TensorProto.BOOL, ["batch", 1]),
    ]
    graph_ = onnx.helper.make_graph(nodes.nodes, "g", inputs, outputs, nodes.constants)
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("ai.onnx.ml", 3)]
    model = onnx.helper.make_model(graph_, opset_imports=opsets, ir_version=10)
    found = run_columns(open_session(model.SerializeToString(), "features", "export"), columns)
    return found[prepared.inputs], found[prepared.refused]


@given(st.lists(st.floats(-1e6, 1e6).filter(lambda number: number not in {-999, 0.1}), min_size=1, max_size=8))
def test_rounding_to_float32_moves_a_feature_by_less_than_it_is_said_to(table, numbers):
    """By 2**-17 at most beside the feature's own rounding; not at all where the input is float64."""
    preprocessing = table[0].preprocessing()
    count, exact = len(numbers), np.array(numbers)
    columns = dict(preprocessing.synthetic(count, np.random.default_rng(0)))
    ages = np.clip(np.abs(exact) % 120, 1, 119.7)
    columns |= {"age": ages.astype(np.float32)[:, None], "day": exact[:, None]}
    features, _ = features_of(preprocessing, columns)
    wanted = (ages - 50) / 20
    assert (np.abs(features[:, 0] - wanted) <= 2**-17 + 2**-23 * np.abs(wanted)).all()
    assert features[:, 3].tolist() == ((exact - 19000) / 30).astype(np.float32).tolist()


def test_the_reader_fills_the_columns_with_what_cannot_be_parsed_in_a_graph(tmp_path):
    definition = {
        "columns": [
            {"name": "age", "kind": "numeric", "range": [0, 120]},
            {"name": "seen", "kind": "categorical", "levels": ["2024-01-31", "1", "café"]},
            {"name": "smoker", "kind": "boolean"},
        ],
        "target": {"name": "y", "labels": ["a", "b"]},
        "missing": ["-9"],
    }
    schema = schema_class("tabular").parse(json.dumps(definition), "test")
    schema = schema.written_as(FileFormat(delimiter=";", decimal=",", encoding="latin-1", title_lines=1))
    path = tmp_path / "rows.csv"
    rows = ["61,5;1,0;2024-01-31 00:00", "-9,0;-9;1,0", ";JA;café", "121;no;1", "x;no;1", "5;no;2", "1;2"]
    path.write_bytes("\n".join(["a title", "age;smoker;seen", *rows, ""]).encode("latin-1"))
    typed = schema.preprocessing().read(path)
    assert typed.columns["age"].dtype == np.float32
    age = typed.columns["age"][:, 0].tolist()
    assert age[0] == 61.5
    assert np.isnan(age[1])
    assert age[2:] == [np.inf] * 5  # refused in the graph too, whatever it is that is wrong with the row
    assert typed.columns["seen"][:2, 0].tolist() == ["2024-01-31", "1"]
    assert typed.columns["smoker"][:2, 0].tolist() == ["true", ""]
    assert sorted(typed.refused) == [2, 3, 4, 5, 6]
    assert "'JA'; expected true or false" in typed.refused[2]
    refused = schema.preprocessing().prepare(typed.columns)[1]
    assert refused.tolist() == [False, False, *[True] * 5]
    assert schema.preprocessing().read(path, ["seen"]).identifiers["seen"][0] == "2024-01-31 00:00"


def test_numbers_and_truths_as_data_frames_write_them_are_the_levels_that_the_reader_finds(tmp_path):
    """'1.0' for the level 1 would else be 'other', and answered as that."""
    levels = ["1", "02", "2.50", "-0", "true", "1e2", "9007199254740993", "x", "3", "3.0"]
    definition = {
        "columns": [
            {"name": "stage", "kind": "categorical", "levels": levels, "unseen": "other"},
            {"name": "able", "kind": "boolean"},
        ],
        "target": {"name": "y", "labels": ["a", "b"]},
        "missing": ["-9"],
    }
    schema = schema_class("tabular").parse(json.dumps(definition), "test")
    cells = [1, 1.0, 2, 2.0, 2.5, 0, -0.0, True, 100, 100.0, 9007199254740993, -9, -9.0, 3, 3.0, False, 4, 4.0, "x"]
    able = [1.0, 0.0, True, False, 1, 0, "", -9.0, -9]
    stages, ables = zip(*[(str(c), str(able[row % len(able)])) for row, c in enumerate(cells)], strict=True)
    (tmp_path / "rows.csv").write_text("stage,able\n" + "\n".join(map(",".join, zip(stages, ables, strict=True))))
    read = schema.read_rows(tmp_path / "rows.csv")
    columns = {"stage": np.array(stages, object)[:, None], "able": np.array(ables, object)[:, None]}
    features, refused = features_of(schema.preprocessing(), columns)
    assert np.flatnonzero(refused).tolist() == sorted(read.refused)
    answered = ~refused[:, 0]
    np.testing.assert_array_equal(features[answered], read.inputs[answered])
    assert features[0, 0] == features[1, 0] == 1


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"standardise": "site", "columns": [{"name": "x", "kind": "numeric"}]}, "each site's own constants"),
        ({"columns": [{"name": f"x{n}", "kind": "numeric"} for n in range(1001)]}, "1001 columns, .* at most 1000"),
    ],
)
def test_what_cannot_be_in_a_graph_is_said(changes, why):
    definition = {**TABLE, **changes}
    with pytest.raises(NotInGraph, match=why):
        schema_class("tabular").parse(json.dumps(definition), "test").preprocessing()


def test_a_workload_that_does_not_say_how_has_no_pipeline(table_source, home, tmp_path, monkeypatch):
    monkeypatch.setattr(type(table_source.schema), "preprocessing", Schema.preprocessing)
    export_bundle(table_source, home.signer(), tmp_path / "bundle", Request())
    assert not (tmp_path / "bundle" / layout.PIPELINE).exists()
    manifest = layout.Manifest.model_validate_json((tmp_path / "bundle" / layout.MANIFEST).read_bytes())
    assert (manifest.pipeline, layout.PIPELINE in manifest.graphs) == (None, False)
    assert "the workload tabular does not say how" in manifest.no_pipeline


@pytest.mark.parametrize("which", ["table", "image"])
def test_a_bundle_says_what_its_pipeline_takes_and_gives(which, request):
    bundle = request.getfixturevalue(f"{which}_bundle")
    manifest = layout.Manifest.model_validate_json((bundle / layout.MANIFEST).read_bytes())
    model = onnx.load(bundle / layout.PIPELINE)

    def told(values):
        types = {v: k for k, v in TYPES.items()}
        shapes = [tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in values]
        return [(v.name, types[v.type.tensor_type.elem_type], s) for v, s in zip(values, shapes, strict=True)]

    assert told(model.graph.input) == [(c.name, c.dtype, c.shape) for c in manifest.pipeline.columns]
    assert told(model.graph.output) == [(o.name, o.dtype, o.shape) for o in manifest.pipeline.outputs]
    assert manifest.graphs[layout.PIPELINE] == "typed columns"
    assert manifest.graphs[layout.ONNX] == manifest.graphs[layout.PROGRAM] == "prepared inputs"
    assert manifest.no_pipeline is None
    assert manifest.parity.files[layout.PIPELINE].max_abs_diff < 1e-5


def test_images_of_eight_bits_are_answered_as_their_file_is(image_bundle, tmp_path):
    predictor = Predictor.open(image_bundle)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 8), np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)
    expected = predictor.predict(predictor.read(tmp_path / "images.npz"))
    pipeline = open_session((image_bundle / layout.PIPELINE).read_bytes(), layout.PIPELINE, "export")
    found = run_columns(pipeline, {"images": pixels[..., None]})
    np.testing.assert_allclose(found["probabilities"], expected, atol=1e-6)
    assert found["label"][:, 0].tolist() == [predictor.labels[place] for place in expected.argmax(1)]
    assert not found["refused"].any()
    given = predictor.read_columns(tmp_path / "images.npz").columns["images"]
    assert given.tolist() == pixels[..., None].tolist()
    np.savez(tmp_path / "between.npz", images=np.full((1, 8, 8), 0.5017))
    with pytest.raises(NotInGraph, match="8 bits cannot hold"):
        predictor.read_columns(tmp_path / "between.npz")
    with pytest.raises(BundleError, match="typed columns"):
        run_columns(pipeline, {"images": np.zeros((1, 9, 8, 1), np.uint8)})


def test_an_array_with_a_number_that_is_not_finite_is_refused_by_itself(tmp_path):
    definition = {"input_shape": [2, 3], "labels": ["a", "b"]}
    schema = schema_class("arrays").parse(json.dumps(definition), "test")
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 2)).eval()
    exact = graph.to_onnx(graph.trace(model, schema.task, (2, 3)), schema.task, (2, 3))
    inputs = np.random.default_rng(0).normal(size=(6, 2, 3)).astype(np.float32)
    expected = run_session(session(exact, tmp_path / "model.onnx"), inputs)[1]
    cut = float(expected[5, 1])  # what one row has exactly, and is above by
    pipeline = session(compose_pipeline(exact, schema.preprocessing(), schema.task, cut), tmp_path / "p.onnx")
    for row, bad in ((1, np.nan), (4, np.inf)):
        inputs[row, 1, 2] = bad
    found = run_columns(pipeline, {"inputs": inputs})
    good = [0, 2, 3, 5]
    assert np.flatnonzero(found["refused"]).tolist() == [1, 4]
    np.testing.assert_allclose(found["probabilities"][good], expected[good], atol=1e-6)
    assert (found["probabilities"][good, 1] == np.float32(cut)).any()
    above = np.where(found["probabilities"][:, 1] >= np.float32(cut), "b", "a")
    above[[1, 4]] = ""
    assert found["label"][:, 0].tolist() == above.tolist()


def test_a_pipeline_that_answers_otherwise_is_found(table, tmp_path):
    schema = table[0]
    model = workload_class("tabular")(schema)
    preprocessing = schema.preprocessing()
    torch.manual_seed(0)
    trained = model.build(model.default_model()).eval()
    exact = graph.to_onnx(graph.trace(trained, schema.task, schema.input_shape), schema.task, schema.input_shape)
    columns = preprocessing.synthetic(64, np.random.default_rng(0))
    path = tmp_path / "pipeline.onnx"
    good = compose_pipeline(exact, preprocessing, schema.task, None)
    good.write(path)
    assert 3 < preprocessing.prepare(columns)[1].sum() < 20
    assert np.isnan(columns["age"]).any()
    assert compare(path, trained, preprocessing, columns, schema.task, None).max_abs_diff < 1e-6

    def spoilt(change):
        changed = onnx.load(path)
        change(changed.graph)
        onnx.save(changed, tmp_path / "spoilt.onnx")
        return compare(tmp_path / "spoilt.onnx", trained, preprocessing, columns, schema.task, None)

    def scale(graph_):
        (center,) = [c for c in graph_.initializer if 19000.0 in onnx.numpy_helper.to_array(c).ravel().tolist()]
        center.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(center) + 1, center.name))

    def labels(graph_):
        (texts,) = [c for c in graph_.initializer if b"gut" in c.string_data]
        texts.string_data[:2] = texts.string_data[1::-1]

    def lenient(graph_):
        for node in graph_.node:
            if node.op_type == "LabelEncoder":
                for attribute in node.attribute:
                    if attribute.name == "default_int64":
                        attribute.i = -1

    assert spoilt(scale).max_abs_diff > 1e-4
    with pytest.raises(BundleError, match="another label"):
        spoilt(labels)
    with pytest.raises(BundleError, match="refuses other rows"):
        spoilt(lenient)


def test_a_file_is_written_weight_by_weight(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 3000), nn.ReLU(), nn.Linear(3000, 2)).eval()
    task = Classification(("a", "b"), None)
    exact = graph.to_onnx(graph.trace(model, task, (40,)), task, (40,))
    path = tmp_path / "model.onnx"
    tracemalloc.start()
    exact.write(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 4 * 40 * 3000 > 3 * peak
    onnx.checker.check_model(str(path), full_check=True)
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(found[f"model.{name}"], parameter.detach().numpy())
    short = SimpleNamespace(shape=(3, 2000), dtype=1, nbytes=24000, name="w", tofile=lambda file: file.write(b"12"))
    with pytest.raises(BundleError, match="it is not 24000 bytes"):
        OnnxModel(exact.message, {"w": short}).write(tmp_path / "short.onnx")
    monkeypatch.setattr(onnx_model, "PROTOBUF_LIMIT", 4 * 40 * 3000)
    with pytest.raises(BundleError, match="an ONNX file holds at most 2 GiB"):
        exact.write(tmp_path / "large.onnx")
    assert not (tmp_path / "large.onnx").exists()
