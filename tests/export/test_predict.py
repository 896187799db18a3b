import csv

import numpy as np
import pytest
import torch
from PIL import Image

from fedclaw.errors import BundleError, DataError
from fedclaw.export import layout
from fedclaw.export.bundle import Request, export_bundle
from fedclaw.export.check import Trust
from fedclaw.export.predictor import Predictor
from fedclaw.export.source import load_source
from fedclaw.protocol.terms import ModelSpec

ROWS = "age,smoker,ward,outcome\n61,yes,surgery,benign\n,no,medicine,malignant\n20,,,benign\n"


def softmax(source, inputs):
    with torch.no_grad():
        return torch.softmax(source.model(torch.from_numpy(inputs)), 1).numpy()


def answers(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(ROWS)
    return path


def test_many_rows_are_what_torch_says(command, table_bundle, table_source, rows, tmp_path, home):
    output = tmp_path / "out.csv"
    result = command(
        "fedclaw.predict", f"bundle={table_bundle}", f"input={rows}", f"output={output}", f"ca={home.root / 'ca.crt'}"
    )
    assert result.returncode == 0, result.stderr
    expected = softmax(table_source, table_source.schema.read_inputs(rows))
    for number, (answer, row) in enumerate(zip(answers(output), expected, strict=True), start=1):
        assert answer["row"] == str(number)
        assert answer["label"] == table_source.schema.labels[row.argmax()]
        assert float(answer["p(benign)"]) == pytest.approx(row[0], abs=2e-6)
        assert float(answer["probability"]) == pytest.approx(row.max(), abs=2e-6)


def test_one_row_is_printed_as_a_table(command, table_bundle, table_source, tmp_path):
    path = tmp_path / "patient.csv"
    path.write_text("ward,age,smoker\nsurgery,61,yes\n")
    result = command("fedclaw.predict", f"bundle={table_bundle}", f"input={path}")
    assert result.returncode == 0, result.stderr
    row = softmax(table_source, table_source.schema.read_inputs(path))[0]
    line = next(line for line in result.stdout.splitlines() if line.startswith("│"))
    assert [cell.strip() for cell in line.strip("│").split("│")] == [
        "1",
        table_source.schema.labels[row.argmax()],
        f"{row.max():.4f}",
    ]
    assert "ca=… proves who signed it" in result.stdout


def test_an_image_and_an_archive(command, image_bundle, image_run, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    Image.fromarray(pixels[0]).save(tmp_path / "one.png")
    np.savez(tmp_path / "three.npz", images=pixels)
    source = load_source(image_run)
    expected = softmax(source, (pixels[:, None] / np.float32(255) - np.float32(0.5)) / np.float32(0.25))
    for name, count in (("one.png", 1), ("three.npz", 3)):
        output = tmp_path / f"{name}.csv"
        result = command("fedclaw.predict", f"bundle={image_bundle}", f"input={tmp_path / name}", f"output={output}")
        assert result.returncode == 0, result.stderr
        given = [[float(a[f"p({label})"]) for label in source.schema.labels] for a in answers(output)]
        np.testing.assert_allclose(given, expected[:count], atol=3e-6)


def test_more_rows_than_a_batch_and_than_a_table(command, table_bundle, table_source, tmp_path):
    path = tmp_path / "many.csv"
    path.write_text("age,smoker,ward\n" + "".join(f"{age % 100},yes,surgery\n" for age in range(600)))
    result = command("fedclaw.predict", f"bundle={table_bundle}", f"input={path}")
    assert "and 550 more rows" in result.stdout
    predictor = Predictor.open(table_bundle)
    inputs = predictor.read(path)
    np.testing.assert_allclose(predictor.predict(inputs), softmax(table_source, inputs), atol=2e-6)


HEAVY = ("torch", "onnx", "onnxscript", "opacus", "flwr", "mlflow")


@pytest.mark.parametrize("module", ["fedclaw.predict", "fedclaw.verify"])
def test_works_where_torch_is_not_installed_and_never_imports_it(process, module, table_bundle, rows):
    arguments = {
        "fedclaw.predict": [f"bundle={table_bundle}", f"input={rows}"],
        "fedclaw.verify": [str(table_bundle)],
    }[module]
    result = process("-X", "importtime", "-m", module, *arguments, broken=HEAVY)
    assert result.returncode == 0, result.stderr[-500:]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "fedclaw" in imported
    assert not imported & set(HEAVY)


def test_a_missing_runtime_names_the_extra(process, table_bundle, rows):
    result = process("-m", "fedclaw.predict", f"bundle={table_bundle}", f"input={rows}", broken=["onnxruntime"])
    assert result.returncode == 2
    assert "pip install 'fedclaw[predict]'" in result.stderr


@pytest.mark.parametrize("name", [layout.ONNX, layout.SCHEMA, layout.CARD])
def test_a_tampered_bundle_is_not_run(command, bundle, rows, name):
    with (bundle / name).open("ab") as file:
        file.write(b"\n")
    result = command("fedclaw.predict", f"bundle={bundle}", f"input={rows}")
    assert (result.returncode, result.stdout) == (1, "")
    assert name in result.stderr


def test_another_federations_ca_is_not_run(table_bundle, stranger):
    with pytest.raises(BundleError, match="not the CA that you trust"):
        Predictor.open(table_bundle, Trust(authority=(stranger.root / "ca.crt").read_bytes()))


def test_what_was_verified_is_what_runs(bundle, table_source, rows):
    """Files exchanged after the check change nothing: the predictor holds the verified bytes."""
    predictor = Predictor.open(bundle)
    (bundle / layout.ONNX).write_bytes(b"something else")
    inputs = predictor.read(rows)
    np.testing.assert_allclose(predictor.predict(inputs), softmax(table_source, inputs), atol=2e-6)


def test_no_rows_is_an_error(table_bundle, tmp_path):
    path = tmp_path / "empty.csv"
    path.write_text("age,smoker,ward\n")
    with pytest.raises(DataError, match=r"empty\.csv"):
        Predictor.open(table_bundle).read(path)


MISTAKES = [
    (["bundle={b}"], 2, "input= is missing"),
    (["bundle=nowhere", "input={i}"], 2, "nowhere is not a bundle"),
    (["bundle={b}", "input=missing.csv"], 2, "missing.csv: no such file"),
    (["bundle={b}", "input={i}", "ca=missing.crt"], 2, "ca=missing.crt cannot be read"),
    (["bundle={b}", "input={i}", "output=table.xlsx"], 2, "name a file that ends in .csv"),
    (["bundle={b}", "input={i}", "colour=red"], 2, "colour"),
    (["{b}"], 2, "settings are written key=value"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), MISTAKES)
def test_mistakes_get_one_clear_line(command, table_bundle, rows, arguments, code, message):
    result = command("fedclaw.predict", *(text.format(b=table_bundle, i=rows) for text in arguments))
    assert (result.returncode, result.stdout) == (code, "")
    assert message in result.stderr.splitlines()[0]
    assert "Traceback" not in result.stderr


def test_a_bad_value_names_line_and_column_and_costs_its_row_alone(command, table_bundle, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("age,smoker,ward\n61,yes,surgery\nold,yes,surgery\n")
    result = command("fedclaw.predict", f"bundle={table_bundle}", f"input={path}")
    assert result.returncode == 0
    line = next(line for line in result.stdout.splitlines() if line.startswith("refused"))
    assert line == ("refused   1 of 2 rows, the first: line 3, column 'age': 'old'; expected a number from 0 to 120")


def test_a_file_without_any_good_row_is_an_error(command, table_bundle, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("age,smoker,ward\nold,yes,surgery\n" + "61,yes,garden\n" * 5)
    result = command("fedclaw.predict", f"bundle={table_bundle}", f"input={path}")
    assert (result.returncode, result.stdout) == (1, "")
    for part in ("bad.csv", "no row can be answered", "line 2", "'old'", "line 4", "'garden'", "and 3 more"):
        assert part in result.stderr.splitlines()[0]


def test_a_site_standardised_bundle_needs_the_sites_constants(command, samples, home, rows, tmp_path):
    columns = [{"name": "age", "kind": "numeric", "range": [0, 120]}, *samples.table["columns"][1:]]
    definition = samples.table | {"columns": columns, "standardise": "site"}
    run = samples.make_run(tmp_path / "own", "tabular", definition, ModelSpec(name="logistic"))
    source = load_source(run)
    fitted = source.schema.fit(rows)
    bundle, constants = tmp_path / "bundle", tmp_path / "preprocessing.json"
    export_bundle(source, home.signer(), bundle, Request())
    constants.write_text(fitted.constants_json())

    without = command("fedclaw.predict", f"bundle={bundle}", f"input={rows}")
    assert without.returncode == 1
    assert "constants=" in without.stderr

    output = tmp_path / "out.csv"
    done = command("fedclaw.predict", f"bundle={bundle}", f"input={rows}", f"constants={constants}", f"output={output}")
    assert done.returncode == 0, done.stderr
    expected = softmax(source, fitted.read_inputs(rows))
    assert [float(a["probability"]) for a in answers(output)] == pytest.approx(expected.max(axis=1), abs=2e-6)


def test_constants_for_a_schema_that_takes_none(command, table_bundle, rows):
    done = command("fedclaw.predict", f"bundle={table_bundle}", f"input={rows}", f"constants={rows}")
    assert done.returncode == 1
    assert str(rows) in done.stderr
