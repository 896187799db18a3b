"""What happens to an update between local training and the step: ordered postprocessors, each in two halves.

The site applies its halves in order to its own update; the server applies the other halves in reverse to the sum. A
postprocessor sees an update and the plan, never a model or data, so it is post-processing under differential
privacy; what it changes about sensitivity is its own to say.

Weighting is the only one so far. Compression, masking and central noise are to be others of the same kind.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np

from fedclaw.errors import UpdateError
from fedclaw.federation.arrays import Arrays, all_finite
from fedclaw.federation.plan import Plan


@dataclass(frozen=True)
class Update:
    """Parameter deltas by name (float32), or a sum of them; `weight` and `examples` add up as they do."""

    arrays: Arrays
    weight: float
    examples: int


class Postprocessor(ABC):
    """One kind of processing. Either half may change the update's arrays in place and return them."""

    @abstractmethod
    def at_site(self, update: Update, plan: Plan) -> Update:
        """Before the update leaves."""

    @abstractmethod
    def at_server(self, total: Update, plan: Plan) -> Update:
        """After all updates were added. Raises UpdateError when the sum cannot be used."""


class Weighting(Postprocessor):
    """Sum of weight x delta at the sites, divided by the sum of weights at the server (McMahan et al. 2017, alg. 1)."""

    def at_site(self, update: Update, plan: Plan) -> Update:
        """Multiply by the site's weight: its examples, or 1."""
        weight = float(update.examples) if plan.weighting == "examples" else 1.0
        for array in update.arrays.values():
            np.multiply(array, np.float32(weight), out=array)
        return replace(update, weight=weight)

    def at_server(self, total: Update, plan: Plan) -> Update:
        """Divide by the sum of weights."""
        if total.weight <= 0:
            raise UpdateError("no update was added, so there is no mean")
        for name, array in total.arrays.items():
            np.divide(array, np.float32(total.weight), out=array)
            if not all_finite(array):
                raise UpdateError(f"the updates' sum overflowed in parameter {name!r}")
        return replace(total, weight=1.0)


PIPELINE: tuple[Postprocessor, ...] = (Weighting(),)
"""In the order in which a site applies them."""


def at_site(update: Update, plan: Plan) -> Update:
    """What leaves the site."""
    for postprocessor in PIPELINE:
        update = postprocessor.at_site(update, plan)
    return update


def at_server(total: Update, plan: Plan) -> Update:
    """What the server's optimiser steps along."""
    for postprocessor in reversed(PIPELINE):
        total = postprocessor.at_server(total, plan)
    return total
