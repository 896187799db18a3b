"""A node of real processes: what it answers, what it refuses to start with, and how it ends."""

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from fedclaw.errors import ProvisionError, UsageError
from fedclaw.serve.__main__ import main
from tests.conftest import environment, run_module
from tests.serve.node_process import INSECURE, RunningNode, running_node

CSV = "age,smoker,ward\n61,yes,surgery\n,no,medicine\n130,no,medicine\n33.5,no,ward nine\n"


@pytest.fixture(scope="module")
def node(tmp_path_factory, table_bundle, home):
    root = tmp_path_factory.mktemp("node")
    with running_node(root, f"bundle={table_bundle}", "model=heart", f"ca={home.root / 'ca.crt'}", *INSECURE) as found:
        yield found


def columns_of(node: RunningNode) -> list[dict[str, object]]:
    status, found, _ = node.ask("GET", f"{node.http}/v2/models/heart")
    assert status == 200
    return found["inputs"]


def one_row(node: RunningNode) -> dict[str, object]:
    values = {"age": [50.0], "smoker": ["yes"], "ward": ["surgery"]}
    inputs = [{**column, "shape": [1, 1], "data": values[str(column["name"])]} for column in columns_of(node)]
    return {"inputs": inputs}


def test_a_request_is_answered_with_its_version_and_a_receipt(node):
    status, answer, headers = node.ask("POST", f"{node.http}/v2/models/heart/infer", one_row(node))
    assert status == 200
    assert {output["name"] for output in answer["outputs"]} == {"label", "probabilities", "refused"}
    assert headers["fedclaw-version"] == answer["model_version"]
    label = next(output["data"][0] for output in answer["outputs"] if output["name"] == "label")
    body = {"receipt": headers["fedclaw-prediction"], "label": label}
    assert node.ask("POST", f"{node.http}/feedback", body)[0] == 200
    assert node.ask("POST", f"{node.http}/feedback", {**body, "completed": True})[0] == 409
    assert node.ask("POST", f"{node.http}/feedback", {"receipt": "A" * 100})[0] == 422


def test_rows_of_a_table_are_answered_one_by_one(node):
    status, answer, _ = node.ask("POST", f"{node.http}/predict", CSV.encode(), content_type="text/csv")
    assert status == 200, answer
    assert len(answer["rows"]) == 4
    assert "130" in json.dumps(answer["rows"][2])
    assert "ward nine" in json.dumps(answer["rows"][3])


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v2/models/heart/infer", b"{", 400),
        ("POST", "/v2/models/other/infer", b"{}", 404),
        ("POST", "/v2/models/heart/versions/none/infer", b"{}", 404),
        ("GET", "/v2/models/heart/infer", None, 405),
        ("GET", "/v2/repository/index", None, 501),
        ("GET", "/../etc/passwd", None, 400),
        ("GET", "/v2/models/%2e%2e/config", None, 400),
        ("POST", "/predict/heart", b"\xff\xfe\x00", 415),
        ("PUT", "/predict/heart", b"", 405),
    ],
)
def test_what_is_refused_is_refused_in_words(node, method, path, body, status):
    found, answer, _ = node.ask(method, f"{node.http}{path}", body)
    assert found == status, answer
    assert set(answer) <= {"error", "code"}
    assert "Traceback" not in answer["error"]
    assert "/tmp" not in answer["error"]


def test_a_body_that_is_too_large_is_refused_before_it_is_read(node):
    connection = http.client.HTTPConnection(urlsplit(node.http).netloc, timeout=60)
    connection.putrequest("POST", "/predict/heart")
    connection.putheader("content-type", "text/csv")
    connection.putheader("content-length", str(17 << 20))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_the_bundle_is_served_from_a_copy_that_only_the_service_can_write(node):
    store = node.log.parent / "node" / "bundles"
    assert store.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o077 == 0 for path in (node.log.parent / "node").rglob("*"))


def test_metrics_and_decisions_are_at_the_admin_port(node):
    status, page, _ = node.ask("GET", f"{node.admin}/metrics")
    assert status == 200
    assert b"fedclaw_serve_" in page
    assert node.ask("GET", f"{node.http}/metrics")[0] == 404
    assert node.ask("GET", f"{node.admin}/admin/models")[1][0]["model"] == "heart"


@pytest.mark.slow
def test_a_worker_that_is_killed_is_started_again(node):
    before = node.processes()["worker-1"]
    os.kill(before, signal.SIGKILL)
    node.wait_for(lambda: node.processes()["worker-1"] not in {before, None} or None)

    def answered() -> bool | None:
        try:
            return node.ask("GET", f"{node.http}/v2/health/ready")[0] == 200 or None
        except OSError:
            return None

    node.wait_for(answered)
    assert node.ask("POST", f"{node.http}/v2/models/heart/infer", one_row(node))[0] == 200


@pytest.mark.slow
def test_a_second_node_in_the_same_directory_changes_nothing(node, table_bundle, home):
    settings = (f"bundle={table_bundle}", "model=other", f"ca={home.root / 'ca.crt'}", *INSECURE)
    second = run_module("fedclaw.serve", f"state={node.log.parent / 'node'}", "port=0", *settings)
    assert second.code == 2
    assert "a node runs in it already" in second.errors
    assert [found["model"] for found in node.ask("GET", f"{node.admin}/admin/models")[1]] == ["heart"]


@pytest.mark.slow
def test_what_an_upload_left_that_was_broken_off_is_swept(node):
    left = node.log.parent / "node" / ".incoming.broken"
    left.mkdir(mode=0o700)
    (left / "archive").touch()
    copied = node.log.parent / "node" / "bundles" / ".incoming.broken"
    copied.mkdir(mode=0o700)
    os.kill(node.processes()["control"], signal.SIGKILL)
    node.wait_for(lambda: True if not left.exists() and not copied.exists() else None)


@pytest.mark.slow
def test_ctrl_c_while_its_processes_start_ends_all_without_a_traceback(tmp_path, table_bundle, home):
    settings = (f"bundle={table_bundle}", f"ca={home.root / 'ca.crt'}", "port=0", "grpc_port=0", "admin.port=0")
    state = tmp_path / "node"
    command = [sys.executable, "-m", "fedclaw.serve", f"state={state}", *settings, *INSECURE]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, env=environment(), start_new_session=True, text=True, **pipes)
    while not (state / "processes.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_client_that_keeps_its_connection_is_told_of_the_end_with_an_answer(tmp_path, table_bundle, home):
    settings = (f"bundle={table_bundle}", "model=heart", f"ca={home.root / 'ca.crt'}", *INSECURE)
    with running_node(tmp_path, *settings) as node:
        connection = http.client.HTTPConnection(urlsplit(node.http).netloc, timeout=60)
        connection.connect()
        node.process.send_signal(signal.SIGTERM)
        closed = False
        while not closed:
            # It is idle for most of the time, and so it is when the word to stop comes.
            time.sleep(0.02)
            connection.request("POST", "/predict/heart", CSV, {"content-type": "text/csv"})
            answer = connection.getresponse()
            assert answer.read()
            assert answer.status == 200
            closed = answer.will_close
        connection.close()
        assert node.process.wait(60) == 143


@pytest.mark.slow
def test_a_copy_that_was_changed_is_not_served_again_and_what_is_served_stays(tmp_path, table_bundle, home):
    settings = (f"bundle={table_bundle}", "model=heart", f"ca={home.root / 'ca.crt'}", *INSECURE)
    with running_node(tmp_path, *settings) as node:
        store = next((tmp_path / "node" / "bundles").glob("[0-9a-f]" * 64))
        graph = store / "pipeline.onnx"
        content = bytearray(graph.read_bytes())
        content[-1] ^= 1
        graph.write_bytes(content)
        assert node.ask("POST", f"{node.http}/v2/models/heart/infer", one_row(node))[0] == 200
        assert node.stop() == 143
    again = run_module(
        "fedclaw.serve", f"state={tmp_path / 'node'}", "port=0", "grpc_port=0", "admin.port=0",
        f"ca={home.root / 'ca.crt'}", *INSECURE,
    )  # fmt: skip
    assert again.code == 1
    assert "pipeline.onnx" in again.errors


def test_a_bundle_that_was_changed_is_refused(tmp_path, table_bundle, home):
    bundle = tmp_path / "bundle"
    shutil.copytree(table_bundle, bundle)
    (bundle / "schema.json").write_bytes((bundle / "schema.json").read_bytes() + b" ")
    found = run_module(
        "fedclaw.serve", f"bundle={bundle}", f"ca={home.root / 'ca.crt'}", f"state={tmp_path / 'node'}", *INSECURE
    )
    assert found.code == 1
    assert "schema.json" in found.errors
    assert "Traceback" not in found.errors


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ((), "tls.certificate"),
        (("tls.disabled=true",), "tokens.jwks"),
        (("host=0.0.0.0", *INSECURE), "0.0.0.0"),
        (INSECURE, "no model to serve"),
        (("bundle=nowhere", *INSECURE), "nowhere"),
        ((".", *INSECURE), "give bundle=."),
        (("release.steps=[0.5,0.1,1]", *INSECURE), "release.steps: shares must rise and end at 1"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, settings, said):
    found = run_module("fedclaw.serve", f"state={tmp_path / 'node'}", *settings)
    assert found.code == 2, found.errors
    assert said in found.errors
    assert "Traceback" not in found.errors
    assert not (Path(tmp_path) / "node").exists()


def refused(arguments: list[str], what: type[Exception], words: str) -> None:
    with pytest.raises(what, match=words):
        main(arguments)


def test_a_node_is_told_whose_bundles_it_serves(tmp_path, table_bundle):
    refused([f"bundle={table_bundle}", f"state={tmp_path / 'node'}", *INSECURE], UsageError, "whose bundles")
    trust = f"ca={table_bundle / 'ca.crt'}"
    refused(
        [f"bundle={tmp_path}", trust, f"state={tmp_path / 'node'}", *INSECURE], UsageError, "is no bundle: it has no"
    )
    assert not (tmp_path / "node").exists()


def test_files_that_are_no_good_are_told_before_anything_begins(tmp_path, table_bundle, home):
    key = tmp_path / "open.key"
    key.write_bytes((home.root / "server.key").read_bytes())
    key.chmod(0o644)
    (tmp_path / "keys.json").write_text("{}")
    authority = home.root / "ca.crt"
    given = [f"bundle={table_bundle}", f"ca={authority}", f"state={tmp_path / 'node'}", "tokens.issuer=a"]
    given += [
        "tokens.audience=b",
        f"tls.certificate={home.root / 'server.crt'}",
        f"tokens.jwks={tmp_path / 'keys.json'}",
    ]
    refused([*given, f"tls.private_key={key}"], ProvisionError, "chmod 600")
    refused([*given, f"tls.private_key={home.root / 'ca.key'}"], ProvisionError, "does not fit")
    refused([*given, f"tls.private_key={home.root / 'server.key'}"], UsageError, "is no key set")
    refused(
        [*given, f"tls.private_key={home.root / 'server.key'}", "tokens.jwks=http://host/keys"], UsageError, "https"
    )
    assert not (tmp_path / "node").exists()


def test_rates_that_cannot_be_are_told_before_anything_begins(tmp_path, table_bundle, home):
    given = [f"bundle={table_bundle}", f"ca={home.root / 'ca.crt'}", f"state={tmp_path / 'node'}", *INSECURE]
    for limits in ("limits", "admin"):
        refused([*given, f"{limits}.requests_per_second=0.001"], UsageError, f"{limits}.burst: a rate limit needs")
    refused([*given, "limits.rows_per_second=0.001"], UsageError, "limits.rows_burst: a rate limit needs")
    assert not (tmp_path / "node").exists()


def test_who_asks_for_probabilities_alone_can_still_give_feedback(node):
    asked = {**one_row(node), "outputs": [{"name": "probabilities"}]}
    status, answer, headers = node.ask("POST", f"{node.http}/v2/models/heart/infer", asked)
    assert (status, [output["name"] for output in answer["outputs"]]) == (200, ["probabilities"])
    labels = node.ask("POST", f"{node.http}/v2/models/heart/infer", one_row(node))[1]["outputs"]
    label = next(output["data"][0] for output in labels if output["name"] == "label")
    body = {"receipt": headers["fedclaw-prediction"], "label": label}
    assert node.ask("POST", f"{node.http}/feedback", body)[0] == 200
    assert node.ask("POST", f"{node.http}/feedback", {**body, "label": "made up"})[0] in {409, 422}


def test_answers_on_one_connection_keep_apart_and_a_client_may_end_it(node):
    connection = http.client.HTTPConnection(urlsplit(node.http).netloc, timeout=60)
    for path, status, kept in (("/v2", 200, {}), ("/nowhere", 404, {}), ("/v2", 200, {"connection": "close"})):
        connection.request("GET", path, headers=kept)
        response = connection.getresponse()
        content = response.read()
        assert (response.status, len(content)) == (status, int(response.headers["content-length"]))
        assert (response.headers["connection"] == "close") == bool(kept)
    connection.request("HEAD", "/v2")
    response = connection.getresponse()
    assert (response.status, response.read()) == (405, b"")
    connection.close()


def test_the_baseline_of_inputs_is_begun_anew_at_a_persons_word(node):
    model = f"{node.admin}/admin/models/heart"
    assert node.ask("POST", f"{model}/baseline")[:2] == (200, {"model": "heart", "baseline": "the next rows"})
    last = node.ask("GET", f"{model}/events")[1][-1]
    assert (last["kind"], last["by"]) == ("new_baseline", "anonymous")
    assert node.ask("POST", f"{node.admin}/admin/models/lung/baseline")[0] == 404


def test_a_path_or_method_that_the_admin_port_has_not_is_refused_in_words(node):
    status, found, _ = node.ask("GET", f"{node.admin}/nowhere")
    assert (status, found["code"]) == (404, "not_found")
    assert node.ask("PUT", f"{node.admin}/admin/models", {})[0] == 405
