"""Files as tools write them by default."""

from pathlib import Path

import pytest

from fedclaw.clients.tabular_schema import TabularSchema
from fedclaw.errors import DataError
from fedclaw.learning.workload import FileFormat

SCHEMA = """
columns:
  - {name: age, kind: numeric, center: 45, scale: 5}
  - {name: code, kind: categorical, levels: [0, 1, 2]}
target: {name: y, labels: ["no", "yes"]}
"""
INPUTS = [[-1, 1, 0, 0], [1, 0, 1, 0]]


def read(path: Path, text: str | bytes, more: str = "extra: ignore", **written: object) -> list[list[float]]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    schema = TabularSchema.parse(SCHEMA + more, "schema.yaml").written_as(FileFormat(**written))
    table = schema.read_examples(path)
    assert table.targets.tolist() == [0, 1]
    return table.inputs.tolist()


@pytest.mark.parametrize(
    "text",
    [
        ",age,code,y\n0,40,0,no\n1,50,1,yes\n",
        '"","age","code","y"\n"1",40,0,"no"\n"2",50,1,"yes"\n',
        "age,code,y,\n40,0,no,\n50,1,yes,\n",
        ",age,code,y,,\n0,40,0,no,,\n1,50,1,yes,,\n",
        "note,age,note,code,y\n,40,,0,no\n,50,,1,yes\n",
    ],
    ids=["pandas", "r", "spreadsheet", "several-nameless", "ignored-twice"],
)
def test_columns_that_the_schema_ignores_can_be_called_anything(tmp_path: Path, text: str) -> None:
    assert read(tmp_path / "rows.csv", text) == INPUTS
    with pytest.raises(DataError, match=r"has no name; name it, .* extra: ignore|'note' more than once"):
        read(tmp_path / "rows.csv", text, more="extra: refuse")


def test_a_column_that_is_read_may_not_be_there_twice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the header has the column 'age' more than once"):
        read(tmp_path / "rows.csv", "age,code,y,age\n40,0,no,1\n50,1,yes,2\n")


def test_a_spreadsheet_of_another_country(tmp_path: Path) -> None:
    text = "Bericht der Station für März\n\nage;code;y\n40,0;0;no\n50,00;1;yes\n".encode("cp1252")
    form = {"delimiter": ";", "decimal": ",", "encoding": "windows-1252", "title_lines": 2}
    assert read(tmp_path / "rows.csv", text, **form) == INPUTS
    with pytest.raises(DataError, match="line 4, column 'age': 'x'"):
        read(tmp_path / "rows.csv", text.replace(b"40,0", b"x"), **form)


def test_an_encoding_that_was_not_declared_is_named_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not UTF-8 text; .* \(utf-8, utf-16, latin-1, windows-1252\) under data in"):
        read(tmp_path / "rows.csv", "Prüfung,age,code,y\n,40,0,no\n,50,1,yes\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-16 text"):
        read(tmp_path / "rows.csv", "age,code,y\n40,0,no\n50,1,yes\n", encoding="utf-16")


def test_what_an_operator_should_know(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("a,b,c,d,y\n1,,5,260000,no\n1,NA,5,310000,yes\n1,,5,260000,no\n1,,?,260000,no\n")
    schema = TabularSchema.parse(
        "columns: [{name: a, kind: categorical, levels: [1, 2]}, {name: b, kind: boolean}, {name: c, kind: numeric},"
        " {name: d, kind: numeric}]\ntarget: {name: y, labels: ['no', 'yes']}",
        "schema.yaml",
    )
    notes = schema.notes(schema.read_examples(path))
    assert notes[0] == "4 of 4 rows have missing cells (b 4, c 1)"
    assert notes[1] == "nothing is known of column 'b': every cell is missing"
    assert notes[2] == "columns 'a', 'c' with the same value in every row that has one"
    assert notes[3].startswith("column 'd' in raw units, with numbers above 10, and neither center nor scale")
    assert notes[4] == "1 of 4 rows are the same as an earlier one"
    scaled = TabularSchema.parse(SCHEMA, "schema.yaml")
    path.write_text("age,code,y\n40,0,no\n50,1,yes\n")
    assert scaled.notes(scaled.read_examples(path)) == ("no cells are missing in 2 rows",)
