"""How many cells of a table are missing, counted as the encoder takes them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from fedclaw.clients import tables
from fedclaw.clients.tabular_schema import TabularSchema
from fedclaw.errors import DataError

SCHEMA = """
columns:
  - {name: age, kind: numeric, center: 50, scale: 20}
  - {name: smoker, kind: boolean}
  - {name: ward, kind: categorical, levels: [surgery, NA]}
target: {name: outcome, labels: [benign, malignant]}
"""
ROWS = "age,smoker,ward,outcome\n70,?,surgery,malignant\n?,,NA,benign\n40,no,?,benign\n30,yes,NA,benign\n"


def schema_of(text: str = SCHEMA) -> TabularSchema:
    return TabularSchema.parse(text, "schema.yaml")


def written(folder: Path, text: str) -> Path:
    path = folder / "rows.csv"
    path.write_text(text)
    return path


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_missing_cells_by_column_and_the_rows_they_touch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(tables.read_blocks, "__defaults__", (rows,))
    found = schema_of().missing(written(tmp_path, ROWS))
    assert (found.rows, found.incomplete_rows) == (4, 3)
    assert list(found.columns.items()) == [("age", 1), ("smoker", 2), ("ward", 1)]
    assert str(found) == "3 of 4 rows have missing cells (age 1, smoker 2, ward 1)"


def test_they_are_the_cells_that_the_encoder_takes_for_missing(tmp_path: Path) -> None:
    path = written(tmp_path, ROWS)
    inputs = schema_of().read_examples(path).inputs
    encoded = {
        "age": inputs[:, 0] == 0,
        "smoker": inputs[:, 1] == 0.5,
        "ward": inputs[:, 2:].sum(axis=1) == 0,
    }
    found = schema_of().missing(path)
    assert found.columns == {name: int(where.sum()) for name, where in encoded.items()}
    assert found.incomplete_rows == int(np.any(list(encoded.values()), axis=0).sum())


def test_a_whole_table_and_only_the_columns_that_miss(tmp_path: Path) -> None:
    complete = schema_of().missing(written(tmp_path, "age,smoker,ward\n1,yes,NA\n2,no,surgery\n"))
    assert (complete.rows, complete.incomplete_rows, set(complete.columns.values())) == (2, 0, {0})
    assert str(complete) == "no cells are missing in 2 rows"
    found = schema_of().missing(written(tmp_path, "age,smoker,ward\n1,,NA\n2,no,surgery\n"))
    assert str(found) == "1 of 2 rows have missing cells (smoker 1)"


def test_parquet_nulls_and_nans(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    columns = {
        "age": pa.array([float("nan"), None, -9.0, 1.0]),
        "smoker": pa.array([True, None, False, True]),
        "ward": pa.array(["surgery", "NA", None, "surgery"]),
    }
    parquet.write_table(pa.table(columns), path)
    found = schema_of(SCHEMA + 'missing: ["-9"]').missing(path)
    assert (found.rows, found.incomplete_rows, found.columns) == (4, 3, {"age": 3, "smoker": 1, "ward": 1})


def test_a_schema_that_standardises_by_site_needs_no_constants_for_it(tmp_path: Path) -> None:
    schema = schema_of(SCHEMA.replace(", center: 50, scale: 20", "") + "standardise: site")
    assert schema.missing(written(tmp_path, ROWS)).columns["age"] == 1


def test_a_table_that_does_not_fit_the_schema(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the column 'ward' is missing"):
        schema_of().missing(written(tmp_path, "age,smoker\n1,yes\n"))


def test_an_empty_cell_that_is_declared_as_a_level_is_not_missing(tmp_path: Path) -> None:
    schema = schema_of("{columns: [{name: a, kind: categorical, levels: ['', x]}], target: {name: t, labels: [y, z]}}")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"a": ["x", "", None, "?"]}), path)
    assert schema.missing(path).columns == {"a": int((schema.read_inputs(path).sum(axis=1) == 0).sum())} == {"a": 1}
