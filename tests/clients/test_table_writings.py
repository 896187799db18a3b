"""A value means the same however it is written: one table, in all ways that tools know, gives the same arrays."""

import csv
import gzip
import hashlib
import io
import unicodedata
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from fedclaw.clients.tabular_schema import TabularSchema
from fedclaw.errors import DataError
from fedclaw.learning.workload import FileFormat

WARDS = ("Chirurgie", "Kinderstation Süd", "Ærø", "true", "NA")
CODES = ("001", "010", "2", "1.5")
DAYS = ("2024-01-31", "2024-02-29 12:30:00")
SCHEMA = """
columns:
  - {name: Größe, kind: numeric, center: 50, scale: 20, missing: [-9.00, unbekannt]}
  - {name: dose, kind: numeric}
  - {name: smoker, kind: boolean}
  - {name: ward, kind: categorical, levels: [Chirurgie, Kinderstation Süd, Ærø, "true", NA]}
  - {name: code, kind: categorical, levels: [001, 010, 2, 1.50], missing: [999]}
  - {name: day, kind: categorical, levels: [2024-01-31, 2024-02-29T12:30:00]}
target: {name: outcome, labels: {0: gut, 1: schlecht}}
extra: ignore
"""
NAMES = ("Größe", "dose", "smoker", "ward", "code", "day", "outcome")
SHAPES = 1 + 1 + 1 + len(WARDS) + len(CODES) + len(DAYS)

quarters = st.integers(-4000, 4000).map(lambda value: value / 4).filter(lambda value: value != -9)
rows = st.lists(
    st.tuples(
        st.none() | quarters,
        st.none() | st.integers(-999, 999).map(float),
        st.none() | st.booleans(),
        st.none() | st.integers(0, len(WARDS) - 1),
        st.none() | st.integers(0, len(CODES) - 1),
        st.none() | st.integers(0, len(DAYS) - 1),
        st.integers(0, 1),
    ),
    min_size=1,
    max_size=6,
)


def expected(table: list[tuple]) -> np.ndarray:
    """What the columns' rules say, worked out cell by cell."""
    out = np.zeros((len(table), SHAPES), np.float32)
    for row, (size, dose, smoker, ward, code, day, _) in zip(out, table, strict=True):
        row[0] = 0 if size is None else (size - 50) / 20
        row[1] = 0 if dose is None else dose
        row[2] = 0.5 if smoker is None else smoker
        for first, place in ((3, ward), (3 + len(WARDS), code), (3 + len(WARDS) + len(CODES), day)):
            if place is not None:
                row[first + place] = 1
    return out


@dataclass(frozen=True)
class Dress:
    """One way of writing a CSV file."""

    delimiter: str
    decimal: str
    quoting: int
    end: str
    encoding: str
    form: str
    zipped: bool
    index: bool


dresses = st.builds(
    Dress,
    st.sampled_from([",", ";", "\t", "|"]),
    st.sampled_from([".", ","]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252"]),
    st.sampled_from(["NFC", "NFD"]),
    st.booleans(),
    st.booleans(),
)
YES, NO = ("true", "True", "TRUE", "t", "Yes", "y", "1", "1.0"), ("false", "False", "f", "no", "N", "0", "0.0", "-0")
DAY_SPELLINGS = (
    ("2024-01-31", "2024-01-31 00:00:00", "2024-01-31T00:00"),
    ("2024-02-29 12:30", "2024-02-29T12:30:00.000"),
)
DECLARED = {"utf-8-sig": "utf-8", "cp1252": "windows-1252"}


def spelt(draw: st.DrawFn, number: float) -> str:
    """A number in one of its spellings."""
    ways = [repr(number), f"{number:.3f}", f"{number:+.2f}", f"{number:.8e}"]
    return draw(st.sampled_from([*ways, str(int(number))] if number.is_integer() else ways))


def cell(draw: st.DrawFn, name: str, value: object) -> str:
    """A value of the table as text; numbers with a point."""
    if value is None:
        own = {"Größe": ["-9", "-9.0", "unbekannt"], "dose": ["NA", "?"], "code": ["999", "999.0"]}
        # NA is a ward, and the default markers hold for the rest
        return draw(st.sampled_from([*own.get(name, ["?"]), "", "NaN"]))
    if name in {"Größe", "dose"}:
        return spelt(draw, value)
    if name == "smoker":
        return draw(st.sampled_from(YES if value else NO))
    if name == "ward":
        return draw(st.sampled_from(["true", "True", "TRUE"])) if WARDS[value] == "true" else WARDS[value]
    if name == "code":
        return draw(st.sampled_from([CODES[value], spelt(draw, float(CODES[value]))]))
    if name == "day":
        return draw(st.sampled_from(DAY_SPELLINGS[value]))
    return draw(st.sampled_from([str(value), f"{value}.0"]))


@st.composite
def csv_files(draw: st.DrawFn) -> tuple[list[tuple], Dress, bytes]:
    """A table and its CSV file."""
    table, dress = draw(rows), draw(dresses)
    if dress.encoding in {"latin-1", "cp1252"}:
        dress = Dress(**{**vars(dress), "form": "NFC"})
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=dress.delimiter, quoting=dress.quoting, lineterminator=dress.end)
    order = draw(st.permutations(range(len(NAMES))))
    writer.writerow(["" for _ in range(dress.index)] + [unicodedata.normalize(dress.form, NAMES[i]) for i in order])
    for number, row in enumerate(table):
        cells = [cell(draw, NAMES[i], row[i]) for i in order]
        cells = [c if NAMES[i] == "day" else c.replace(".", dress.decimal) for i, c in zip(order, cells, strict=True)]
        cells = [unicodedata.normalize(dress.form, text) for text in cells]
        writer.writerow([str(number) for _ in range(dress.index)] + cells)
    content = text.getvalue().encode(dress.encoding)
    return table, dress, gzip.compress(content) if dress.zipped else content


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(written=csv_files())
def test_csv_in_every_dress(tmp_path: Path, written: tuple[list[tuple], Dress, bytes]) -> None:
    table, dress, content = written
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    encoding = DECLARED.get(dress.encoding, dress.encoding)
    schema = TabularSchema.parse(SCHEMA, "schema.yaml").written_as(
        FileFormat(delimiter=dress.delimiter, decimal=dress.decimal, encoding=encoding)
    )
    read = schema.read_examples(path)
    np.testing.assert_array_equal(read.inputs, expected(table))
    assert read.targets.tolist() == [row[-1] for row in table]
    assert schema.fit_examples(path)[1].inputs.tolist() == read.inputs.tolist()


@st.composite
def parquet_files(draw: st.DrawFn) -> tuple[list[tuple], pa.Table, str]:
    """A table and its Parquet file's content: each column in one of the types that hold it."""
    table = draw(rows)
    columns = [list(column) for column in zip(*table, strict=True)]
    size, dose, smoker, ward, code, day, outcome = columns
    wards = [None if value is None else WARDS[value] for value in ward]
    codes = [None if value is None else CODES[value] for value in code]
    days = [None if value is None else datetime.fromisoformat(DAYS[value]) for value in day]

    def either(*arrays: pa.Array) -> pa.Array:
        return draw(st.sampled_from(arrays))

    def floats(values: list) -> pa.Array:
        return either(pa.array(values, pa.float64()), pa.array(values, pa.float32()))

    def decimals(values: list) -> pa.Array:
        return pa.array([None if v is None else Decimal(str(v)) for v in values], pa.decimal128(12, 3))

    def texts(values: list) -> pa.Array:
        return pa.array([None if v is None else str(v) for v in values], pa.string())

    whole = pa.array([None if v is None else int(v) for v in dose])
    made = {
        "Größe": either(floats(size), decimals(size), texts(size)),
        "dose": either(floats(dose), whole),
        "smoker": either(pa.array(smoker, pa.bool_()), floats(smoker), texts(smoker)),
        "ward": either(texts(wards), texts(wards).dictionary_encode(), texts(wards).cast(pa.binary())),
        "code": either(texts(codes), decimals(codes), floats([v and float(v) for v in codes])),
        "day": either(texts(days), pa.array(days, pa.timestamp("ns")), pa.array(days, pa.timestamp("s"))),
        "outcome": either(pa.array(outcome), pa.array(map(float, outcome)), texts(outcome)),
    }
    form = draw(st.sampled_from(["NFC", "NFD"]))
    named = pa.table(list(made.values()), names=[unicodedata.normalize(form, name) for name in made])
    return table, named, draw(st.sampled_from(["NONE", "SNAPPY", "GZIP", "ZSTD"]))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(written=parquet_files())
def test_parquet_in_every_type(tmp_path: Path, written: tuple[list[tuple], pa.Table, str]) -> None:
    table, columns, compression = written
    path = tmp_path / "rows.parquet"
    parquet.write_table(columns, path, compression=compression)
    read = TabularSchema.parse(SCHEMA, "schema.yaml").read_examples(path)
    np.testing.assert_array_equal(read.inputs, expected(table))
    assert read.targets.tolist() == [row[-1] for row in table]


def test_parquet_dates(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"d": pa.array([date(2024, 1, 31), None], pa.date32())}), path)
    text = "{columns: [{name: d, kind: categorical, levels: [2024-01-31]}], target: {name: t, labels: [x, y]}}"
    assert TabularSchema.parse(text, "schema.yaml").read_inputs(path).tolist() == [[1], [0]]


def schema_of(*levels: object, **fields: object) -> TabularSchema:
    column = {"name": "a", "kind": "categorical", "levels": list(levels), **fields}
    return TabularSchema.parse(
        yaml.safe_dump({"columns": [column], "target": {"name": "t", "labels": ["x", "y"]}}), "s"
    )


def inputs(folder: Path, schema: TabularSchema, *cells: object) -> list[list[float]]:
    if any(not isinstance(item, str) for item in cells):
        path = folder / "a.parquet"
        parquet.write_table(pa.table({"a": list(cells)}), path)
    else:
        path = folder / "a.csv"
        path.write_text("a\n" + "\n".join(f'"{item}"' for item in cells) + "\n")
    return schema.read_inputs(path).tolist()


def test_codes_of_equal_number_are_told_apart_as_they_are_written(tmp_path: Path) -> None:
    schema = schema_of("001", "1", "7")
    assert inputs(tmp_path, schema, "1", "001", "7.0") == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    for cells in (["1.0"], [1], [1.0]):
        with pytest.raises(DataError, match=r"'1(\.0)?'; expected one of '001', '1', '7'"):
            inputs(tmp_path, schema, *cells)


def test_case_and_other_letters_still_count(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'Surgery'; expected one of 'surgery'"):
        inputs(tmp_path, schema_of("surgery"), "Surgery")


@pytest.mark.parametrize("cell", ["1_000", "0x1", "1,0", "\u0661", "1e999999999"])
def test_what_is_no_plain_number_is_text(tmp_path: Path, cell: str) -> None:
    with pytest.raises(DataError, match="expected one of"):
        inputs(tmp_path, schema_of("1000", "1", "10"), cell)


def test_a_marker_of_one_column_is_a_measurement_in_another(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n999,999\n1,NA\n")
    text = (
        "{columns: [{name: a, kind: numeric}, {name: b, kind: numeric, missing: [999, NA]}],"
        " target: {name: t, labels: [x, y]}}"
    )
    assert TabularSchema.parse(text, "s").read_inputs(path).tolist() == [[999, 0], [1, 0]]


def test_a_point_in_a_file_with_decimal_commas_is_refused_as_it_may_mean_thousands(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("a\n1,5\n1.234\n")
    text = "{columns: [{name: a, kind: numeric}], target: {name: t, labels: [x, y]}}"
    schema = TabularSchema.parse(text, "s")
    with pytest.raises(DataError, match=r"line 3, column 'a': '1\.234'; expected a finite number"):
        schema.written_as(FileFormat(delimiter=";", decimal=",")).read_inputs(path)
    with pytest.raises(DataError, match=r"'1,5'; expected a finite number \(is the file written with decimal: \",\""):
        schema.written_as(FileFormat(delimiter=";")).read_inputs(path)


OLD = {
    # SHA-256 of the canonical JSON as the version before this test gave it
    "{columns: [{name: a, kind: numeric, center: 1, scale: 2.5, range: [0, 9]}], target: {name: t, labels: [x, y]}}": (
        "f1b77d3dd22b51ab9ce6ce32a85e52104afeaebb587da289c9a79c2ff723f0be"
    ),
    "{columns: [{name: a, kind: categorical, levels: [u, 3, '001', 1.5]}], target: {name: t, labels: {0: x, 1: y}},"
    " missing: ['', -9, NA], standardise: site, extra: ignore, delimiter: ';'}": (
        "db980be8a09fb0257d076e28458f09af17bd733388bf74712382a0c753a972aa"
    ),
}


@pytest.mark.parametrize(("text", "digest"), OLD.items())
def test_what_means_the_same_keeps_its_digest(text: str, digest: str) -> None:
    assert hashlib.sha256(TabularSchema.parse(text, "s").to_json().encode()).hexdigest() == digest
