"""Executors of a round: this process, or a pool of processes forked from it that share its memory.

A worker inherits the clients' data by the fork, so it is held once, and lives as long as the run. A round's parameters
and the answers lie in memory that all share; what else passes between processes is small, and JSON, but for what the
clients remember.
"""

import gc
import json
import logging
import math
import mmap
import multiprocessing
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fedclaw.errors import FedClawError, RoundError, UsageError
from fedclaw.privacy.accounting import NoiseEvent
from fedclaw.protocol.arrays import Shapes, arrays_to_npz, flat, npz_to_arrays, shaped, shapes_of
from fedclaw.protocol.terms import Plan
from fedclaw.simulation.job import Answer, Round, State, size_of
from fedclaw.simulation.trainer import Trainer

log = logging.getLogger(__name__)

_BROADCAST = "broadcast/"
"""Begins the name of a group of arrays that holds a kind of what is broadcast."""


class Executor(Protocol):
    """Trains the units of a round."""

    def train(self, round: Round, units: Sequence[Sequence[int]], memory: Mapping[int, State]) -> Iterator[Answer]:
        """The units' answers, in the order of the units; an answer's numbers are good until the next one is asked for.

        Raises RoundError when a process is lost.
        """

    def close(self) -> None:
        """End the worker processes; nothing is asked any more."""


class SerialExecutor:
    """Trains in this process."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def train(self, round: Round, units: Sequence[Sequence[int]], memory: Mapping[int, State]) -> Iterator[Answer]:
        """See Executor."""
        for unit in units:
            yield self._trainer.answer(round, unit, memory)

    def close(self) -> None:
        """See Executor."""


class ProcessPoolExecutor:
    """Trains in processes that are forked when the first round is asked."""

    def __init__(self, trainer: Trainer, workers: int, largest_unit: int) -> None:
        """Raises UsageError where processes cannot be forked; macOS's libraries do not survive a fork."""
        if "fork" not in multiprocessing.get_all_start_methods() or sys.platform == "darwin":
            lacks = "is not safe on macOS" if sys.platform == "darwin" else "this system lacks"
            raise UsageError(
                f"runtime.workers: worker processes share their data by a fork, which {lacks}; say runtime.workers=1"
            )
        self._trainer = trainer
        self._count = workers
        self._largest = largest_unit
        self._links: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self._outgoing = self._slots = np.zeros(0, np.float32)

    def train(self, round: Round, units: Sequence[Sequence[int]], memory: Mapping[int, State]) -> Iterator[Answer]:
        """See Executor."""
        groups = {"parameters": round.parameters, **({"teacher": round.teacher} if round.teacher else {})}
        groups |= {f"{_BROADCAST}{kind}": arrays for kind, arrays in round.broadcast.items()}
        shapes: dict[str, Shapes] = {name: shapes_of(arrays) for name, arrays in groups.items()}
        if not self._processes:
            self._start(round, shapes)
        numbers = [flat(arrays, shapes[name]) for name, arrays in groups.items()]
        np.concatenate(numbers, out=self._outgoing)
        head = {
            "plan": round.plan.model_dump_json(),
            "mechanisms": {size: asdict(found) if found else None for size, found in round.mechanisms.items()},
        }
        return self._dispatch(head, units, memory)

    def close(self) -> None:
        """See Executor."""
        for link in self._links:
            link.close()
        for process in self._processes:
            process.join(_PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()
        if self._processes:
            gc.unfreeze()
        self._links, self._processes = [], []

    def _start(self, round: Round, shapes: dict[str, Shapes]) -> None:
        sizes = [size_of(own) for own in shapes.values()]
        self._outgoing = shared_numbers(sum(sizes))
        rows = self._largest if round.single else 1
        self._slots = shared_numbers(2 * self._count, rows, size_of(round.template))
        # A garbage collection writes into every object that it looks at, and so copies the page that it is on.
        gc.freeze()
        context = multiprocessing.get_context("fork")
        for number in range(self._count):
            ours, theirs = context.Pipe()
            self._links.append(ours)
            worker = _Worker(self._trainer, self._outgoing, self._slots, shapes, dict(round.template), round.single)
            process = context.Process(
                target=worker.serve, args=(theirs, list(self._links)), name=f"simulation-{number}", daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)

    def _dispatch(
        self, head: Mapping[str, Any], units: Sequence[Sequence[int]], memory: Mapping[int, State]
    ) -> Iterator[Answer]:
        text = json.dumps(head).encode()
        fresh, idle = set(range(self._count)), list(range(self._count))
        done: dict[int, Answer] = {}
        asked = 0
        for turn in range(len(units)):
            while turn not in done:
                while idle and asked < min(len(units), turn + len(self._slots)):
                    worker = idle.pop()
                    self._ask(worker, text if worker in fresh else b"", asked, units[asked], memory)
                    fresh.discard(worker)
                    asked += 1
                for worker in self._ready():
                    number, answer = self._read(worker)
                    done[number] = answer
                    idle.append(worker)
            yield done.pop(turn)

    def _ask(self, worker: int, head: bytes, number: int, unit: Sequence[int], memory: Mapping[int, State]) -> None:
        own = {client: memory[client] for client in unit if client in memory}
        try:
            self._links[worker].send_bytes(head)
            self._links[worker].send_bytes(json.dumps({"unit": list(unit), "number": number}).encode())
            self._links[worker].send_bytes(_memory_to_bytes(own))
        except OSError as error:
            raise self._lost(worker) from error

    def _ready(self) -> list[int]:
        ready = wait(self._links)
        return [number for number, link in enumerate(self._links) if link in ready]

    def _read(self, worker: int) -> tuple[int, Answer]:
        try:
            plain = json.loads(self._links[worker].recv_bytes())
            remembered = _memory_from_bytes(self._links[worker].recv_bytes())
        except (EOFError, OSError) as error:
            raise self._lost(worker) from error
        if "error" in plain:
            raise RoundError(f"a worker process of the simulation failed: {plain['error']}")
        number = int(plain.pop("number"))
        return number, Answer(numbers=self._slots[number % len(self._slots)], memory=remembered, **plain)

    def _lost(self, worker: int) -> RoundError:
        process = self._processes[worker]
        process.join(_PATIENCE)
        code = process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return RoundError(
            f"worker process {worker + 1} of {self._count} of the simulation {how} (out of memory, perhaps: fewer "
            "workers= need less); nothing is lost but the rounds since the last checkpoint: continue the run"
        )


_PATIENCE = 5.0
"""Seconds that a worker has to end."""


@dataclass
class _Worker:
    """The other end."""

    trainer: Trainer
    outgoing: NDArray[np.float32]
    slots: NDArray[np.float32]
    shapes: Mapping[str, Shapes]
    template: Shapes
    single: bool
    round: Round | None = None
    _remembered: bytes = field(default=b"", init=False)

    def serve(self, link: Connection, others: Sequence[Connection]) -> None:
        """Train what is asked until nobody asks any more."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        torch.set_num_threads(1)
        # Copies of the ends of others' links would keep those open when the process that asks is gone.
        for other in others:
            other.close()
        try:
            while True:
                head, asked, memory = link.recv_bytes(), json.loads(link.recv_bytes()), link.recv_bytes()
                if head:
                    self.round = self._round(json.loads(head))
                link.send_bytes(json.dumps(self._answer(asked, _memory_from_bytes(memory))).encode())
                link.send_bytes(self._remembered)
        except (EOFError, OSError):
            return

    def _answer(self, asked: Mapping[str, Any], memory: Mapping[int, State]) -> dict[str, Any]:
        assert self.round is not None
        number = int(asked["number"])
        self._remembered = b""
        try:
            answer = self.trainer.answer(self.round, asked["unit"], memory)
        except Exception as error:
            if not isinstance(error, FedClawError):
                log.exception("a simulated client failed")
            return {"error": f"{type(error).__name__}: {error}"}
        slot = self.slots[number % len(self.slots)]
        slot[: len(answer.numbers)] = answer.numbers
        self._remembered = _memory_to_bytes(answer.memory)
        return {
            "number": number,
            "clients": answer.clients,
            "weights": answer.weights,
            "payloads": answer.payloads,
        }

    def _round(self, head: Mapping[str, Any]) -> Round:
        arrays, start = {}, 0
        for name, shapes in self.shapes.items():
            size = size_of(shapes)
            arrays[name] = shaped(self.outgoing[start : start + size], shapes)
            start += size
        broadcast = {name.removeprefix(_BROADCAST): own for name, own in arrays.items() if name.startswith(_BROADCAST)}
        mechanisms = {int(size): NoiseEvent(**found) if found else None for size, found in head["mechanisms"].items()}
        plan = Plan.model_validate_json(head["plan"])
        return Round(
            plan, arrays["parameters"], arrays.get("teacher"), broadcast, self.template, self.single, mechanisms
        )


def shared_numbers(*shape: int) -> NDArray[np.float32]:
    """Zeros of `shape` in memory that processes forked from this one share."""
    count = math.prod(shape)
    return np.frombuffer(mmap.mmap(-1, max(1, count) * 4), np.float32, count=count).reshape(shape)


def _memory_to_bytes(memory: Mapping[int, State]) -> bytes:
    named = {
        f"{client}/{kind}/{name}": array
        for client, state in memory.items()
        for kind, arrays in state.items()
        for name, array in arrays.items()
    }
    return arrays_to_npz(named) if named else b""


def _memory_from_bytes(content: bytes) -> dict[int, State]:
    memory: dict[int, State] = {}
    if content:
        for label, array in npz_to_arrays(content, Path("a client's memory")).items():
            client, kind, name = label.split("/", 2)
            memory.setdefault(int(client), {}).setdefault(kind, {})[name] = array
    return memory
