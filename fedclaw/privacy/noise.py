"""Noise and sampling from a cryptographic source.

A seeded generator makes noise that whoever learns or guesses the seed can subtract. Here every random bit of a
private step comes from an AES-256-CTR keystream under a key that the operating system drew, that is never stored
and that no two sources share; reading the noise off the output would take breaking AES.

Normals are made in pairs (Box and Muller 1958): a radius sqrt(-2 ln u) in float64 from the lower 52 bits
of a word, and the cosine and sine in float32 of an angle from 32 bits; their products are float64. What that costs in
exactness: float32 trigonometry is off by about 1.2e-7 of each value, so the density is too, where it matters; and there
is no mass beyond sqrt(2 x 52 ln 2) = 8.49 standard deviations (true mass: 2e-17), which disappears within any useful
delta.

What this does not close: floating point (Mironov 2012, "On Significance of the Least Significant Bits for
Differential Privacy"). Real-valued Gaussian noise does not exist on a computer; the set of doubles that value + noise
can reach depends on the value, and an adversary who sees exact outputs could in principle tell neighbouring values
apart by their last bits. `perturb_` mitigates this: value and noise are added in float64 and the sum is rounded to
float32 once, so that each pair of outputs of the noise's own size has about 2^26 (radius, angle) pairs that lead to it.
That is a mitigation, not a proof; the proof needs integer noise, as in secure aggregation with the discrete Gaussian.
"""

import math
import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedclaw.errors import PrivacyError

_KEY_BYTES = 32
CHUNK = 1 << 15
"""Values made at a time: 512 KiB of doubles and as much keystream stay in the cache. Even, for Box-Muller's pairs."""
_UNIFORM_BITS = 53
_MANTISSA = np.uint64(2**52 - 1)
_ONE = np.uint64(0x3FF << 52)
# (word & _MANTISSA) | _ONE is a double in [1, 2), uniform with 52 bits.
_TO_ANGLE = np.float32(math.pi * 2.0**-31)
_HALF_ANGLE = np.float32(math.pi * 2.0**-32)
# Angles lie halfway between multiples of the step, so that no sine and no normal number is exactly zero.
_SQUARE_IS_FINE = (1e-100, 1e100)
_SIZES_KEPT = 16
# By the processor and by nothing that is measured: under a fixed key the same noise is made every time.
_NUMPY_HAS_FAST_LOG = bool(
    {"X86_V4", "AVX512_SKX", "AVX512F"}
    & {
        found["current"]
        for kinds in np.lib.introspect.opt_func_info(func_name="^log$", signature="float64").values()
        for found in kinds.values()
    }
)
_BYTES_A_NONCE = 1 << 32
# GCM's block counter has 32 bits, good for 2^36 bytes; the next nonce begins long before.


class GaussianSource:
    """A stream of normal and uniform random numbers, independent of every other source.

    Not safe for use by two threads at once. After a fork the child's copy raises PrivacyError: it would draw the
    same numbers as its parent's.
    """

    def __init__(self, *, insecure_fixed_key_for_tests: bytes | None = None) -> None:
        """A source with a fresh key.

        `insecure_fixed_key_for_tests` (32 bytes) makes the stream repeatable: whoever has the key can subtract the
        noise, so it is for tests alone. Raises PrivacyError for a key of another length.
        """
        key = os.urandom(_KEY_BYTES) if insecure_fixed_key_for_tests is None else insecure_fixed_key_for_tests
        if len(key) != _KEY_BYTES:
            raise PrivacyError(f"a key of a noise source has {_KEY_BYTES} bytes, not {len(key)}")
        self._keystream = _Keystream(key)
        self._process = os.getpid()
        self._zeros = memoryview(bytes(8 * CHUNK))
        self._benches: dict[int, _Bench] = {}

    def __repr__(self) -> str:
        return "GaussianSource()"

    def __getstate__(self) -> object:
        raise TypeError("a noise source is never copied or sent: two holders would draw the same noise")

    def standard(self, count: int) -> torch.Tensor:
        """(count,) float64 on the CPU, independent standard normal."""
        values = torch.zeros(count, dtype=torch.float64)
        self._perturb(values, 1.0)
        return values

    def perturb_(self, values: torch.Tensor, std: float) -> torch.Tensor:
        """Add independent N(0, std^2) to each number of `values` (contiguous) in place, and return it.

        The sum is made in float64 and rounded once. Raises PrivacyError if std is not >= 0.
        """
        if not 0 <= std < math.inf:
            raise PrivacyError(f"a standard deviation is a number of at least 0, not {std}")
        flat = values.view(-1)
        if flat.device.type == "cpu":
            self._perturb(flat, std)
        else:
            flat.add_(self.standard(len(flat)).mul_(std).to(flat.device))
        return values

    def bernoulli(self, count: int, q: float) -> NDArray[np.bool_]:
        """(count,) mask, each True with probability `q`, exact to 2^-53. Raises PrivacyError outside [0, 1]."""
        if not 0 <= q <= 1:
            raise PrivacyError(f"a probability lies in [0, 1], not {q}")
        mask, most = np.empty(count, dtype=np.bool_), np.uint64(math.ceil(q * 2**_UNIFORM_BITS))
        for start in range(0, count, CHUNK):
            part = mask[start : start + CHUNK]
            np.less(self._uniforms(len(part)), most, out=part)
        return mask

    def permutation(self, count: int) -> NDArray[np.int64]:
        """A uniformly random order of 0 .. count-1 (by sorting 53-bit keys; a tie changes nothing that matters)."""
        return np.argsort(self._uniforms(count), kind="stable")

    def words(self, count: int) -> NDArray[np.uint64]:
        """(count,) uniform 64-bit words of the keystream."""
        words = np.empty(count, dtype=np.uint64)
        for start in range(0, count, CHUNK):
            self._fill(words[start : start + CHUNK])
        return words

    def _perturb(self, flat: torch.Tensor, std: float) -> None:
        """Add N(0, std^2) to (n,) numbers on the CPU, in place."""
        for part in torch.split(flat, CHUNK):
            bench = self._benches.get(len(part))
            if bench is None:
                if len(self._benches) == _SIZES_KEPT:
                    self._benches.clear()
                bench = self._benches[len(part)] = _Bench(len(part))
            self._fill(bench.words)
            bench.add_normals(part, std)

    def _uniforms(self, count: int) -> NDArray[np.uint64]:
        """(count,) uniform numbers of 53 bits."""
        return self.words(count) >> np.uint64(64 - _UNIFORM_BITS)

    def _fill(self, words: NDArray[np.uint64]) -> None:
        if os.getpid() != self._process:
            raise PrivacyError("a noise source came over a fork; make one in the process that uses it")
        self._keystream.fill(self._zeros[: words.nbytes], words.view(np.uint8).data)


class _Keystream:
    """The AES-256-CTR keystream of a key, from AES-256-GCM (NIST SP 800-38D), which encrypts by counting.

    Nobody asks for GCM's tag; OpenSSL merely has a faster way of counting for it (twice as fast where the processor has
    vector AES). Under nonce n (12 bytes, 0, 1, ...), block i is AES(key, n || i + 2).
    """

    def __init__(self, key: bytes) -> None:
        self._cipher = algorithms.AES(key)
        self._nonce = 0
        self._begin()

    def fill(self, zeros: memoryview, into: memoryview) -> None:
        """Write as many bytes of the stream as there are `zeros` to `into`."""
        if self._left < len(zeros):
            self._nonce += 1
            self._begin()
        self._left -= len(zeros)
        self._encryptor.update_into(zeros, into)

    def _begin(self) -> None:
        nonce = self._nonce.to_bytes(12, "big")
        self._encryptor = Cipher(self._cipher, modes.GCM(nonce)).encryptor()
        self._left = _BYTES_A_NONCE


class _Bench:
    """Where `count` normals are worked out in pairs: half of the words give radii, the rest two angles each.

    Memory and views of it are made once, as both cost more than the arithmetic. numpy and torch share the memory. numpy
    does the arithmetic: its calls start faster, and its float32 sine and cosine take less than half of torch's time.
    Its logarithm does too where it has AVX-512 (0.9 ns against 2.3); elsewhere it takes one number at a time.
    """

    def __init__(self, count: int) -> None:
        half = (count + 1) // 2
        self.words = np.empty(half + (half + 1) // 2, dtype=np.uint64)
        self._radius_bits = self.words[:half]
        self._turns = self.words[half:].view(np.int32)[:half]
        self._radius = self._radius_bits.view(np.float64)
        self._radius_torch = torch.from_numpy(self._radius)
        self._angle = np.empty(half, dtype=np.float32)
        self._circle = torch.empty(2, half)
        self._cosine, self._sine = self._circle.numpy()
        self._point = torch.empty(2, half, dtype=torch.float64)
        self._sum = torch.empty(2, half, dtype=torch.float64)
        self._values = self._sum.view(-1)[:count]

    def add_normals(self, values: torch.Tensor, std: float) -> None:
        """Add N(0, std^2) made of `words`, which are used up, to `values` (count,); in float64, rounded once."""
        bits, radius, angle = self._radius_bits, self._radius, self._angle
        np.bitwise_and(bits, _MANTISSA, out=bits)
        np.bitwise_or(bits, _ONE, out=bits)
        # 2 - [1, 2) lies in (0, 1], so that its logarithm is finite.
        np.subtract(2.0, radius, out=radius)
        if _NUMPY_HAS_FAST_LOG:
            np.log(radius, out=radius)
        else:
            self._radius_torch.log_()
        # Where the square of the deviation is an ordinary number it takes part in this product; elsewhere apart.
        inside = std if _SQUARE_IS_FINE[0] < std < _SQUARE_IS_FINE[1] else 1.0
        np.multiply(radius, -2.0 * inside * inside, out=radius)
        np.sqrt(radius, out=radius)
        if inside != std:
            np.multiply(radius, std, out=radius)
        np.copyto(angle, self._turns, casting="same_kind")
        np.multiply(angle, _TO_ANGLE, out=angle)
        np.add(angle, _HALF_ANGLE, out=angle)
        np.cos(angle, out=self._cosine)
        np.sin(angle, out=self._sine)
        self._point.copy_(self._circle)
        if values.dtype == torch.float64 and len(values) == self._sum.numel():
            pairs = values.view(2, -1)
            torch.addcmul(pairs, self._point, self._radius_torch, out=pairs)
            return
        self._values.copy_(values)
        torch.addcmul(self._sum, self._point, self._radius_torch, out=self._sum)
        values.copy_(self._values)
