"""What happens to an update between local training and the step: ordered postprocessors, each in two halves.

The site applies its halves in order to its own update; the server applies the other halves in reverse to the sum. A
postprocessor has its settings, made from the plan, and sees an update, randomness, and what it kept of the last update,
never a model or data, so it is post-processing under differential privacy; what it changes about sensitivity is its own
to say.

Random positions come before the clipping, so that what is clipped is what is sent; a form of its own, in fewer bytes,
is the last thing that a site makes of an update, and the server opens it before it adds it (`reader`).

What clips at the site knows the sensitivity, so the same postprocessor makes the noise at the server. Masking comes
after all of these and is not one of them: it is an exchange of its own (`fedclaw.server.exchange`).

`SiteEncoding`, for the methods whose form of an update is each site's own (`fedclaw.learning.compressors`), is the
site's last step, after clipping, noise and weighting: with local noise it is post-processing, which costs nothing. An
answer is opened when it arrives, before it is added, so the sum is the usual one.

What a strategy adds to an update (control variates, normalisers) travels as it is: it has to add up exactly.

Error feedback: what a site did not send goes into its next update (Karimireddy et al. 2019, algorithm 1).

    p = update + memory     sent = C(p)     memory = p - sent

The memory is the site's own state. It is made of what was about to leave, clipped, noised and weighted as it was, so
it, too, is post-processing under local noise. What was asked under other terms (another model, another guarantee) is
not carried over: the memory of a run without noise has no place in an update that has it.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from fedclaw.errors import UpdateError
from fedclaw.learning.compressors import Compressor, Fp16, LargestK, LowRank, Stochastic, broken, kept
from fedclaw.learning.registry import strategy_class
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.mechanisms.mechanism import Mechanism
from fedclaw.privacy.mechanisms.sum_noise import WITHIN
from fedclaw.privacy.provenance import Part
from fedclaw.protocol.arrays import (
    Arrays,
    Form,
    Shapes,
    Update,
    Wire,
    all_finite,
    is_extra,
    payload,
    shapes_of,
    unpack,
    unpack_wire,
)
from fedclaw.protocol.terms import Compression, HalfPrecision, Plan, PowerSgd, Quantisation, RandomK, TopK

if TYPE_CHECKING:
    from fedclaw.privacy.noise import GaussianSource


@dataclass(frozen=True)
class SiteContext:
    """What a site hands to its postprocessors beside the update: none of its data."""

    source: "GaussianSource"
    """Randomness that nobody else knows."""
    state: Mapping[str, Arrays] = field(default_factory=dict)
    """By kind, what the site kept from its last update in this run."""


class Postprocessor(ABC):
    """One kind of processing, with its settings. Either half may change the arrays in place and return them."""

    @abstractmethod
    def at_site(self, part: Part[Update], context: SiteContext) -> Part[Update]:
        """Before the update leaves, with what becomes of where it comes from. Raises PrivacyError.

        What the site is to keep goes into `Update.state`.
        """

    def template(self, arrays: Arrays) -> Arrays:
        """Arrays of the shapes in which updates of the shapes of `arrays` are summed."""
        return arrays

    def at_server(self, total: Update, shapes: Shapes) -> Update:
        """After all updates were added. Raises UpdateError when the sum cannot be used.

        `shapes` are those of the global parameters.
        """
        return total


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


_BESIDE = 1024
"""Bytes of an array's header, padding and description, at most."""

Reader = Callable[[ArrayRecord], tuple[Arrays, int]]
"""Opens what a site sent: its weighted update, and how many bytes it came in. Raises UpdateError."""


@dataclass(frozen=True)
class Bounding(Postprocessor):
    """The mechanism's two halves: it bounds at the site, and adds the server's noise if there is any."""

    mechanism: Mechanism

    def at_site(self, part: Part[Update], context: SiteContext) -> Part[Update]:
        """See Mechanism.bound."""
        return self.mechanism.bound(part)

    def template(self, arrays: Arrays) -> Arrays:
        """With the count of who stayed within an adaptive bound, where there is one."""
        return {**arrays, WITHIN: np.zeros(1, np.float32)} if self.mechanism.counts_within_clip else arrays

    def at_server(self, total: Update, shapes: Shapes) -> Update:
        """See Mechanism.noised."""
        return self.mechanism.noised(total)


@dataclass(frozen=True)
class Weighting(Postprocessor):
    """Sum of weight x delta at the sites, divided by the sum of weights at the server (McMahan et al. 2017, alg. 1).

    Where sites are asked at random under central privacy, the divisor is what is expected of them, not what came:
    the divisor must not depend on who was asked (McMahan, Ramage, Talwar, Zhang 2018, section 3, the estimator with
    a fixed denominator).
    """

    weight_of: Callable[[int], float]
    """What a site with so many examples counts by."""
    fixed_divisor: float | None = None

    def at_site(self, part: Part[Update], context: SiteContext) -> Part[Update]:
        """Multiply by the site's weight, which brings two updates that many times further apart."""
        return part.scaled(self.weight_of(part.value.examples), self._weighted)

    def _weighted(self, update: Update) -> Update:
        weight = self.weight_of(update.examples)
        for array in update.arrays.values():
            np.multiply(array, array.dtype.type(weight), out=array)
        return replace(update, weight=weight, heaviest=weight)

    def at_server(self, total: Update, shapes: Shapes) -> Update:
        """Divide by the sum of weights."""
        divisor = total.weight if self.fixed_divisor is None else self.fixed_divisor
        if divisor <= 0:
            raise UpdateError("no update was added, so there is no mean")
        for name, array in total.arrays.items():
            np.divide(array, array.dtype.type(divisor), out=array)
            if not all_finite(array):
                raise UpdateError(f"the updates' sum overflowed in parameter {name!r}: a site sent absurd values")
        return replace(total, weight=1.0, heaviest=total.heaviest / divisor, divisor=divisor)


def postprocessors(plan: Plan) -> tuple[Postprocessor, ...]:
    """Those of `plan`, in the order in which a site applies them. What it does not ask for is not among them."""
    divisor, compression = plan.central.expected_sites if plan.central else None, plan.compression
    always = Bounding(mechanism_of(plan)), Weighting(plan.weight, divisor)
    if isinstance(compression, RandomK):
        return SharedPositions(compression, plan.round, terms_of(plan)), *always
    if (compressor := compressor_of(compression)) is not None:
        return *always, SiteEncoding(compressor, bool(getattr(compression, "feedback", False)), terms_of(plan))
    return always


def at_site(part: Part[Update], plan: Plan, context: SiteContext) -> Part[Update]:
    """What leaves a site (`Update.leaving`), what the server adds of it (`arrays`), and what the site keeps (`state`).

    Whoever answers for a site without a message adds `arrays` as they are. Raises PrivacyError for what the plan's
    mechanism does not cover.
    """
    for postprocessor in postprocessors(plan):
        part = postprocessor.at_site(part, context)
    return part


def at_server(total: Update, plan: Plan, shapes: Shapes) -> Update:
    """What the server's optimiser steps along; `shapes` are those of the global parameters."""
    for postprocessor in reversed(postprocessors(plan)):
        total = postprocessor.at_server(total, shapes)
    return total


def template(parameters: Mapping[str, NDArray[np.float32]], plan: Plan) -> Arrays:
    """Arrays, by name, of the shapes that updates under `plan` are summed in: its parameters', and what a site adds.

    Raises PluginError for a strategy that is not installed.
    """
    arrays = {name: array for name, array in parameters.items() if name not in plan.personal}
    arrays |= strategy_class(plan.strategy).extras(arrays)
    for postprocessor in postprocessors(plan):
        arrays = postprocessor.template(arrays)
    return arrays


def sum_of(parameters: Mapping[str, NDArray[np.float32]], plan: Plan) -> dict[str, NDArray[Any]]:
    """Zeros of the shapes that `template` has, in the type of the sum. They take no memory."""
    zero = mechanism_of(plan).sum_dtype(0)
    return {name: np.broadcast_to(zero, array.shape) for name, array in template(parameters, plan).items()}


def reader(parameters: Mapping[str, NDArray[np.float32]], plan: Plan) -> Reader:
    """What opens the answers of the sites that were asked with `plan` and `parameters`. Raises PluginError."""
    if (compressor := compressor_of(plan.compression)) is None:
        return as_sent
    shapes = shapes_of(template(parameters, plan))
    expected = layout(compressor, shapes)

    def read(record: ArrayRecord) -> tuple[Arrays, int]:
        return opened(compressor, unpack_wire(record, expected), shapes), sum(form.nbytes for form in expected.values())

    return read


def answer_bytes(parameters: Mapping[str, NDArray[np.float32]], plan: Plan) -> int:
    """What the arrays of an answer to `plan` and `parameters` take as a message. Raises PluginError."""
    arrays = template(parameters, plan)
    compressor = None if plan.secure else compressor_of(plan.compression)
    sizes = {name: array.nbytes for name, array in arrays.items()}
    if compressor is not None:
        sizes = {name: form.nbytes for name, form in layout(compressor, shapes_of(arrays)).items()}
    return sum(size + len(name) + _BESIDE for name, size in sizes.items())


def as_sent(record: ArrayRecord) -> tuple[Arrays, int]:
    """A `Reader` of updates that travel as they are summed."""
    arrays = unpack(record)
    return arrays, payload(arrays)
