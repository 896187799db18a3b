"""Which engine clips the gradients of a step: the one that is asked for, or the fastest.

`auto` decides by cost. With few steps ahead it takes book-keeping, which is never far from the best, where that can
take the model, and torch.func's vmap elsewhere. With enough steps ahead that looking pays, each eager engine works off
one made-up batch a few times, and the fastest is taken. That batch is of zeros, and of as many rows as units are
expected: the choice cannot depend on anybody's data, nor on who is sampled, since engines round otherwise, and with
hostile parameters that can be a bound for each unit. Opacus' hooks are left to those who ask for them and to models
that nothing else takes: they are about as fast as vmap, but do not see a parameter that a model uses otherwise than
through its layer. Compiling is tried only if the steps ahead would last many times longer than it takes, and for units
of one row, whose sums alone are compiled.
"""

import logging
import math
import time
from contextlib import closing

import torch

from fedclaw.errors import PrivacyError
from fedclaw.privacy.gradients.bookkeeping import Bookkeeping
from fedclaw.privacy.gradients.interface import Clip, ClippedSums, Loss, Unsuited, trainable
from fedclaw.privacy.gradients.opacus_hooks import OpacusHooks
from fedclaw.privacy.gradients.vmap import CompiledVmap, Vmap
from fedclaw.privacy.speed import Mode, StepSpeed

logger = logging.getLogger(__name__)

ENGINES: dict[str, type[ClippedSums]] = {
    "bookkeeping": Bookkeeping,
    "opacus": OpacusHooks,
    "vmap": Vmap,
    "compiled": CompiledVmap,
}
"""Every engine by its mode."""
_EAGER: tuple[Mode, ...] = ("bookkeeping", "vmap")
_STEPS_WORTH_LOOKING = 500
_GOES = 4
_MOST_LOOKED_AT = 4096
_SECONDS_WORTH_COMPILING = 120.0
_said: set[tuple[str, str]] = set()
# What the log has been told, so that it is told once and not in every round.


def choose(
    speed: StepSpeed,
    model: torch.nn.Module,
    loss: Loss,
    clip: Clip,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    *,
    steps_ahead: int,
    rows_alone: bool = True,
) -> ClippedSums:
    """The engine that `speed` asks for, or the next one that can take the model, on `model` now.

    Of a batch's inputs (B, *D) and targets (B, ...) what one row is like, the expected number of units (of which `clip`
    has the inverse), `steps_ahead` and `rows_alone` (each unit is a row) matter for `auto`, and `rows_alone` for
    `compiled`, which is vmap where it is false.
    """
    if speed.mode != "auto":
        # Code that is compiled rounds otherwise, and where some unit has several rows it cannot go: then all of a batch
        # would come out otherwise for that one, however little it adds itself.
        return made("vmap" if speed.mode == "compiled" and not rows_alone else speed.mode, model, loss, clip)
    mode: Mode = "bookkeeping"
    if steps_ahead >= _STEPS_WORTH_LOOKING:
        worth_compiling = _SECONDS_WORTH_COMPILING if rows_alone else math.inf
        rows = min(max(round(1 / clip.scale), 1), _MOST_LOOKED_AT)
        made_up = inputs.new_zeros(rows, *inputs.shape[1:]), targets.new_zeros(rows, *targets.shape[1:])
        mode = _fastest(model, loss, clip, *made_up, steps_ahead, worth_compiling)
    engine = made(mode, model, loss, clip)
    logger.debug("private steps by %s, with %d steps ahead of about %d examples", engine.name, steps_ahead, len(inputs))
    return engine


def made(mode: str, model: torch.nn.Module, loss: Loss, clip: Clip) -> ClippedSums:
    """The engine of that mode, or the next one that can take the model as far as its layers show."""
    if mode not in ENGINES:
        raise PrivacyError(f"no engine of a private step is called {mode!r}; there are: auto, {', '.join(ENGINES)}")
    try:
        return ENGINES[mode](model, loss, clip)
    except Unsuited as reason:
        return instead(mode, reason, model, loss, clip)


def instead(mode: str, reason: Unsuited, model: torch.nn.Module, loss: Loss, clip: Clip) -> ClippedSums:
    """The next engine, when that of `mode` cannot take the model and is off it: vmap, then Opacus' hooks."""
    if mode == "opacus":
        raise reason
    later = "opacus" if mode == "vmap" else "vmap"
    if (mode, str(reason)) not in _said:
        _said.add((mode, str(reason)))
        logger.info("private steps: %s cannot take this model (%s); taking %s", mode, reason, later)
    return made(later, model, loss, clip)


def _fastest(
    model: torch.nn.Module,
    loss: Loss,
    clip: Clip,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    steps_ahead: int,
    worth_compiling: float,
) -> Mode:
    with torch.random.fork_rng(devices=[]):
        seconds = {mode: _seconds(mode, model, loss, clip, inputs, targets) for mode in _EAGER}
        best = min(_EAGER, key=lambda mode: seconds[mode])
        if steps_ahead * seconds[best] > worth_compiling:
            seconds["compiled"] = _seconds("compiled", model, loss, clip, inputs, targets)
            best = min(best, "compiled", key=lambda mode: seconds[mode])
    logger.debug("private steps: seconds by engine: %s", {mode: round(value, 5) for mode, value in seconds.items()})
    return best


def _seconds(
    mode: Mode, model: torch.nn.Module, loss: Loss, clip: Clip, inputs: torch.Tensor, targets: torch.Tensor
) -> float:
    """Of the faster of a few goes at a made-up batch after the first; infinite if the engine cannot take the model."""
    totals = [torch.empty(p.shape, dtype=torch.float64, device=p.device) for p in trainable(model)]
    times = []
    try:
        with closing(ENGINES[mode](model, loss, clip)) as engine:
            for _ in range(_GOES):
                began = time.perf_counter()
                for start in range(0, len(inputs), engine.chunk_size):
                    part = slice(start, start + engine.chunk_size)
                    engine.add(totals, inputs[part], targets[part], fresh=start == 0)
                float(totals[0].flatten()[0])  # waits for another device, which works on while Python goes ahead
                times.append(time.perf_counter() - began)
    except Unsuited:
        return math.inf
    return min(times[1:])
