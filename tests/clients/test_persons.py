"""Whose a row is: schemas that say it, and tables, images and arrays that are read by them."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from fedclaw.clients import tables
from fedclaw.clients.array_schema import ArraySchema
from fedclaw.clients.arrays import persons_of
from fedclaw.clients.persons import FilePattern, Persons, identifier
from fedclaw.clients.tabular_schema import TabularSchema
from fedclaw.clients.vision_schema import VisionSchema
from fedclaw.errors import DataError
from fedclaw.learning.workload import Schema, Table, schema_digest

COLUMNS = (
    "columns: [{name: age, kind: numeric, range: [0, 120]}]\ntarget: {name: outcome, labels: [benign, malignant]}\n"
)
BY_PERSON = COLUMNS + "person: patient\n"
IMAGES = '{shape: [1, 2, 2], labels: [cat, dog], person: "{person}_*"}'


def schema_of(text: str = BY_PERSON) -> TabularSchema:
    return TabularSchema.parse(text, "schema.yaml")


def written(folder: Path, persons: list[str], name: str = "rows.csv") -> Path:
    rows = (f"{number},{person},{'malignant' if number % 3 else 'benign'}" for number, person in enumerate(persons))
    path = folder / name
    path.write_text("\n".join(["age,patient,outcome", *rows, ""]), encoding="utf-8")
    return path


def ages(schema: Schema, path: Path) -> list[float]:
    return [float(age) for part in schema.records(path) for age in part.columns["age"]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("person: age", "person: 'age' is an input or the target too, and whose a row is can be neither: take it out"),
        ("person: outcome", "person: 'outcome' is an input or the target too"),
        ("rows_per_person: 2", "rows_per_person is set, and nothing says whose a row is"),
        ("person: patient\nrows_per_person: 0", "rows_per_person"),
        ("person: patient\nrows_per_person: 1001", "rows_per_person"),
    ],
)
def test_what_a_schema_cannot_say(changed: str, message: str) -> None:
    with pytest.raises(DataError, match=r"schema\.yaml") as error:
        schema_of(COLUMNS + changed)
    assert message in str(error.value)


def test_a_schema_without_persons_has_the_digest_that_it_always_had() -> None:
    before = json.loads(schema_of(COLUMNS).to_json())
    assert not {"person", "rows_per_person"} & set(before)
    assert schema_of(COLUMNS).rows_per_person is None
    arrays = ArraySchema.of((3,), ("a", "b"))
    assert json.loads(arrays.to_json()) == {"columns": [], "input_shape": [3], "labels": ["a", "b"], "target": None}
    assert "person" not in VisionSchema.parse("{shape: [1, 2, 2], labels: [cat, dog]}", "").to_json()


def test_who_is_protected_is_part_of_what_was_agreed_on() -> None:
    digests = {
        schema_digest(schema_of(text).to_json())
        for text in (COLUMNS, BY_PERSON, BY_PERSON.replace("patient", "who"), BY_PERSON + "rows_per_person: 2\n")
    }
    assert len(digests) == 4
    schema = schema_of(BY_PERSON + "rows_per_person: 2\n")
    assert TabularSchema.parse(schema.to_json(), "bundle").rows_per_person == 2
    assert schema_of().rows_per_person == 1


def test_rows_are_numbered_by_person(tmp_path: Path) -> None:
    table = schema_of().read_examples(written(tmp_path, ["p2", "p1", " p2 ", "é", "e\u0301", "P1"]))
    assert table.persons is not None
    assert table.persons.tolist() == [0, 1, 0, 2, 2, 3]
    assert (table.units, table.unit) == (4, "person")
    assert table.person_names == ("p2", "p1", "é", "P1")
    assert "p2" not in repr(table)
    # The column is no input.
    assert table.inputs.shape == (6, 1)


def test_csv_and_parquet_tell_the_same_persons(tmp_path: Path) -> None:
    names = ["17", "p17", "17.0", "18", "3.5", "17"]
    by_text = schema_of().read_examples(written(tmp_path, names))
    assert by_text.persons is not None
    assert by_text.persons.tolist() == [0, 1, 0, 2, 3, 0]
    for cells in ([17, 18, 17], [17.0, 18.0, 17.0], ["17", "18", " 17"], ["017", "18", "1.7e+1"]):
        columns = {"age": [1, 2, 3], "patient": cells, "outcome": ["benign", "malignant", "benign"]}
        parquet.write_table(pa.table(columns), tmp_path / "rows.parquet")
        table = schema_of().read_examples(tmp_path / "rows.parquet")
        assert table.person_names == ("17", "18")


@pytest.mark.parametrize(
    ("cells", "name"),
    [
        (("17", "017", "00017", " 17 ", "+17", "17.", "17.0", "17,00", "1.7e1", "1,7E+01", 17, 17.0), "17"),
        (("0", "000", "-0", "0.0", "0e99999", 0, -0.0), "0"),
        (("10000000000000000", "1e+16", "1e16", 10**16, 1e16), "10000000000000000"),
        (("2.50", "2,5", "02.5"), "2.5"),
        (("1e99999",), "1e99999"),
        (("A17", "A17\u00a0"), "A17"),
    ],
)
def test_a_number_is_one_person_however_programs_write_it(cells: tuple[str | float, ...], name: str) -> None:
    """pandas reads 00017 as 17; what it writes would else be another person, or one in both training and test data."""
    assert {identifier(cell) for cell in cells} == {name}


def test_persons_who_are_other_numbers_or_other_text_stay_apart() -> None:
    cells = ("17", "-17", "170", "1.75", "p17", "P17", "p017", "1_7", "0x17", "17a", "9" * 65, "9" * 64, "1e70")
    assert len({identifier(cell) for cell in cells}) == len(cells)


@pytest.mark.parametrize("cell", ["", "  ", "NA", "?", "nan"])
def test_a_row_of_nobody_is_refused_and_named(tmp_path: Path, cell: str) -> None:
    path = written(tmp_path, ["a", cell, "a"])
    for read in (schema_of().read_examples, lambda path: list(schema_of().records(path))):
        with pytest.raises(DataError, match=r"line 3, column 'patient': .*give a row of nobody known an identifier"):
            read(path)


def test_a_number_with_decimals_is_no_person(tmp_path: Path) -> None:
    columns = {"age": [1, 2], "patient": [1.5, 2.0], "outcome": ["benign", "malignant"]}
    parquet.write_table(pa.table(columns), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"row 1, column 'patient': '1\.5'"):
        schema_of().read_examples(tmp_path / "rows.parquet")


def test_labelled_data_says_whose_it_is_and_data_to_predict_need_not(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("age,outcome\n1,benign\n")
    with pytest.raises(DataError, match="the column 'patient' is missing"):
        schema_of().read_examples(path)
    assert schema_of().read_inputs(path).shape == (1, 1)
    assert schema_of().read_inputs(written(tmp_path, ["a", ""])).shape == (2, 1)
    rows = schema_of().read_rows(written(tmp_path, ["a", "b"]), ["patient"])
    assert rows.identifiers == {"patient": ["a", "b"]}


def test_a_person_may_be_handed_through_beside_a_prediction(tmp_path: Path) -> None:
    schema = schema_of(BY_PERSON + "identifiers: [patient]\n")
    assert schema.read_rows(written(tmp_path, ["a", "b"])).identifiers == {"patient": ["a", "b"]}
    assert schema.read_examples(written(tmp_path, ["a", "a"])).units == 1


def test_statistics_use_the_first_rows_of_each_person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    persons = ["a", "b", "a", "a", "b", "c", "a"]
    path = written(tmp_path, persons)
    assert ages(schema_of(COLUMNS + "extra: ignore\n"), path) == list(range(7))
    assert ages(schema_of(), path) == [0, 1, 5]
    two = schema_of(BY_PERSON + "rows_per_person: 2\n")
    assert ages(two, path) == [0, 1, 2, 4, 5]
    # The same in blocks of two rows, and the labels go with them.
    monkeypatch.setattr(tables, "BLOCK_CELLS", 6)
    parts = list(two.records(path))
    assert len(parts) == 4
    assert np.concatenate([part.columns["age"] for part in parts]).tolist() == [0, 1, 2, 4, 5]
    assert np.concatenate([part.labels for part in parts]).tolist() == [0, 1, 1, 1, 1]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 7))
def test_a_person_more_changes_nobody_elses_rows(owners: list[int], most: int, block: int) -> None:
    """The oracle counts; a table of all rows, and one read in blocks, choose the same."""
    seen, chosen = Counter[int](), list[int]()
    for row, person in enumerate(owners):
        seen[person] += 1
        if seen[person] <= most:
            chosen.append(row)
    table = Table(np.zeros((len(owners), 1), np.float32), np.zeros(len(owners), np.int64))
    table = table.owned_by(np.array(owners), list("abcde"))
    assert table.first_rows(most).tolist() == chosen
    reader, flags = Persons(), list[bool]()
    for start in range(0, len(owners), block):
        flags += reader.first(np.array(owners[start : start + block]), most).tolist()
    assert np.flatnonzero(flags).tolist() == chosen
    others = [row for row in chosen if owners[row] != 0]
    kept = np.array([row for row, person in enumerate(owners) if person != 0], np.int64)
    without = table.take(kept)
    assert kept[without.first_rows(most)].tolist() == others
    even = table.evenly(most)
    assert len(even) == most * table.units
    assert set(even.tolist()) == set(chosen)
    counts = Counter(owners[row] for row in even)
    assert set(counts.values()) == {most}


def test_a_table_keeps_its_persons_where_rows_are_taken() -> None:
    table = Table(np.arange(6, dtype=np.float32)[:, None], np.arange(6)).owned_by(
        np.array([2, 0, 2, 1, 0, 1]), ["x", "y", "z"]
    )
    assert table.persons is not None
    assert table.persons.tolist() == [0, 1, 0, 2, 1, 2]
    assert table.person_names == ("z", "x", "y")
    taken = table.take(np.array([5, 1, 3]))
    assert taken.persons is not None
    assert (taken.persons.tolist(), taken.person_names) == ([0, 1, 0], ("y", "x"))
    assert taken.inputs.ravel().tolist() == [5, 1, 3]
    nobody = Table(table.inputs, table.targets)
    assert nobody.take(np.array([1])).persons is None
    assert nobody.first_rows(1).tolist() == nobody.evenly(1).tolist() == list(range(6))
    for empty in (table.take(np.zeros(0, np.int64)), schema_of().no_examples()):
        assert (empty.units, empty.unit, len(empty.evenly(2)), len(empty.first_rows(1))) == (0, "person", 0, 0)


def test_the_operator_is_told_how_many_rows_persons_have(tmp_path: Path) -> None:
    table = schema_of().read_examples(written(tmp_path, ["a", "b", "a", "a"]))
    assert "4 rows of 2 persons, 2 in the median and at most 3" in schema_of().notes(table)


def test_people_who_are_not_protected_are_pointed_out(tmp_path: Path) -> None:
    """Only where the schema says that the column is no input, it is called as people are, and its values repeat."""

    def told(column: str, persons: list[str], schema: str = COLUMNS) -> list[str]:
        path = written(tmp_path, persons)
        path.write_text(path.read_text().replace("patient", column))
        table = schema_of(f"{schema}identifiers: [{column}]\n").read_examples(path)
        return [note for note in table.notes if "protect" in note]

    (note,) = told("patient_id", ["a", "b", "a", ""])
    assert note.startswith(
        "column 'patient_id' has 2 values in 3 rows: if it says whose a row is, person: patient_id in"
    )
    assert not told("patient_id", ["a", "b", "c", ""])
    assert not told("ward", ["a", "b", "a"])
    assert not told("rapid", ["a", "b", "a"])
    assert told("PID", ["a", "a"])
    assert not told("patient", ["a", "a"], BY_PERSON)


def test_a_person_with_ten_thousand_rows_and_one_alone(tmp_path: Path) -> None:
    table = schema_of(COLUMNS.replace("120", "99999") + "person: patient\n").read_examples(
        written(tmp_path, ["a", *["b"] * 10_000])
    )
    assert table.units == 2
    assert table.first_rows(1).tolist() == [0, 1]
    assert len(table.evenly(3)) == 6
    alone = schema_of().read_examples(written(tmp_path, ["a"] * 5))
    assert (alone.units, alone.first_rows(2).tolist()) == (1, [0, 1])


def saved(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((2, 2), number, np.uint8)).save(path)
    return folder


def test_images_are_of_whom_their_files_are_named_after(tmp_path: Path) -> None:
    folder = saved(tmp_path / "train", "cat/p2_left.png", "cat/p1_left_1.png", "dog/p2_right.png", "dog/p3_.png")
    table = VisionSchema.parse(IMAGES, "").read_examples(folder)
    assert table.person_names == ("p1", "p2", "p3")
    assert table.persons is not None
    assert table.persons.tolist() == [0, 1, 1, 2]
    assert table.targets.tolist() == [0, 0, 1, 1]
    saved(folder, "dog/left.png")
    with pytest.raises(DataError, match=r"left\.png: does not say whose it is; the schema has person: {person}_"):
        VisionSchema.parse(IMAGES, "").read_examples(folder)


def test_images_of_a_person_in_a_folder(tmp_path: Path) -> None:
    schema = VisionSchema.parse(IMAGES.replace("{person}_*", "{person}/*"), "")
    folder = saved(tmp_path / "train", "cat/p2/1.png", "cat/p2/2.png", "dog/p1/1.png")
    table = schema.read_examples(folder)
    assert table.person_names == ("p2", "p1")
    assert len(schema.read_inputs(folder)) == 3
    saved(folder, "cat/3.png")
    with pytest.raises(DataError, match=r"3\.png: expected only folders"):
        schema.read_examples(folder)


@pytest.mark.parametrize("pattern", ["p17", "{person}{person}", "/{person}", "a//{person}", ""])
def test_what_is_no_pattern(pattern: str) -> None:
    with pytest.raises(DataError, match=r"schema\.yaml: .*has \{person\} once"):
        VisionSchema.parse(f'{{shape: [1, 2, 2], labels: [cat, dog], person: "{pattern}"}}', "schema.yaml")


def test_a_pattern_is_no_regular_expression(tmp_path: Path) -> None:
    assert FilePattern("s.{person}-*.png").person(tmp_path / "s.7-1-2.png", tmp_path) == "7"
    with pytest.raises(DataError):
        FilePattern("s.{person}-*.png").person(tmp_path / "sx7-1.png", tmp_path)


def test_archives_have_an_array_of_persons(tmp_path: Path) -> None:
    images, labels = np.zeros((3, 2, 2), np.uint8), np.array([0, 1, 0])
    path = tmp_path / "a.npz"
    schema = VisionSchema.parse(IMAGES, "")
    np.savez(path, images=images, labels=labels, persons=np.array(["b", "a", "b "]))
    assert schema.read_examples(path).person_names == ("b", "a")
    np.savez(path, images=images, labels=labels)
    with pytest.raises(DataError, match=r"a\.npz: has no array 'persons'"):
        schema.read_examples(path)
    np.savez(path, images=images, labels=labels, persons=np.array([1, 2]))
    with pytest.raises(DataError, match=r"'persons' has the shape \(2,\); expected \(3,\)"):
        schema.read_examples(path)
    arrays = ArraySchema.of((2,), ("a", "b"), 2)
    np.savez(path, x=np.zeros((3, 2)), y=np.array(["a", "b", "a"]), persons=np.array([5, 6, 5]))
    table = ArraySchema.parse(arrays.to_json(), "bundle").read_examples(path)
    assert (table.units, arrays.rows_per_person) == (2, 2)
    assert ArraySchema.of((2,), ("a", "b")).read_examples(path).persons is None


@pytest.mark.parametrize(
    "persons", [np.array([1.5, 1, 1]), np.array(["", "a", "b"]), np.array([True, False, True]), [None, "a", "b"]]
)
def test_arrays_that_name_nobody(persons: object) -> None:
    with pytest.raises(DataError, match="persons"):
        persons_of(persons, 3)  # type: ignore[arg-type]


def test_numbers_and_text_are_one_person() -> None:
    for persons in (np.array([7, 8, 7]), np.array([7.0, 8.0, 7.0]), ["7", "8", "7.0"], np.array([b"7", b"8", b"7"])):
        assert persons_of(persons, 3)[1] == ("7", "8")


def test_yes_is_no_number_of_rows() -> None:
    for parse in (lambda: schema_of(BY_PERSON + "rows_per_person: true\n"), lambda: images("rows_per_person: yes")):
        with pytest.raises(DataError, match="rows_per_person: Input should be a number, not yes"):
            parse()


def images(rule: str) -> VisionSchema:
    return VisionSchema.parse(f'{{shape: [1, 2, 2], labels: [cat, dog], person: "{{person}}_*", {rule}}}', "")


def test_who_has_fewer_rows_has_them_counted_again_in_turn() -> None:
    table = Table(np.zeros((4, 1), np.float32), np.zeros(4, np.int64)).owned_by(np.array([0, 1, 0, 0]), ("a", "b"))
    assert table.evenly(2).tolist() == [0, 2, 1, 1]
    assert table.evenly(5).tolist() == [0, 2, 3, 0, 2, 1, 1, 1, 1, 1]


def test_of_numbers_beside_nothing_the_row_of_nobody_is_named() -> None:
    """It was all rows: None makes an array of objects, and its numbers are numpy's."""
    with pytest.raises(DataError, match=r"does not say in row 1 "):
        persons_of([np.int64(4), None, np.int64(4)], 3)
    numbers, names = persons_of(np.array([np.int64(4), "p", np.float64(4)], object), 3)
    assert (numbers.tolist(), names) == ([0, 1, 0], ("4", "p"))
