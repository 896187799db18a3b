"""What a node notes of requests that it refuses: who it was, wherever that is known, and no more than a disk takes."""

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

import grpc
import pytest

from fedclaw.serve.inference.protocol import SERVICE
from fedclaw.serve.inference.protocol import open_inference_pb2 as messages
from fedclaw.serve.security.development_tokens import sign_token, write_keys
from tests.serve.node_process import RunningNode, running_node

ISSUED = ("issuer", "audience")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def node(tmp_path_factory, table_bundle, home):
    root = tmp_path_factory.mktemp("refusing")
    write_keys(root / "keys")
    token = sign_token(root / "keys", *ISSUED, "mallory", ["predict:other"], 600)
    settings = (
        f"bundle={table_bundle}",
        "model=heart",
        f"ca={home.root / 'ca.crt'}",
        "tls.disabled=true",
        f"tokens.jwks={root / 'keys' / 'keys.json'}",
        "tokens.issuer=issuer",
        "tokens.audience=audience",
    )
    with running_node(root, *settings, token=token) as found:
        yield found


def lines(node: RunningNode) -> list[dict[str, Any]]:
    files = sorted((node.log.parent / "node" / "audit").glob("*.jsonl"))
    return [json.loads(line)["entry"] for file in files for line in file.read_text().splitlines()]


def test_who_asks_for_what_it_may_not_is_named(node):
    assert node.ask("POST", f"{node.http}/v2/models/heart/infer", {})[0] == 403
    last = lines(node)[-1]
    assert (last["principal"], last["model"], last["status"]) == ("mallory", "heart", 403)
    assert node.ask("POST", f"{node.http}/predict/{'x' * 500}", b"a")[0] == 403
    assert lines(node)[-1]["model"] == "x" * 64


def test_grpc_calls_that_are_refused_are_noted_too(node):
    with grpc.insecure_channel(node.grpc) as channel:
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer", messages.ModelInferRequest.SerializeToString)
        asked = messages.ModelInferRequest(model_name="heart")
        for metadata, name in (([("authorization", f"Bearer {node.token}")], "mallory"), ([], "")):
            with pytest.raises(grpc.RpcError):
                call(asked, metadata=metadata)
            last = lines(node)[-1]
            assert (last["principal"], last["model"]) == (name, "heart")
            assert last["status"] in {401, 403}


def test_who_has_no_token_cannot_fill_the_disk(node):
    before = len(lines(node))
    connection = http.client.HTTPConnection(urlsplit(node.http).netloc, timeout=60)
    for _ in range(1500):
        connection.request("GET", "/nothing")
        connection.getresponse().read()
    connection.close()
    assert 50 < len(lines(node)) - before < 750
