"""One client at a time, or many at once: what is faster for the model and the data, found out once, before a run.

The model is compared on a few rows of the table first: many at once is taken only if it gives the very gradients that
each client would get by itself. Which of the two is faster is then measured on one unit of made-up clients. It depends
on the machine, so a run that is to be repeated to the last bit elsewhere says `mode=one` or `mode=many`.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import nn

from fedclaw.errors import UsageError
from fedclaw.learning.stacked.engines import BatchedModel, Build, Engine, Loss, NotStackable, PlainModel, VmapModel
from fedclaw.learning.stacked.layout import Packing, Rows, pack, shuffled
from fedclaw.learning.stacked.steps import plain_steps
from fedclaw.learning.step_loop import take_steps
from fedclaw.learning.workload import Table
from fedclaw.protocol.arrays import Arrays
from fedclaw.protocol.terms import LocalTraining
from fedclaw.simulation.settings import Mode

log = logging.getLogger(__name__)

Kind = Literal["batched", "vmap", "plain"]
CPU = torch.device("cpu")
_STACKABLE: tuple[Kind, ...] = ("batched", "vmap")
_CLIENTS, _ROWS = 3, 2
_SAME_GRADIENT = 1e-3
_PROBES, _PROBE_STEPS = 3, 2
SPARE = 40
"""Rows that may be filled up to save a segment of a batched model; found by trying with small models."""


@dataclass(frozen=True)
class Trial:
    """What engines are compared on: a model and its loss, the examples, and how some clients of a run train on them."""

    build: Build
    loss: Loss
    table: Table
    training: LocalTraining
    shares: Sequence[Rows]
    """By client, its rows of the table."""
    device: torch.device = CPU

    @cached_property
    def start(self) -> Arrays:
        """The parameters of a fresh model."""
        return {name: value.detach().cpu().numpy() for name, value in self.build().named_parameters()}

    def model(self) -> nn.Module:
        """A fresh model where it is to be trained."""
        return self.build().to(self.device)

    def engine(self, kind: Kind) -> Engine:
        """A fresh engine. Raises NotStackable."""
        return make_engine(kind, self.model, self.loss)

    def examples(self, packing: Packing) -> tuple[torch.Tensor, torch.Tensor]:
        """The inputs (N, *D) and targets (N, ...) of a step."""
        rows = packing.rows.cpu()
        inputs, targets = torch.from_numpy(self.table.inputs)[rows], torch.from_numpy(self.table.targets)[rows]
        return inputs.to(self.device), targets.to(self.device)

    def pack(self, batches: Sequence[Sequence[Rows]], spare: int = 0) -> list[Packing]:
        """The steps of clients with these batches; see `fedclaw.learning.stacked.layout.pack`."""
        return pack(batches, spare, self.device)


@dataclass(frozen=True)
class Choice:
    """How the clients of a run are trained: many at once or one at a time, and by which engine."""

    many: bool
    kind: Kind

    @property
    def spare(self) -> int:
        """Rows that may be filled up."""
        return SPARE if self.kind == "batched" else 0


def make_engine(kind: Kind, build: Build, loss: Loss) -> Engine:
    """A fresh engine. Raises NotStackable."""
    if kind == "batched":
        return BatchedModel(build(), loss)
    return VmapModel(build(), loss) if kind == "vmap" else PlainModel(build(), loss)


def choose(mode: Mode, trial: Trial, *, elementwise: bool, private: bool) -> Choice:
    """The engine for clients such as those of `trial`; see `fedclaw.simulation.settings` for `mode`.

    `elementwise`: whether the strategy can correct many clients' gradients at once. Raises UsageError if mode=many is
    asked for and cannot be had.
    """
    found = next((kind for kind in _STACKABLE if agrees(kind, trial)), None)
    stackable = [] if found is None else [found]
    alone = Choice(False, "plain")
    choices = [alone] + [Choice(False, "batched")] * ("batched" in stackable and not private)
    usable = [kind for kind in stackable if kind == "batched" or not private]
    if mode == "one" or not usable or not elementwise:
        if mode == "many" and (not usable or not elementwise):
            reason = "its strategy corrects clients one by one" if usable else "its model can only be trained by itself"
            raise UsageError(f"runtime.mode=many: {reason}; take mode=one or mode=auto")
        return _fastest(choices, trial)
    together = Choice(True, usable[0])
    if mode == "many":
        return together
    return _fastest([*choices, together], trial)


def _fastest(choices: Sequence[Choice], trial: Trial) -> Choice:
    """The fastest of `choices` at a few steps of the trial's clients."""
    if len(choices) == 1:
        return choices[0]
    shapes = tuple(array.shape for array in trial.start.values())
    shares = trial.shares
    key = (
        *choices,
        shapes,
        trial.table.inputs.shape[1:],
        trial.training,
        len(shares),
        max(map(len, shares)),
        trial.device,
    )
    if key not in _known:
        seconds = {choice: _seconds(choice, trial) for choice in choices}
        best = _known[key] = min(seconds, key=lambda choice: seconds[choice])
        log.info(
            "simulation: %s, by %s (%.3g s against %.3g s a unit)",
            "many clients at once" if best.many else "one client at a time",
            *(best.kind, seconds[best], max(seconds.values())),
        )
    return _known[key]


_known: dict[tuple[object, ...], Choice] = {}
# What was fastest, by models and clients of these shapes.


def agrees(kind: Kind, trial: Trial) -> bool:
    """Whether the engine gives what autograd gives for each client by itself, on a few rows of the table."""
    rows = np.arange(min(len(trial.table), _CLIENTS * _ROWS + 1))
    parts = [part for part in np.array_split(rows, _CLIENTS) if len(part)]
    if kind == "vmap":
        parts = [part[:1] for part in parts]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            engine, plain = trial.engine(kind), PlainModel(trial.model(), trial.loss)
            stack = engine.layout.row(trial.start).expand(len(parts), -1).clone()
            stack.add_(torch.randn_like(stack), alpha=0.01)
            (packing,) = trial.pack([[part] for part in parts], SPARE if kind == "batched" else 0)
            found = torch.zeros_like(stack)
            engine.bind(stack, found)
            engine.gradients(packing, *trial.examples(packing))
            return all(
                _same(plain, engine, stack[client], found[client], trial, part) for client, part in enumerate(parts)
            )
    except (NotStackable, RuntimeError) as error:
        log.debug("simulation: %s cannot take the model: %s", kind, error)
        return False


def _same(
    plain: PlainModel, engine: Engine, parameters: torch.Tensor, found: torch.Tensor, trial: Trial, rows: Rows
) -> bool:
    row = plain.layout.row(engine.layout.arrays(parameters))[None]
    expected = torch.zeros_like(row)
    plain.bind(row, expected)
    (packing,) = trial.pack([[rows]])
    plain.gradients(packing, *trial.examples(packing))
    ours = plain.layout.row(engine.layout.arrays(found))
    return bool((ours - expected[0]).norm() <= _SAME_GRADIENT * expected.norm())


def _seconds(choice: Choice, trial: Trial) -> float:
    """Of this thread's processor time for a few steps of the trial's clients, after one that warms up; where another
    device computes, which is waited for, of the clock's."""
    generator = np.random.default_rng(0)
    batches = [shuffled(share, trial.training, generator)[:_PROBE_STEPS] for share in trial.shares]
    batches.sort(key=len, reverse=True)
    clock = time.thread_time if trial.device.type == "cpu" else time.perf_counter
    with torch.random.fork_rng(devices=[]):
        engine = trial.engine(choice.kind)
        start = engine.layout.row(trial.start)
        groups = [batches] if choice.many else [[own] for own in batches]
        stack, gradients = start.new_zeros(2, len(groups[0]), len(start))
        engine.bind(stack, gradients)
        best = float("inf")
        for _ in range(_PROBES):
            began = clock()
            for group in groups:
                packings = trial.pack(group, choice.spare)
                steps = plain_steps(
                    engine, trial.training, start, stack, gradients, packings, trial.examples, corrected=False
                )
                take_steps(packings, steps)
                moved = steps.change(start.new_ones(len(group)), start)
            float(moved[0])  # waits until all of it is computed
            best = min(best, clock() - began)
    return best
