"""Error feedback: what a site did not send goes into its next update (Karimireddy et al. 2019, algorithm 1).

    p = update + memory     sent = C(p)     memory = p - sent

The memory is the site's own state. It is made of what was about to leave, clipped, noised and weighted as it was, so
it, too, is post-processing under local noise. What was asked under other terms (another model, another guarantee) is
not carried over: the memory of a run without noise has no place in an update that has it.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedclaw.protocol.arrays import Arrays
from fedclaw.protocol.plan import Plan

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
