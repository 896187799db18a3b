"""Each method by itself: what travels, what it is read as, how far that is from the update."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from fedclaw.errors import UpdateError
from fedclaw.learning.compressors import (
    Fp16,
    LargestK,
    LowRank,
    Stochastic,
    encoded_positions,
    kept,
    packed,
    position_form,
    read_positions,
    unpacked,
)
from fedclaw.privacy.noise import GaussianSource
from fedclaw.protocol.arrays import flattened, pack_wire, payload, shapes_of, unpack_wire

SOURCE = GaussianSource()
METHODS = [Fp16(), Stochastic(8, 256), Stochastic(4, 256), Stochastic(4, None), LargestK(0.1), LowRank(2)]


def update(seed=0, scale=1.0):
    generator = np.random.default_rng(seed)
    shapes = {"conv.weight": (8, 3, 3, 3), "head.weight": (12, 40), "head.bias": (12,), "scale": ()}
    return {name: np.array(generator.normal(size=shape) * scale, dtype=np.float32) for name, shape in shapes.items()}


def through(compressor, arrays, warm=None):
    """What a server reads of what travelled, as records."""
    wire = compressor.encode(arrays, SOURCE, warm or {}).wire
    shapes = shapes_of(arrays)
    return compressor.decode(unpack_wire(pack_wire(wire), compressor.layout(shapes)), shapes)


def _named(compressor):
    """The same in every process, which a plain object's repr is not."""
    return "Fp16" if isinstance(compressor, Fp16) else repr(compressor)


@pytest.mark.parametrize("compressor", METHODS, ids=_named)
def test_what_is_read_has_the_updates_names_and_shapes(compressor):
    arrays = update()
    found = through(compressor, arrays)
    assert {name: (a.shape, a.dtype) for name, a in found.items()} == {
        name: (a.shape, a.dtype) for name, a in arrays.items()
    }
    assert payload(compressor.encode(arrays, SOURCE, {}).wire) < payload(arrays)


@pytest.mark.parametrize("compressor", METHODS, ids=_named)
def test_zeros_stay_zeros(compressor):
    found = through(compressor, {"w": np.zeros((6, 50), np.float32), "b": np.zeros(3, np.float32)})
    assert not any(array.any() for array in found.values())


# Half precision


@given(seed=st.integers(0, 10**6), exponent=st.integers(-40, 35))
@settings(max_examples=60, deadline=None)
def test_half_precision_is_as_near_as_ten_bits_can_be(seed, exponent):
    """At scales far beyond what half precision can hold, too."""
    arrays = update(seed, 2.0**exponent)
    found = through(Fp16(), arrays)
    for name, array in arrays.items():
        allowed = np.maximum(np.abs(array) * 2.0**-11, np.abs(array).max() * 2.0**-39)
        assert (np.abs(found[name] - array) <= allowed).all()


# Stochastic quantisation


def test_four_bits_are_packed_two_to_a_byte_by_hand():
    codes = np.array([-7, 0, 7, 1, -1], np.int8)
    # 1 8 | 15 9 | 7 and the filling 8; the earlier one in the lower half
    assert packed(codes).tolist() == [0x81, 0x9F, 0x87]
    assert unpacked("w", packed(codes), 5).tolist() == codes.tolist()


def test_a_block_by_hand():
    """Numbers that are multiples of scale / levels are certain."""
    arrays = {"w": np.array([7, -7, 3, 0, 0.5, -1], np.float32)}
    encoded = Stochastic(4, 4).encode(arrays, SOURCE, {}).wire
    assert encoded["w:scales"].tolist() == [7, 1]
    assert encoded["w:codes"][:2].tolist() == [0x1F, 0x8B]
    found = through(Stochastic(4, 4), arrays)["w"]
    assert found[:4].tolist() == [7, -7, 3, 0]
    assert found[4] in (np.float32(3 / 7), np.float32(4 / 7))
    assert found[5] == -1


@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=70),
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([None, 1, 3, 16]),
)
@settings(max_examples=150, deadline=None)
def test_quantisation_is_off_by_less_than_one_step_of_its_block(values, bits, block):
    array = np.array(values, np.float32)
    found = through(Stochastic(bits, block), {"w": array})["w"].astype(np.float64)
    length = block or len(array)
    for start in range(0, len(array), length):
        part, read = array[start : start + length].astype(np.float64), found[start : start + length]
        step = np.abs(part).max() / (127 if bits == 8 else 7)
        assert (np.abs(read - part) <= step * (1 + 1e-5) + 1e-45).all()


def bias_of(read, array, step, repeats):
    """How unlikely the mean of `repeats` readings is, if each is an unbiased choice of the two nearest steps."""
    place = array.astype(np.float64) / step
    share = place - np.floor(place)
    judged = (share > 0.05) & (share < 0.95)
    mean = sum(read().astype(np.float64) for _ in range(repeats)) / repeats
    deviation = step * np.sqrt(share * (1 - share) / repeats)
    z = ((mean - array) / np.where(judged, deviation, 1))[judged]
    return chi2.sf((z**2).sum(), judged.sum())


@pytest.mark.parametrize("bits", [4, 8])
def test_quantisation_is_unbiased_and_rounding_to_the_nearest_is_not(bits):
    array = np.random.default_rng(1).normal(size=2000).astype(np.float32)
    levels = 127 if bits == 8 else 7
    step = float(np.abs(array).max()) / levels
    compressor = Stochastic(bits, None)
    assert bias_of(lambda: through(compressor, {"w": array})["w"], array, step, 200) > 1e-8
    assert bias_of(lambda: np.rint(array / step) * step, array, step, 200) < 1e-12
    slightly = np.float32(step * 0.02)
    assert bias_of(lambda: through(compressor, {"w": array})["w"] + slightly, array, step, 200) < 1e-12


@pytest.mark.parametrize(("bits", "expected"), [(8, 1000 + 4 * 4), (4, 500 + 4 * 4)])
def test_a_number_takes_a_byte_or_half_of_one(bits, expected):
    wire = Stochastic(bits, 256).encode({"w": np.ones(1000, np.float32)}, SOURCE, {}).wire
    assert payload(wire) == expected


# Top-k


def test_the_largest_numbers_of_the_whole_update_are_sent():
    arrays = {"b": np.array([0.5, -3], np.float32), "a": np.array([[1, -2], [0, 9]], np.float32)}
    found = through(LargestK(0.5), arrays)
    assert found["a"].tolist() == [[0, -2], [0, 9]]
    assert found["b"].tolist() == [0, -3]


@given(seed=st.integers(0, 10**6), fraction=st.floats(0.001, 1))
@settings(max_examples=60, deadline=None)
def test_top_k_leaves_no_more_than_its_share_of_the_square(seed, fraction):
    """Stich, Cordonnier, Jaggi 2018, equation 8: |x - C(x)|^2 <= (1 - k / d) |x|^2."""
    arrays = update(seed)
    whole, sent = flattened(arrays), flattened(through(LargestK(fraction), arrays))
    count = kept(fraction, len(whole))
    assert np.count_nonzero(sent) == count
    assert ((whole - sent) ** 2).sum() <= (1 - count / len(whole)) * (whole**2).sum() * (1 + 1e-5)


@given(st.integers(1, 300), st.data())
@settings(max_examples=80, deadline=None)
def test_positions_come_back(numbers, data):
    chosen = np.array(sorted(data.draw(st.sets(st.integers(0, numbers - 1), min_size=1))), np.int64)
    coded = encoded_positions(chosen, numbers)
    form = position_form(len(chosen), numbers)
    assert (coded.dtype, coded.shape) == (form.dtype, form.shape)
    assert read_positions(coded, len(chosen), numbers).tolist() == chosen.tolist()


@pytest.mark.parametrize(
    ("count", "numbers", "expected"),
    [(10, 1000, 20), (100, 1000, 125), (10, 1 << 16, 20), (10, (1 << 16) + 1, 40), (1 << 15, 1 << 20, 1 << 17)],
)
def test_positions_take_the_shorter_form(count, numbers, expected):
    assert position_form(count, numbers).nbytes == expected


# PowerSGD


def low_rank(rank, rows=30, columns=45, seed=3):
    generator = np.random.default_rng(seed)
    return (generator.normal(size=(rows, rank)) @ generator.normal(size=(rank, columns))).astype(np.float32)


def test_an_update_of_the_factors_rank_is_exact():
    matrix = low_rank(3)
    for shape in [(30, 45), (30, 5, 3, 3)]:
        found = through(LowRank(3), {"w": matrix.reshape(shape)})["w"]
        np.testing.assert_allclose(found, matrix.reshape(shape), atol=1e-4)
    assert np.abs(through(LowRank(2), {"w": matrix})["w"] - matrix).max() > 0.1


def test_a_warm_start_comes_to_the_best_approximation_and_a_cold_one_does_not():
    """Vogels, Karimireddy, Jaggi 2019, section 4.2: one step of power iteration at a time, over the updates."""
    matrix = low_rank(3, seed=5) + 0.3 * np.random.default_rng(6).normal(size=(30, 45)).astype(np.float32)
    values = np.linalg.svd(matrix, compute_uv=False)
    best = np.sqrt((values[2:] ** 2).sum())
    compressor, warm = LowRank(2), {}
    for _ in range(30):
        encoded = compressor.encode({"w": matrix}, SOURCE, warm)
        warm = encoded.warm
    found = compressor.decode(encoded.wire, {"w": matrix.shape})["w"]
    assert np.linalg.norm(matrix - found) <= best * 1.001
    cold = [np.linalg.norm(matrix - through(compressor, {"w": matrix})["w"]) for _ in range(30)]
    assert min(cold) > best * 1.001


def test_vectors_and_matrices_that_factors_would_not_shorten_travel_as_they_are():
    layout = LowRank(2).layout({"b": (50,), "small": (3, 4), "w": (10, 20)})
    assert set(layout) == {"b", "small", "w:left", "w:right"}


# What a site must not send


@pytest.mark.parametrize(
    ("compressor", "shapes", "change"),
    [
        (Fp16(), {"w": (3,)}, {"w": np.zeros(3, np.float32)}),
        (Fp16(), {"w": (3,)}, {"w": np.array([1, np.inf, 0], np.float16)}),
        (Fp16(), {"w": (3,)}, {"w:exponent": np.array([np.nan], np.float32)}),
        (Stochastic(8, 4), {"w": (6,)}, {"w:codes": np.zeros(5, np.int8)}),
        (Stochastic(8, 4), {"w": (6,)}, {"w:codes": np.full(6, -128, np.int8)}),
        (Stochastic(8, 4), {"w": (6,)}, {"w:scales": np.array([np.nan, 1], np.float32)}),
        (Stochastic(8, 4), {"w": (6,)}, {"w:scales": np.array([-1, 1], np.float32)}),
        (Stochastic(8, 4), {"w": (6,)}, {"w:scales": np.ones(10**6, np.float32)}),
        (Stochastic(4, None), {"w": (6,)}, {"w:codes": np.array([0x88, 0x80, 0x88], np.uint8)}),
        (Stochastic(4, None), {"w": (5,)}, {"w:codes": np.full(3, 0x99, np.uint8)}),
        (LargestK(0.01), {"w": (2000,)}, {"positions": np.array([*range(19), 2000], np.uint16)}),
        (LargestK(0.01), {"w": (2000,)}, {"positions": np.array([*range(19), 18], np.uint16)}),
        (LargestK(0.01), {"w": (2000,)}, {"positions": np.arange(20, dtype=np.uint16)[::-1]}),
        (LargestK(0.01), {"w": (200,)}, {"positions": np.arange(2, dtype=np.uint32)}),
        (LargestK(0.5), {"w": (100,)}, {"positions": np.full(13, 255, np.uint8)}),
        (LargestK(0.5), {"w": (100,)}, {"positions": np.array([255] * 6 + [1] + [0] * 5 + [0x10], np.uint8)}),
        (LargestK(0.1), {"w": (200,)}, {"values": np.full(20, np.nan, np.float32)}),
        (LowRank(1), {"w": (9, 8)}, {"w:left": np.zeros((8, 1), np.float32)}),
        (LowRank(1), {"w": (9, 8)}, {"w:right": np.full((8, 1), np.inf, np.float32)}),
        (LowRank(1), {"w": (9, 8)}, {"w": np.zeros((9, 8), np.float32)}),
    ],
)
def test_a_malformed_answer_is_an_update_error(compressor, shapes, change):
    honest = compressor.encode({n: np.ones(s, np.float32) for n, s in shapes.items()}, SOURCE, {}).wire
    layout = compressor.layout(shapes)
    compressor.decode(unpack_wire(pack_wire(honest), layout), shapes)
    with pytest.raises(UpdateError):
        compressor.decode(unpack_wire(pack_wire({**honest, **change}), layout), shapes)


@pytest.mark.parametrize("compressor", METHODS, ids=_named)
def test_an_answer_that_lacks_an_array_is_an_update_error(compressor):
    arrays = update()
    wire = compressor.encode(arrays, SOURCE, {}).wire
    wire.pop(sorted(wire)[0])
    with pytest.raises(UpdateError, match="missing or unknown"):
        unpack_wire(pack_wire(wire), compressor.layout(shapes_of(arrays)))
