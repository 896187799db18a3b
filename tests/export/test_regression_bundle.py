"""A run that predicts a number, compressed, exported, verified, and asked: values, not labels."""

import csv
import json
import shutil
from itertools import product

import numpy as np
import pytest
import torch

from fedclaw.cli import make_console
from fedclaw.compress.__main__ import compared, notes
from fedclaw.compress.record import CompressSettings, RecoverySettings
from fedclaw.compress.stage import compress
from fedclaw.errors import BundleError
from fedclaw.export import layout
from fedclaw.export.bundle import Request, export_bundle
from fedclaw.export.check import Trust, verify_bundle
from fedclaw.export.graph import load_program, torch_outputs
from fedclaw.export.predictor import Predictor
from fedclaw.export.runtime import open_session, run_columns
from fedclaw.export.source import load_source
from fedclaw.learning.workload import Table
from fedclaw.protocol.terms import ModelSpec
from tests.export.test_check import sign

COLUMNS = [{"name": f"x{number}", "kind": "numeric", "center": 0, "scale": 1} for number in range(4)]
SPEC = ModelSpec(name="mlp", args={"hidden": [16, 8]})


def definition(**target):
    return {"columns": COLUMNS, "target": {"name": "dose", "kind": "numeric", "range": [0, 40], **target}}


@pytest.fixture
def run(samples, tmp_path):
    return samples.make_run(tmp_path / "run", "tabular", definition(loss="poisson"), SPEC, task="regression")


@pytest.fixture
def rows(tmp_path):
    """Forty rows, one of which is beyond anything the model can answer in range, and a bad one."""
    path = tmp_path / "rows.csv"
    inputs = np.random.default_rng(4).normal(size=(40, 4))
    inputs[0] *= 1000
    lines = [",".join(repr(float(value)) for value in row) for row in inputs]
    path.write_text("\n".join(["x0,x1,x2,x3", *lines, "1,2,three,4"]) + "\n")
    return path, inputs.astype(np.float32)


def test_the_whole_chain_says_values(run, rows, home, command, tmp_path):
    path, inputs = rows
    how = RecoverySettings(steps=100)
    record = compress(CompressSettings(run=run.root, fraction=0.5, synthetic=200, recovery=how, latency_repeats=1))
    assert record.score == "r2"
    assert record.accuracy_before == pytest.approx(1.0, abs=1e-9)
    assert record.accuracy_after > record.accuracy_pruned
    console = make_console()
    with console.capture() as captured:
        console.print(compared(record))
    assert "Agreement with the teacher" in captured.get()
    assert any("the student's r2 with the teacher's answers for targets" in note for note in notes(record, run.root))

    target = tmp_path / "bundle"
    export_bundle(load_source(run), home.signer(), target, Request(quantised=True))
    manifest = verify_bundle(target, Trust(authority=home.signer().ca_pem)).manifest
    assert (manifest.task, manifest.labels) == ("regression", ())
    assert manifest.target["name"] == "dose"
    assert [output.name for output in manifest.outputs] == ["outputs", "values"]
    forms = manifest.forms
    assert forms.files[layout.ONNX].agreement == 1
    assert 0.9 < forms.files[layout.QUANTISED].agreement < forms.files[layout.HALF].agreement < 1
    assert all(figures.agreement_low <= figures.agreement for figures in forms.files.values())
    card = (target / layout.CARD).read_text()
    assert "| Target | dose, a number from 0 to 40 |" in card
    assert "Values lie within the declared range of dose, 0 to 40" in card
    assert "softmax" not in card
    assert "r2 against the exact model" in card

    output = tmp_path / "out.csv"
    result = command("fedclaw.predict", f"bundle={target}", f"input={path}", f"output={output}")
    assert result.returncode == 0, result.stderr
    with output.open(newline="") as file:
        answers = list(csv.DictReader(file))
    assert list(answers[0]) == ["row", "value", "refused"]
    source = load_source(run)
    with torch.no_grad():
        values = source.schema.task.link(source.model(torch.from_numpy(inputs)))[:, 0].numpy()
    assert [float(answer["value"]) for answer in answers[:40]] == pytest.approx(values.tolist(), rel=1e-5, abs=1e-4)
    assert all(0 <= float(answer["value"]) <= 40 for answer in answers[:40])
    assert answers[40]["value"] == ""
    assert "x2" in answers[40]["refused"]
    shown = command("fedclaw.predict", f"bundle={target}", f"input={path}").stdout
    assert "value" in shown
    assert "probability" not in shown


@pytest.fixture(scope="session")
def squared_bundle(samples, home, tmp_path_factory):
    root = tmp_path_factory.mktemp("squared")
    run = samples.make_run(root / "run", "tabular", definition(loss="squared"), SPEC, task="regression")
    export_bundle(load_source(run), home.signer(), root / "bundle", Request())
    return root / "bundle"


@pytest.fixture
def bundles(squared_bundle, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(squared_bundle, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": None, "target": None, "labels": ["no", "yes"]}, "disagree about labels"),
        ({"task": "classification"}, "a classification task and 0 labels contradict each other"),
        ({"task": "survival"}, "disagree about the task: regression and survival"),
        ({"target": None}, "disagree about the task"),
        ({"target": {"name": "dose", "minimum": 0.0, "maximum": 4000.0}}, "disagree about the task"),
    ],
)
def test_a_manifest_of_another_task_than_the_schema_is_no_bundle(bundles, home, changes, says):
    """Signed by the federation itself: a mistake of its own, or an older bundle put together anew."""
    path = bundles / layout.MANIFEST
    plain = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in plain.items() if value is not None}))
    sign(bundles, home.signer())
    with pytest.raises(BundleError, match=says):
        Predictor.open(bundles, Trust(authority=home.signer().ca_pem))


def test_a_graph_of_another_task_is_no_bundle(bundles, table_bundle, home):
    (bundles / layout.ONNX).write_bytes((table_bundle / layout.ONNX).read_bytes())
    sign(bundles, home.signer())
    with pytest.raises(BundleError, match=r"outputs 'logits', 'probabilities'; a regression task has 'outputs' and"):
        Predictor.open(bundles, Trust(authority=home.signer().ca_pem))


def test_the_pipeline_gives_values_from_typed_columns_and_refuses_what_the_reader_and_the_model_refuse(
    squared_bundle, command, tmp_path
):
    program = load_program(squared_bundle / layout.PROGRAM)
    large = np.array(list(product((3e38, -3e38), repeat=4)), np.float32)
    nothing = large[np.isnan(torch_outputs(program, large)[1][:, 0])]
    manifest = layout.Manifest.model_validate_json((squared_bundle / layout.MANIFEST).read_bytes())
    assert [output.name for output in manifest.pipeline.outputs] == ["values", "refused"]
    pipeline = open_session((squared_bundle / layout.PIPELINE).read_bytes(), layout.PIPELINE, "export")
    rows = np.random.default_rng(3).normal(size=(12, 4)).astype(np.float32)
    rows[3, 1], rows[5] = np.nan, nothing[0]
    found = run_columns(pipeline, {f"x{place}": rows[:, [place]] for place in range(4)})
    path, output = tmp_path / "rows.csv", tmp_path / "out.csv"
    lines = [",".join(repr(float(value)) for value in row) for row in rows]
    path.write_text("\n".join(["x0,x1,x2,x3", *lines]))
    assert command("fedclaw.predict", f"bundle={squared_bundle}", f"input={path}", f"output={output}").returncode == 0
    with output.open(newline="") as file:
        answers = list(csv.DictReader(file))
    refused = [bool(answer["refused"]) for answer in answers]
    assert [row for row, bad in enumerate(refused) if bad] == [5]
    assert answers[5]["refused"] == "the model's answer to it is no finite number"
    assert found["refused"][:, 0].tolist() == refused
    expected = [float(answer["value"] or "nan") for answer in answers]
    np.testing.assert_allclose(found["values"][:, 0], expected, rtol=1e-5, atol=1e-5)


def test_a_number_has_no_threshold(run, home, tmp_path):
    public = Table(np.zeros((20, 4), np.float32), np.zeros(20, np.float32))
    with pytest.raises(BundleError, match="a threshold is for two classes"):
        export_bundle(load_source(run), home.signer(), tmp_path / "b", Request(public=public))


def test_a_bundle_of_classes_is_written_as_before(table_bundle):
    """An older reader knows neither a task nor a target."""
    plain = json.loads((table_bundle / layout.MANIFEST).read_text())
    assert not {"task", "target"} & plain.keys()
    assert "quantised" not in plain
