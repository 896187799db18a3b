"""Tables as people have them, answered by real bundles as `fedclaw.predict` answers them."""

import asyncio
import csv
import dataclasses
import gzip
import io
import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedclaw import predict
from fedclaw.clients import tables
from fedclaw.clients.arrays import read_archive
from fedclaw.errors import DataError
from fedclaw.learning.sources import MemoryFile
from fedclaw.learning.workload import FileFormat
from fedclaw.serve.inference import tables as served_tables
from fedclaw.serve.inference.rest import Asker, RequestReader
from fedclaw.serve.inference.tables import CSV, JPEG, NPZ, PNG, SentTable, TableAnswer, only_model, parse_query
from fedclaw.serve.inference.tables import predict_table as answer_table
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.requests import Caller
from tests.serve.inference.small_node import PEOPLE, TOKEN, VERSION, SmallNode

JSON = "application/json"
ROWS = (
    "visit,age,smoker,ward\n=1+1,61,yes,surgery\n17,,no,medicine\n18,130,no,medicine\n19,20,maybe,\n20,33.5,1,surgery\n"
)
ALICE = PEOPLE[TOKEN.encode()]
ASKING = Caller(ALICE, "127.0.0.1", "predict")


@pytest.fixture(scope="module")
def node(table_bundle: Path, image_bundle: Path) -> SmallNode:
    return SmallNode({"table": table_bundle, "images": image_bundle})


def answered(
    node: SmallNode, body: bytes | str, content_type: str = CSV, model: str = "table", accept: str = "", **query: str
) -> TableAnswer:
    sent = SentTable(body.encode() if isinstance(body, str) else body, content_type, accept, query)
    return asyncio.run(answer_table(node, ASKING, model, sent, Asker("alice", new_identity=lambda: "made")))


def rows_of(node: SmallNode, body: bytes | str | Mapping[str, Any], content_type: str = CSV, **more: str) -> Any:
    text = body if isinstance(body, bytes | str) else json.dumps(body)
    return json.loads(answered(node, text, content_type, **more).body)["rows"]


def refused(
    node: SmallNode, body: bytes | str | Mapping[str, Any], content_type: str = CSV, **more: str
) -> ServeRefusal:
    with pytest.raises(ServeRefusal) as found:
        rows_of(node, body, content_type, **more)
    return found.value


def predicted(bundle: Path, tmp_path: Path, name: str, content: bytes, *more: str) -> list[dict[str, str]]:
    (tmp_path / name).write_bytes(content)
    output = tmp_path / "answers.csv"
    predict.main([f"bundle={bundle}", f"input={tmp_path / name}", f"output={output}", *more])
    return list(csv.DictReader(io.StringIO(output.read_text())))


def same(ours: list[dict[str, str]], theirs: list[dict[str, str]]) -> None:
    assert len(ours) == len(theirs)
    for own, other in zip(ours, theirs, strict=True):
        assert own.keys() == other.keys()
        for name, value in other.items():
            if name.startswith("p") and value:
                assert float(own[name]) == pytest.approx(float(value), abs=2e-6)
            else:
                assert own[name] == value


def test_a_csv_is_answered_as_the_predict_command_answers_it(
    node: SmallNode, table_bundle: Path, tmp_path: Path
) -> None:
    answer = answered(node, ROWS, accept="text/csv, application/json", identifiers="visit")
    assert answer.content_type.startswith("text/csv")
    assert answer.headers["fedclaw-version"] == VERSION
    ours = list(csv.DictReader(io.StringIO(answer.body.decode())))
    same(ours, predicted(table_bundle, tmp_path, "rows.csv", ROWS.encode(), "identifiers=[visit]"))
    assert [bool(row["refused"]) for row in ours] == [False, False, True, True, False]
    assert ours[2]["refused"] == "line 4, column 'age': '130'; expected a number from 0 to 120"


def test_what_was_handed_through_is_no_formula(node: SmallNode) -> None:
    text = answered(node, ROWS, accept=CSV, identifiers="visit").body.decode()
    assert [row["visit"] for row in csv.DictReader(io.StringIO(text))] == ["'=1+1", "17", "18", "19", "20"]
    for cell, written in (("@x", "'@x"), ("-5", "-5"), ("+1e3", "+1e3"), ("-5-x", "'-5-x"), ("a=b", "a=b")):
        text = answered(
            node, f"visit,age,smoker,ward\n{cell},1,yes,surgery\n", accept=CSV, identifiers="visit"
        ).body.decode()
        assert next(csv.DictReader(io.StringIO(text)))["visit"] == written


def test_json_has_labels_probabilities_and_reasons(node: SmallNode) -> None:
    answer = answered(node, ROWS, identifiers="visit")
    told = json.loads(answer.body)
    assert (answer.content_type, told["model_name"], told["model_version"], told["id"]) == (
        JSON,
        "table",
        VERSION,
        "made",
    )
    first, _, third, fourth, _ = told["rows"]
    assert first["identifiers"] == {"visit": "=1+1"}
    assert first["label"] == max(first["probabilities"], key=first["probabilities"].get)
    assert sum(first["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert third == {"row": 3, "identifiers": {"visit": "18"}, "refused": third["refused"]}
    assert "line 5, column 'smoker': 'maybe'" in fourth["refused"]


def test_json_rows_and_columns_are_the_same_table(node: SmallNode) -> None:
    rows = [
        {"age": 61, "smoker": True, "ward": "surgery"},
        {"age": None, "smoker": "no", "ward": "medicine"},
        {"age": 130, "smoker": 0, "ward": "medicine"},
        {"age": "33.5", "smoker": 1.0, "ward": " surgery "},
    ]
    by_row = rows_of(node, {"rows": rows}, JSON)
    assert by_row == rows_of(node, {"columns": {name: [row[name] for row in rows] for name in rows[0]}}, JSON)
    assert by_row[2] == {"row": 3, "refused": "row 3, column 'age': '130'; expected a number from 0 to 120"}
    assert by_row[:1] == rows_of(node, rows[0], JSON)
    text = "age,smoker,ward\n61,true,surgery\n,no,medicine\n130,0,medicine\n33.5,1,surgery\n"
    assert [row.get("probabilities") for row in by_row] == [row.get("probabilities") for row in rows_of(node, text)]


def test_a_row_that_is_not_like_the_first_costs_itself_alone(node: SmallNode) -> None:
    good = {"age": 61, "smoker": "yes", "ward": "surgery"}
    rows = [good, {"age": 61}, 7, {**good, "bmi": 1}, {**good, "age": [61]}, good]
    found = rows_of(node, {"rows": rows}, JSON)
    assert ["refused" in row for row in found] == [False, True, True, True, True, False]
    assert found[1]["refused"] == "row 2: its columns are not those of row 1; what is not known is null"
    assert found[5]["probabilities"] == found[0]["probabilities"]


def test_a_table_none_of_whose_rows_can_be_read_is_answered_with_the_reasons(node: SmallNode) -> None:
    asked = len(node.seen)
    (row,) = rows_of(node, {"age": 61, "smoker": "maybe", "ward": "surgery"}, JSON)
    assert "expected true or false" in row["refused"]
    assert len(node.seen) == asked


def test_parquet_is_not_taken_because_its_reader_can_be_made_to_end_the_process(node: SmallNode) -> None:
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"age": [61.0], "smoker": [True], "ward": ["surgery"]}), table)
    assert refused(node, table.getvalue(), "application/vnd.apache.parquet").code == "unsupported_media_type"
    source = MemoryFile("table.parquet", table.getvalue())
    with pytest.raises(DataError, match="send CSV"):
        list(tables.read_blocks(source, FileFormat(), tables.Wanted(("age",)), tables.Content()))


def many(rows: int) -> dict[str, bytes]:
    archive = io.BytesIO()
    np.savez(archive, images=np.zeros((rows, 8, 8), np.uint8))
    text = b"age,smoker,ward\n" + b"1,yes,surgery\n" * rows
    return {CSV: text, NPZ: archive.getvalue()}


def test_more_rows_or_columns_than_a_table_may_have_are_refused(
    node: SmallNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_tables, "MAX_ROWS", 20)
    for kind, content in many(20).items():
        assert len(rows_of(node, content, kind, model="images" if kind == NPZ else "table")) == 20
    for kind, content in many(21).items():
        assert "20 rows" in str(refused(node, content, kind, model="images" if kind == NPZ else "table"))
    good = {"age": 1, "smoker": "yes", "ward": "surgery"}
    assert len(rows_of(node, {"rows": [good] * 20}, JSON)) == 20
    wide = {f"c{number}": 1 for number in range(10_001)}
    for body in ({"rows": [good] * 21}, wide, {"columns": {name: [1] * 21 for name in good}}):
        assert refused(node, body, JSON).code == "too_large"
    assert "10001 columns" in str(refused(node, ",".join(wide) + "\n1\n"))


def test_a_text_that_takes_the_square_of_its_length_to_normalise_is_left_alone(node: SmallNode) -> None:
    """Half an hour, if it were not."""
    slow = "a" + "\u0301\u0316" * 500_000
    (row,) = rows_of(node, {"age": 1, "smoker": "yes", "ward": slow}, JSON)
    assert "column 'ward'" in row["refused"]
    age = {"name": "age", "shape": [1, 1], "datatype": "FP32", "data": [1]}
    texts = [{"name": name, "shape": [1, 1], "datatype": "BYTES", "data": [slow]} for name in ("smoker", "ward")]
    reader = node.reader(ALICE, "table")
    request, _ = reader.read(json.dumps({"inputs": [age, *texts]}).encode(), None, Asker("alice"))
    assert request.columns["ward"][0, 0] == slow


def test_images(node: SmallNode, image_bundle: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    image, archive = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels[0]).save(image, "PNG")
    np.savez(archive, images=pixels)
    for name, content, kind in (("one.png", image.getvalue(), PNG), ("three.npz", archive.getvalue(), NPZ)):
        text = answered(node, content, kind, "images", accept=CSV).body.decode()
        same(list(csv.DictReader(io.StringIO(text))), predicted(image_bundle, tmp_path, name, content))
    assert rows_of(node, image.getvalue(), JPEG, model="images") == rows_of(node, image.getvalue(), PNG, model="images")


def test_files_that_are_not_what_they_say_are_refused(node: SmallNode) -> None:
    image, floats, pickled = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(image, "PNG")
    np.savez(floats, images=np.full((1, 8, 8), 0.3))
    np.savez(pickled, images=np.array([{}], object))
    for content, kind, words in (
        (image.getvalue(), PNG, "8 x 9 pixels"),
        (image.getvalue()[:40], PNG, "not a readable PNG"),
        (b"x", NPZ, "not a readable .npz"),
        (floats.getvalue(), NPZ, "8 bits cannot hold"),
        (pickled.getvalue(), NPZ, "not a readable .npz"),
    ):
        found = refused(node, content, kind, model="images")
        assert (found.code, words in str(found)) == ("unprocessable", True), str(found)


def test_what_would_unpack_to_very_much_is_refused() -> None:
    archive = io.BytesIO()
    np.savez_compressed(archive, images=np.zeros((100, 8, 8), np.uint8))
    for most, fits in ((6400, False), (6600, True)):
        source = MemoryFile("archive.npz", archive.getvalue(), max_unpacked=most)
        with nullcontext() if fits else pytest.raises(DataError, match="would unpack to"):
            assert len(read_archive(source, "images")["images"]) == 100


def test_how_a_csv_is_written_is_in_the_query_and_the_content_type(node: SmallNode) -> None:
    text = "a table\nage;smoker;ward\n33,5;yes;surgery\n"
    assert "label" in rows_of(node, text, delimiter=";", decimal=",", title_lines="1")[0]
    latin = "age,smoker,ward,é\n1,yes,surgery,x\n".encode("latin-1")
    for more in ({"content_type": "text/csv; charset=ISO-8859-1"}, {"content_type": CSV, "encoding": "latin-1"}):
        assert "the schema knows no column 'é'" in str(refused(node, latin, **more))
    hint = str(refused(node, "age;smoker;ward\n1;yes;surgery\n"))
    assert 'say delimiter: ";" in the request\'s query' in hint


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("", "empty"),
        ("age,smoker,ward\n", "no data rows"),
        ("age,smoker\n1,yes\n", "the column 'ward' is missing"),
        ("age,age,smoker,ward\n1,1,yes,surgery\n", "more than once"),
        ("age,smoker,ward\n1,yes,\xff\n".encode("latin-1"), "not UTF-8"),
        (gzip.compress(b"age,smoker,ward\n1,yes,surgery\n", mtime=0), "gzipped"),
    ],
)
def test_a_csv_that_is_wrong_as_a_whole_is_refused(node: SmallNode, body: bytes | str, words: str) -> None:
    found = refused(node, body)
    assert (found.code, found.status) == ("unprocessable", 422)
    assert words in str(found)
    assert str(found).startswith("table.csv: ")


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"rows": []}',
        '{"rows": [7]}',
        '{"columns": {}}',
        '{"columns": {"a": [1], "b": []}}',
        '{"columns": {"a": [[1]]}}',
        '{"rows": [{}]}',
        '{"age": [1]}',
        "[" * 5000,
    ],
)
def test_json_that_is_no_table_is_refused(node: SmallNode, body: str) -> None:
    assert refused(node, body, JSON).code == "bad_request"


def test_content_types_that_the_model_does_not_take(node: SmallNode) -> None:
    for model, kind in (("table", PNG), ("table", "text/plain"), ("images", CSV), ("images", JSON), ("table", "")):
        found = refused(node, "x", kind, model=model)
        assert (found.code, found.status) == ("unsupported_media_type", 415)
    assert refused(node, "x", "text/csv; charset=utf-7").code == "unsupported_media_type"


@pytest.mark.parametrize("query", [{"delimiter": "x"}, {"title_lines": "-1"}, {"title_lines": "x"}, {"drop": "all"}])
def test_a_query_that_is_wrong_is_refused(node: SmallNode, query: dict[str, str]) -> None:
    assert refused(node, ROWS, **query).code == "bad_request"


def test_a_threshold_decides_on_the_label(node: SmallNode, table_bundle: Path) -> None:
    (row,) = rows_of(node, {"age": 61, "smoker": "yes", "ward": "surgery"}, JSON)
    chance = row["probabilities"]["malignant"]
    for threshold, label in ((chance * 0.9, "malignant"), (chance * 1.1, "benign")):
        other = SmallNode({"table": table_bundle})
        other._readers["table"] = RequestReader(dataclasses.replace(other._readers["table"].model, threshold=threshold))
        assert rows_of(other, {"age": 61, "smoker": "yes", "ward": "surgery"}, JSON)[0]["label"] == label


def test_a_large_table_is_answered_row_by_row(node: SmallNode) -> None:
    text = "age,smoker,ward\n" + "".join(f"{age % 125},yes,surgery\n" for age in range(3000))
    found = rows_of(node, text)
    assert [row["row"] for row in found] == list(range(1, 3001))
    assert sum("refused" in row for row in found) == sum(age % 125 > 120 for age in range(3000))


def test_a_queue_that_is_full_is_said_so(node: SmallNode) -> None:
    sent = SentTable(b'{"age": 1, "smoker": 1, "ward": "surgery"}', JSON)
    with pytest.raises(ServeRefusal) as found:
        asyncio.run(answer_table(node, ASKING, "table", sent, Asker("alice", new_identity=lambda: "shed")))
    assert (found.value.code, found.value.retry_after) == ("overloaded", 0.25)


def test_a_query_is_parsed_strictly() -> None:
    assert parse_query(b"delimiter=%3B&identifiers=a,b") == {"delimiter": ";", "identifiers": "a,b"}
    for wrong in (b"a=1&a=2", b"\xff", b"a=%ff", b"&".join(b"a%d=1" % n for n in range(17))):
        with pytest.raises(ServeRefusal):
            parse_query(wrong)


def test_a_model_need_not_be_named_where_there_is_one() -> None:
    assert only_model(["table"]) == "table"
    for names in ([], ["a", "b"]):
        with pytest.raises(ServeRefusal) as found:
            only_model(names)
        assert found.value.code == "not_found"


cells = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text("1é\0")
values = cells | st.lists(cells, max_size=2) | st.dictionaries(st.text(max_size=2), cells, max_size=2)
named = st.dictionaries(st.sampled_from(["age", "smoker", "ward", "x", "e\u0301"]), values, max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries({"rows": st.lists(named | values, max_size=3)})
    | st.fixed_dictionaries({"columns": named})
    | named
    | values
)
def test_json_of_any_content_is_answered_or_refused(node: SmallNode, content: Any) -> None:
    try:
        found = rows_of(node, json.dumps(content), JSON)
    except ServeRefusal:
        return
    assert all(("refused" in row) != ("label" in row) for row in found)


@settings(max_examples=60, deadline=None)
@given(
    st.binary(max_size=60) | st.text(st.sampled_from("age,smoker\n\"';1\0é"), max_size=60).map(str.encode),
    st.sampled_from([("table", CSV), ("images", NPZ), ("images", PNG)]),
)
def test_files_of_any_content_are_answered_or_refused(node: SmallNode, content: bytes, kind: tuple[str, str]) -> None:
    for body in (content, b"age,smoker,ward\n" + content):
        try:
            rows_of(node, body, kind[1], model=kind[0])
        except ServeRefusal:
            continue
