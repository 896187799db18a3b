"""Prediction row by row: what a bad row costs, what is handed through, and from which probability on is yes."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from fedclaw.clients.tabular_schema import TabularSchema
from fedclaw.errors import BundleError, DataError
from fedclaw.export import layout
from fedclaw.export.bundle import Request, export_bundle
from fedclaw.export.predictor import Predictor
from fedclaw.export.source import load_source
from fedclaw.export.threshold import choose_threshold, f1
from fedclaw.learning.workload import FileFormat, Table
from fedclaw.protocol.terms import ModelSpec

WARD = {"name": "ward", "kind": "categorical", "levels": ["surgery", "medicine"]}


def answers(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def softmax(source, inputs):
    with torch.no_grad():
        return torch.softmax(source.model(torch.from_numpy(inputs)), 1).numpy()


def test_bad_rows_cost_nobody_else_and_identifiers_come_back(command, table_bundle, table_source, tmp_path):
    definition = json.loads(table_source.schema.to_json()) | {"extra": "ignore"}
    good = tmp_path / "good.csv"
    good.write_text("age,smoker,ward\n61,yes,surgery\n20,no,medicine\n")
    expected = softmax(table_source, TabularSchema.parse(json.dumps(definition), "s").read_inputs(good))
    path, output = tmp_path / "rows.csv", tmp_path / "out.csv"
    path.write_text("age;smoker;ward\n61,0;yes;surgery\n61;yes;garden\n61;yes\n20;no;medicine\n")
    result = command(
        "fedclaw.predict",
        *(f"bundle={table_bundle}", f"input={path}", f"output={output}"),
        *("delimiter=';'", "decimal=','", "identifiers=[age]"),
    )
    assert result.returncode == 0, result.stderr
    assert "refused   2 of 4 rows" in result.stdout
    assert "predictions: 2" in result.stdout
    rows = answers(output)
    assert [row["row"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["age"] for row in rows] == ["61,0", "61", "", "20"]
    assert rows[1]["refused"] == "line 3, column 'ward': 'garden'; expected one of 'surgery', 'medicine'"
    assert rows[2]["refused"] == "line 4: 2 cells; expected 3, as in the header"
    assert {rows[1]["label"], rows[2]["label"], rows[2]["p(benign)"]} == {""}
    given = [float(rows[place]["p(benign)"]) for place in (0, 3)]
    np.testing.assert_allclose(given, expected[:, 0], atol=2e-6)
    assert {rows[0]["refused"], rows[3]["refused"]} == {""}


def test_an_identifier_that_the_file_lacks(command, table_bundle, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("age,smoker,ward\n61,yes,surgery\n")
    result = command("fedclaw.predict", f"bundle={table_bundle}", f"input={path}", "identifiers=[patient]")
    assert (result.returncode, result.stdout) == (1, "")
    assert "the column 'patient', which identifiers= names, is missing" in result.stderr


def schema_of(**fields):
    definition = {"columns": [WARD], "target": {"name": "t", "labels": ["x", "y"]}, **fields}
    return TabularSchema.parse(json.dumps(definition), "schema.yaml")


def test_identifiers_of_the_schema_are_allowed_everywhere_and_no_input(tmp_path):
    schema, path = schema_of(identifiers=["patient", "visit"]), tmp_path / "rows.csv"
    path.write_text("patient,ward,t\nA-1,surgery,x\n007,medicine,y\n")
    assert schema.input_shape == (2,)
    assert schema.read_examples(path).inputs.tolist() == [[1, 0], [0, 1]]
    rows = schema.read_rows(path)
    assert dict(rows.identifiers) == {"patient": ["A-1", "007"]}
    with pytest.raises(DataError, match="more than once: 'ward'"):
        schema_of(identifiers=["ward"])


@pytest.mark.parametrize(
    ("fields", "features", "encoded"),
    [
        ({"unseen": "missing"}, ["ward=surgery", "ward=medicine"], [[1, 0], [0, 0], [0, 0]]),
        (
            {"unseen": "other"},
            ["ward=surgery", "ward=medicine", "ward=other"],
            [[1, 0, 0], [0, 0, 1], [0, 0, 0]],
        ),
        (
            {"columns": [WARD | {"levels": ["other", "surgery"], "unseen": "other"}], "unseen": "missing"},
            ["ward=other", "ward=surgery"],
            [[0, 1], [1, 0], [0, 0]],
        ),
    ],
    ids=["missing", "other", "other-is-a-level"],
)
def test_an_unseen_level_by_the_schemas_rule(tmp_path, fields, features, encoded):
    schema, path = schema_of(**fields), tmp_path / "rows.csv"
    path.write_text("ward,t\nsurgery,x\ngarden,y\n,x\n")
    assert schema.describe_inputs()["features"] == features
    assert schema.input_shape == (len(features),)
    for inputs in (schema.read_examples(path).inputs, schema.read_rows(path).inputs):
        assert inputs.tolist() == encoded
    assert not schema.read_rows(path).refused
    again = TabularSchema.parse(schema.to_json(), "schema.json")
    assert again.read_inputs(path).tolist() == encoded
    assert [len(column.levels) for column in schema.statistic_columns()] == [len(features)]
    assert schema.synthetic_inputs(3, np.random.default_rng(0)).shape == (3, len(features))


def test_without_a_rule_an_unseen_level_refuses_the_row_and_training_the_file(tmp_path):
    schema, path = schema_of(), tmp_path / "rows.csv"
    path.write_text("ward,t\nsurgery,x\ngarden,y\n")
    assert dict(schema.read_rows(path).refused) == {
        1: "line 3, column 'ward': 'garden'; expected one of 'surgery', 'medicine'"
    }
    with pytest.raises(DataError, match="'garden'"):
        schema.read_examples(path)
    assert schema.to_json() == schema_of(unseen=None).to_json()
    assert "unseen" not in schema.to_json()


def test_one_damaged_image_of_a_folder_is_refused_alone(image_bundle, tmp_path):
    for name in ("a", "c"):
        Image.new("L", (8, 8), 100).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    rows = Predictor.open(image_bundle).read_rows(tmp_path)
    assert rows.answered.tolist() == [0, 2]
    assert list(rows.refused) == [1]
    assert "b.png: not a readable PNG or JPEG" in rows.refused[1]
    assert dict(rows.identifiers) == {"file": ["a.png", "b.png", "c.png"]}


def test_the_best_threshold_by_trying_all():
    random = np.random.default_rng(0)
    labels = (random.random(200) < 0.1).astype(np.int64)
    positive = (0.3 * random.random(200) + 0.1 * labels).astype(np.float32)
    decision = choose_threshold(positive, Table(np.zeros((200, 1), np.float32), labels))
    best = max(f1(positive, labels, float(cut)) for cut in np.unique(positive))
    assert decision.value == pytest.approx(best)
    assert decision.value_at_half == 0
    assert 0 < decision.threshold < 0.5
    assert f1(positive, labels, decision.threshold) == decision.value


def test_too_few_of_a_class_choose_nothing():
    labels = np.array([1] * 4 + [0] * 50)
    with pytest.raises(BundleError, match="at least 5 examples of each class; there are 50 and 4"):
        choose_threshold(np.linspace(0, 1, 54, dtype=np.float32), Table(np.zeros((54, 1), np.float32), labels))


def test_a_threshold_of_public_data_goes_into_the_bundle_and_decides(command, table_run, table_source, home, tmp_path):
    random, public = np.random.default_rng(3), tmp_path / "public.csv"
    inputs = [
        (int(age), smoker, ward)
        for age, smoker, ward in zip(
            random.integers(0, 121, 300),
            random.choice(["yes", "no"], 300),
            random.choice(["surgery", "medicine"], 300),
            strict=True,
        )
    ]
    public.write_text("age,smoker,ward\n" + "".join(f"{a},{s},{w}\n" for a, s, w in inputs))
    positive = softmax(table_source, table_source.schema.read_inputs(public))[:, 1]
    cut = float(np.quantile(positive, 0.9))
    labels = ["malignant" if p > cut else "benign" for p in positive]
    rows = zip(inputs, labels, strict=True)
    public.write_text("age,smoker,ward,outcome\n" + "".join(f"{a},{s},{w},{label}\n" for (a, s, w), label in rows))
    bundle, output = tmp_path / "bundle", tmp_path / "out.csv"
    made = command(
        "fedclaw.export",
        *(f"run={table_run.root}", f"federation={home.root}", f"output={bundle}", f"threshold_data={public}"),
    )
    assert made.returncode == 0, made.stderr
    decision = Predictor.open(bundle).verified.manifest.decision
    assert decision.value == 1
    assert decision.value_at_half < 1
    assert decision.chosen_on == "public data"
    assert f"malignant from a probability of {decision.threshold:.4g} on" in (bundle / layout.CARD).read_text()
    done = command("fedclaw.predict", f"bundle={bundle}", f"input={public}", f"output={output}")
    assert done.returncode == 0, done.stderr
    assert [row["label"] for row in answers(output)] == labels


def test_a_bundle_without_a_threshold_is_what_older_versions_read(table_bundle):
    assert "decision" not in json.loads((table_bundle / layout.MANIFEST).read_text())
    assert Predictor.open(table_bundle).verified.manifest.decision is None


def test_a_threshold_is_for_two_classes(image_run, home, tmp_path):
    public = Table(np.zeros((20, 1, 8, 8), np.float32), np.zeros(20, np.int64))
    with pytest.raises(BundleError, match="a threshold is for two classes, and the schema has 3"):
        export_bundle(load_source(image_run), home.signer(), tmp_path / "bundle", Request(public=public))
    assert not (tmp_path / "bundle").exists()


def test_images_take_no_identifiers_nor_delimiter(image_bundle, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    predictor = Predictor.open(image_bundle)
    for path in (tmp_path, tmp_path / "a.png"):
        with pytest.raises(DataError, match="columns"):
            predictor.read_rows(path, ("patient",))
    with pytest.raises(DataError, match="have no delimiter"):
        predictor.read_as(FileFormat(decimal=","))


def test_a_bundle_of_a_weighted_schema(samples, home, tmp_path):
    target = {**samples.table["target"], "weights": {"malignant": 10}}
    run = samples.make_run(tmp_path / "own", "tabular", samples.table | {"target": target}, ModelSpec(name="logistic"))
    export_bundle(load_source(run), home.signer(), tmp_path / "bundle", Request())
    assert Predictor.open(tmp_path / "bundle").schema.class_weights == (1.0, 10.0)


def test_the_input_is_never_written_over(command, table_bundle, tmp_path):
    """On a system that does not tell ROWS.csv from rows.csv; shown here by a second name of the same file."""
    path, other = tmp_path / "rows.csv", tmp_path / "ROWS.CSV"
    path.write_text("age,smoker,ward\n61,yes,surgery\n")
    other.hardlink_to(path)
    result = command("fedclaw.predict", f"bundle={table_bundle}", f"input={path}", f"output={other}")
    assert (result.returncode, result.stdout) == (2, "")
    assert "this is the input; name another file" in result.stderr
    assert path.read_text().startswith("age,")
