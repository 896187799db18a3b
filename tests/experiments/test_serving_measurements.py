"""What measures a node from outside: that the load is what it says, and that the figures are those of the outcomes."""

import http.server
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from concurrent import futures
from contextlib import contextmanager

import grpc
import jwt
import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from scipy.stats import binom

from experiments.chaos.kills import Kill
from experiments.chaos.releases import binomial_interval
from experiments.serving.bundles import KINDS, LABELS, Digits, Disagreeing, Failing, Slow
from experiments.serving.clients import Crowd, Outcome, next_success
from experiments.serving.issuer import AUDIENCE, ISSUER, Issuer
from experiments.serving.load import Asked, Load, LoadError, grpc_load, http_load, median_load
from experiments.serving.requests import binary_request, json_request
from experiments.serving.servers import Server, ServerError, family, hydra, processor_seconds

wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
h2load = pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load is not installed")
BODY = bytes(range(256)) + b'"\\]]'


@contextmanager
def answering(status_of):
    """An HTTP server that answers each POST with `status_of(n, headers, body)`; its address."""
    count = iter(range(10**9))

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status_of(next(count), self.headers, body))
            self.send_header("fedclaw-version", "v1")
            content = json.dumps({"outputs": [{"name": "label", "data": ["7"]}]}).encode()
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@wrk
def test_wrk_sends_the_very_bytes_and_counts_refusals_apart():
    def status(number, headers, body):
        right = body == BODY and headers["authorization"] == 'Bearer "x\\y' and headers["content-type"] == "a/b"
        return (503 if number % 4 == 0 else 200) if right else 400

    with answering(status) as url:
        asked = Asked(f"{url}/x", BODY, {"authorization": 'Bearer "x\\y', "content-type": "a/b"})
        load = http_load(asked, 2, 1)
    assert load.answered > 10
    assert load.errors == pytest.approx(load.answered / 3, abs=3)
    assert load.rate == pytest.approx(load.answered, rel=0.3)
    assert 0 < load.p50 <= load.p99


@wrk
def test_a_load_that_nobody_answers_is_an_error():
    with answering(lambda *_: 500) as url, pytest.raises(LoadError, match="none of"):
        http_load(Asked(url, b"x"), 1, 1)


@h2load
def test_h2load_makes_grpc_calls_of_the_very_bytes():
    seen = set()

    def call(body, context):
        seen.add((bytes(body), dict(context.invocation_metadata()).get("authorization")))
        return b"answer"

    handler = grpc.method_handlers_generic_handler("a.B", {"C": grpc.unary_unary_rpc_method_handler(call)})
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        load = grpc_load(Asked(f"http://127.0.0.1:{port}/a.B/C", BODY, {"authorization": "Bearer y"}), 2, 1)
    finally:
        server.stop(None)
    assert seen == {(BODY, "Bearer y")}
    assert load.answered > 10
    assert load.errors == 0
    assert 0 < load.p50 <= load.p99


def test_rounds_come_to_their_median_and_all_of_their_errors():
    rounds = [Load(rate, p50, p99, 10, errors) for rate, p50, p99, errors in ((5, 3, 9, 1), (1, 1, 7, 0), (3, 2, 8, 2))]
    assert median_load(rounds) == Load(3, 2, 8, 30, 3)


def test_the_binary_form_holds_the_bytes_of_the_rows():
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    body, headers = binary_request(rows)
    length = int(headers["inference-header-content-length"])
    (tensor,) = json.loads(body[:length])["inputs"]
    assert tensor == {"name": "inputs", "datatype": "FP32", "shape": [2, 3], "parameters": {"binary_data_size": 24}}
    assert struct.unpack("<6f", body[length:]) == (0, 1, 2, 3, 4, 5)
    (tensor,) = json.loads(json_request(rows, id="a"))["inputs"]
    assert tensor["data"] == [0, 1, 2, 3, 4, 5]


def test_tokens_are_signed_by_the_key_in_the_file_but_for_the_wrong_ones(tmp_path):
    issuer = Issuer(tmp_path / "jwks.json")
    (key,) = jwt.PyJWKSet.from_dict(json.loads((tmp_path / "jwks.json").read_text())).keys

    def claims(token):
        return jwt.decode(token, key, ["ES256"], audience=AUDIENCE, issuer=ISSUER)

    found = claims(issuer.token(("predict:a", "admin:read"), "anna"))
    assert (found["scope"], found["sub"]) == ("predict:a admin:read", "anna")
    for wrong in (issuer.unsigned(), issuer.token(aud="other"), issuer.token(exp=1), Issuer(tmp_path / "b").token()):
        with pytest.raises(jwt.InvalidTokenError):
            claims(wrong)


class TestBundles:
    def test_what_goes_wrong_is_in_the_nets(self):
        torch.manual_seed(0)
        net, digits = KINDS["cnn"].make().eval(), Digits.load()
        inputs = KINDS["cnn"].inputs(digits)[:50]
        right = net(inputs)
        assert torch.equal(Failing(net)(inputs), right)
        with pytest.raises(IndexError, match="out of range"):
            Failing(net)(torch.cat([inputs, torch.ones(1, 1, 8, 8)]))
        assert torch.equal(Disagreeing(net)(inputs).argmax(1), (right.argmax(1) + 1) % len(LABELS))
        assert torch.allclose(Slow(net)(inputs), right, atol=1e-6)

    def test_the_sizes_are_those_that_the_table_says(self):
        sizes = {name: sum(one.numel() for one in kind.make().parameters()) for name, kind in KINDS.items()}
        assert sizes["cnn"] == pytest.approx(6_000, rel=0.05)
        assert sizes["mlp"] == pytest.approx(10_000_000, rel=0.01)


def test_a_process_and_all_that_it_started_are_found_and_charged():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        end = time.monotonic() + 30
        while len(found := family(process.pid)) < 2 or processor_seconds(found[1]) < 0.1:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert found[0] == process.pid
    finally:
        os.killpg(process.pid, 9)
        process.wait()
    assert family(process.pid)[1:] == []
    assert processor_seconds(process.pid) == 0


def test_a_server_that_ends_is_an_error_with_its_last_words(tmp_path):
    command = [sys.executable, "-c", "print('no such bundle')"]
    with (
        pytest.raises(ServerError, match="no such bundle"),
        Server("node", command, "http://127.0.0.1:9", "/", tmp_path / "log"),
    ):
        pass


@pytest.mark.parametrize(
    "value",
    [
        {"a": {"bundle": "/a b/c,d=e", "pinned": True}},
        ["on", 1.5, None],
        "file:/x y",
        1e6,
    ],
)
def test_settings_reach_hydra_as_they_are(value):
    (override,) = OverridesParser.create().parse_overrides([f"x={hydra(value)}"])
    found = override.value()
    assert json.loads(json.dumps(found, default=str)) == value


def outcome(began, ended, status):
    return Outcome(began, ended, status, "key", "id")


def test_what_clients_saw_of_a_kill():
    outcomes = [
        outcome(8, 9, 0),
        outcome(9, 11, 0),
        outcome(9.5, 10.5, 200),
        outcome(11, 12, 503),
        outcome(11, 13, 200),
    ]
    assert Kill.of(outcomes, 10) == Kill(asked=4, failed=2, next_success=3, last_failure=2)
    assert next_success(outcomes, 12) is None


def test_the_interval_is_that_of_the_binomial():
    for count, share, confidence in ((1000, 0.05, 0.999), (50, 0.5, 0.95), (10, 0.05, 0.9)):
        low, high = binom.interval(confidence, count, share)
        assert binomial_interval(count, share, confidence) == (low, high)


def test_a_crowd_notes_what_became_of_each_request():
    keys = set()

    def status(number, headers, body):
        keys.add(headers["fedclaw-key"])
        return 500 if number % 3 == 2 else 200

    with answering(status) as url:
        crowd = Crowd(url, ["a", "b"], "digits", lambda _: np.zeros((1, 64), np.float32), clients=3, pause=0)
        with crowd:
            assert crowd.wait_for(lambda outcomes: len(outcomes) > 60, 60)
    good = [one for one in crowd.outcomes if one.good]
    assert {(one.version, one.label) for one in good} == {("v1", "7")}
    assert len(crowd.outcomes) == len(keys) == len({one.identity for one in crowd.outcomes})
    assert sum(one.failed for one in crowd.outcomes) == pytest.approx(len(crowd.outcomes) / 3, abs=3)


def test_a_crowd_whose_service_goes_away_counts_failures():
    with answering(lambda *_: 200) as url:
        pass
    crowd = Crowd(url, ["a"], "digits", lambda _: np.zeros((1, 64), np.float32), clients=1, pause=0.01)
    with crowd:
        assert crowd.wait_for(lambda outcomes: len(outcomes) > 3, 60)
    assert all(one.failed and one.status == 0 for one in crowd.outcomes)
