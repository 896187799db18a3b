"""SIGKILL under load: of a worker of a node, and of a whole node out of two behind HAProxy.

What was acknowledged before and after has to be there at the end: each feedback in the state store, and each answer as
a line of an audit log whose hash chain holds.
"""

import json
import math
import os
import signal
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus

from experiments.chaos.stage import Finding, Stage, tell_seconds, worst
from experiments.serving.clients import Client, Crowd, Outcome, next_success, since
from experiments.serving.cluster import Postgres, haproxy
from experiments.serving.servers import Node, NodePorts
from fedclaw.errors import FedClawError
from fedclaw.serve.home import AUDIT, DATABASE
from fedclaw.serve.state.audit_verification import entries, verify
from fedclaw.serve.state.store import StateStore
from fedclaw.serve.supervisor import read_processes

WORKERS = 2
CALM, AFTER = 1.0, 3.0
"""Seconds of load before a kill, and after it."""
PATIENCE = 60.0
"""Seconds in which a worker has to be back."""
WORKER_REACH, NODE_REACH = 1.0, 5.0
"""Seconds within which somebody is answered again."""


@dataclass(frozen=True)
class Kill:
    """One trial: what the clients saw from the kill on."""

    asked: int
    failed: int
    next_success: float | None
    """Seconds."""
    last_failure: float
    """Seconds after the kill; 0: nobody saw any."""

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], moment: float) -> "Kill":
        """By the outcomes after `moment`."""
        after = since(outcomes, moment)
        failures = [outcome.ended - moment for outcome in after if outcome.failed]
        return cls(len(after), len(failures), next_success(after, moment), max(failures, default=0.0))


def worker_killed(stage: Stage) -> Finding:
    """Each worker of a node once, then a fresh node: a worker that ends again and again is another matter."""
    kills: list[Kill] = []
    lost: list[str] = []
    kept = 0
    while len(kills) < stage.settings.trials:
        with stage.node(workers=WORKERS) as node:
            with stage.crowd(node.url, feedback=feedback) as crowd:
                for number in range(1, WORKERS + 1):
                    time.sleep(CALM)
                    moment = time.monotonic()
                    os.kill(worker_processes(node)[f"worker-{number}"], signal.SIGKILL)
                    time.sleep(AFTER)
                    kills.append(Kill.of(list(crowd.outcomes), moment))
                    wait_for_all(node, time.monotonic() - moment)
            lost += missing(crowd, [node])
            kept += acknowledged(crowd)
        stage.say(f"a worker killed: {len(kills)} of {stage.settings.trials}")
    return told(f"a worker of {WORKERS} killed", kills[: stage.settings.trials], WORKER_REACH, lost, kept)


def node_killed(stage: Stage) -> Finding:
    """Two nodes behind HAProxy that share PostgreSQL; now one of them goes, now the other."""
    kills: list[Kill] = []
    with ExitStack() as stack:
        database = stack.enter_context(Postgres()).place(stage.root / "database")
        names = ("node-a", "node-b")
        nodes = [
            stage.node(workers=1, root=stage.root / name, ports=NodePorts.free(), name=name, database=database)
            for name in names
        ]
        for node in nodes:
            stack.enter_context(node)
        front = stack.enter_context(haproxy(stage.root / "haproxy", stage.foundry, nodes))
        with stage.crowd(front.url, feedback=feedback, authority=stage.foundry.authority) as crowd:
            for trial in range(stage.settings.trials):
                node = nodes[trial % len(nodes)]
                time.sleep(CALM)
                moment = time.monotonic()
                node.kill()
                time.sleep(AFTER)
                kills.append(Kill.of(list(crowd.outcomes), moment))
                node.start()
                node.wait_until_ready()
                time.sleep(CALM)
                stage.say(f"a node killed: {trial + 1} of {stage.settings.trials}")
        lost = missing(crowd, nodes)
    return told("a node of two killed", kills, NODE_REACH, lost, acknowledged(crowd))


def worker_processes(node: Node) -> dict[str, int]:
    """By name, the process ids of the node's processes, as its supervisor says."""
    found = {entry["name"]: entry["pid"] for entry in read_processes(node.root / "state")}
    return {name: int(process) for name, process in found.items() if process is not None}


def wait_for_all(node: Node, age: float) -> None:
    """Until every worker has told that it answers, `age` seconds ago at most. Raises FedClawError after a while."""
    began, end = time.monotonic() - age, time.monotonic() + PATIENCE
    while True:
        with StateStore.open(f"sqlite:///{node.root / 'state' / DATABASE}") as store:
            well = [beat for beat in store.workers() if beat.ready and beat.age < time.monotonic() - began]
        if len({beat.worker for beat in well}) == WORKERS:
            # It has told so a moment before it listens.
            time.sleep(CALM)
            return
        if time.monotonic() > end:
            raise FedClawError(f"a worker was not started again:\n{node.last_words()}")
        time.sleep(0.1)


def feedback(outcome: Outcome) -> bytes | None:
    """What a client tells of an answer: that its task was completed."""
    return json.dumps({"receipt": outcome.receipt, "completed": True}).encode() if outcome.receipt else None


def missing(crowd: Crowd, nodes: Sequence[Node]) -> list[str]:
    """What was acknowledged and is not there: answers without a line, feedback that is news, broken chains.

    Feedback that was credited is answered as `repeated` when the same client says the same again.
    """
    found: set[str] = set()
    lost: list[str] = []
    for node in nodes:
        directory = node.root / "state" / AUDIT
        found |= {str(entry.get("request")) for entry in entries(directory)}
        lost += [f"{report.chain}: {fault}" for report in verify(directory) for fault in report.faults]
    answered = (outcome.identity for outcome in crowd.outcomes if outcome.good)
    lost += [f"answer {identity}" for identity in answered if identity not in found]
    with ThreadPoolExecutor(len(crowd.tokens)) as pool:
        for news in pool.map(partial(_not_credited, crowd), crowd.tokens):
            lost += news
    return lost


def _not_credited(crowd: Crowd, token: str) -> list[str]:
    client, found = Client(crowd.url, token, crowd.authority), []
    for body in (body for teller, body in crowd.acknowledged if teller == token):
        status, _, content = client.post("/feedback", body)
        if status != HTTPStatus.OK or not json.loads(content)["repeated"]:
            found.append(f"feedback ({status}) {body[:60]!r}")
    client.close()
    return found


def acknowledged(crowd: Crowd) -> int:
    """Answers and feedback that a client has seen taken."""
    return sum(outcome.good for outcome in crowd.outcomes) + len(crowd.acknowledged)


def told(name: str, kills: Sequence[Kill], reach: float, lost: Sequence[str], kept: int) -> Finding:
    """The finding of all trials."""
    failed, asked = sum(kill.failed for kill in kills), sum(kill.asked for kill in kills)
    slowest = worst([kill.next_success for kill in kills])
    usual = statistics.median(float("inf") if kill.next_success is None else kill.next_success for kill in kills)
    last = max(kill.last_failure for kill in kills)
    most, times = max(kill.failed for kill in kills), f"{tell_seconds(usual)}, worst {tell_seconds(slowest)}"
    rows = [
        (f"{name}: time to the next answer", times, f"reach: {reach:g} s"),
        (
            f"{name}: requests that failed",
            f"{failed} of {asked:,}",
            f"at most {most} in a trial, the last {last:.2f} s after the kill",
        ),
        (f"{name}: acknowledged, and lost", f"{len(lost)} of {kept:,}", "; ".join(lost[:3]) or "reach: 0"),
    ]
    return Finding(
        rows,
        {
            f"{name}: trials": len(kills),
            f"{name}: failed": failed,
            f"{name}: asked": asked,
            f"{name}: failed in the worst trial": most,
            f"{name}: seconds to the next answer, median": _figure(usual),
            f"{name}: seconds to the next answer, worst": _figure(slowest),
            f"{name}: last failure after s": round(last, 4),
            f"{name}: acknowledged": kept,
            f"{name}: acknowledged and lost": len(lost),
        },
    )


def _figure(seconds: float) -> float | str:
    """For JSON, which has no infinity."""
    return round(seconds, 4) if math.isfinite(seconds) else "never"
