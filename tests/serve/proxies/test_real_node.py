"""A real node behind a real proxy: what its clients ask, binary tensors and tables of odd words too, is answered."""

import json
import ssl
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from http.client import HTTPSConnection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedclaw.identity.federation_home import FederationHome
from tests.conftest import Background
from tests.ports import free_port
from tests.serve.proxies import test_haproxy, test_nginx
from tests.serve.proxies.certificates import Certificates, make_certificates
from tests.serve.proxies.conversation import PATIENCE, Proxy, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def node(
    certificates: Certificates, table_bundle: Path, home: FederationHome, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """A node with TLS, for everybody on this machine: its address and, where standing in, what a stand-in has."""
    root, port = tmp_path_factory.mktemp("node"), free_port()
    ports = (f"port={port}", f"grpc_port={free_port()}", f"admin.port={free_port()}")
    tls = (f"tls.certificate={certificates.node}", f"tls.private_key={certificates.node}")
    words = (f"bundle={table_bundle}", "model=heart", f"ca={home.root / 'ca.crt'}", f"state={root / 'state'}")
    process = Background(root / "log", "fedclaw.serve", *words, *ports, *tls, "tokens.disabled=true", fresh=True)
    try:
        process.wait_for(lambda: _is_ready(port, certificates), "is ready")
        yield SimpleNamespace(address=f"127.0.0.1:{port}", arrived=[])
    finally:
        process.stop()


def _is_ready(port: int, certificates: Certificates) -> bool:
    context = ssl.create_default_context(cafile=certificates.ca)
    context.check_hostname = False
    connection = HTTPSConnection("127.0.0.1", port, timeout=PATIENCE, context=context)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _haproxy(node: SimpleNamespace, certificates: Certificates, directory: Path) -> AbstractContextManager[Proxy]:
    return test_haproxy.running(test_haproxy.settings_for(certificates, node.address), directory, certificates)


def _nginx(node: SimpleNamespace, certificates: Certificates, directory: Path) -> AbstractContextManager[Proxy]:
    return test_nginx.running(directory, certificates, node)  # type: ignore[arg-type]


ROWS = [
    {"age": 63, "smoker": "yes", "ward": "surgery"},
    {"age": 41, "smoker": "no", "ward": "O'Brien, <5 mmol"},  # a level that the model does not know
]
PACKED = {"FP32": "<2f", "FP64": "<2d", "INT64": "<2q", "BOOL": "<2?"}


def _tensors(described: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bytes]:
    """Two rows for each input: numbers as bytes behind the JSON, text in it."""
    tensors, raw = [], b""
    for one in described:
        tensor = {"name": one["name"], "datatype": one["datatype"], "shape": [2, *one["shape"][1:]]}
        if one["datatype"] in PACKED:
            values = struct.pack(PACKED[one["datatype"]], 1, 0)
            tensors.append({**tensor, "parameters": {"binary_data_size": len(values)}})
            raw += values
        else:
            tensors.append({**tensor, "data": ["surgery", "medicine"]})
    return tensors, raw


@pytest.mark.parametrize(
    "front",
    [
        pytest.param(_haproxy, marks=test_haproxy.real, id="haproxy"),
        pytest.param(_nginx, marks=test_nginx.pytestmark[1], id="nginx"),
    ],
)
def test_a_node_answers_through_it(
    front: Callable[..., AbstractContextManager[Proxy]],
    node: SimpleNamespace,
    certificates: Certificates,
    tmp_path: Path,
):
    with front(node, certificates, tmp_path) as proxy:
        wait_for(proxy)

        def ask(
            method: str, target: str, body: bytes | None = None, **headers: str
        ) -> tuple[int, bytes, dict[str, str]]:
            context = ssl.create_default_context(cafile=certificates.ca)
            connection = HTTPSConnection("127.0.0.1", proxy.port, timeout=PATIENCE, context=context)
            try:
                connection.request(method, target, body, {k.replace("_", "-"): v for k, v in headers.items()})
                answer = connection.getresponse()
                return answer.status, answer.read(), {k.lower(): v for k, v in answer.getheaders()}
            finally:
                connection.close()

        for target in ("/v2", "/v2/health/live", "/v2/models/heart/ready", "/openapi.json", "/docs"):
            assert ask("GET", target)[0] == 200, target
        rows = json.dumps({"rows": ROWS}).encode()
        status, answer, headers = ask("POST", "/predict", rows, content_type="application/json")
        assert status == 200, answer
        assert headers["fedclaw-version"]
        table = 'age;smoker;ward\n63;yes;surgery\n41;no;"O\'Brien; Südflügel"\n'.encode()
        assert ask("POST", "/predict/heart?delimiter=%3B", table, content_type="text/csv")[0] == 200
        tensors, raw = _tensors(json.loads(ask("GET", "/v2/models/heart")[1])["inputs"])
        assert raw
        head = json.dumps({"inputs": tensors, "parameters": {"binary_data_output": True}}).encode()
        status, answer, headers = ask(
            "POST",
            "/v2/models/heart/infer",
            head + raw,
            content_type="application/octet-stream",
            inference_header_content_length=str(len(head)),
        )
        assert status == 200, answer
        size = int(headers["inference-header-content-length"])
        assert json.loads(answer[:size])["outputs"]
        assert len(answer) > size
        outcome = {"receipt": headers["fedclaw-prediction"], "labels": ["benign", "malignant"]}
        status, answer, _ = ask("POST", "/feedback", json.dumps(outcome).encode(), content_type="application/json")
        assert status == 200, answer
