"""Clients that others wrote, asking a real node: Triton's, over REST and gRPC, and plain HTTP for tables."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from queue import Queue
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from openapi_spec_validator import OpenAPIV31SpecValidator
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from fedclaw import __version__
from fedclaw.export.predictor import Predictor
from fedclaw.identity.federation_home import FederationHome
from fedclaw.serve.security.development_tokens import sign_token, write_keys
from tests.serve.node_process import RunningNode, running_node

pytestmark = pytest.mark.slow

ISSUER, AUDIENCE = "https://issuer.test", "node.test"
TRITON = (tritonclient.http, tritonclient.grpc)
CSV = "age,smoker,ward\n63.5,yes,surgery\n,no,medicine\n20,true,attic\n"
COLUMNS = {
    "age": np.array([[63.5], [np.nan], [20]], np.float32),
    "smoker": np.array([["yes"], ["no"], ["true"]], object),
    "ward": np.array([["surgery"], ["medicine"], ["attic"]], object),
}


@pytest.fixture(scope="module")
def node(
    table_bundle: Path, image_bundle: Path, home: FederationHome, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningNode]:
    root = tmp_path_factory.mktemp("node")
    keys = write_keys(root / "keys")
    settings = (
        f"models={{table: {{bundle: {table_bundle}}}, images: {{bundle: {image_bundle}}}}}",
        f"ca={home.root / 'ca.crt'}",
        *("tls.disabled=true", f"tokens.jwks={keys}", f"tokens.issuer={ISSUER}", f"tokens.audience={AUDIENCE}"),
    )
    with running_node(root, *settings) as found:
        yield found


@pytest.fixture(scope="module")
def token(node: RunningNode) -> Callable[..., str]:
    keys = node.log.parent / "keys"
    return lambda *scopes: f"Bearer {sign_token(keys, ISSUER, AUDIENCE, 'alice', scopes, minutes=30)}"


@pytest.fixture(scope="module")
def expected(table_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    path.write_text(CSV)
    predictor = Predictor.open(table_bundle)
    rows = predictor.read_rows(path)
    found = np.full((3, 2), np.nan, np.float32)
    found[rows.answered] = predictor.predict(rows.inputs[rows.answered])
    return found


@pytest.fixture(params=TRITON, ids=("http", "grpc"))
def triton(request: pytest.FixtureRequest) -> ModuleType:
    found: ModuleType = request.param
    return found


@pytest.fixture
def client(triton: ModuleType, node: RunningNode) -> Iterator[Any]:
    address = node.http.removeprefix("http://") if triton is tritonclient.http else node.grpc
    with triton.InferenceServerClient(address) as found:
        yield found


@pytest.fixture
def mine(token: Callable[..., str], triton: ModuleType) -> dict[str, str]:
    # gRPC's metadata has names in lower case alone.
    name = "Authorization" if triton is tritonclient.http else "authorization"
    return {name: token("predict:table", "predict:images")}


def inputs(triton: ModuleType, binary: bool | None = None, **changes: np.ndarray) -> list[Any]:
    found = []
    for name, values in {**COLUMNS, **changes}.items():
        tensor = triton.InferInput(name, values.shape, np_to_triton_dtype(values.dtype))
        tensor.set_data_from_numpy(values, **({} if binary is None else {"binary_data": binary}))
        found.append(tensor)
    return found


def right(result: Any, expected: np.ndarray) -> None:
    assert np.allclose(result.as_numpy("probabilities").astype(np.float32), expected, atol=1e-6, equal_nan=True)
    assert result.as_numpy("refused").tolist() == [[False], [False], [True]]
    labels = [str(label, "utf-8") if isinstance(label, bytes) else label for label in result.as_numpy("label")[:, 0]]
    assert [label in {"benign", "malignant"} for label in labels] == [True, True, False]


def test_health_and_metadata(client: Any, triton: ModuleType, mine: dict[str, str]) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("table", headers=mine)
    assert not client.is_model_ready("other", headers=mine)
    more = {} if triton is tritonclient.http else {"as_json": True}
    server = client.get_server_metadata(headers=mine, **more)
    assert (server["name"], server["version"]) == ("fedclaw", __version__)
    assert "binary_tensor_data" in server["extensions"]
    model = client.get_model_metadata("table", headers=mine, **more)
    assert [(own["name"], own["datatype"], list(map(int, own["shape"]))) for own in model["inputs"]] == [
        ("age", "FP32", [-1, 1]),
        ("smoker", "BYTES", [-1, 1]),
        ("ward", "BYTES", [-1, 1]),
    ]
    (version,) = model["versions"]
    assert client.is_model_ready("table", version, headers=mine)
    assert not client.is_model_ready("table", "7", headers=mine)


def test_infer(client: Any, triton: ModuleType, mine: dict[str, str], expected: np.ndarray) -> None:
    result = client.infer("table", inputs(triton), request_id="r1", headers=mine)
    right(result, expected)
    response = result.get_response()
    found = response if isinstance(response, dict) else {"id": response.id, "model_name": response.model_name}
    assert (found["id"], found["model_name"]) == ("r1", "table")


def test_async_infer(client: Any, triton: ModuleType, mine: dict[str, str], expected: np.ndarray) -> None:
    if triton is tritonclient.http:
        right(client.async_infer("table", inputs(triton), headers=mine).get_result(), expected)
        return
    answers: Queue[Any] = Queue()
    client.async_infer("table", inputs(triton), lambda result, error: answers.put((result, error)), headers=mine)
    result, error = answers.get(timeout=60)
    assert error is None
    right(result, expected)


def test_pixels_and_wanted_outputs(client: Any, triton: ModuleType, mine: dict[str, str]) -> None:
    pixels = np.arange(128, dtype=np.uint8).reshape(2, 8, 8, 1)
    tensor = triton.InferInput("images", pixels.shape, "UINT8")
    tensor.set_data_from_numpy(pixels)
    wanted = [triton.InferRequestedOutput("probabilities")]
    result = client.infer("images", [tensor], outputs=wanted, headers=mine)
    assert np.allclose(result.as_numpy("probabilities").sum(axis=1), 1, atol=1e-5)
    assert result.as_numpy("label") is None


@pytest.mark.parametrize("binary_in", [False, True])
@pytest.mark.parametrize("binary_out", [False, True])
def test_json_and_binary_tensors(
    node: RunningNode, token: Callable[..., str], expected: np.ndarray, binary_in: bool, binary_out: bool
) -> None:
    names = ("label", "probabilities", "refused")
    wanted = [tritonclient.http.InferRequestedOutput(name, binary_data=binary_out) for name in names]
    headers = {"Authorization": token("predict:*")}
    age = COLUMNS["age"] if binary_in else np.array([[63.5], [0], [20]], np.float32)
    with tritonclient.http.InferenceServerClient(node.http.removeprefix("http://")) as client:
        result = client.infer("table", inputs(tritonclient.http, binary_in, age=age), outputs=wanted, headers=headers)
    if binary_in:
        right(result, expected)
    assert np.allclose(result.as_numpy("probabilities").astype(np.float32)[0], expected[0], atol=1e-6)


def test_refusals(client: Any, triton: ModuleType, token: Callable[..., str], mine: dict[str, str]) -> None:
    (name,) = mine
    other = {name: token("predict:images")}
    http = triton is tritonclient.http
    for call, status in (
        (lambda: client.infer("table", inputs(triton)), ("401", "UNAUTHENTICATED")),
        (lambda: client.infer("table", inputs(triton), headers={name: "Bearer x.y.z"}), ("401", "UNAUTHENTICATED")),
        (lambda: client.infer("table", inputs(triton)[:2], headers=mine), ("400", "INVALID_ARGUMENT")),
        (lambda: client.infer("table", inputs(triton), sequence_id=7, headers=mine), ("501", "UNIMPLEMENTED")),
    ):
        with pytest.raises(InferenceServerException) as refused:
            call()
        assert refused.value.status() == (status[0] if http else f"StatusCode.{status[1]}")
    told = []
    for model in ("table", "not-there"):
        with pytest.raises(InferenceServerException) as refused:
            client.infer(model, inputs(triton), headers=other)
        told.append((refused.value.status(), refused.value.message().replace(model, "")))
    assert told[0] == told[1], "a model that one may not ask is like one that is not there"


def test_what_is_not_supported(client: Any, mine: dict[str, str]) -> None:
    for call in (
        client.get_model_repository_index,
        lambda headers: client.load_model("table", headers=headers),
        client.get_inference_statistics,
        client.get_system_shared_memory_status,
        client.get_cuda_shared_memory_status,
        client.get_trace_settings,
        client.get_log_settings,
    ):
        with pytest.raises(InferenceServerException) as refused:
            call(headers=mine)
        assert refused.value.status() in {"501", "StatusCode.UNIMPLEMENTED"}
        assert "not supported" in refused.value.message()


@pytest.fixture
def asked(node: RunningNode, token: Callable[..., str]) -> Callable[..., tuple[int, Any, Mapping[str, str]]]:
    """Sends one request under a token for all models, or for what `authorization` says."""

    def ask(method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Mapping[str, str]]:
        headers.setdefault("authorization", token("predict:*"))
        status, found, told = node.ask(method, f"{node.http}{path}", body, **headers)
        return status, found, {name.lower(): value for name, value in told.items()}

    return ask


def test_a_table_is_answered(asked: Any, expected: np.ndarray) -> None:
    sent = CSV.encode()
    status, told, headers = asked("POST", "/predict/table", sent, content_type="text/csv")
    assert (status, told["model_version"]) == (200, headers["fedclaw-version"])
    assert headers["fedclaw-prediction"]
    first, second, third = told["rows"]
    found = [list(row["probabilities"].values()) for row in (first, second)]
    assert np.allclose(found, expected[:2], atol=1e-6)
    assert "column 'ward': 'attic'" in third["refused"]
    _, text, headers = asked("POST", "/predict/table", sent, content_type="text/csv", accept="text/csv")
    assert headers["content-type"].startswith("text/csv")
    assert text.decode().splitlines()[0] == "row,label,probability,p(benign),p(malignant),refused"
    assert asked("POST", "/predict", sent, content_type="text/csv")[0] == 404, "there are two models"
    assert asked("POST", "/predict/table", b"x", content_type="text/plain")[0] == 415


def test_the_description_names_what_the_token_may_ask(asked: Any, token: Callable[..., str]) -> None:
    status, document, _ = asked("GET", "/openapi.json")
    assert status == 200
    OpenAPIV31SpecValidator(document).validate()
    assert {"/predict/table", "/predict/images"} <= document["paths"].keys()
    _, only, _ = asked("GET", "/openapi.json", authorization=token("predict:images"))
    assert "/predict/table" not in only["paths"]
    assert asked("GET", "/openapi.json", authorization="")[0] == 401
    example = document["paths"]["/predict/table"]["post"]["requestBody"]["content"]["application/json"]["example"]
    _, told, _ = asked("POST", "/predict/table", example, content_type="application/json")
    assert "label" in told["rows"][0]


def test_the_page_is_there_without_a_token(asked: Any) -> None:
    status, body, headers = asked("GET", "/docs", authorization="")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert b"table" not in body.split(b"<script>")[0].split(b"</style>")[1], "it names no model"
