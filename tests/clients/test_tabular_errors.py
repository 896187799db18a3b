"""Bad tables and bad schema files get one line with the file, the line in it, the column and what was expected."""

import gzip
import re
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from fedclaw.clients.tabular_schema import TabularSchema
from fedclaw.errors import DataError

SCHEMA = """
columns:
  - {name: age, kind: numeric, center: 50, scale: 20, range: [0, 120]}
  - {name: dose, kind: numeric}
  - {name: smoker, kind: boolean}
  - {name: ward, kind: categorical, levels: [surgery, medicine]}
target: {name: outcome, labels: [benign, malignant]}
"""
HEAD = "age,dose,smoker,ward,outcome\n"
GOOD = "70,1.5,yes,medicine,benign\n"


def message_of(path: Path, text: str | bytes, *, schema: str = SCHEMA) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as caught:
        TabularSchema.parse(schema, "schema.yaml").read_examples(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("old,1,yes,medicine,benign", "line 3, column 'age': 'old'; expected a number from 0 to 120"),
        ("121,1,yes,medicine,benign", "line 3, column 'age': '121'; expected a number from 0 to 120"),
        ("-1,1,yes,medicine,benign", "line 3, column 'age': '-1'; expected a number from 0 to 120"),
        ("1_0,1,yes,medicine,benign", "line 3, column 'age': '1_0'; expected a number from 0 to 120"),
        ("7,12;5,yes,medicine,benign", "line 3, column 'dose': '12;5'; expected a finite number"),
        ("7,inf,yes,medicine,benign", "line 3, column 'dose': 'inf'; expected a finite number"),
        ("7,-Infinity,yes,medicine,benign", "line 3, column 'dose': '-Infinity'; expected a finite number"),
        ("7,1e39,yes,medicine,benign", "line 3, column 'dose': '1e39'; expected a finite number"),
        ("7,NAN,yes,medicine,benign", "line 3, column 'dose': 'NAN'; expected a finite number"),
        ("7,1,perhaps,medicine,benign", "line 3, column 'smoker': 'perhaps'; expected true or false"),
        ("7,1,yes,garden,benign", "line 3, column 'ward': 'garden'; expected one of 'surgery', 'medicine'"),
        ("7,1,yes,Medicine,benign", "line 3, column 'ward': 'Medicine'; expected one of 'surgery', 'medicine'"),
        ("7,1,yes,medicine,so-so", "line 3, column 'outcome': 'so-so'; expected one of 'benign', 'malignant'"),
        ("7,1,yes,medicine,", "line 3, column 'outcome': an empty cell; expected one of 'benign', 'malignant'"),
        ("7,1,yes,medicine,NA", "line 3, column 'outcome': 'NA'; expected one of"),
        ("7,1,yes,medicine", "line 3: 4 cells; expected 5, as in the header"),
        ("7,1,yes,medicine,benign,extra", "line 3: 6 cells; expected 5, as in the header"),
    ],
)
def test_a_bad_row(tmp_path: Path, row: str, message: str) -> None:
    assert message_of(tmp_path / "rows.csv", HEAD + GOOD + row + "\n" + GOOD).startswith(message)


def test_the_first_bad_row_is_named(tmp_path: Path) -> None:
    rows = HEAD + GOOD * 3 + "7,x,yes,medicine,benign\n" + GOOD + "7,y,yes,medicine,benign\n"
    assert message_of(tmp_path / "rows.csv", rows).startswith("line 5, column 'dose': 'x'")


BAD = "7,x,yes,medicine,benign\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (HEAD + BAD, 2),
        ("\n\n" + HEAD + GOOD + BAD, 5),
        (HEAD + GOOD + "\n\n" + BAD, 5),
        ("\ufeff" + HEAD + GOOD + BAD, 3),
        ((HEAD + GOOD + BAD).replace("\n", "\r\n"), 3),
        (HEAD + GOOD * 40_000 + BAD, 40_002),
        (HEAD + GOOD + BAD.replace("x", '"a\nb"'), 3),
        (HEAD.replace("dose", '"dose"').replace("age", '"age\n"') + GOOD + BAD, 4),
        (HEAD + GOOD.replace("medicine", '"medicine\n\n"') + BAD, 5),
        (HEAD + GOOD.replace("medicine", '"medicine\n"') + "7,1,yes\n", 4),
        (HEAD + GOOD + '7,1,"yes,medicine,benign\n' + GOOD * 5, 3),
    ],
    ids=[
        "first",
        "empty-lines-before-the-header",
        "empty-lines-within",
        "byte-order-mark",
        "crlf",
        "a-later-block",
        "begin-of-a-row-of-two-lines",
        "header-of-two-lines",
        "after-a-row-of-three-lines",
        "too-few-cells",
        "begin-of-an-open-quote",
    ],
)
def test_a_csv_error_names_the_line_that_an_editor_shows(tmp_path: Path, text: str, line: int) -> None:
    assert re.match(rf"line {line}\b", message_of(tmp_path / "rows.csv", text))


def test_a_parquet_error_names_the_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"a": ["1"] * 20_000 + ["x", "1"], "t": ["x"] * 20_002}), path)
    schema = TabularSchema.parse(
        "{columns: [{name: a, kind: numeric}], target: {name: t, labels: [x, y]}}", "schema.yaml"
    )
    with pytest.raises(DataError, match=r"rows.parquet: row 20001, column 'a': 'x'; expected a finite number"):
        schema.read_examples(path)


def test_a_long_value_is_cut(tmp_path: Path) -> None:
    message = message_of(tmp_path / "rows.csv", HEAD + f"7,{'secret' * 100},yes,medicine,benign\n")
    assert "…" in message
    assert len(message) < 150


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("\n\n", "the file is empty"),
        (HEAD, "no data rows"),
        ("age,smoker,ward,outcome\n7,yes,medicine,benign\n", "the column 'dose' is missing; the file has 'age, smoker"),
        ("age,dose,smoker,ward\n7,1,yes,medicine\n", "the column 'outcome' is missing"),
        ("age,dose,smoker,ward,outcome,name\n7,1,yes,medicine,benign,Bo\n", "the schema knows no column 'name'"),
        ("age,dose,smoker,ward,outcome,age\n7,1,yes,medicine,benign,7\n", "the header has the column 'age' more than"),
        ("age,dose,smoker,ward,outcome,\n7,1,yes,medicine,benign,7\n", "column 6 of the header has no name"),
        (HEAD.encode() + "7,1,yes,médicine,benign\n".encode("latin-1"), "near line 1: not UTF-8 text"),
        (HEAD.encode("utf-16"), "near line 1: not UTF-8 text"),
        (HEAD + '7,1,"yes,medicine,benign\n', "line 2: not CSV"),
        (HEAD + f"{'7' * 200_000},1,yes,medicine,benign\n", "line 2: not CSV: field larger"),
    ],
    ids=[
        "empty",
        "blank",
        "header-only",
        "missing-column",
        "missing-target",
        "extra",
        "duplicate",
        "nameless",
        "latin-1",
        "utf-16",
        "open-quote",
        "giant-cell",
    ],
)
def test_a_bad_file(tmp_path: Path, text: str | bytes, message: str) -> None:
    assert message_of(tmp_path / "rows.csv", text).startswith(message)


def test_a_number_that_only_overflows_after_scaling(tmp_path: Path) -> None:
    schema = "{columns: [{name: a, kind: numeric, scale: 1.0e-10}], target: {name: t, labels: [x, y]}}"
    message = message_of(tmp_path / "rows.csv", "a,t\n1,x\n1e30,y\n", schema=schema)
    assert message == "line 3, column 'a': '1e30'; expected a number that fits after scaling"


def test_no_such_file_and_no_file(tmp_path: Path) -> None:
    schema = TabularSchema.parse(SCHEMA, "schema.yaml")
    with pytest.raises(DataError, match=r"none.csv: no such file"):
        schema.read_examples(tmp_path / "none.csv")
    with pytest.raises(DataError, match="not a file"):
        schema.read_inputs(tmp_path)


def test_bad_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.parquet"
    assert message_of(path, "age,dose\n").startswith("not a readable Parquet file")
    assert message_of(path, "").startswith("not a readable Parquet file")
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert message_of(path, "") == "reading Parquet needs pyarrow: pip install 'fedclaw[data]', or use CSV"


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("", "a schema is a mapping of fields, this is NoneType"),
        ("[1, 2]", "a schema is a mapping of fields, this is list"),
        ("a: [", "not YAML"),
        ("!!python/object/apply:os.getcwd []", "not YAML"),
        ("a: &a [1, 1]\nb: &b [*a, *a]\n", "not YAML: aliases (*a) are not read; write it out"),
        (SCHEMA.replace("[benign, malignant]", "{1: a, '1': b}"), "target.labels: more than once: '1'"),
        ("{columns: [], target: {name: t, labels: [x, y]}}", "columns: expected 1 to 100000 of them, got 0"),
        (SCHEMA.replace("kind: boolean", "kind: date"), "columns.2: Input tag 'date'"),
        (SCHEMA.replace("[0, 120]", "[120, 0]"), "columns.0.numeric: range must go from a smaller to a larger"),
        (SCHEMA.replace("scale: 20", "scale: 0"), "columns.0.numeric.scale: Input should be greater than 0"),
        (SCHEMA.replace("scale: 20", "scale: .inf"), "columns.0.numeric.scale: Input should be a finite number"),
        (SCHEMA.replace("name: dose", "name: age"), "more than once: 'age'"),
        (SCHEMA.replace("name: dose", "name: outcome"), "more than once: 'outcome'"),
        (SCHEMA.replace("[surgery, medicine]", "[a, a]"), "columns.3.categorical.levels: more than once: 'a'"),
        (SCHEMA.replace("[surgery, medicine]", "[]"), "columns.3.categorical.levels: expected 1 to 10000"),
        (SCHEMA.replace("[surgery, medicine]", "[yes, no]"), "columns.3.categorical.levels.0: YAML reads this as the"),
        (SCHEMA.replace("[benign, malignant]", "[benign]"), "target.labels.list: expected 2 to 10000 of them, got 1"),
        (SCHEMA.replace("[benign, malignant]", "{0: a, 1: a}"), "target: labels must name at least two classes"),
        (SCHEMA.replace("[benign, malignant]", "{yes: a, no: b}"), "target.labels: YAML reads this as the boolean"),
        (SCHEMA + "standardize: site", "standardize: Extra inputs are not permitted"),
        (SCHEMA + "standardise: site", "column 'age' has a center or scale, and standardise: site has none"),
    ],
)
def test_a_bad_schema_file(schema: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        TabularSchema.parse(schema, "schema.yaml")
    assert str(caught.value).startswith(f"schema.yaml: {message}")
    assert "\n" not in str(caught.value)


def test_all_bad_cells_are_counted_and_the_first_ten_shown(tmp_path: Path) -> None:
    bad = ["7,x,yes,medicine,benign", "8,1,perhaps,garden,benign", "9,1,yes,medicine", "9,1,yes,medicine,so-so"]
    message = message_of(tmp_path / "rows.csv", HEAD + GOOD + "\n".join(bad) + "\n")
    starts = [
        "line 3, column 'dose': 'x'",
        "line 4, column 'smoker': 'perhaps'",
        "line 4, column 'ward': 'garden'",
        "line 5: 4 cells; expected 5",
        "line 6, column 'outcome': 'so-so'",
    ]
    places = [message.index(start) for start in starts]
    assert places == sorted(places)
    assert message.endswith("; 5 bad cells or rows in all")

    many = message_of(tmp_path / "many.csv", HEAD + GOOD * 20_000 + BAD * 30)
    assert [int(line) for line in re.findall(r"line (\d+)", many)] == list(range(20_002, 20_012))
    assert many.endswith("; and 20 more; 30 bad cells or rows in all")


@pytest.mark.parametrize(
    ("text", "remark"),
    [
        (
            (HEAD + GOOD).replace(",", ";"),
            '; the columns are separated by a semicolon: say delimiter: ";" under data in site.yaml',
        ),
        (
            (HEAD + GOOD).replace(",", "\t"),
            '; the columns are separated by a tab: say delimiter: "\\t" under data in site.yaml',
        ),
        (
            "Report of the ward\n" + HEAD + GOOD,
            "; line 1 is a title line above the header in line 2: say title_lines: 1 under data in site.yaml",
        ),
        (
            "Report; of the ward\n\n" + (HEAD + GOOD).replace(",", ";"),
            "; lines 1 to 2 are title lines above the header in line 3 and the columns are separated by a semicolon: "
            'say title_lines: 2, delimiter: ";" under data in site.yaml',
        ),
        ("a;b\n1;2\n", '; are its columns separated by a semicolon? say delimiter: ";" under data in site.yaml'),
    ],
    ids=["semicolons", "tabs", "title", "both", "another-table"],
)
def test_what_a_file_without_the_header_is(tmp_path: Path, text: str, remark: str) -> None:
    message = message_of(tmp_path / "rows.csv", text)
    assert message.startswith("the column 'age' is missing; the file has ")
    assert message.endswith(remark)


def test_a_damaged_gzip_file(tmp_path: Path) -> None:
    whole = gzip.compress((HEAD + GOOD * 1000).encode())
    assert message_of(tmp_path / "rows.csv", whole[: len(whole) // 2]).startswith("a damaged gzip file")
    assert message_of(tmp_path / "rows.csv", whole[:40] + bytes(20) + whole[60:]).startswith("a damaged gzip file")


def test_parquet_columns_that_hold_no_single_values(tmp_path: Path) -> None:
    schema = TabularSchema.parse(
        "{columns: [{name: a, kind: numeric}], target: {name: t, labels: [x, y]}}", "schema.yaml"
    )
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"a": [[1.0], [2.0]]}), path)
    with pytest.raises(DataError, match=r"column 'a' holds 'list<.*>' in each row; expected single values"):
        schema.read_inputs(path)
    parquet.write_table(pa.table({"a": [b"\xff"]}), path)
    with pytest.raises(DataError, match="column 'a' holds bytes that are no UTF-8 text"):
        schema.read_inputs(path)
