"""What happens to an update between local training and the step: ordered postprocessors, each in two halves.

The site applies its halves in order to its own update; the server applies the other halves in reverse to the sum. A
postprocessor has its settings, made from the plan, and sees an update, randomness, and what it kept of the last update,
never a model or data, so it is post-processing under differential privacy; what it changes about sensitivity is its own
to say.

Random positions come before the clipping, so that what is clipped is what is sent; a form of its own, in fewer bytes,
is the last thing that a site makes of an update, and the server opens it before it adds it (`reader`).

What clips at the site knows the sensitivity, so the same postprocessor makes the noise at the server. Masking comes
after all of these and is not one of them: it is an exchange of its own (`fedclaw.server.exchange`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from fedclaw.errors import UpdateError
from fedclaw.learning.compression.postprocessors import (
    SharedPositions,
    SiteEncoding,
    compressor_of,
    layout,
    opened,
    terms_of,
)
from fedclaw.learning.postprocessor import Postprocessor, SiteContext
from fedclaw.learning.registry import strategy_class
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.mechanisms.mechanism import Mechanism
from fedclaw.privacy.mechanisms.sum_noise import WITHIN
from fedclaw.privacy.provenance import Part
from fedclaw.protocol.arrays import Arrays, Shapes, all_finite, payload, shapes_of, unpack, unpack_wire
from fedclaw.protocol.compression import RandomK
from fedclaw.protocol.plan import Plan
from fedclaw.protocol.update import Update

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
