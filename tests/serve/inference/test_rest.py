"""Requests and answers of the Open Inference Protocol over REST."""

import json
import re
import struct
from time import monotonic
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclaw.serve.inference.rest import AnswerForm, Asker, RequestReader, write_refusal, write_response
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.requests import InferenceRequest, InferenceResponse
from tests.serve.inference.descriptions import IMAGES, TABLE, describe, prepared

TABULAR = RequestReader(describe("tabular", TABLE))
VISION = RequestReader(describe("vision", IMAGES))
PREPARED = RequestReader(prepared())
ASKER = Asker("alice", new_identity=lambda: "made")
AGE = {"name": "age", "shape": [2, 1], "datatype": "FP32", "data": [63.5, 70]}
YEAR = {"name": "year", "shape": [2, 1], "datatype": "FP64", "data": [[1990.25], [2001]]}
SMOKER = {"name": "smoker", "shape": [2], "datatype": "BYTES", "data": ["yes", "no"]}
TWO = {"name": "inputs", "shape": [1, 2], "datatype": "FP32"}
WARD = {"name": "ward", "shape": [2, 1], "datatype": "BYTES", "data": ["surgery", "me\u0301decine"]}


def body(*inputs: Any, **more: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **more}).encode()


def asked(*inputs: Any, reader: RequestReader = TABULAR, **more: Any) -> tuple[InferenceRequest, AnswerForm]:
    return reader.read(body(*inputs, **more), None, ASKER)


def read(*inputs: Any, reader: RequestReader = TABULAR, **more: Any) -> InferenceRequest:
    return asked(*inputs, reader=reader, **more)[0]


def refusal(*inputs: Any, reader: RequestReader = TABULAR, **more: Any) -> ServeRefusal:
    with pytest.raises(ServeRefusal) as refused:
        read(*inputs, reader=reader, **more)
    return refused.value


def binary(tensors: list[tuple[dict[str, Any], bytes]], **more: Any) -> tuple[bytes, str]:
    listed = [{**tensor, "parameters": {"binary_data_size": len(raw)}} for tensor, raw in tensors]
    header = json.dumps({"inputs": listed, **more}).encode()
    return header + b"".join(raw for _, raw in tensors), str(len(header))


def texts(*values: str) -> bytes:
    return b"".join(struct.pack("<I", len(value.encode())) + value.encode() for value in values)


def changed(tensor: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**tensor, **changes}


def test_columns_have_the_models_types_and_shapes() -> None:
    request = read(AGE, YEAR, SMOKER, WARD, id="r1", parameters={"key": "patient 7"})
    assert (request.model, request.rows, request.identity, request.key) == ("m", 2, "r1", "patient 7")
    assert request.columns["age"].dtype == np.float32
    assert request.columns["age"].tolist() == [[63.5], [70.0]]
    assert request.columns["year"].dtype == np.float64
    assert request.columns["year"].tolist() == [[1990.25], [2001.0]]
    assert request.columns["smoker"].tolist() == [["yes"], ["no"]]
    assert request.columns["ward"].tolist() == [["surgery"], ["médecine"]]


def test_the_order_of_inputs_and_fields_that_nobody_knows_do_not_matter() -> None:
    extra = changed(YEAR, parameters={"content_type": "np"}, note="x")
    assert read(WARD, extra, SMOKER, AGE, note=1).columns.keys() == {"age", "year", "smoker", "ward"}


def test_a_request_without_an_id_gets_one_and_is_routed_by_itself() -> None:
    request = read(AGE, YEAR, SMOKER, WARD)
    assert (request.identity, request.key) == ("made", "alice made")


def test_a_key_in_a_header_goes_before_the_parameter() -> None:
    given = body(AGE, YEAR, SMOKER, WARD, parameters={"key": "parameter"})
    assert TABULAR.read(given, None, Asker("alice", "header"))[0].key == "header"


def test_null_is_what_is_not_known() -> None:
    request = read(changed(AGE, data=[None, 70]), YEAR, SMOKER, changed(WARD, data=[None, "surgery"]))
    assert np.isnan(request.columns["age"][0, 0])
    missing = TABULAR.model.columns[3].missing
    assert request.columns["ward"].tolist() == [[missing], ["surgery"]]


def test_pixels_are_taken_flat_and_nested_and_as_bytes() -> None:
    pixels = np.arange(128, dtype=np.uint8).reshape(2, 8, 8, 1)
    tensor = {"name": "images", "shape": [2, 8, 8, 1], "datatype": "UINT8"}
    for data in (pixels.tolist(), pixels.ravel().tolist()):
        assert (read({**tensor, "data": data}, reader=VISION).columns["images"] == pixels).all()
    sent, length = binary([(tensor, pixels.tobytes())])
    assert (VISION.read(sent, length, ASKER)[0].columns["images"] == pixels).all()


def test_binary_inputs_may_stand_beside_json_ones() -> None:
    header = {
        "inputs": [
            {**{k: v for k, v in AGE.items() if k != "data"}, "parameters": {"binary_data_size": 8}},
            YEAR,
            {**{k: v for k, v in SMOKER.items() if k != "data"}, "parameters": {"binary_data_size": 13}},
            WARD,
        ]
    }
    text = json.dumps(header).encode()
    raw = np.array([1.5, np.nan], "<f4").tobytes() + texts("yes", "no")
    columns = TABULAR.read(text + raw, str(len(text)), ASKER)[0].columns
    assert columns["age"][0, 0] == 1.5
    assert np.isnan(columns["age"][1, 0])
    assert columns["smoker"].tolist() == [["yes"], ["no"]]


@pytest.mark.parametrize(
    ("datatype", "raw"),
    [
        ("FP64", np.array([0.1, 3.0], "<f8")),
        ("FP16", np.array([0.5, 3.0], "<f2")),
        ("BF16", np.array([0x3F00, 0x4040], "<u2")),
        ("INT8", np.array([-5, 3], "i1")),
        ("INT64", np.array([2**24, 3], "<i8")),
        ("UINT64", np.array([2**40, 3], "<u8")),
    ],
)
def test_other_types_of_numbers_keep_their_value(datatype: str, raw: np.ndarray) -> None:
    tensor = {"name": "age", "shape": [2, 1], "datatype": datatype, "parameters": {"binary_data_size": raw.nbytes}}
    text = body(tensor, YEAR, SMOKER, WARD)
    found = TABULAR.read(text + raw.tobytes(), str(len(text)), ASKER)[0].columns["age"]
    assert found.dtype == np.float32
    expected = {"BF16": [0.5, 3.0], "FP64": [float(np.float32(0.1)), 3.0]}.get(datatype, raw.tolist())
    assert found[:, 0].tolist() == expected


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (changed(AGE, datatype="INT64", data=[2**24 + 1, 1]), "holds exactly"),
        (changed(AGE, datatype="INT8", data=[128, 1]), "none of INT8"),
        (changed(AGE, datatype="UINT64", data=[-1, 1]), "none of UINT64"),
        (changed(AGE, datatype="INT64", data=[1.5, 1]), "whole numbers"),
        (changed(AGE, data=[True, 1]), "not of numbers"),
        (changed(AGE, data=["63", 1]), "not of numbers"),
        (changed(AGE, data=[[63.5, 70]]), "nested"),
        (changed(AGE, data=[[63.5], 70]), "nested"),
        (changed(AGE, data=[[63.5], [[70]]]), "not of numbers"),
        (changed(AGE, data=[1]), "2 values, and 1"),
        (changed(AGE, data={"0": 1}), "not a list"),
        (changed(AGE, datatype="BYTES"), "datatype must be FP32"),
        (changed(AGE, datatype="BOOL", data=[True, False]), "datatype must be FP32"),
        (changed(AGE, datatype="FLOAT"), "datatype must be FP32"),
        (changed(AGE, datatype=["FP32"]), "datatype must be FP32"),
        (changed(AGE, shape=[2, 2]), r"\[N, 1\]"),
        (changed(AGE, shape=[-2, 1]), "N at least 1"),
        (changed(AGE, shape=[0, 1], data=[]), "N at least 1"),
        (changed(AGE, shape=[2**63, 1]), "N at least 1"),
        (changed(AGE, shape=[2**39, 1]), "values, and 2"),
        (changed(AGE, shape=[True, 1], data=[1]), "N at least 1"),
        (changed(AGE, shape=[2.0, 1]), "N at least 1"),
        (changed(AGE, shape="2,1"), "its shape"),
        (changed(AGE, shape=[]), "its shape"),
        (changed(AGE, shape=[3, 1], data=[1, 2, 3]), "different numbers of rows"),
        (changed(AGE, name="bmi"), "no such input; it has 'age', 'year'"),
        (changed(AGE, name=7), "no such input"),
        (changed(AGE, parameters={"binary_data_size": 8}), "one of them"),
        (changed(AGE, parameters=[]), "parameters"),
        ("age", "a tensor is an object"),
    ],
)
def test_a_wrong_input_is_refused_with_the_reason(tensor: Any, words: str) -> None:
    refused = refusal(tensor, YEAR, SMOKER, WARD)
    assert refused.code == "bad_request"
    assert re.search(words, str(refused)), str(refused)


def test_whole_numbers_and_truths_are_texts_of_a_column_of_texts() -> None:
    request = read(
        AGE, YEAR, changed(SMOKER, datatype="BOOL", data=[True, False]), changed(WARD, datatype="INT64", data=[1, 2])
    )
    assert request.columns["smoker"].tolist() == [["true"], ["false"]]
    assert request.columns["ward"].tolist() == [["1"], ["2"]]


def test_what_a_float64_cannot_tell_apart_is_refused() -> None:
    year = changed(YEAR, datatype="INT64", data=[2**53, 2**53 + 1])
    assert "holds exactly" in str(refusal(AGE, year, SMOKER, WARD))
    assert read(AGE, changed(year, data=[2**53, 2**53 - 1]), SMOKER, WARD).columns["year"][0, 0] == 2**53


def test_pixels_are_whole_and_of_8_bits() -> None:
    tensor = {"name": "images", "shape": [1, 8, 8, 1], "datatype": "UINT8", "data": [0] * 63}
    for wrong in (256, -1, 1.0, True, None):
        assert refusal({**tensor, "data": [*tensor["data"], wrong]}, reader=VISION).code == "bad_request"
    floats = {**tensor, "datatype": "FP32"}
    assert read({**floats, "data": [*tensor["data"], 255.0]}, reader=VISION).columns["images"].max() == 255
    for wrong in (0.5, 256.0, -1.0):
        assert "holds exactly" in str(refusal({**floats, "data": [*tensor["data"], wrong]}, reader=VISION))


def test_what_is_not_finite_goes_to_the_graph_which_refuses_its_row_alone() -> None:
    for value in (np.nan, np.inf):
        sent, length = binary([(TWO, np.array([1, value], "<f4").tobytes())])
        assert not np.isfinite(PREPARED.read(sent, length, ASKER)[0].columns["inputs"][0, 1])
    assert np.isinf(read({**TWO, "data": [1, 1e39]}, reader=PREPARED).columns["inputs"][0, 1])
    assert refusal({**TWO, "data": [1, None]}, reader=PREPARED).code == "bad_request"


def test_an_input_is_there_once_and_none_is_missing() -> None:
    assert "more than once" in str(refusal(AGE, YEAR, SMOKER, WARD, AGE))
    assert str(refusal(AGE, YEAR, WARD)) == "an input is missing: 'smoker'"
    assert "list of tensors" in str(refusal())


@pytest.mark.parametrize(
    ("length", "words"),
    [
        (None, "not JSON"),
        ("{more}", "no number of bytes"),
        ("-1", "no number of bytes"),
        ("1e3", "no number of bytes"),
        ("9" * 5000, "no number of bytes"),
        ("\u0663", "no number of bytes"),
        ("", "no number of bytes"),
        ("0", "not JSON"),
        ("{less}", "not JSON"),
    ],
)
def test_a_header_that_is_not_the_length_of_the_json_is_refused(length: str | None, words: str) -> None:
    sent, right = binary([(TWO, b"\0" * 8)])
    said = length and length.format(more=len(sent) + 1, less=int(right) - 1)
    with pytest.raises(ServeRefusal, match=words):
        PREPARED.read(sent, said, ASKER)
    with pytest.raises(ServeRefusal, match="no header"):
        PREPARED.read(sent[: int(right)], None, ASKER)


@pytest.mark.parametrize(
    ("raw", "shape", "size", "words"),
    [
        (9, [1, 2], 8, "do not add up"),
        (7, [1, 2], 8, "no number of bytes"),
        (8, [1, 2], True, "no number of bytes"),
        (8, [1, 2], -8, "no number of bytes"),
        (8, [1, 2], 2**64 - 1, "no number of bytes"),
        (8, [1, 2], 8.0, "no number of bytes"),
        (8, [1, 2], 4, "8 bytes, and 4"),
        (8, [2, 2], 8, "16 bytes, and 8"),
        (8, [2**40, 2], 8, "bytes, and 8"),
        (0, [1, 2], 0, "8 bytes, and 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(raw: int, shape: list[int], size: Any, words: str) -> None:
    header = json.dumps({"inputs": [{**TWO, "shape": shape, "parameters": {"binary_data_size": size}}]}).encode()
    with pytest.raises(ServeRefusal, match=words):
        PREPARED.read(header + b"\0" * raw, str(len(header)), ASKER)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (texts("yes"), "do not hold 2 values"),
        (texts("yes", "no", "no"), "after its last value"),
        (struct.pack("<I", 2**32 - 1) + b"yes" + texts("no"), "beyond their end"),
        (texts("yes") + struct.pack("<I", 3) + b"no", "beyond their end"),
        (texts("yes") + struct.pack("<I", 2) + b"\xff\xfe", "not UTF-8"),
        (texts("yes") + struct.pack("<I", 3) + b"\xed\xa0\x80", "not UTF-8"),
        (b"", "do not hold 2 values"),
    ],
)
def test_damaged_texts_are_refused(raw: bytes, words: str) -> None:
    tensors = [{**AGE}, {**YEAR}, {k: v for k, v in SMOKER.items() if k != "data"}, {**WARD}]
    tensors[2]["parameters"] = {"binary_data_size": len(raw)}
    text = body(*tensors)
    with pytest.raises(ServeRefusal, match=words):
        TABULAR.read(text + raw, str(len(text)), ASKER)


@pytest.mark.parametrize(
    "parameters",
    [
        {"sequence_id": 1},
        {"sequence_start": True},
        {"shared_memory_region": "a", "shared_memory_byte_size": 8},
    ],
)
def test_what_is_not_supported_is_said_so(parameters: dict[str, Any]) -> None:
    assert refusal(AGE, YEAR, SMOKER, WARD, parameters=parameters).code == "not_supported"
    assert refusal(changed(AGE, parameters=parameters), YEAR, SMOKER, WARD).code == "not_supported"
    outputs = [{"name": "label", "parameters": {"classification": 1}}]
    assert refusal(AGE, YEAR, SMOKER, WARD, outputs=outputs).code == "not_supported"


@pytest.mark.parametrize(
    "more",
    [
        {"id": 7},
        {"id": "x" * 129},
        {"id": "a\nb"},
        {"parameters": {"key": 7}},
        {"parameters": {"key": ""}},
        {"parameters": {"key": "x" * 257}},
        {"parameters": {"timeout": "1"}},
        {"parameters": {"timeout": -1}},
        {"parameters": {"timeout": True}},
        {"parameters": {"binary_data_output": 1}},
        {"parameters": "key"},
        {"outputs": {"name": "label"}},
        {"outputs": ["label"]},
        {"outputs": [{"name": "score"}]},
        {"outputs": [{"name": ["label"]}]},
        {"outputs": [{"name": "label"}, {"name": "label"}]},
        {"outputs": [{"name": "label", "parameters": {"binary_data": "yes"}}]},
    ],
)
def test_what_else_a_request_says_is_checked(more: dict[str, Any]) -> None:
    assert refusal(AGE, YEAR, SMOKER, WARD, **more).code == "bad_request"


def test_a_timeout_makes_the_deadline_earlier_and_never_later() -> None:
    given, now = body(AGE, YEAR, SMOKER, WARD, parameters={"timeout": 10_000_000}), monotonic()
    earlier = TABULAR.read(given, None, ASKER, None, now + 1000)[0].deadline
    assert earlier is not None
    assert now + 9 < earlier < now + 1000
    assert TABULAR.read(given, None, ASKER, None, now)[0].deadline == now


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{", b"\xff", b"[" * 100_000, b'{"inputs":' * 9000, b"{}{}"])
def test_a_body_that_is_no_object_is_refused(text: bytes) -> None:
    with pytest.raises(ServeRefusal) as refused:
        TABULAR.read(text, None, ASKER)
    assert refused.value.code == "bad_request"


def test_a_message_never_repeats_what_was_sent() -> None:
    for tensor in (changed(AGE, name="s3cret"), changed(AGE, datatype="s3cret"), changed(AGE, data=["s3cret"] * 2)):
        assert "s3cret" not in str(refusal(tensor, YEAR, SMOKER, WARD))
    assert "s3cret" not in str(refusal(AGE, YEAR, SMOKER, WARD, outputs=[{"name": "s3cret"}]))
    with pytest.raises(ServeRefusal) as refused:
        TABULAR.read(b'{"s3cret": s3cret}', None, ASKER)
    assert "s3cret" not in str(refused.value)


RESPONSE = InferenceResponse(
    "m",
    "0123456789ab",
    "r1",
    {
        "label": np.array([["benign"], [""]], object),
        "probabilities": np.array([[0.75, 0.25], [np.nan, np.nan]], np.float32),
        "refused": np.array([[False], [True]]),
    },
)


def test_an_answer_in_json() -> None:
    text, length = write_response(RESPONSE)
    assert length is None
    found = json.loads(text)
    assert (found["model_name"], found["model_version"], found["id"]) == ("m", "0123456789ab", "r1")
    assert found["outputs"] == [
        {"name": "label", "datatype": "BYTES", "shape": [2, 1], "data": ["benign", ""]},
        {"name": "probabilities", "datatype": "FP32", "shape": [2, 2], "data": [0.75, 0.25, None, None]},
        {"name": "refused", "datatype": "BOOL", "shape": [2, 1], "data": [False, True]},
    ]


def test_an_answer_with_binary_outputs_where_they_are_asked_for() -> None:
    outputs = [{"name": "label", "parameters": {"binary_data": False}}, {"name": "refused"}, {"name": "probabilities"}]
    request, form = asked(AGE, YEAR, SMOKER, WARD, outputs=outputs, parameters={"binary_data_output": True})
    assert request.outputs == ("label", "refused", "probabilities")
    text, length = write_response(RESPONSE, form)
    assert length is not None
    label, probabilities, refused = json.loads(text[:length])["outputs"]
    assert label["data"] == ["benign", ""]
    assert probabilities["parameters"] == {"binary_data_size": 16}
    assert refused["parameters"] == {"binary_data_size": 2}
    assert np.array_equal(
        np.frombuffer(text[length:-2], "<f4"), RESPONSE.outputs["probabilities"].ravel(), equal_nan=True
    )
    assert text[-2:] == b"\0\1"


def test_texts_are_binary_outputs_too() -> None:
    text, length = write_response(RESPONSE, AnswerForm(by_name={"label": True}))
    assert length is not None
    assert text[length:] == texts("benign", "")


def test_an_answer_that_is_not_contiguous_is_written_as_it_is() -> None:
    values = np.arange(12, dtype=np.float32).reshape(2, 6)[:, ::2]
    response = InferenceResponse("m", "v", "i", {"values": values})
    assert json.loads(write_response(response)[0])["outputs"][0]["data"] == [0, 2, 4, 6, 8, 10]
    text, length = write_response(response, AnswerForm(usual=True))
    assert np.frombuffer(text[length:], "<f4").tolist() == [0, 2, 4, 6, 8, 10]


def test_an_error_is_said_to_people_and_programs() -> None:
    assert json.loads(write_refusal(ServeRefusal("not_found", "no model"))) == {
        "error": "no model",
        "code": "not_found",
    }


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["age", "label", "FP32", "BYTES", "INT64", "BOOL", "FP16", "UINT8", "BF16", "\0", "e\u0301"]),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)
tensors = st.fixed_dictionaries(
    {"name": st.sampled_from(["age", "year", "smoker", "ward", 1])},
    optional={
        "shape": st.sampled_from([[1, 1], [2, 1], [1], [2], [0, 1], [2**62, 2**62]]) | anything,
        "datatype": st.sampled_from(["FP32", "FP64", "FP16", "BF16", "INT8", "UINT64", "BYTES", "BOOL"]) | anything,
        "data": st.lists(anything, max_size=2) | anything,
        "parameters": st.dictionaries(st.sampled_from(["binary_data_size", "x"]), st.integers(-1, 20)) | anything,
    },
)
requests = st.fixed_dictionaries(
    {"inputs": st.lists(tensors, max_size=5) | anything},
    optional={
        "id": anything,
        "parameters": st.dictionaries(st.sampled_from(["key", "timeout", "binary_data_output"]), anything) | anything,
        "outputs": st.lists(st.dictionaries(st.sampled_from(["name", "parameters"]), anything), max_size=3) | anything,
    },
)


def answers_or_refuses(text: bytes, length: str | None) -> None:
    for reader in (TABULAR, PREPARED, VISION):
        try:
            request, _ = reader.read(text, length, ASKER)
        except ServeRefusal:
            continue
        for column in reader.model.columns:
            found = request.columns[column.name]
            assert found.shape == (request.rows, *column.shape[1:])
            assert found.dtype == {"string": object}.get(column.dtype, column.dtype)


@settings(max_examples=150, deadline=None)
@given(requests, st.binary(max_size=20), st.none() | st.integers(-2, 2))
def test_requests_of_any_content_are_answered_or_refused(request: Any, tail: bytes, off: int | None) -> None:
    text = json.dumps(request).encode()
    answers_or_refuses(text + tail * (off is not None), None if off is None else str(len(text) + off))


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.none() | st.text(max_size=5))
def test_bodies_of_any_bytes_are_answered_or_refused(text: bytes, length: str | None) -> None:
    answers_or_refuses(text, length)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_good_request_with_one_thing_changed_is_answered_or_refused(data: st.DataObject) -> None:
    sent, length = binary(
        [({"name": "inputs", "shape": [2, 2], "datatype": "FP32"}, np.arange(4, dtype="<f4").tobytes())]
    )
    place = data.draw(st.integers(0, len(sent) - 1))
    answers_or_refuses(sent[:place] + data.draw(st.binary(max_size=3)) + sent[place + 1 :], length)
