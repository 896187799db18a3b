"""The Open Inference Protocol over gRPC: a real server, asked by Triton's client, which registers the same messages."""

from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from time import monotonic
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as theirs
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from fedclaw import __version__
from fedclaw.export.predictor import Predictor
from fedclaw.serve.inference.grpc_service import STATUS, read_request
from fedclaw.serve.inference.protocol import SERVICE, generate
from fedclaw.serve.inference.protocol import open_inference_pb2 as messages
from fedclaw.serve.inference.rest import Asker, RequestReader
from fedclaw.serve.refusals import STATUS as HTTP
from fedclaw.serve.refusals import ServeRefusal
from tests.serve.grpc_served import grpc_served
from tests.serve.inference.descriptions import TABLE, describe
from tests.serve.inference.small_node import TOKEN, VERSION, SmallNode

MINE = {"authorization": TOKEN}
CSV = "age,smoker,ward\n63.5,yes,surgery\n,no,medicine\n20,true,attic\n"
COLUMNS = {
    "age": np.array([[63.5], [np.nan], [20]], np.float32),
    "smoker": np.array([["yes"], ["no"], ["true"]], object),
    "ward": np.array([["surgery"], ["medicine"], ["attic"]], object),
}


@pytest.fixture(scope="module")
def node(table_bundle: Path, image_bundle: Path) -> SmallNode:
    return SmallNode({"table": table_bundle, "images": image_bundle})


@pytest.fixture(scope="module")
def address(node: SmallNode) -> Iterator[str]:
    with grpc_served(node) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address) as found:
        yield found


@pytest.fixture(scope="module")
def expected(table_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    path.write_text(CSV)
    predictor = Predictor.open(table_bundle)
    rows = predictor.read_rows(path)
    found = np.full((3, 2), np.nan, np.float32)
    found[rows.answered] = predictor.predict(rows.inputs[rows.answered])
    return found


def inputs(**changes: np.ndarray) -> list[triton.InferInput]:
    found = []
    for name, values in {**COLUMNS, **changes}.items():
        tensor = triton.InferInput(name, values.shape, np_to_triton_dtype(values.dtype))
        tensor.set_data_from_numpy(values)
        found.append(tensor)
    return found


def test_the_generated_code_is_current(tmp_path: Path) -> None:
    for made in generate.generate(tmp_path):
        assert made.read_bytes() == (generate.HERE / made.name).read_bytes(), f"{made.name} is not from the .proto"


def shape_of(message: Any) -> dict[str, Any]:
    fields = {(field.name, field.number, field.type, field.is_repeated) for field in message.fields}
    return {message.name: fields} | {k: v for nested in message.nested_types for k, v in shape_of(nested).items()}


def test_messages_have_the_specifications_names_and_numbers() -> None:
    for name, message in messages.DESCRIPTOR.message_types_by_name.items():
        assert message.full_name == f"inference.{name}"
        assert shape_of(message) == shape_of(theirs.DESCRIPTOR.message_types_by_name[name])
    ours = messages.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert ours.full_name == SERVICE
    known = theirs.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    for method in ours.methods:
        assert method.input_type.full_name == known[method.name].input_type.full_name
        assert method.output_type.full_name == known[method.name].output_type.full_name


def test_every_refusal_has_a_status() -> None:
    assert STATUS.keys() == HTTP.keys()


def test_health_needs_no_token_and_all_else_does(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    for call in (
        lambda: client.is_model_ready("table"),
        client.get_server_metadata,
        lambda: client.get_model_metadata("table"),
        lambda: client.infer("table", inputs()),
        lambda: client.infer("table", inputs(), headers={"authorization": "Bearer wrong"}),
    ):
        with pytest.raises(InferenceServerException) as refused:
            call()
        assert refused.value.status() == "StatusCode.UNAUTHENTICATED"


def test_metadata(client: triton.InferenceServerClient) -> None:
    server = client.get_server_metadata(headers=MINE)
    assert (server.name, server.version) == ("fedclaw", __version__)
    model = client.get_model_metadata("table", headers=MINE)
    assert model.versions == [VERSION]
    assert [(own.name, own.datatype, list(own.shape)) for own in model.inputs] == [
        ("age", "FP32", [-1, 1]),
        ("smoker", "BYTES", [-1, 1]),
        ("ward", "BYTES", [-1, 1]),
    ]
    assert client.is_model_ready("table", VERSION, headers=MINE)
    assert not client.is_model_ready("table", "1", headers=MINE)
    assert not client.is_model_ready("other", headers=MINE)
    assert not client.is_model_ready("table", headers={"authorization": "Bearer none"})


def test_an_answer_is_that_of_the_bundles_own_reader(
    client: triton.InferenceServerClient, node: SmallNode, expected: np.ndarray
) -> None:
    result = client.infer("table", inputs(), request_id="r1", headers=MINE, client_timeout=60)
    assert np.allclose(result.as_numpy("probabilities"), expected, atol=1e-6, equal_nan=True)
    assert result.as_numpy("refused").tolist() == [[False], [False], [True]]
    assert [label in {b"benign", b"malignant"} for label in result.as_numpy("label")[:, 0]] == [True, True, False]
    response = result.get_response()
    assert (response.model_name, response.model_version, response.id) == ("table", VERSION, "r1")
    assert response.parameters["fedclaw-prediction"].string_param == "receipt"
    asked = node.seen[-1]
    assert asked.key == "alice r1"
    assert asked.deadline is not None
    assert 0 < asked.deadline - monotonic() < 61


def test_async_infer_and_wanted_outputs(client: triton.InferenceServerClient, node: SmallNode) -> None:
    answers: Queue[Any] = Queue()
    wanted = [triton.InferRequestedOutput("refused")]
    headers = {**MINE, "fedclaw-key": "patient 7"}
    client.async_infer(
        "table", inputs(), lambda result, error: answers.put((result, error)), outputs=wanted, headers=headers
    )
    result, error = answers.get(timeout=30)
    assert error is None
    assert result.as_numpy("refused").tolist() == [[False], [False], [True]]
    assert result.as_numpy("label") is None
    assert node.seen[-1].key == "patient 7"


def test_pixels(client: triton.InferenceServerClient) -> None:
    pixels = np.arange(128, dtype=np.uint8).reshape(2, 8, 8, 1)
    tensor = triton.InferInput("images", pixels.shape, "UINT8")
    tensor.set_data_from_numpy(pixels)
    found = client.infer("images", [tensor], headers=MINE).as_numpy("probabilities")
    assert found.shape == (2, 3)
    assert np.allclose(found.sum(axis=1), 1, atol=1e-5)


def typed() -> Any:
    message = messages.ModelInferRequest(model_name="table")
    for name, datatype, field, values in (
        ("age", "FP32", "fp32_contents", [63.5, float("nan"), 20]),
        ("smoker", "BOOL", "bool_contents", [True, False, True]),
        ("ward", "BYTES", "bytes_contents", [b"surgery", b"medicine", b"attic"]),
    ):
        tensor = message.inputs.add(name=name, datatype=datatype, shape=[3, 1])
        getattr(tensor.contents, field).extend(values)
    return message


def called(address: str, method: str, message: Any, reply: Any = messages.ModelInferResponse) -> Any:
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(f"/{SERVICE}/{method}", lambda given: given.SerializeToString(), reply.FromString)
        return call(message, metadata=(("authorization", TOKEN),), timeout=30)


def test_typed_values_are_answered_with_typed_values(address: str, expected: np.ndarray) -> None:
    answer = called(address, "ModelInfer", typed())
    assert not answer.raw_output_contents
    label, probabilities, refused = answer.outputs
    assert label.contents.bytes_contents[2] == b""
    found = np.array(probabilities.contents.fp32_contents).reshape(list(probabilities.shape))
    assert np.allclose(found, expected, atol=1e-6, equal_nan=True)
    assert list(refused.contents.bool_contents) == [False, False, True]


def test_refusals_have_their_status_and_their_reason(address: str, client: triton.InferenceServerClient) -> None:
    for wrong, status, words in (
        (lambda: client.infer("other", inputs(), headers=MINE), "NOT_FOUND", "no such model"),
        (lambda: client.infer("table", inputs(), model_version="7", headers=MINE), "NOT_FOUND", "no such model"),
        (lambda: client.infer("table", inputs()[:2], headers=MINE), "INVALID_ARGUMENT", "missing: 'ward'"),
        (
            lambda: client.infer("table", inputs(age=np.array([[2**24 + 1]] * 3)), headers=MINE),
            "INVALID_ARGUMENT",
            "FP32 holds exactly",
        ),
        (lambda: client.infer("table", inputs(), sequence_id=1, headers=MINE), "UNIMPLEMENTED", "sequences"),
        (lambda: client.infer("table", inputs(), request_id="break", headers=MINE), "INTERNAL", "the node failed"),
        (lambda: client.infer("table", inputs(), request_id="shed", headers=MINE), "UNAVAILABLE", "queue is full"),
    ):
        with pytest.raises(InferenceServerException) as refused:
            wrong()
        assert refused.value.status() == f"StatusCode.{status}"
        assert words in refused.value.message()
        assert "secret" not in refused.value.message()


def test_load_is_shed_with_a_time_to_come_back(address: str) -> None:
    message = typed()
    message.id = "shed"
    with pytest.raises(grpc.RpcError) as refused:
        called(address, "ModelInfer", message)
    assert dict(refused.value.trailing_metadata())["retry-after"] == "0.250"
    assert dict(refused.value.trailing_metadata())["fedclaw-code"] == "overloaded"


def test_calls_that_there_are_not_are_named(client: triton.InferenceServerClient) -> None:
    for call in (
        client.get_model_repository_index,
        lambda: client.load_model("table"),
        client.get_inference_statistics,
        client.get_system_shared_memory_status,
        client.get_cuda_shared_memory_status,
        client.get_trace_settings,
        client.get_log_settings,
        lambda: client.get_model_config("table"),
    ):
        with pytest.raises(InferenceServerException) as refused:
            call()
        assert refused.value.status() == "StatusCode.UNIMPLEMENTED"
        assert "not supported" in refused.value.message()


def test_a_message_that_is_too_large_or_none_is_refused(address: str) -> None:
    message = typed()
    message.inputs[0].contents.fp32_contents.extend([0.0] * 2**19)
    with pytest.raises(grpc.RpcError) as refused:
        called(address, "ModelInfer", message)
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary(f"/{SERVICE}/ModelInfer")(b"\xff" * 20, metadata=(("authorization", TOKEN),), timeout=30)
    assert called(address, "ModelInfer", typed()).model_version == VERSION


READER = RequestReader(describe("tabular", TABLE))
ASKER = Asker("alice")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda message: message.raw_input_contents.append(b""), "one for each input"),
        (lambda message: message.raw_input_contents.extend([b""] * 4), "one of them"),
        (lambda message: message.inputs.add(name="age", shape=[1]), "more than once"),
        (lambda message: message.inputs[0].shape.append(1), r"\[N, 1\]"),
        (lambda message: message.inputs[0].ClearField("contents"), "1 values, and 0"),
        (lambda message: setattr(message.inputs[0], "datatype", "FP16"), "1 values, and 0"),
        (lambda message: setattr(message.inputs[0], "datatype", "INT64"), "1 values, and 0"),
        (lambda message: message.inputs[3].contents.bytes_contents.__setitem__(0, b"\xff"), "UTF-8"),
        (lambda message: message.outputs.add(name="score"), "no such output"),
        (lambda message: [message.outputs.add(name="label") for _ in range(2)], "more than once"),
        (lambda message: message.parameters["key"].__setattr__("int64_param", 1), "key"),
        (lambda message: message.parameters["sequence_id"].__setattr__("int64_param", 1), "not supported"),
        (lambda message: message.inputs[0].parameters["shared_memory_region"].SetInParent(), "not supported"),
        (lambda message: message.ClearField("inputs"), "missing"),
    ],
)
def test_wrong_messages_are_refused(change: Any, words: str) -> None:
    message = messages.ModelInferRequest(model_name="m")
    for name, datatype, field, value in (
        ("age", "FP32", "fp32_contents", 1.0),
        ("year", "FP64", "fp64_contents", 2000.0),
        ("smoker", "BYTES", "bytes_contents", b"yes"),
        ("ward", "BYTES", "bytes_contents", b"surgery"),
    ):
        tensor = message.inputs.add(name=name, datatype=datatype, shape=[1, 1])
        getattr(tensor.contents, field).append(value)
    assert read_request(READER, message, ASKER)[0].rows == 1
    change(message)
    with pytest.raises(ServeRefusal, match=words):
        read_request(READER, message, ASKER)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_messages_of_any_content_are_read_or_refused(data: st.DataObject) -> None:
    message = messages.ModelInferRequest(model_name="m", id=data.draw(st.sampled_from(["", "a", "\n"])))
    for name in ("age", "year", "smoker", "ward"):
        tensor = message.inputs.add(
            name=name,
            datatype=data.draw(st.sampled_from(["FP32", "FP64", "BYTES", "INT8", "BOOL", "FP16", "BF16", ""])),
            shape=data.draw(st.sampled_from([[1, 1], [1], [2, 1], [], [-1, 1], [2**62, 2**62]])),
        )
        if data.draw(st.booleans()):
            tensor.contents.fp32_contents.extend(data.draw(st.lists(st.just(1.0), max_size=2)))
            tensor.contents.bytes_contents.extend(data.draw(st.lists(st.binary(max_size=3), max_size=2)))
    message.raw_input_contents.extend(data.draw(st.lists(st.binary(max_size=9), max_size=4)))
    try:
        request, _ = read_request(READER, message, ASKER)
    except ServeRefusal:
        return
    assert all(values.shape == (request.rows, 1) for values in request.columns.values())
