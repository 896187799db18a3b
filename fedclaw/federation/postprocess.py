"""What happens to an update between local training and the step: ordered postprocessors, each in two halves.

The site applies its halves in order to its own update; the server applies the other halves in reverse to the sum. A
postprocessor sees an update and the plan, never a model or data, so it is post-processing under differential
privacy; what it changes about sensitivity is its own to say.

What clips at the site knows the sensitivity, so the same postprocessor makes the noise at the server. Masking comes
after all of these and is not one of them: it is an exchange of its own (`fedclaw.federation.secure_round`).
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import UpdateError
from fedclaw.federation.arrays import Arrays, all_finite
from fedclaw.federation.central import WITHIN, CentralNoise
from fedclaw.federation.plan import Plan
from fedclaw.federation.registry import strategy_class
from fedclaw.federation.update import Postprocessor, Update


class Weighting(Postprocessor):
    """Sum of weight x delta at the sites, divided by the sum of weights at the server (McMahan et al. 2017, alg. 1).

    Where sites are asked at random under central privacy, the divisor is what is expected of them, not what came:
    the divisor must not depend on who was asked (McMahan, Ramage, Talwar, Zhang 2018, section 3, the estimator with
    a fixed denominator).
    """

    def at_site(self, update: Update, plan: Plan) -> Update:
        """Multiply by the site's weight."""
        weight = plan.weight(update.examples)
        for array in update.arrays.values():
            np.multiply(array, np.float32(weight), out=array)
        return replace(update, weight=weight, heaviest=weight)

    def at_server(self, total: Update, plan: Plan) -> Update:
        """Divide by the sum of weights."""
        fixed = plan.central.expected_sites if plan.central else None
        divisor = total.weight if fixed is None else fixed
        if divisor <= 0:
            raise UpdateError("no update was added, so there is no mean")
        for name, array in total.arrays.items():
            np.divide(array, np.float32(divisor), out=array)
            if not all_finite(array):
                raise UpdateError(f"the updates' sum overflowed in parameter {name!r}: a site sent absurd values")
        return replace(total, weight=1.0, heaviest=total.heaviest / divisor)


PIPELINE: tuple[Postprocessor, ...] = (CentralNoise(), Weighting())
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


def template(parameters: Mapping[str, NDArray[np.float32]], plan: Plan) -> Arrays:
    """Arrays, by name, of the shapes that an update under `plan` has: its parameters', and what the site adds.

    Raises PluginError for a strategy that is not installed.
    """
    arrays = {name: array for name, array in parameters.items() if name not in plan.personal}
    arrays |= strategy_class(plan.strategy).extras(arrays)
    if plan.central and plan.central.adaptive:
        arrays[WITHIN] = np.zeros(1, np.float32)
    return arrays
