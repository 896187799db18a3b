"""Vectors of real numbers as integers modulo 2^32, which add up exactly under secure aggregation.

A number x is round(x / step) steps; a sum of integers is read back as centred representatives times the step. Rounding
is at random and without bias for differential privacy, where the norm of what is rounded, or of what one unit changes
in it, has to stay bounded; and to the nearest for secure aggregation alone.

Legend: d numbers in a vector.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import PrivacyError

if TYPE_CHECKING:
    from fedclaw.privacy.noise import GaussianSource

Vector = NDArray[np.floating[Any]]

BETA = 2.0**-64
"""Probability with which a vector may exceed its norm bound by being rounded."""

_ATTEMPTS = 10
_CHUNK = 1 << 16
# Numbers worked on at a time, so that what is made on the way stays in the cache. Even.
_HALF = 1 << 31
_BEYOND = 2.0**40


@dataclass(frozen=True)
class Encoding:
    """Real numbers as multiples of `step`, modulo 2^32. Raises PrivacyError for a step that is not above 0."""

    step: float

    def __post_init__(self) -> None:
        if not 0 < self.step < math.inf:
            raise PrivacyError(f"the step of an encoding is a number above 0, not {self.step}")

    def encode(self, vector: Vector, clip: float, source: "GaussianSource") -> NDArray[np.uint32]:
        """`vector` (d,), scaled to an L2 norm of at most `clip`, in steps: (d,) integers modulo 2^32.

        Each number is rounded up or down at random, such that its mean is right (to 2^-32 steps), again and again until
        the integers' norm keeps to `rounded_norm_squared` (Kairouz, Liu, Steinke 2021, section 4.2): whatever floating
        point did before, that bound holds of what is returned. A vector with a number that is not finite counts as
        zero: whether a site answers must not depend on its data. Raises PrivacyError for bounds of over 2^30 steps.
        """
        limit = rounded_norm_squared(clip, self.step, len(vector))
        scale = _scale(vector, clip) / self.step
        rounded = np.zeros(len(vector), dtype=np.int32)
        if scale == 0:
            return rounded.view(np.uint32)
        for _ in range(_ATTEMPTS):
            if _round_at_random(vector, scale, rounded, source) <= limit:
                return rounded.view(np.uint32)
        raise AssertionError("rounding exceeded a bound that it exceeds with probability 2^-64, again and again")

    def encode_sum(
        self, vector: Vector, largest: int, source: "GaussianSource", longest: float = math.inf
    ) -> tuple[NDArray[np.uint32], int]:
        """`vector` (d,) of any norm, rounded at random, each number then brought into [-largest, largest] steps.

        For a sum within a site, of which one unit is a part: if the unit moves `vector` by an L2 norm of at most
        `clip`, it moves the integers by at most `rounded_norm_squared(clip, step, d)`, except with probability
        BETA: with the same random numbers, the difference of the two rounded vectors is the unit's own part rounded at
        random. Float64 vectors keep that true to 16 digits. Numbers that are not finite count as zero. The
        second value is how many numbers were beyond `largest`.

        `longest` is what the norm of a sum of as many parts as there can be comes to. A longer vector, which clipping
        cannot have left, is scaled down to it, which brings no two vectors further apart; and the integers are looked
        at once more: raises PrivacyError if they are longer than rounding can have made them.
        """
        rounded = np.empty(len(vector), dtype=np.int32)
        beyond, squared = 0, 0.0
        scale = _scale(vector, longest) / self.step or 1 / self.step
        for start in range(0, len(vector), _CHUNK):
            whole, finite = _rounded_part(vector[start : start + _CHUNK], scale, source)
            beyond += int(np.count_nonzero(np.abs(whole) > largest)) + len(finite) - int(np.count_nonzero(finite))
            part = np.clip(whole, -largest, largest)
            rounded[start : start + _CHUNK] = part
            # Of whole numbers, which are exact up to 2^53.
            squared += float(part.astype(np.float64) @ part)
        if squared > (longest / self.step * (1 + 1e-9) + math.sqrt(len(vector))) ** 2:
            raise PrivacyError("the sum that was to leave is longer than its clipped parts can make it; nothing leaves")
        return rounded.view(np.uint32), beyond

    def encode_nearest(self, vector: Vector, value_range: float) -> NDArray[np.uint32]:
        """`vector` (d,), each number brought into [-value_range, value_range] and rounded to the nearest step; what is
        no number becomes 0."""
        encoded = np.empty(len(vector), dtype=np.int32)
        for start in range(0, len(vector), _CHUNK):
            part = vector[start : start + _CHUNK].astype(np.float64)
            np.nan_to_num(part, copy=False, nan=0.0, posinf=value_range, neginf=-value_range)
            np.clip(part, -value_range, value_range, out=part)
            encoded[start : start + _CHUNK] = np.rint(part / self.step)
        return encoded.view(np.uint32)

    def decode(self, total: NDArray[np.uint32]) -> NDArray[np.float64]:
        """A sum (d,) of encoded vectors as real numbers (d,): representatives in [-2^31, 2^31) times the step."""
        return total.view(np.int32) * np.float64(self.step)


def nearest_step(value_range: float, sites: int) -> float:
    """The smallest power of two with which a sum of `sites` vectors in [-value_range, value_range] cannot wrap.

    Raises PrivacyError for a range that is not above 0.
    """
    if not 0 < value_range < math.inf:
        raise PrivacyError(f"a range of values is a number above 0, not {value_range}")
    return float(2.0 ** math.ceil(math.log2(sites * value_range / (_HALF - 1 - sites))))


def rounded_norm_squared(clip: float, step: float, dimension: int) -> int:
    """The largest squared L2 norm, in steps, of a vector (d,) of norm <= `clip` after rounding at random.

    With c = clip / step: c^2 + d / 4 + sqrt(2 log(1 / BETA)) (c + sqrt(d) / 2), which rounding exceeds with
    probability BETA at most (Hoeffding's inequality; Kairouz, Liu, Steinke 2021, section 4.2), or (c + sqrt(d))^2,
    which it cannot exceed. Raises PrivacyError if it is more than 2^60: such vectors have no place in 32 bits.
    """
    if not (0 < clip < math.inf and 0 < step < math.inf):
        raise PrivacyError(f"clipping bound and step are numbers above 0, not {clip} and {step}")
    norm, root = clip / step, math.sqrt(dimension)
    likely = norm**2 + dimension / 4 + math.sqrt(-2 * math.log(BETA)) * (norm + root / 2)
    limit = min(likely, (norm + root) ** 2)
    if limit > 2.0**60:
        raise PrivacyError(
            f"a step of {step:g} is too small: vectors of norm {clip:g} do not fit into 32 bits a number"
        )
    return math.floor(limit)


def _scale(vector: Vector, clip: float) -> float:
    """What `vector` has to be multiplied by to have a norm of at most `clip`; 0 if it is zero or not finite."""
    squared = 0.0
    for start in range(0, len(vector), _CHUNK):
        part = vector[start : start + _CHUNK].astype(np.float64)
        with np.errstate(over="ignore"):
            squared += float(part @ part)
    if squared == 0 or not math.isfinite(squared):
        return 0.0
    return min(1.0, clip / math.sqrt(squared))


def _round_at_random(vector: Vector, scale: float, rounded: NDArray[np.int32], source: "GaussianSource") -> int:
    """Overwrite `rounded` (d,) by `vector` times `scale`, each number rounded up or down at random.

    Returns its squared norm, exactly.
    """
    squared = 0
    for start in range(0, len(vector), _CHUNK):
        whole, _ = _rounded_part(vector[start : start + _CHUNK], scale, source)
        rounded[start : start + _CHUNK] = whole
        squared += int(whole @ whole)
    return squared


def _rounded_part(part: Vector, scale: float, source: "GaussianSource") -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """`part` (n,) times `scale`, each number rounded up or down at random; and which numbers are finite.

    Those that are not become 0; magnitudes end at 2^40, which is beyond anything that is sent.
    """
    scaled = part.astype(np.float64)
    scaled *= scale
    finite = np.isfinite(scaled)
    np.nan_to_num(scaled, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    np.clip(scaled, -_BEYOND, _BEYOND, out=scaled)
    below = np.floor(scaled)
    scaled -= below
    scaled *= 2.0**32
    chances = source.words((len(part) + 1) // 2).view(np.uint32)[: len(part)]
    whole = below.astype(np.int64)
    whole += chances < scaled
    return whole, finite
