"""What a node has to refuse while it answers everybody else: tokens, bodies, connections and bundles that are wrong."""

import http.client
import os
import random
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.report import Figure, Row
from experiments.chaos.kills import worker_processes
from experiments.chaos.releases import publish
from experiments.chaos.stage import MODEL, Finding, Stage
from experiments.serving.bundles import Digits, Foundry
from experiments.serving.clients import Client, Crowd
from experiments.serving.issuer import Issuer
from experiments.serving.requests import json_request
from experiments.serving.servers import Node
from fedclaw.errors import FedClawError

BODY_BYTES, HEADER_SECONDS = 1 << 20, 1.0
"""Limits of the node that is attacked."""
SLOW_CONNECTIONS = 50
SLACK = 3.0
"""Seconds beyond the limit after which a slow connection counts as one that was let live."""
HOUR = 3600
ATTACKERS = "127.9.0.0/16"
"""Addresses of this machine, as Linux has them."""
_SWAPPED_FOR = 4.0
"""Seconds of load after a stored bundle was changed."""


@dataclass(frozen=True)
class Scene:
    """A node under load, and those who attack it."""

    stage: Stage
    node: Node
    stranger: Issuer
    """Its keys are not the node's issuer's."""
    impostor: Foundry
    """Another federation of the same name."""
    addresses: Iterator[str]
    """Where attackers ask from, a new one each time: else the node would soon refuse whatever comes from the one that
    they share."""

    def status(self, token: str | None, body: bytes | None = None) -> int:
        """What one request gets."""
        client = Client(self.node.url, token or "", source=next(self.addresses))
        asked = json_request(self.stage.digit(0)) if body is None else body
        status, _, _ = client.post(f"/v2/models/{MODEL}/infer", asked)
        client.close()
        return status


def attacks() -> Mapping[str, Callable[[Scene, int], bool]]:
    """By name, what one trial does; whether it was refused."""
    return {
        "no token": lambda scene, _: scene.status(None) == HTTPStatus.UNAUTHORIZED,
        "an expired token": lambda scene, trial: _token_refused(scene, exp=int(time.time()) - HOUR - trial),
        "a token for later": lambda scene, trial: _token_refused(scene, nbf=int(time.time()) + HOUR + trial),
        "a token of another audience": lambda scene, trial: _token_refused(scene, aud=f"other-{trial}"),
        "a token of another issuer": lambda scene, trial: _token_refused(scene, iss=f"https://other-{trial}.example"),
        "alg: none": lambda scene, trial: _refused(scene, scene.stage.issuer.unsigned(f"admin-{trial}")),
        "a token that a stranger signed": lambda scene, _: _refused(scene, scene.stranger.token()),
        "a token without the scope": without_the_scope,
        "an oversized body": oversized,
        "an oversized body in chunks": oversized_in_chunks,
        "slow headers": slow_headers,
        "a corrupted bundle": corrupted_bundle,
        "a bundle that another federation signed": lambda scene, _: _not_taken(scene, scene.impostor.bundle("cnn")),
    }


def _token_refused(scene: Scene, **claims: Any) -> bool:
    return _refused(scene, scene.stage.issuer.token(**claims))


def _refused(scene: Scene, token: str) -> bool:
    return scene.status(token) == HTTPStatus.UNAUTHORIZED


def without_the_scope(scene: Scene, trial: int) -> bool:
    """A good token for another model."""
    return scene.status(scene.stage.issuer.token((f"predict:other-{trial}",))) == HTTPStatus.FORBIDDEN


def oversized(scene: Scene, trial: int) -> bool:
    """A body that says its size: an error, or the connection is closed."""
    status = scene.status(scene.stage.tokens[0], b" " * (BODY_BYTES + 1 + trial))
    return status in (0, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)


def oversized_in_chunks(scene: Scene, _: int) -> bool:
    """A body that does not say its size, and does not end."""
    piece = b" " * (BODY_BYTES // 8)
    connection = http.client.HTTPConnection("127.0.0.1", scene.node.ports.http, timeout=20)
    headers = {"authorization": f"Bearer {scene.stage.tokens[0]}", "content-type": "application/json"}
    pieces = (piece for _ in range(16))
    try:
        connection.request("POST", f"/v2/models/{MODEL}/infer", pieces, headers, encode_chunked=True)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException):
        status = 0
    connection.close()
    return status in (0, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)


def slow_headers(scene: Scene, _: int) -> bool:
    """Connections that never get to the end of a header: all are closed in time."""
    with ExitStack() as stack:
        place = ("127.0.0.1", scene.node.ports.http)
        slow = [stack.enter_context(socket.create_connection(place)) for _ in range(SLOW_CONNECTIONS)]
        for connection in slow:
            connection.setblocking(False)
            connection.send(b"POST /v2/models/digits/infer HTTP/1.1\r\nhost: x\r\n")
        open_still, end = set(slow), time.monotonic() + HEADER_SECONDS + SLACK
        while open_still and time.monotonic() < end:
            time.sleep(0.2)
            open_still = {connection for connection in open_still if not _closed(connection)}
    return not open_still


def _closed(connection: socket.socket) -> bool:
    """Whether the other side has ended it; sends a little more if not."""
    try:
        while connection.recv(4096):
            pass
    except BlockingIOError:
        try:
            connection.send(b"x: y\r\n")
        except OSError:
            return True
        return False
    except OSError:
        return True
    return True


def corrupted_bundle(scene: Scene, trial: int) -> bool:
    """One bit of one file of a signed bundle is another one."""
    chosen = random.Random(trial)
    copy = scene.stage.root / f"corrupted-{trial}"
    shutil.copytree(scene.stage.foundry.bundle("same"), copy)
    path = chosen.choice(sorted(copy.iterdir()))
    content = bytearray(path.read_bytes())
    content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
    path.write_bytes(content)
    return _not_taken(scene, copy)


def _not_taken(scene: Scene, bundle: Path) -> bool:
    try:
        publish(scene.stage.admin(scene.node), MODEL, bundle)
    except FedClawError as error:
        return "refused it (4" in str(error)
    return False


def refused(stage: Stage) -> Finding:
    """All attacks on one node, one after the other, while others are answered."""
    found: Counter[str] = Counter()
    stranger = Issuer(stage.root / "stranger.json")
    impostor = Foundry(stage.root / "impostor", Digits.load())
    tried = attacks()
    with stage.node(limits__body_bytes=BODY_BYTES, limits__header_seconds=HEADER_SECONDS) as node:
        scene = Scene(stage, node, stranger, impostor, map(str, ip_network(ATTACKERS).hosts()))
        with stage.crowd(node.url) as crowd:
            for name, attack in tried.items():
                for trial in range(stage.settings.trials):
                    found[name] += attack(scene, trial)
                stage.say(f"{name}: refused {found[name]} of {stage.settings.trials}")
    rows: list[Row] = [
        (f"{name}: refused", f"{found[name]} of {stage.settings.trials}", "reach: all") for name in tried
    ]
    figures: dict[str, Figure] = {f"refused: {name}": found[name] for name in tried}
    return Finding(*_unaffected("meanwhile", crowd, rows, figures | {"refused: trials of each": stage.settings.trials}))


def swapped(stage: Stage) -> Finding:
    """The node's own copy of a verified bundle gets another graph, then a worker has to load it again."""
    expected = _labels(stage)
    other = (stage.foundry.bundle("disagrees") / "pipeline.onnx").read_bytes()
    wrong, failed, asked, changed = 0, 0, 0, 0
    for trial in range(stage.settings.trials):
        with stage.node(workers=2) as node, stage.crowd(node.url) as crowd:
            time.sleep(0.5)
            changed += _overwrite(node.root / "state", other)
            os.kill(worker_processes(node)["worker-1"], signal.SIGKILL)
            time.sleep(_SWAPPED_FOR)
        answered = [outcome for outcome in crowd.outcomes if outcome.good]
        wrong += any(outcome.label != expected[_number(outcome.key) % len(expected)] for outcome in answered)
        failed += sum(outcome.failed for outcome in crowd.outcomes)
        asked += len(crowd.outcomes)
        stage.say(f"a bundle swapped after it was verified: {trial + 1} of {stage.settings.trials}")
    trials, name = stage.settings.trials, "a bundle swapped after it was verified"
    rows: list[Row] = [
        (f"{name}: served", f"{wrong} of {trials}", f"{changed} files were overwritten; reach: 0"),
        (f"{name}: requests that failed", f"{failed} of {asked:,}", "one of two workers was killed"),
    ]
    figures: dict[str, Figure] = {
        f"{name}: trials": trials,
        f"{name}: files overwritten": changed,
        f"{name}: served": wrong,
        f"{name}: failed": failed,
        f"{name}: asked": asked,
    }
    return Finding(rows, figures)


def _labels(stage: Stage) -> list[str]:
    """What `cnn` says of each digit."""
    import onnxruntime

    graph = (stage.foundry.bundle("cnn") / "pipeline.onnx").read_bytes()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    (found,) = session.run(["label"], {"images": stage.digits.pixels})
    return [str(label) for label in np.asarray(found)[:, 0]]


def _number(key: str) -> int:
    """The n of the n-th request."""
    return int(key.rpartition("-")[2])


def _overwrite(state: Path, content: bytes) -> int:
    """Overwrite every pipeline.onnx that the node keeps; how many there were."""
    paths = list(state.rglob("pipeline.onnx"))
    for path in paths:
        path.chmod(0o600)
        path.write_bytes(content)
    return len(paths)


def _unaffected(
    name: str, crowd: Crowd, rows: Sequence[Row], figures: Mapping[str, Figure]
) -> tuple[list[Row], dict[str, Figure]]:
    failed = sum(outcome.failed for outcome in crowd.outcomes)
    times = sorted(outcome.ended - outcome.began for outcome in crowd.outcomes if outcome.good)
    p99 = 1e3 * times[int(0.99 * (len(times) - 1))]
    asked = f"{failed} of {len(crowd.outcomes):,}"
    row = (f"{name}: requests of others that failed", asked, f"their p99 {p99:.0f} ms; reach: 0")
    more = {f"{name}: failed": failed, f"{name}: asked": len(crowd.outcomes), f"{name}: p99 ms": round(p99, 2)}
    return [*rows, row], {**figures, **more}
