"""Vectors as integers modulo 2^32: what comes back, and what bounds hold of what is sent."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedclaw.errors import PrivacyError
from fedclaw.privacy.fixed_point import Encoding, nearest_step, rounded_norm_squared
from fedclaw.privacy.noise import GaussianSource

KEY = bytes(range(32))
VECTORS = arrays(np.float64, st.integers(1, 40), elements=st.floats(-1e6, 1e6))


def source(key=KEY):
    return GaussianSource(insecure_fixed_key_for_tests=key)


def integers(encoded):
    assert encoded.dtype == np.uint32
    return encoded.view(np.int32).astype(np.int64)


def test_exact_multiples_survive_and_sums_are_exact():
    encoding = Encoding(0.25)
    vectors = [np.array([1.0, -0.5, 0.0, 2.25]), np.array([-3.0, 0.25, -0.25, -2.5])]
    encoded = [encoding.encode(vector, 100.0, source()) for vector in vectors]
    assert integers(encoded[0]).tolist() == [4, -2, 0, 9]
    assert encoding.decode(encoded[0] + encoded[1]).tolist() == (vectors[0] + vectors[1]).tolist()


@settings(max_examples=100, deadline=None)
@given(VECTORS, st.floats(1e-3, 1e3), st.sampled_from([2.0**-12, 0.01, 0.3, 1.0]), st.binary(min_size=32, max_size=32))
def test_the_integers_keep_the_bound_whatever_the_vector(vector, clip, step, key):
    rounded = integers(Encoding(step).encode(vector, clip, source(key)))
    assert sum(int(number) ** 2 for number in rounded) <= rounded_norm_squared(clip, step, len(vector))
    norm = math.sqrt(math.fsum(vector**2))
    scaled = vector * min(1.0, clip / norm) / step if norm else vector
    assert np.abs(rounded - scaled).max() <= 1 + 1e-6


def test_the_bound_of_a_large_vector_is_close_to_its_norm():
    vector = np.random.default_rng(1).standard_normal(200_000).astype(np.float32)
    limit = rounded_norm_squared(1.0, 2.0**-14, len(vector))
    rounded = integers(Encoding(2.0**-14).encode(vector, 1.0, source()))
    assert 2.0**28 < int(rounded @ rounded) <= limit < 2.0**28 * 1.002


def test_the_bound_by_hand():
    assert rounded_norm_squared(3.0, 1.0, 1) == 16
    likely = 400**2 + 100 + math.sqrt(2 * 64 * math.log(2)) * (400 + 10)
    assert rounded_norm_squared(100.0, 0.25, 400) == math.floor(likely)


def test_rounding_at_random_has_no_bias():
    vector = np.array([0.1, -0.1, 0.5, -2.75, 3.999, 0.0, -1.0])
    rounded = integers(Encoding(1.0).encode(np.tile(vector, 40_000), 1e6, source()))
    mean = rounded.reshape(-1, len(vector)).mean(axis=0)
    assert np.abs(mean - vector).max() < 5.5 * 0.5 / math.sqrt(40_000)
    assert mean[5] == 0
    assert mean[6] == -1


def test_numbers_are_rounded_independently():
    vector = np.full(100_000, 0.5)
    rounded = integers(Encoding(1.0).encode(vector, 1000.0, source()))
    for lag in (1, 2, 1 << 15, 1 << 16):
        assert abs(np.corrcoef(rounded[:-lag], rounded[lag:])[0, 1]) < 5.5 / math.sqrt(len(vector) - lag)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_a_vector_that_is_not_finite_counts_as_zero(bad):
    assert not Encoding(0.5).encode(np.array([1.0, bad, 2.0]), 1.0, source()).any()


@settings(max_examples=200, deadline=None)
@given(
    arrays(np.float64, 30, elements=st.floats(-1e5, 1e5)),
    arrays(np.float64, 30, elements=st.floats(-1, 1)),
    st.integers(1, 2000),
    st.binary(min_size=32, max_size=32),
)
def test_one_part_moves_a_rounded_sum_by_no_more_than_its_bound(rest, part, largest, key):
    part *= min(1.0, 1 / max(np.linalg.norm(part), 1e-9))
    encoding = Encoding(2.0**-9)
    without, _ = encoding.encode_sum(rest, largest, source(key))
    together, _ = encoding.encode_sum(rest + part, largest, source(key))
    moved = integers(together) - integers(without)
    assert int(moved @ moved) <= rounded_norm_squared(1.0, 2.0**-9, 30)
    assert np.abs(integers(together)).max() <= largest


def test_sums_are_rounded_without_bias_and_cut_off():
    vector = np.array([0.3, -7.6, 1e30, -50.0, math.nan, -math.inf])
    rounded, beyond = Encoding(1.0).encode_sum(np.tile(vector, 20_000), 20, source())
    assert beyond == 4 * 20_000
    mean = integers(rounded).reshape(-1, len(vector)).mean(axis=0)
    assert np.abs(mean[:2] - vector[:2]).max() < 5.5 * 0.5 / math.sqrt(20_000)
    assert mean[2:].tolist() == [20, -20, 0, 0]


def test_nearest_by_hand():
    encoded = Encoding(0.5).encode_nearest(np.array([0.2, 0.3, -1.3, 9.0, -9.0, math.nan, math.inf]), 2.0)
    assert integers(encoded).tolist() == [0, 1, -3, 4, -4, 0, 4]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 50), st.floats(1e-6, 1e6), st.integers(0, 2**32 - 1))
def test_nearest_sums_are_within_half_a_step_a_site_and_never_wrap(sites, value_range, seed):
    step = nearest_step(value_range, sites)
    vectors = np.random.default_rng(seed).uniform(-value_range, value_range, (sites, 20))
    vectors[:, 0], vectors[:, 1] = value_range, -value_range
    total = np.zeros(20, dtype=np.uint32)
    for vector in vectors:
        total += Encoding(step).encode_nearest(vector, value_range)
    assert np.abs(Encoding(step).decode(total) - vectors.sum(axis=0)).max() <= sites * step * 0.5000001
    assert step <= 4 * sites * value_range / 2**31


def test_decoding_reads_centred_representatives():
    total = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1], dtype=np.uint32)
    assert Encoding(2.0).decode(total).tolist() == [0.0, 2.0, 2.0 * (2**31 - 1), -(2.0**32), -2.0]


def test_float32_and_float64_give_the_same():
    vector = np.random.default_rng(0).standard_normal(70_001).astype(np.float32)
    both = [Encoding(1e-4).encode(vector.astype(kind), 3.0, source()) for kind in (np.float32, np.float64)]
    assert np.array_equal(*both)


@pytest.mark.parametrize(
    "call",
    [
        lambda: Encoding(0.0),
        lambda: Encoding(math.nan),
        lambda: nearest_step(0.0, 3),
        lambda: rounded_norm_squared(0.0, 1.0, 3),
        lambda: rounded_norm_squared(1.0, -1.0, 3),
    ],
)
def test_values_outside_their_range_are_refused(call):
    with pytest.raises(PrivacyError, match="above 0"):
        call()


def test_vectors_that_do_not_fit_are_refused():
    with pytest.raises(PrivacyError, match="do not fit into 32 bits"):
        Encoding(1e-12).encode(np.ones(3), 1.0, source())
