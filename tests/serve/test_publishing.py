"""A new version for a node that runs: published, compared, taken back, refused."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import urlsplit

import pytest

from fedclaw.serve.__main__ import main
from fedclaw.serve.security.development_tokens import sign_token, write_keys
from tests.bundles import export_table
from tests.conftest import environment, run_module
from tests.serve.node_process import INSECURE, RunningNode, running_node

ISSUED = ("issuer", "audience")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def second_bundle(tmp_path_factory, table_source, home) -> Path:
    return export_table(table_source, home, tmp_path_factory.mktemp("second") / "bundle")


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("keys")
    write_keys(directory / "keys")
    return directory / "keys"


@pytest.fixture
def node(tmp_path, table_bundle, home, keys):
    token = sign_token(keys, *ISSUED, "ann", ["predict:*", "admin:*"], 60)
    settings = (
        f"bundle={table_bundle}",
        "model=heart",
        f"ca={home.root / 'ca.crt'}",
        "tls.disabled=true",
        f"tokens.jwks={keys / 'keys.json'}",
        "tokens.issuer=issuer",
        "tokens.audience=audience",
    )
    with running_node(tmp_path, *settings, token=token) as found:
        (tmp_path / "token").write_text(token)
        yield found


def publish(node: RunningNode, bundle: Path, *settings: str):
    token = node.log.parent / "token"
    return run_module(
        "fedclaw.serve",
        "publish",
        f"bundle={bundle}",
        "model=heart",
        f"node={node.admin}",
        f"token=file:{token}",
        *settings,
    )


def release(node: RunningNode):
    return node.ask("GET", f"{node.admin}/admin/models/heart/release")[1]


def test_a_version_takes_the_place_of_another_at_once(node, second_bundle):
    before = release(node)["says"]
    done = publish(node, second_bundle, "mode=at_once", "version=second", "wait=true")
    assert done.code == 0, done.errors
    assert "second answers" in done.output
    assert release(node)["says"] == "second answers" != before
    body = b"age,smoker,ward\n61,yes,surgery\n"

    def answered_by_the_second() -> bool | None:
        status, answer, headers = node.ask("POST", f"{node.http}/predict/heart", body, content_type="text/csv")
        assert status == 200, answer
        return headers["fedclaw-version"] == "second" or None

    node.wait_for(answered_by_the_second)  # Workers read plans four times a second.


def test_a_canary_begins_with_some_of_the_keys_and_is_taken_back(node, second_bundle):
    assert publish(node, second_bundle, "mode=canary", "version=second").code == 0
    assert release(node)["state"] == "canary"
    status, found, _ = node.ask("POST", f"{node.admin}/admin/models/heart/roll_back", {})
    assert (status, found["state"]) == (200, "rolled_back")
    kinds = [event["kind"] for event in node.ask("GET", f"{node.admin}/admin/models/heart/events")[1]]
    assert "published" in kinds


def test_what_is_no_version_of_the_model_is_refused_and_what_answers_stays(node, image_bundle, second_bundle, tmp_path):
    before = release(node)["says"]
    other = publish(node, image_bundle, "mode=canary")
    assert other.code == 1
    assert "other columns" in other.errors
    changed = tmp_path / "changed"
    shutil.copytree(second_bundle, changed)
    (changed / "model.onnx").write_bytes((changed / "model.onnx").read_bytes() + b"\0")
    broken = publish(node, changed)
    assert broken.code == 1
    assert "model.onnx" in broken.errors
    assert str(tmp_path / "node") not in broken.errors
    none = publish(node, tmp_path)
    assert none.code == 2
    assert f"bundle={tmp_path} is no bundle" in none.errors
    assert release(node)["says"] == before


def test_who_may_not_publish_is_refused(node, second_bundle, keys):
    (node.log.parent / "token").write_text(sign_token(keys, *ISSUED, "bob", ["predict:*", "admin:read"], 60))
    done = publish(node, second_bundle)
    assert done.code == 1
    assert "403" in done.errors
    assert "'bob' was refused at the admin port" in node.log.read_text()


def test_an_upload_that_breaks_off_is_no_failure_of_the_node(node):
    place = urlsplit(node.admin)
    with socket.create_connection((place.hostname, place.port)) as connection:
        connection.sendall(
            b"POST /admin/models/heart/versions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
            b"Authorization: Bearer " + str(node.token).encode() + b"\r\n"
            b"Content-Type: application/x-tar\r\n\r\n4\r\nabcd\r\n"
        )
    node.wait_for(lambda: True if "went away" in node.log.read_text() else None)
    assert "Traceback" not in node.log.read_text()


def test_who_waits_for_a_release_learns_that_another_version_was_pinned(node, second_bundle):
    first = release(node)["stable"]
    waiting = Thread(target=lambda: ended.append(publish(node, second_bundle, "version=second", "wait=true")))
    ended: list[Any] = []
    waiting.start()
    node.wait_for(lambda: True if release(node)["state"] == "canary" else None)
    assert node.ask("POST", f"{node.admin}/admin/models/heart/pin", {"version": first})[0] == 200
    waiting.join()
    assert ended[0].code == 1, ended[0].output
    assert "second" in ended[0].errors


def test_who_stops_waiting_is_told_that_the_release_goes_on(node, second_bundle):
    command = [sys.executable, "-m", "fedclaw.serve", "publish", f"bundle={second_bundle}", "model=heart", "wait=true"]
    command += ["version=second", f"node={node.admin}", f"token=file:{node.log.parent / 'token'}"]
    log = node.log.parent / "publish.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment())
    node.wait_for(lambda: True if "answers 5%" in log.read_text() else None)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "the release of second goes on at the node" in log.read_text()
    assert release(node)["state"] == "canary"


def test_a_model_whose_copy_is_damaged_takes_no_other_down(tmp_path, table_bundle, image_bundle, home):
    models = f"models={{heart: {{bundle: '{table_bundle}'}}, scan: {{bundle: '{image_bundle}'}}}}"
    with running_node(tmp_path, models, f"ca={home.root / 'ca.crt'}", *INSECURE) as node:
        entry = node.ask("GET", f"{node.admin}/admin/models/scan")[1]
        digest = next(iter(entry["versions"].values()))["digest"]
        (tmp_path / "node" / "bundles" / digest / "schema.json").write_bytes(b"{}")
        before = node.processes()["worker-1"]
        os.kill(before, signal.SIGKILL)

        def answered() -> tuple[int, int] | None:
            body = b"age,smoker,ward\n61,yes,surgery\n"
            try:
                status, _, _ = node.ask("POST", f"{node.http}/predict/heart", body, content_type="text/csv")
                return (status, node.ask("GET", f"{node.http}/v2/health/ready")[0]) if status == 200 else None
            except OSError:
                return None

        assert node.wait_for(answered) == (200, 503)
        assert node.processes()["worker-1"] != before
        assert node.ask("GET", f"{node.http}/v2/models/scan/ready")[0] == 503


def test_a_flood_at_the_admin_port_keeps_nobody_else_from_it_and_no_decision_from_being_made(
    node, second_bundle, keys, capsys
):
    tokens = [None, "made up", sign_token(keys, *ISSUED, "mallory", ["admin:read"], 60)]
    ended, statuses = Event(), Counter()
    # From the address of those that come with bad tokens: only one that is known to be good is not made to wait.
    assert release(node)["state"] == "answers"

    def flood(token: str | None) -> None:
        other = replace(node, token=token)
        while not ended.is_set():
            statuses[token, other.ask("GET", f"{node.admin}/admin/events?limit=10000")[0]] += 1

    floods = [Thread(target=flood, args=(token,)) for token in tokens]
    for thread in floods:
        thread.start()
    try:
        node.wait_for(lambda: True if {status for _, status in statuses} >= {200, 401, 429} else None)
        assert publish(node, second_bundle, "mode=canary", "version=second").code == 0
        assert release(node)["state"] == "canary"
        assert node.ask("POST", f"{node.admin}/admin/models/heart/roll_back", {})[0] == 200
        assert node.ask("GET", f"{node.admin}/metrics")[0] == 200
    finally:
        ended.set()
        for thread in floods:
            thread.join()
    assert node.stop() == 143
    main(["audit", f"state={node.log.parent / 'node'}", "principal=ann", "model=heart"])
    told = capsys.readouterr().out
    assert "node.control: " in told
    assert told.count(": whole") == 2
    rows = [line.split()[1:] for line in told.splitlines() if " ann " in line]
    assert {row[2] for row in rows} == {"publish", "release", "roll_back"}
    assert sum("roll_back" in row for row in rows) == 2


def test_publishing_the_same_again_changes_nothing(node, second_bundle):
    for _ in range(2):
        done = publish(node, second_bundle, "mode=canary", "version=second")
        assert done.code == 0, done.errors
    kinds = [event["kind"] for event in node.ask("GET", f"{node.admin}/admin/models/heart/events")[1]]
    assert (kinds.count("published"), kinds.count("canary_started")) == (1, 1)


def test_a_model_that_is_removed_is_answered_until_it_is_gone_and_can_come_again(node, second_bundle, image_bundle):
    def published(bundle: Path) -> str:
        done = publish(node, bundle, "model=lung", "version=first", "mode=at_once")
        assert done.code == 0, done.errors
        return node.ask("GET", f"{node.admin}/admin/models/lung")[1]["versions"]["first"]["digest"]

    def ready() -> str:
        (worker,) = node.ask("GET", f"{node.admin}/admin/node")[1]["workers"]
        return " ".join(worker["ready"])

    digest = published(second_bundle)
    body = b"age,smoker,ward\n61,yes,surgery\n"
    statuses: list[int] = []
    ended = Event()

    def keep_asking() -> None:
        while not ended.is_set():
            statuses.append(node.ask("POST", f"{node.http}/predict/lung", body, content_type="text/csv")[0])

    node.wait_for(lambda: True if digest in ready() else None)
    clients = [Thread(target=keep_asking) for _ in range(3)]
    for client in clients:
        client.start()
    node.wait_for(lambda: True if 200 in statuses else None)
    assert node.ask("DELETE", f"{node.admin}/admin/models/heart")[0] == 409
    status, told, _ = node.ask("DELETE", f"{node.admin}/admin/models/lung")
    assert (status, told) == (200, {"model": "lung", "removed": ["first"]})
    node.wait_for(lambda: True if 404 in statuses[-3:] and digest not in ready() else None)
    ended.set()
    for client in clients:
        client.join()
    assert set(statuses) == {200, 404}
    for path in ("/admin/models/lung", "/admin/models/lung/release"):
        assert node.ask("GET", f"{node.admin}{path}")[0] == 404
    assert node.ask("DELETE", f"{node.admin}/admin/models/lung")[0] == 404
    assert node.ask("GET", f"{node.http}/v2/health/ready")[0] == 200
    assert [event["by"] for event in node.ask("GET", f"{node.admin}/admin/models/lung/events")[1]][-1] == "ann"
    # Another bundle may have the name now, and workers answer from that one.
    other = published(image_bundle)
    node.wait_for(lambda: True if other in ready() else None)

    def described() -> Any:
        status, model, _ = node.ask("GET", f"{node.http}/v2/models/lung")
        return model if status == 200 else None

    model = node.wait_for(described)  # Workers read plans four times a second.
    assert [column["name"] for column in model["inputs"]] == ["images"]
