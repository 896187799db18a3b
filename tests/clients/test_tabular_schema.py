"""Tables to arrays: the encoding, standardisation, Parquet, and what goes into bundles."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from fedclaw.clients import tables
from fedclaw.clients.moments import Moments
from fedclaw.clients.tabular_schema import TabularSchema
from fedclaw.errors import DataError
from fedclaw.learning.workload import FileFormat

SCHEMA = """
columns:
  - {name: age, kind: numeric, center: 50, scale: 20, range: [0, 120]}
  - {name: smoker, kind: boolean}
  - {name: ward, kind: categorical, levels: [surgery, medicine, 3]}
target: {name: outcome, labels: [benign, malignant]}
"""
ROWS = "age,smoker,ward,outcome\n70,yes,medicine,malignant\n?,NA,,benign\n40,F,3,benign\n"
ENCODED = [[1.0, 1.0, 0, 1, 0], [0.0, 0.5, 0, 0, 0], [-0.5, 0.0, 0, 0, 1]]


def schema_of(text: str = SCHEMA) -> TabularSchema:
    return TabularSchema.parse(text, "schema.yaml")


def written(folder: Path, text: str | bytes, name: str = "rows.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_every_kind_and_every_missing_cell(tmp_path: Path) -> None:
    table = schema_of().read_examples(written(tmp_path, ROWS))
    assert table.inputs.tolist() == ENCODED
    assert table.targets.tolist() == [1, 0, 0]
    assert table.inputs.dtype == np.float32
    assert table.targets.dtype == np.int64
    assert schema_of().input_shape == (5,)
    assert schema_of().labels == ("benign", "malignant")


@pytest.mark.parametrize(
    "text",
    [
        ROWS.replace("\n", "\r\n"),
        "\ufeff" + ROWS,
        ROWS.rstrip("\n"),
        ROWS + "\n\n",
        ROWS.replace("malignant", '"malignant"').replace(",", " , "),
        "outcome,ward,age,smoker\nmalignant,medicine,70,Y\nbenign,?,,\nbenign,3,4e1,0\n",
    ],
    ids=["crlf", "byte-order-mark", "no-last-newline", "empty-lines", "spaces-and-quotes", "other-order"],
)
def test_the_same_table_in_other_dress(tmp_path: Path, text: str) -> None:
    table = schema_of().read_examples(written(tmp_path, text))
    assert table.inputs.tolist() == ENCODED
    assert table.targets.tolist() == [1, 0, 0]


def test_other_delimiters(tmp_path: Path) -> None:
    schema = schema_of(SCHEMA + 'delimiter: ";"')
    assert schema.read_inputs(written(tmp_path, ROWS.replace(",", ";"))).tolist() == ENCODED


def test_inputs_need_no_target_and_do_not_look_at_one(tmp_path: Path) -> None:
    without = "\n".join(line.rpartition(",")[0] for line in ROWS.splitlines())
    assert schema_of().read_inputs(written(tmp_path, without)).tolist() == ENCODED
    nonsense = ROWS.replace("benign", "who knows")
    assert schema_of().read_inputs(written(tmp_path, nonsense)).tolist() == ENCODED


def test_extra_columns_can_be_ignored(tmp_path: Path) -> None:
    text = "\n".join(f"{i},{line}" for i, line in enumerate(ROWS.splitlines())).replace("0,", "patient,", 1)
    path = written(tmp_path, text)
    assert schema_of(SCHEMA + "extra: ignore").read_inputs(path).tolist() == ENCODED
    with pytest.raises(DataError, match="knows no column 'patient'"):
        schema_of().read_inputs(path)


def test_raw_values_map_to_labels_in_order_of_first_appearance(tmp_path: Path) -> None:
    schema = schema_of(SCHEMA.replace("[benign, malignant]", "{2: benign, 4: malignant, 1: benign}"))
    assert schema.labels == ("benign", "malignant")
    text = ROWS.replace("malignant", "4").replace("benign", "2", 1).replace("benign", "1")
    assert schema.read_examples(written(tmp_path, text)).targets.tolist() == [1, 0, 0]


def test_a_declared_level_or_label_wins_over_a_missing_marker(tmp_path: Path) -> None:
    schema = schema_of(
        "{columns: [{name: a, kind: categorical, levels: [NA, x]}], target: {name: t, labels: [None, some]}}"
    )
    table = schema.read_examples(written(tmp_path, "a,t\nNA,None\n?,some\n"))
    assert table.inputs.tolist() == [[1, 0], [0, 0]]
    assert table.targets.tolist() == [0, 1]


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_block_size_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(tables.read_blocks, "__defaults__", (rows,))
    path = written(tmp_path, ROWS)
    assert schema_of().read_examples(path).inputs.tolist() == ENCODED
    bad = written(tmp_path, ROWS + "70,yes,garden,benign\n", "bad.csv")
    with pytest.raises(DataError, match=r"bad.csv: line 5, column 'ward': 'garden'"):
        schema_of().read_examples(bad)


def test_parquet_text_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    ends, text = pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")
    parquet.write_table(pa.table({"ward": pa.Array.from_buffers(pa.string(), 1, [None, ends, text])}), path)
    with pytest.raises(DataError, match="no UTF-8"):
        list(tables.read_blocks(path, FileFormat(), tables.Wanted(("ward",)), tables.Content()))


def test_parquet_reads_as_csv_does(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    columns = {
        "age": pa.array([70.0, None, 40.0]),
        "smoker": pa.array([True, None, False]),
        "ward": pa.array(["medicine", None, "3"]),
        "outcome": pa.array(["malignant", "benign", "benign"]),
    }
    parquet.write_table(pa.table(columns), path)
    table = schema_of().read_examples(path)
    assert table.inputs.tolist() == ENCODED
    assert table.targets.tolist() == [1, 0, 0]


def test_parquet_numbers_nan_and_numeric_markers(tmp_path: Path) -> None:
    path = tmp_path / "rows.pq"
    columns = {
        "age": pa.array([float("nan"), -9.0, 90.0]),
        "smoker": pa.array([1, 0, None], pa.int64()),
        "ward": pa.array([3.0, 3.0, float("nan")]),
    }
    parquet.write_table(pa.table(columns), path)
    encoded = schema_of(SCHEMA + 'missing: ["-9"]').read_inputs(path)
    assert encoded.tolist() == [[0, 1, 0, 0, 1], [0, 0, 0, 0, 1], [2, 0.5, 0, 0, 0]]


def test_standardisation_by_site_uses_the_training_moments_everywhere(tmp_path: Path) -> None:
    text = SCHEMA.replace(", center: 50, scale: 20", "") + "standardise: site"
    schema = schema_of(text)
    train = written(
        tmp_path, "age,smoker,ward,outcome\n30,yes,3,benign\n?,no,3,benign\n50,no,3,malignant\n", "train.csv"
    )
    test = written(tmp_path, "age,smoker,ward\n60,yes,3\nNA,no,3\n", "test.csv")
    with pytest.raises(DataError, match=r"train.csv: the schema standardises by site.*preprocessing\.json"):
        schema.read_examples(train)
    with pytest.raises(DataError, match=r"preprocessing\.json"):
        schema.read_inputs(test)

    fitted = schema.fit(train)  # known ages 30 and 50: mean 40, deviation 10
    assert fitted.read_examples(train).inputs[:, 0].tolist() == [-1, 0, 1]
    assert fitted.read_inputs(test)[:, 0].tolist() == [2, 0]
    assert schema.constants_json() is None

    again = schema_of(text).with_constants(fitted.constants_json(), "constants.json")
    assert again.read_inputs(test)[:, 0].tolist() == [2, 0]
    assert again.to_json() == schema.to_json()
    assert "40" not in json.dumps(fitted.describe_inputs())
    assert schema.data_dependent
    assert not schema_of().data_dependent


def test_constants_of_another_schema_are_refused(tmp_path: Path) -> None:
    text = "{columns: [{name: a, kind: numeric}], target: {name: t, labels: [x, y]}, standardise: site}"
    fitted = schema_of(text).fit(written(tmp_path, "a\n1\n3\n"))
    constants = fitted.constants_json()
    with pytest.raises(DataError, match=r"c.json: these .* belong to another schema; compute them anew"):
        schema_of(text.replace("[x, y]", "[y, x]")).with_constants(constants, "c.json")
    with pytest.raises(DataError, match="belong to another schema"):
        schema_of(text).with_constants(constants.replace('"a"', '"b"'), "c.json")
    with pytest.raises(DataError, match=r"c.json: columns.a.deviation: Input should be greater than 0"):
        schema_of(text).with_constants(constants.replace('"deviation":1.0', '"deviation":0'), "c.json")


def test_a_constant_or_wholly_missing_column_stays_finite(tmp_path: Path) -> None:
    schema = schema_of(
        "{columns: [{name: a, kind: numeric}, {name: b, kind: numeric}],"
        " target: {name: t, labels: [x, y]}, standardise: site}"
    )
    path = written(tmp_path, "a,b\n" + "0.1,NA\n" * 7)
    fitted = schema.fit(path)
    np.testing.assert_allclose(fitted.read_inputs(path), np.zeros((7, 2)), atol=1e-6)
    other = fitted.read_inputs(written(tmp_path, "a,b\n0.35,2\n", "other.csv"))
    np.testing.assert_allclose(other, [[0.25, 2]], atol=1e-6)


def test_fitting_a_schema_with_public_constants_changes_nothing(tmp_path: Path) -> None:
    schema = schema_of()
    assert schema.fit(tmp_path / "is never read.csv") is schema
    assert schema.constants_json() is None


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), max_size=6), max_size=6))
def test_moments_in_pieces_are_the_moments_of_the_whole(pieces: list[list[float]]) -> None:
    moments = Moments()
    for piece in pieces:
        moments.add(np.array(piece, np.float64))
    known = [value for piece in pieces for value in piece if value == value]
    assert moments.count == len(known)
    assert moments.mean == pytest.approx(np.mean(known) if known else 0, rel=1e-9, abs=1e-6)
    assert moments.deviation == pytest.approx(np.std(known) if known else 0, rel=1e-6, abs=1e-6)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=20))
def test_numbers_survive_the_file(tmp_path: Path, values: list[float]) -> None:
    schema = schema_of("{columns: [{name: a, kind: numeric}], target: {name: t, labels: [x, y]}}")
    path = written(tmp_path, "a\n" + "\n".join(map(repr, values)))
    assert schema.read_inputs(path)[:, 0].tolist() == np.array(values, np.float32).tolist()


def test_json_is_canonical_and_read_back() -> None:
    schema = schema_of()
    other_layout = json.dumps(json.loads(schema.to_json()), indent=4)
    assert TabularSchema.parse(other_layout, "x").to_json() == schema.to_json()
    assert TabularSchema.parse(SCHEMA + "standardise: schema\n# a comment", "x").to_json() == schema.to_json()
    assert TabularSchema.parse(SCHEMA.replace("50", "51"), "x").to_json() != schema.to_json()


def test_label_order_of_a_map_survives_the_json() -> None:
    schema = schema_of(SCHEMA.replace("[benign, malignant]", "{9: zeta, 1: alpha}"))
    assert TabularSchema.parse(schema.to_json(), "x").labels == ("zeta", "alpha")


def test_the_description_says_how_each_feature_is_made() -> None:
    described = schema_of().describe_inputs()
    assert described["shape"] == ["batch", 5]
    assert described["features"] == ["age", "smoker", "ward=surgery", "ward=medicine", "ward=3"]
    age, smoker, ward = described["columns"]
    assert (age["center"], age["scale"], age["range"], age["first_feature"]) == (50, 20, [0, 120], 0)
    assert (smoker["kind"], smoker["first_feature"]) == ("boolean", 1)
    assert (ward["levels"], ward["first_feature"], ward["features"]) == (["surgery", "medicine", "3"], 2, 3)
    assert set(described["encoding"]) == {"numeric", "boolean", "categorical", "missing"}
    assert json.loads(json.dumps(described)) == described


def test_synthetic_inputs_follow_the_schema() -> None:
    made = schema_of().synthetic_inputs(2000, np.random.default_rng(0))
    assert made.shape == (2000, 5)
    assert made.dtype == np.float32
    age = made[:, 0] * 20 + 50
    assert age.min() >= 0
    assert age.max() <= 120
    assert abs(age.mean() - 50) < 2
    assert set(np.unique(made[:, 1])) == {0, 1}
    assert (made[:, 2:].sum(axis=1) == 1).all()
    assert (made[:, 2:].mean(axis=0) > 0.25).all()
    again = schema_of().synthetic_inputs(2000, np.random.default_rng(0))
    assert np.array_equal(made, again)
    assert schema_of().synthetic_inputs(0, np.random.default_rng(0)).shape == (0, 5)


def test_synthetic_numbers_without_constants_fill_the_range_or_are_standard() -> None:
    schema = schema_of(
        "{columns: [{name: a, kind: numeric, range: [10, 20]}, {name: b, kind: numeric}],"
        " target: {name: t, labels: [x, y]}}"
    )
    made = schema.synthetic_inputs(2000, np.random.default_rng(1))
    assert 10 <= made[:, 0].min() < 10.2
    assert 19.8 < made[:, 0].max() <= 20
    assert made[:, 1].std() == pytest.approx(1, abs=0.1)


def test_schemas_work_without_torch() -> None:
    """Prediction loads schemas where no torch is installed."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from fedclaw.learning.registry import schema_class\n"
        "assert schema_class('tabular').name == 'tabular' and schema_class('vision').name == 'vision'\n"
        "assert 'PIL' not in sys.modules and 'pyarrow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
