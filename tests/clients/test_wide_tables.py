"""Tables up to the schema's own limit of columns: read once, in work that grows with the cells."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from fedclaw.clients import tables
from fedclaw.clients.table_definition import MAX_FEATURES
from fedclaw.clients.tabular_schema import TabularSchema
from fedclaw.errors import DataError
from fedclaw.files import sha256_file
from fedclaw.site.settings import DataFiles
from fedclaw.site.site import load_data


def schema_of(columns: int, more: str = "", kind: str = "numeric, center: 1, scale: 2") -> TabularSchema:
    listed = "\n".join(f"- {{name: c{number}, kind: {kind}}}" for number in range(columns))
    return TabularSchema.parse(f"columns:\n{listed}\ntarget: {{name: t, labels: [x, y]}}\n{more}", "schema.yaml")


def written(folder: Path, columns: int, rows: int = 3, most: int = 7) -> Path:
    path = folder / f"{columns}.csv"
    line = ",".join(str(number % most) for number in range(columns))
    path.write_text(",".join(f"c{number}" for number in range(columns)) + ",t\n" + f"{line},x\n" * rows)
    return path


def calls(work: Callable[[], object]) -> int:
    """How many functions `work` calls, Python's and C's."""
    count = 0

    def profile(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("columns", [5000, pytest.param(MAX_FEATURES, marks=pytest.mark.slow)])
def test_a_wide_table_and_its_schema(tmp_path: Path, columns: int) -> None:
    schema = schema_of(columns)
    again = TabularSchema.parse(schema.to_json(), "schema.json")
    table = again.read_examples(written(tmp_path, columns))
    assert table.inputs.shape == (3, columns)
    assert (table.inputs[1] == (np.arange(columns, dtype=np.float32) % 7 - 1) / 2).all()
    assert again.describe_inputs()["shape"] == ["batch", columns]


@pytest.mark.parametrize("kind", ["numeric", "boolean", "categorical, levels: [0, 1, 2, 3, 4, 5, 6]"])
def test_twice_the_columns_are_twice_the_work(tmp_path: Path, kind: str) -> None:
    work = {}
    for columns in (500, 1000):
        schema, path = schema_of(columns, kind=kind), written(tmp_path, columns, most=2)
        work[columns] = calls(lambda schema=schema, path=path: schema.read_examples(path))
    assert work[1000] <= 2.1 * work[500]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (lambda names: [*names, "t", names[5]], "the header has the column 'c5' more than once"),
        (lambda names: [*names[1:], "zz", "t"], "the column 'c0' is missing"),
        (lambda names: [*names, "t", "zz"], "the schema knows no column 'zz'"),
    ],
)
def test_a_wide_header_is_checked_in_linear_work(
    tmp_path: Path, header: Callable[[list[str]], list[str]], message: str
) -> None:
    names = [f"c{number}" for number in range(10_000)]
    path = tmp_path / "rows.csv"
    path.write_text(",".join(header(names)) + "\n1,2\n")
    with pytest.raises(DataError, match=message):
        schema_of(10_000).read_examples(path)


def test_blocks_of_a_wide_table_have_few_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BLOCK_CELLS", 2000)
    path = written(tmp_path, 1000, rows=10)
    seen = []
    read = tables.read_blocks

    def recorded(*arguments: object, **named: object) -> object:
        for block in read(*arguments, **named):
            seen.append(block.rows)
            yield block

    monkeypatch.setattr("fedclaw.clients.tabular_schema.read_blocks", recorded)
    assert len(schema_of(1000).read_examples(path)) == 10
    assert seen == [1] * 10


@pytest.mark.parametrize("more", ["", "standardise: site"])
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_site_reads_its_file_once(tmp_path: Path, more: str, form: str) -> None:
    schema = schema_of(3, more, kind="numeric")
    path = written(tmp_path, 3)
    if form == "parquet":
        path = tmp_path / "rows.parquet"
        parquet.write_table(pa.table({"c0": [0, 2], "c1": [1, 1], "c2": [2, None], "t": ["x", "y"]}), path)
    opened = []

    def hook(event: str, arguments: tuple) -> None:
        if watching and event == "open" and str(arguments[0]) == str(path):
            opened.append(event)

    watching = True
    sys.addaudithook(hook)
    try:
        fitted, train = schema.fit_examples(path)
        data = load_data(DataFiles(train=path), fitted, train)
        fitted.notes(data.train)
    finally:
        watching = False
    assert opened == ["open"]
    assert data.fingerprint == sha256_file(path)
    assert fitted.fit(path).read_examples(path).inputs.tolist() == train.inputs.tolist()
