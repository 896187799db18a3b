"""The postprocessors that have updates travel in fewer bytes, and how answers are opened.

`SiteEncoding`, for the methods whose form of an update is each site's own (`compressor`), is the site's last step,
after clipping, noise and weighting: with local noise it is post-processing, which costs nothing. An answer is opened
when it arrives, before it is added, so the sum is the usual one.

What a strategy adds to an update (control variates, normalisers) travels as it is: it has to add up exactly.

Error feedback: what a site did not send goes into its next update (Karimireddy et al. 2019, algorithm 1).

    p = update + memory     sent = C(p)     memory = p - sent

The memory is the site's own state. It is made of what was about to leave, clipped, noised and weighted as it was, so
it, too, is post-processing under local noise. What was asked under other terms (another model, another guarantee) is
not carried over: the memory of a run without noise has no place in an update that has it.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedclaw.learning.compression.compressor import Compressor, Fp16, LargestK, LowRank, Stochastic, broken, kept
from fedclaw.learning.postprocessor import Postprocessor, SiteContext
from fedclaw.privacy.provenance import Part
from fedclaw.protocol.arrays import Arrays, Form, Shapes, Wire, all_finite, shapes_of
from fedclaw.protocol.compression import Compression, HalfPrecision, PowerSgd, Quantisation, RandomK, TopK
from fedclaw.protocol.plan import Plan
from fedclaw.protocol.update import Update, is_extra

ERROR, WARM, TERMS = "compression.error", "compression.warm", "compression.terms"
KINDS = frozenset({ERROR, WARM, TERMS})
"""Kinds of a site's state."""
_DIGEST = "sha256"

Terms = NDArray[np.float32]
"""What a memory was made under, as the numbers (32,) of a digest."""


def terms_of(plan: Plan) -> Terms:
    """What a memory is made under: whoever asks otherwise begins with none."""
    terms = (plan.compression, plan.model, plan.personal, plan.strategy, plan.privacy, plan.central, plan.weighting)
    digest = hashlib.sha256(f"{terms}|{plan.weight_cap}|{plan.secure is not None}".encode()).digest()
    return np.frombuffer(digest, np.uint8).astype(np.float32)


def remembered(state: Mapping[str, Arrays], kind: str, terms: Terms) -> Arrays:
    """The arrays of one kind that the site kept under `terms`; empty if there are none."""
    found = state.get(TERMS, {}).get(_DIGEST)
    return state.get(kind, {}) if found is not None and np.array_equal(found, terms) else {}


def to_remember(kinds: dict[str, Arrays], terms: Terms) -> dict[str, Arrays]:
    """`kinds`, marked with `terms`; empty if there is nothing to keep."""
    return {**kinds, TERMS: {_DIGEST: terms}} if any(kinds.values()) else {}


def add_memory(arrays: Arrays, memory: Arrays) -> None:
    """Add what was not sent to `arrays`, in place. A memory of another shape belongs to something else."""
    for name, array in arrays.items():
        missing = memory.get(name)
        if missing is not None and missing.shape == array.shape:
            np.add(array, missing, out=array)


T = TypeVar("T")


def compressor_of(compression: Compression | None) -> Compressor | None:
    """What makes a site's own form of an update; None: it travels as it is summed."""
    match compression:
        case HalfPrecision():
            return Fp16()
        case Quantisation(method=method, block=block):
            return Stochastic(8 if method == "int8" else 4, block)
        case TopK(fraction=fraction):
            return LargestK(fraction)
        case PowerSgd(rank=rank):
            return LowRank(rank)
        case _:
            return None


@dataclass(frozen=True)
class SiteEncoding(Postprocessor):
    """Leaves the update as the server will read it, and beside it the form that travels.

    The server's half is nothing: each answer was opened when it came.
    """

    compressor: Compressor
    feedback: bool
    """Whether what was not sent goes into the next update."""
    terms: Terms

    def at_site(self, part: Part[Update], context: SiteContext) -> Part[Update]:
        """Encode the update and what was not sent before. One that is not finite leaves as one that says so.

        Rounding, and leaving out what is small, may bring two updates further apart.
        """
        return part.then(lambda update: self._encoded(update, context))

    def _encoded(self, update: Update, context: SiteContext) -> Update:
        own, extras = _parts(update.arrays)
        if self.feedback:
            add_memory(own, remembered(context.state, ERROR, self.terms))
        shapes = shapes_of(own)
        if not all(all_finite(array) for array in own.values()):
            return replace(update, encoded={**broken(self.compressor.layout(shapes)), **extras})
        encoded = self.compressor.encode(own, context.source, remembered(context.state, WARM, self.terms))
        read = self.compressor.decode(encoded.wire, shapes)
        error = {name: np.subtract(own[name], read[name], out=own[name]) for name in own} if self.feedback else {}
        return replace(
            update,
            arrays={**read, **extras},
            encoded={**encoded.wire, **extras},
            state={**update.state, **to_remember({ERROR: error, WARM: encoded.warm}, self.terms)},
        )


def layout(compressor: Compressor, shapes: Shapes) -> dict[str, Form]:
    """The arrays that an answer has to have, for an update of these shapes."""
    own, extras = _parts(shapes)
    return {**compressor.layout(own), **{name: Form(np.dtype(np.float32), shape) for name, shape in extras.items()}}


def opened(compressor: Compressor, wire: Wire, shapes: Shapes) -> Arrays:
    """The update of these shapes that `wire`, of their layout, stands for. Raises UpdateError if it stands for none."""
    own, extras = _parts(shapes)
    return {**compressor.decode(wire, own), **{name: wire[name] for name in extras}}


def _parts(items: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """What belongs to the parameters, and what to that which was added to them."""
    own = {name: item for name, item in items.items() if not is_extra(name)}
    return own, {name: item for name, item in items.items() if is_extra(name)}


@dataclass(frozen=True)
class SharedPositions(Postprocessor):
    """Random-k: the numbers at k positions of each tensor, drawn anew each round and the same at every site.

    The positions follow from the plan, so they need not travel, and since all sites send the same ones, the sum of what
    they send is what their sum would send: the vector is only shorter. Secure aggregation masks it like any other, and
    leaving numbers out enlarges no norm, so noise on the sum is made for it as for the whole. That is why it is the
    first thing to happen at a site, before the clipping, and the last at the server.

    Without feedback the server multiplies by d / k, so that the mean over the positions is the update itself (Stich,
    Cordonnier, Jaggi 2018, definition 2.1, made unbiased); the variance is d / k - 1 times its square. With feedback it
    does not, and what was not sent waits at the site.

    Each tensor becomes the (k,) numbers that the round's positions hold; what else a site adds stays whole.
    """

    request: RandomK
    round: int
    terms: Terms

    def at_site(self, part: Part[Update], context: SiteContext) -> Part[Update]:
        """Pick the numbers that are sent, of the update and what was not sent before.

        Leaving numbers out brings nothing further apart; what was kept of earlier updates may.
        """
        if self.request.feedback:
            return part.then(lambda update: self._shortened(update, context))
        return part.scaled(1.0, lambda update: self._shortened(update, context))

    def _shortened(self, update: Update, context: SiteContext) -> Update:
        own, state = {name: array for name, array in update.arrays.items() if not is_extra(name)}, update.state
        if self.request.feedback:
            add_memory(own, remembered(context.state, ERROR, self.terms))
        chosen = {name: self._positions(name, array.size) for name, array in own.items()}
        sent = {name: array.reshape(-1)[chosen[name]] for name, array in own.items()}
        if self.request.feedback and all(all_finite(array) for array in own.values()):
            for name, array in own.items():
                array.reshape(-1)[chosen[name]] = 0
            state = {**state, **to_remember({ERROR: own}, self.terms)}
        return replace(update, arrays={**update.arrays, **sent}, state=state)

    def _positions(self, name: str, numbers: int) -> NDArray[np.int64]:
        return positions(self.request, self.round, name, numbers)

    def template(self, arrays: Arrays) -> Arrays:
        """See Postprocessor."""
        return {
            name: array if is_extra(name) else np.zeros(kept(self.request.fraction, array.size), np.float32)
            for name, array in arrays.items()
        }

    def at_server(self, total: Update, shapes: Shapes) -> Update:
        """Put the numbers back in their places, zeros in the others."""
        arrays = {
            name: array if is_extra(name) else self._spread(name, array, shapes[name])
            for name, array in total.arrays.items()
        }
        return replace(total, arrays=arrays)

    def _spread(self, name: str, sent: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
        whole = np.zeros(math.prod(shape), np.float32)
        scale = 1.0 if self.request.feedback else whole.size / max(sent.size, 1)
        whole[self._positions(name, whole.size)] = sent * np.float32(scale)
        return whole.reshape(shape)


def positions(request: RandomK, round: int, name: str, numbers: int) -> NDArray[np.int64]:
    """The ascending positions (k,) of the tensor `name` that are sent in `round`.

    Philox's plain output is the same in every release of numpy; so is which of its numbers are the smallest.
    """
    count = kept(request.fraction, numbers)
    if count == numbers:
        return np.arange(numbers)
    key = hashlib.sha256(f"randk|{request.seed}|{round}|{name}".encode()).digest()[:16]
    draws = np.random.Philox(key=int.from_bytes(key, "big")).random_raw(numbers)
    return np.sort(np.argpartition(draws, count - 1)[:count])
