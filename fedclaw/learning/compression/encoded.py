"""The postprocessor of the methods whose form of an update is each site's own, and how their answers are opened.

The site's last step, after clipping, noise and weighting: with local noise it is post-processing, which costs nothing.
An answer is opened when it arrives, before it is added, so the sum is the usual one.

What a strategy adds to an update (control variates, normalisers) travels as it is: it has to add up exactly.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from fedclaw.learning.compression.compressor import Compressor, broken
from fedclaw.learning.compression.feedback import ERROR, WARM, Terms, add_memory, remembered, to_remember
from fedclaw.learning.compression.fp16 import Fp16
from fedclaw.learning.compression.powersgd import LowRank
from fedclaw.learning.compression.stochastic import Stochastic
from fedclaw.learning.compression.topk import LargestK
from fedclaw.learning.postprocessor import Postprocessor, SiteContext
from fedclaw.privacy.provenance import Part
from fedclaw.protocol.arrays import Arrays, Form, Shapes, Wire, all_finite, shapes_of
from fedclaw.protocol.compression import Compression, HalfPrecision, PowerSgd, Quantisation, TopK
from fedclaw.protocol.update import Update, is_extra

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
