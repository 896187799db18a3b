"""Requests a second, latency and processor time of a node, beside those of other servers on the same graph.

    python -m experiments.benchmarks.serving mlserver=PATH_OF_A_PYTHON_THAT_HAS_IT
    python -m experiments.benchmarks.serving quick=true parts=[throughput]

conf/serving_benchmark.yaml says what can be set. Two nets on digits (`experiments.serving.bundles`) are served by the
node with everything on (token, rate limit, metrics, audit), by MLServer, by `mlflow models serve`, and run by ONNX
Runtime alone. wrk asks from one core; the servers are on another one, and take turns. All of them are asked in JSON;
binary tensors, gRPC and TLS are further rows.

    throughput    each server and net, 32 connections
    idle          one connection: batching on against off
    concurrency   connections held at a p99 under 200 ms, and processor time of a request at 120 sessions
    start         process start to ready, and the first answer after it, with the model preloaded and without

Processor time is that of all of a server's processes by an answer. It depends less than the rest on what else the
machine does. A p99 is measured in a closed loop, where each connection waits for its answer.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("experiments.benchmarks.serving", __doc__)

import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
from pydantic import Field
from rich.console import Console

from experiments.benchmarks.report import Figure, Row, report
from experiments.serving.bundles import Digits, Foundry
from experiments.serving.issuer import Issuer
from experiments.serving.load import Asked, Load, grpc_load, http_load, median_load, pinned, require, two_cores
from experiments.serving.requests import binary_request, grpc_request, json_request, mlflow_request
from experiments.serving.servers import Node, Server, mlflow, mlserver
from fedclaw.cli import make_console, require_paths, run_main, settings_of
from fedclaw.protocol.frozen import Frozen

Part = Literal["throughput", "idle", "concurrency", "start"]
MODELS = ("cnn", "mlp")
HEAVY = "mlp"
"""The net that batching is for."""
OWN, MLSERVER, MLFLOW, RAW = "node", "MLServer", "mlflow", "ONNX Runtime alone"
REACH = {
    "cnn to MLServer": 4.0,
    "cnn to mlflow": 8.0,
    "mlp to raw batch 32": 0.6,
    "connections ratio": 3.2,
    "processor saving": 0.58,
    "first answer saving": 0.76,
}
"""At least so much is asked for."""
IDLE_REACH = 0.1
"""Milliseconds that batching may cost one idle connection."""
LADDER = 1.15
"""Connections are found to within this factor."""
MOST_CONNECTIONS = 4000
SETTLING = 0.5
"""Seconds in which a server finishes what it has, and one that goes on does what it has missed."""
BATCHING = {"on": "always", "off": "never"}
"""What `batching.mode` says of it."""


class BenchmarkSettings(Frozen):
    """conf/serving_benchmark.yaml, checked."""

    mlserver: Path | None
    mlflow: bool
    parts: tuple[Part, ...] = Field(min_length=1)
    connections: int = Field(ge=1, le=MOST_CONNECTIONS)
    seconds: float = Field(ge=1)
    rounds: int = Field(ge=1)
    sessions: int = Field(ge=1, le=MOST_CONNECTIONS)
    limit: float = Field(gt=0)
    starts: int = Field(ge=1)
    workers: int = Field(ge=1)
    bundles: Path | None
    quick: bool

    def as_asked(self) -> "BenchmarkSettings":
        """With `quick`, as little as can be."""
        return self.model_copy(update={"seconds": 1.0, "rounds": 1, "starts": 1}) if self.quick else self


@dataclass(frozen=True)
class Contender:
    """One row of the throughput table: a server, and how it is asked for one model."""

    name: str
    model: str
    server: Server
    asked: Asked
    load: Callable[[Asked, int, float, int | None], Load] = http_load


@dataclass(frozen=True)
class Measured:
    """A load, and the processor time of all of the server's processes by an answer, in milliseconds."""

    load: Load
    processor: float

    @classmethod
    def median(cls, found: Sequence["Measured"]) -> "Measured":
        """Of several rounds."""
        load = median_load([one.load for one in found])
        return cls(load, statistics.median(one.processor for one in found))


def measure(contender: Contender, connections: int, seconds: float, core: int | None) -> Measured:
    """One load on one server."""
    before = contender.server.processor_seconds()
    load = contender.load(contender.asked, connections, seconds, core)
    return Measured(load, 1e3 * (contender.server.processor_seconds() - before) / load.answered)


def _only(server: Server | None, servers: Sequence[Server]) -> None:
    """Let one of them run, and the others stand still: a server that is idle takes some of the core too."""
    time.sleep(SETTLING)
    for other in servers:
        if other is not server:
            other.pause()
    if server is not None:
        server.resume()
        time.sleep(SETTLING)


class Benchmark:
    """The parts, one after the other, and what they found: rows for people and figures for machines."""

    def __init__(self, settings: BenchmarkSettings, root: Path, console: Console) -> None:
        self.settings, self.root, self.console = settings, root, console
        self.cores = two_cores()
        self.digits = Digits.load()
        kept = settings.bundles or root / "bundles"
        kept.mkdir(parents=True, exist_ok=True)
        self.foundry = Foundry(kept, self.digits)
        self.issuer = Issuer(root / "jwks.json")
        self.authorization = {"authorization": f"Bearer {self.issuer.token()}"}
        self.rows: list[Row] = []
        self.figures: dict[str, Figure] = {}

    def run(self) -> None:
        """All parts that are asked for."""
        parts: Mapping[Part, Callable[[], None]] = {
            "throughput": self.throughput,
            "idle": self.idle,
            "concurrency": self.concurrency,
            "start": self.start,
        }
        for part in self.settings.parts:
            self.say(part)
            parts[part]()

    def say(self, words: str) -> None:
        """A line of progress."""
        self.console.print(words, style="dim", markup=False)

    def node(self, name: str, models: Sequence[str] = MODELS, pinned: bool = True, **settings: Any) -> Node:
        """A node of its own directory; `settings` with __ for a dot."""
        told = {key.replace("__", "."): value for key, value in settings.items()}
        tls = bool(told.pop("tls", False))
        served = {model: {"bundle": str(self.foundry.bundle(model)), "pinned": pinned} for model in models}
        root, given = self.root / name, {"workers": self.settings.workers, **told}
        return Node(root, self.foundry, self.issuer, served, core=self.cores[0], tls=tls, settings=given)

    def asked(self, model: str) -> np.ndarray[Any, Any]:
        """One row, as the model takes it."""
        return self.digits.numbers[:1] if model == "mlp" else self.digits.pixels[:1]

    # throughput

    def throughput(self) -> None:
        """Every server on every model, in turns."""
        found: dict[tuple[str, str], list[Measured]] = {}
        raw: dict[str, list[dict[str, float]]] = {model: [] for model in MODELS}
        with ExitStack() as stack:
            contenders = list(self._contenders(stack))
            for contender in contenders:
                measure(contender, self.settings.connections, 1.0, self.cores[1])
                contender.server.keep_to_its_core()
            servers = list(dict.fromkeys(contender.server for contender in contenders))
            for turn in range(self.settings.rounds):
                self.say(f"throughput: round {turn + 1} of {self.settings.rounds}")
                for one in contenders:
                    _only(one.server, servers)
                    done = measure(one, self.settings.connections, self.settings.seconds, self.cores[1])
                    found.setdefault((one.model, one.name), []).append(done)
                _only(None, servers)
                for model in MODELS:
                    raw[model].append(self._raw(model))
        medians = {key: Measured.median(rounds) for key, rounds in found.items()}
        for model in MODELS:
            alone = {size: statistics.median(one[size] for one in raw[model]) for size in raw[model][0]}
            self._tell_throughput(model, {name: one for (of, name), one in medians.items() if of == model}, alone)

    def _contenders(self, stack: ExitStack) -> Iterator[Contender]:
        plain = stack.enter_context(self.node("plain"))
        secure = stack.enter_context(self.node("tls", tls=True))
        for model in MODELS:
            row, bundle, path = self.asked(model), self.foundry.bundle(model), f"/v2/models/{model}/infer"
            body = json_request(row)
            json_headers = {"content-type": "application/json", **self.authorization}
            yield Contender(OWN, model, plain, Asked(plain.url + path, body, json_headers))
            yield Contender(f"{OWN}, TLS", model, secure, Asked(secure.url + path, body, json_headers))
            packed, headers = binary_request(row)
            yield Contender(
                f"{OWN}, binary", model, plain, Asked(plain.url + path, packed, headers | self.authorization)
            )
            message, service = grpc_request(model, row)
            url = f"http://127.0.0.1:{plain.ports.grpc}{service}"
            yield Contender(f"{OWN}, gRPC", model, plain, Asked(url, message, self.authorization), grpc_load)
            if self.settings.mlserver is not None:
                for rows in (None, 32) if model == HEAVY else (None,):
                    place = self.root / f"mlserver-{model}-{rows}"
                    theirs = mlserver(place, self.settings.mlserver, bundle, model, self.cores[0], rows)
                    name = MLSERVER if rows is None else f"{MLSERVER}, batches of {rows}"
                    stack.enter_context(theirs)
                    yield Contender(name, model, theirs, Asked(theirs.url + path, body, json_headers))
            if self.settings.mlflow:
                flow = stack.enter_context(mlflow(self.root / f"mlflow-{model}", self.foundry, bundle, self.cores[0]))
                json_alone = {"content-type": "application/json"}
                yield Contender(MLFLOW, model, flow, Asked(flow.url + "/invocations", mlflow_request(row), json_alone))

    def _raw(self, model: str) -> dict[str, float]:
        rows = self.root / f"{model}.npy"
        np.save(rows, self.digits.numbers[:32] if model == "mlp" else self.digits.pixels[:32])
        graph = self.foundry.bundle(model) / "pipeline.onnx"
        command = [sys.executable, "-m", "experiments.serving.raw", str(graph), str(rows), str(self.settings.seconds)]
        done = subprocess.run(pinned(self.cores[0], command), capture_output=True, text=True, check=True)
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found

    def _tell_throughput(self, model: str, found: Mapping[str, Measured], alone: Mapping[str, float]) -> None:
        for name, one in found.items():
            load = one.load
            times = (
                f"p50 {load.p50:.2f} ms, p99 {load.p99:.2f} ms, processor {one.processor:.3f} ms, {load.errors} errors"
            )
            self.rows.append((f"{model}: {name}", f"{load.rate:,.0f}/s", times))
        for size, rate in alone.items():
            self.rows.append((f"{model}: {RAW}, batch {size}", f"{rate:,.0f} rows/s", ""))
        self.figures |= {
            f"{model} requests per second": {name: round(one.load.rate, 1) for name, one in found.items()},
            f"{model} p50 ms": {name: round(one.load.p50, 3) for name, one in found.items()},
            f"{model} p99 ms": {name: round(one.load.p99, 3) for name, one in found.items()},
            f"{model} processor ms": {name: round(one.processor, 4) for name, one in found.items()},
            f"{model} errors": {name: one.load.errors for name, one in found.items()},
            f"{model} raw rows per second": {f"batch {size}": round(rate, 1) for size, rate in alone.items()},
        }
        own = found[OWN]
        for rival in (MLSERVER, MLFLOW):
            if rival in found:
                self._ratio(f"{model} to {rival}", own.load.rate / found[rival].load.rate)
                self._ratio(f"{model} to {rival} by processor time", found[rival].processor / own.processor)
        self._ratio(f"{model} to raw batch 1", own.load.rate / alone["1"])
        self._ratio(f"{model} to raw batch 32", own.load.rate / alone["32"])
        if rivals := [one.load.p99 for name, one in found.items() if not name.startswith(OWN)]:
            self._ratio(f"{model} p99 to the best other one", own.load.p99 / min(rivals))

    def _ratio(self, name: str, value: float) -> None:
        self.figures[name] = round(value, 3)
        reach = f"reach: at least {REACH[name]:g}" if name in REACH else ""
        self.rows.append((name, f"{value:.2f}", "at most 1" if "p99" in name else reach))

    # batching on against off

    @contextmanager
    def _both(self, models: Sequence[str]) -> Iterator[dict[str, Node]]:
        with ExitStack() as stack:
            yield {
                mode: stack.enter_context(self.node(f"batching-{mode}", models, batching__mode=told))
                for mode, told in BATCHING.items()
            }

    def _contender(self, node: Node, model: str) -> Contender:
        headers = {"content-type": "application/json", **self.authorization}
        asked = Asked(f"{node.url}/v2/models/{model}/infer", json_request(self.asked(model)), headers)
        return Contender(OWN, model, node, asked)

    def idle(self) -> None:
        """The median latency of one connection. A process answers with a large net by some tenths of a millisecond the
        sooner, the later it was started beside others; so there are two nodes of each kind, the first and the last one
        with batching."""
        with ExitStack() as stack:
            nodes = [
                (mode, stack.enter_context(self.node(f"idle-{place}", batching__mode=BATCHING[mode])))
                for place, mode in enumerate(("on", "off", "off", "on"))
            ]
            found = {model: self._alone(nodes, model) for model in MODELS}
        for model in MODELS:
            medians = {mode: statistics.fmean(found[model][mode]) for mode in BATCHING}
            more = medians["on"] - medians["off"]
            self.figures[f"{model} idle p50 ms"] = {f"batching {mode}": round(own, 4) for mode, own in medians.items()}
            self.figures[f"{model} idle difference ms"] = round(more, 4)
            told = " and ".join(f"{value:.3f} ms with batching {mode}" for mode, value in medians.items())
            self.rows.append(
                (f"{model}: one idle connection", f"{more:+.3f} ms", f"{told}; reach: at most {IDLE_REACH:g}")
            )

    def _alone(self, nodes: Sequence[tuple[str, Node]], model: str) -> dict[str, list[float]]:
        """The median latencies in milliseconds of the nodes of each kind, after a second to get warm."""
        contenders = [self._contender(node, model) for _, node in nodes]
        for contender in contenders:
            measure(contender, 1, 1.0, self.cores[1])
        rounds = [
            [measure(contender, 1, self.settings.seconds, self.cores[1]).load.p50 for contender in contenders]
            for _ in range(self.settings.rounds)
        ]
        found: dict[str, list[float]] = {}
        for (mode, _), times in zip(nodes, zip(*rounds, strict=True), strict=True):
            found.setdefault(mode, []).append(statistics.median(times))
        return found

    def concurrency(self) -> None:
        """Connections that are held, and what a request costs."""
        held: dict[str, float] = {}
        costs: dict[str, float] = {}
        with self._both([HEAVY]) as nodes:
            both = {mode: self._contender(node, HEAVY) for mode, node in nodes.items()}
            for mode, contender in both.items():
                measure(contender, self.settings.connections, 1.0, self.cores[1])
                held[f"batching {mode}"] = float(self._held(contender))
                self.say(f"concurrency: {held[f'batching {mode}']:.0f} connections with batching {mode}")
            rounds: dict[str, list[Measured]] = {mode: [] for mode in both}
            for _ in range(self.settings.rounds):
                for mode, contender in both.items():
                    rounds[mode].append(
                        measure(contender, self.settings.sessions, self.settings.seconds, self.cores[1])
                    )
            costs = {f"batching {mode}": Measured.median(found).processor for mode, found in rounds.items()}
        self.figures["connections held"] = held
        self.figures["processor seconds per request"] = {mode: round(cost / 1e3, 7) for mode, cost in costs.items()}
        counts = " and ".join(f"{count:.0f} with {mode}" for mode, count in held.items())
        self.rows.append((f"{HEAVY}: connections at p99 < {self.settings.limit:g} ms", counts, ""))
        self._ratio("connections ratio", held["batching on"] / held["batching off"])
        told = " and ".join(f"{cost:.3f} ms with {mode}" for mode, cost in costs.items())
        self.rows.append((f"{HEAVY}: processor time of a request, {self.settings.sessions} sessions", told, ""))
        self._ratio("processor saving", 1 - costs["batching on"] / costs["batching off"])

    def _held(self, contender: Contender) -> int:
        """The most connections at a p99 under the limit, to within a factor; 1 where even one is too many."""

        def holds(count: int) -> bool:
            load = measure(contender, count, self.settings.seconds, self.cores[1]).load
            return load.errors == 0 and load.p99 < self.settings.limit

        low, high = 1, 16
        while high < MOST_CONNECTIONS and holds(high):
            low, high = high, 2 * high
        while high > low + 1 and high / low > LADDER and not self.settings.quick:
            middle = min(max(round((low * high) ** 0.5), low + 1), high - 1)
            low, high = (middle, high) if holds(middle) else (low, middle)
        return low

    # start

    def start(self) -> None:
        """Starts with a model preloaded and without; the state is there from an earlier start."""
        ready: dict[str, list[float]] = {"preloaded": [], "on demand": []}
        first: dict[str, list[float]] = {"preloaded": [], "on demand": []}
        nodes = {name: self.node(f"start-{name[:2]}", [HEAVY], name == "preloaded") for name in ready}
        for turn in range(-1, self.settings.starts):
            for name, node in nodes.items():
                began = time.perf_counter()
                with node:
                    until_ready = time.perf_counter() - began
                    asked = self._contender(node, HEAVY).asked
                    took = first_answer(asked)
                if turn >= 0:
                    ready[name].append(until_ready)
                    first[name].append(took)
        seconds = {name: statistics.median(values) for name, values in ready.items()}
        answers = {name: statistics.median(values) for name, values in first.items()}
        self.figures["ready s"] = {name: round(value, 3) for name, value in seconds.items()}
        self.figures["first answer ms"] = {name: round(1e3 * value, 3) for name, value in answers.items()}
        for name, value in seconds.items():
            self.rows.append((f"{HEAVY}: process start to ready, {name}", f"{value:.2f} s", ""))
            self.rows.append((f"{HEAVY}: first answer after it, {name}", f"{1e3 * answers[name]:.1f} ms", ""))
        self._ratio("first answer saving", 1 - answers["preloaded"] / answers["on demand"])


def first_answer(asked: Asked) -> float:
    """Seconds from opening a connection to the whole answer. Raises ValueError if it is an error."""
    parts = urlsplit(asked.url)
    began = time.perf_counter()
    connection = http.client.HTTPConnection(parts.netloc, timeout=60)
    connection.request("POST", parts.path, asked.body, dict(asked.headers))
    answer = connection.getresponse()
    answer.read()
    took = time.perf_counter() - began
    connection.close()
    if answer.status != http.client.OK:
        raise ValueError(f"{asked.url}: {answer.status}")
    return took


def main(arguments: Sequence[str]) -> None:
    """Measure and report. Raises UsageError."""
    settings = settings_of(arguments, "serving_benchmark", BenchmarkSettings).as_asked()
    require_paths(mlserver=settings.mlserver)
    require("wrk", "wrk")
    require("h2load", "nghttp2-client")
    console = make_console()
    if settings.mlserver is None and "throughput" in settings.parts:
        console.print("MLServer is left out: mlserver=PATH names a Python that has it", markup=False)
    with tempfile.TemporaryDirectory(prefix="fedclaw-serving-") as place:
        benchmark = Benchmark(settings, Path(place), console)
        benchmark.run()
    report("a node beside other servers, each on one core (medians)", benchmark.rows, benchmark.figures)


if __name__ == "__main__":
    run_main("experiments.benchmarks.serving", __doc__, main)
