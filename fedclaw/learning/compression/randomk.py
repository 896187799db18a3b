"""Random-k: the numbers at k positions of each tensor, drawn anew each round and the same at every site.

The positions follow from the plan, so they need not travel, and since all sites send the same ones, the sum of what
they send is what their sum would send: the vector is only shorter. Secure aggregation masks it like any other, and
leaving numbers out enlarges no norm, so noise on the sum is made for it as for the whole. That is why it is the first
thing to happen at a site, before the clipping, and the last at the server.

Without feedback the server multiplies by d / k, so that the mean over the positions is the update itself (Stich,
Cordonnier, Jaggi 2018, definition 2.1, made unbiased); the variance is d / k - 1 times its square. With feedback it
does not, and what was not sent waits at the site.
"""

import hashlib
import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedclaw.learning.compression.compressor import kept
from fedclaw.learning.compression.feedback import ERROR, Terms, add_memory, remembered, to_remember
from fedclaw.learning.postprocessor import Postprocessor, SiteContext
from fedclaw.privacy.provenance import Part
from fedclaw.protocol.arrays import Arrays, Shapes, all_finite
from fedclaw.protocol.compression import RandomK
from fedclaw.protocol.update import Update, is_extra


@dataclass(frozen=True)
class SharedPositions(Postprocessor):
    """Each tensor becomes the (k,) numbers that the round's positions hold; what else a site adds stays whole."""

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
