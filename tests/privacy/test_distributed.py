"""Shares of discrete Gaussian noise: what they add up to, what that guarantees, and what it costs."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from fedclaw.errors import PrivacyError
from fedclaw.privacy.accounting import NoiseEvent, calibrate, epsilon_of
from fedclaw.privacy.distributed import (
    INFLATION,
    SMOOTHING,
    WRAP,
    choose_step,
    closeness,
    effective_multiplier,
    gaussian_multiplier,
    rounded_sensitivity,
    share_noise,
    with_noise,
    wrap_probability,
)
from fedclaw.privacy.fixed_point import Encoding
from fedclaw.privacy.noise import GaussianSource

DELTA = 1e-5
UNLIKELY = 1e-7


def sources(count):
    """One source a site, repeatable."""
    return [GaussianSource(insecure_fixed_key_for_tests=number.to_bytes(32, "big")) for number in range(count)]


def summed(shares, vectors, draws):
    total = np.zeros(shares.dimension, dtype=np.uint32)
    for vector, source in zip(vectors, draws, strict=False):
        total += shares.encode(vector, source)
    return shares.decode(total)


def bounded(count, dimension, clip, seed=0):
    """`count` random vectors, each with a norm of `clip` exactly or a little less."""
    vectors = np.random.default_rng(seed).standard_normal((count, dimension))
    return vectors * (clip * 0.999 / np.linalg.norm(vectors, axis=1, keepdims=True))


def promised_std(shares):
    """Of the noise in each number of the decoded sum, from the shares that are counted on."""
    return shares.sigma * math.sqrt(shares.honest) * shares.step


def noise_fits(noise, std):
    """Whether the variance of `noise` (n,) is that of a normal distribution with deviation `std`."""
    statistic = float((noise**2).sum()) / std**2
    return UNLIKELY < chi2.sf(statistic, len(noise)) < 1 - UNLIKELY


DIMENSION = 20_000


@pytest.mark.parametrize("dropped", [0, 3])
def test_the_decoded_sum_carries_the_promised_noise(dropped):
    """Nobody drops out: all ten shares' variance. As many as are tolerated: exactly what was promised."""
    shares = share_noise(2.0, DIMENSION, 10, 1.5, tolerated=3)
    vectors = bounded(10, DIMENSION, 2.0)[: 10 - dropped]
    noise = summed(shares, vectors, sources(10)) - vectors.sum(axis=0)
    expected = promised_std(shares) * math.sqrt((10 - dropped) / 7)
    assert noise_fits(noise, expected)
    assert not noise_fits(noise, expected / 0.9)
    assert not noise_fits(noise, expected * 0.9)
    assert promised_std(shares) == pytest.approx(1.5 * 2.0 * shares.price.rounding_inflation)


def test_colluding_sites_cannot_take_the_promised_noise_away():
    shares = share_noise(2.0, DIMENSION, 10, 1.5, tolerated=3, colluding=2)
    vectors = bounded(7, DIMENSION, 2.0)
    draws = sources(7)
    seen = summed(shares, vectors, draws)
    known = [Encoding(shares.step).encode(vectors[site], 2.0, sources(7)[site]) for site in (0, 1)]
    again = summed(shares, vectors[:2], sources(7)[:2])
    own_noise = again - shares.decode(known[0] + known[1])
    left = seen - own_noise - vectors.sum(axis=0)
    assert noise_fits(left, promised_std(shares))
    assert not noise_fits(left, promised_std(shares) / 0.9)


def test_shares_made_for_nobody_dropping_out_are_found_too_small_when_somebody_does():
    naive = share_noise(2.0, DIMENSION, 10, 1.5)
    vectors = bounded(7, DIMENSION, 2.0)
    noise = summed(naive, vectors, sources(7)) - vectors.sum(axis=0)
    assert not noise_fits(noise, 1.5 * 2.0)


def test_without_noise_the_sum_is_exact_to_the_rounding():
    shares = share_noise(1.0, 500, 30, 1.0)
    vectors = bounded(30, 500, 1.0)
    total = np.zeros(500, dtype=np.uint32)
    rounded = np.zeros(500, dtype=np.int64)
    for vector, source in zip(vectors, sources(30), strict=True):
        encoded = Encoding(shares.step).encode(vector, 1.0, source)
        total += encoded
        rounded += encoded.view(np.int32)
    assert np.array_equal(shares.decode(total), rounded * shares.step)
    assert np.abs(shares.decode(total) - vectors.sum(axis=0)).max() < 30 * shares.step


def test_noise_is_added_modulo_two_to_the_32():
    near_the_edge = np.full(1000, 2**31 - 1, dtype=np.uint32)
    noisy = with_noise(near_the_edge, 100.0, sources(1)[0])
    assert np.abs((noisy - near_the_edge).view(np.int32)).max() < 700


def test_sums_of_parts_carry_the_same_noise():
    shares = share_noise(0.5, DIMENSION, 4, 2.0)
    vectors = np.random.default_rng(3).standard_normal((4, DIMENSION)) * 3
    total = np.zeros(DIMENSION, dtype=np.uint32)
    for vector, source in zip(vectors, sources(4), strict=True):
        encoded, beyond = shares.encode_sum(vector, source)
        assert beyond == 0
        total += encoded
    noise = shares.decode(total) - vectors.sum(axis=0)
    assert noise_fits(noise, promised_std(shares))
    assert not noise_fits(noise, promised_std(shares) / 0.9)


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-4, 1e4), st.integers(1, 2_000_000), st.integers(1, 500), st.floats(0.3, 50), st.integers(0, 2))
def test_a_chosen_step_keeps_its_promises(clip, dimension, sites, noise_multiplier, gone):
    tolerated = min(gone, sites - 1)
    shares = share_noise(clip, dimension, sites, noise_multiplier, tolerated=tolerated)
    assert math.log2(shares.step).is_integer()
    price = shares.price
    assert 1 <= price.rounding_inflation <= INFLATION
    assert price.wrap_probability < WRAP
    assert price.tau < 1e-30
    assert price.extra_variance == pytest.approx(tolerated / (sites - tolerated))
    assert noise_multiplier <= shares.noise_multiplier <= noise_multiplier * 1.001
    if shares.sigma > 3.6:
        assert shares.noise_multiplier <= noise_multiplier * (1 + 1e-8)
    assert promised_std(shares) <= noise_multiplier * clip * 1.002
    assert shares.sigma >= 3.6


@pytest.mark.parametrize("step", [0.01, 0.5, 30.0])
def test_a_step_that_is_given_is_kept_and_a_coarse_one_costs_noise(step):
    shares = share_noise(1.0, 100, 10, 1.0, step=step)
    assert shares.step == step
    assert shares.price.rounding_inflation > INFLATION
    assert shares.noise_multiplier >= 1.0
    assert shares.sigma == 3.6 or replace(shares, sigma=shares.sigma * 0.99).noise_multiplier < 1.0


def test_tau_by_hand():
    assert closeness(0.5, 1) == 0
    two = 10 * math.exp(-(math.pi**2) / 4)
    assert closeness(0.5, 2) == pytest.approx(two)
    assert closeness(0.5, 3) == pytest.approx(two + 10 * math.exp(-(math.pi**2) / 3))
    exact = 10 * sum(math.exp(-2 * (math.pi * 0.6) ** 2 * k / (k + 1)) for k in range(1, 4999))
    assert exact <= closeness(0.6, 4999) <= exact * 1.01


def test_the_effective_multiplier_by_hand():
    assert effective_multiplier(30.0, 4, 20.0, 7) == pytest.approx(3.0)
    tau = closeness(0.5, 2)
    alone = 1 / (math.sqrt(2) * 0.5)
    assert effective_multiplier(0.5, 2, 1.0, 1) == pytest.approx(
        1 / min(math.hypot(alone, math.sqrt(2 * tau)), alone + tau)
    )


def test_a_share_by_hand():
    """Nine honest sites' shares add up to a deviation of 3 sigma, whoever else there is."""
    alone, beside = share_noise(1.0, 50, 9, 4.0), share_noise(1.0, 50, 14, 4.0, tolerated=3, colluding=2, step=2.0**-9)
    for shares in (alone, beside):
        total = math.hypot(4.0 * shares.sensitivity, SMOOTHING)
        assert shares.sigma == pytest.approx(total / 3, rel=1e-8)


def summed_probabilities(sigma, shares):
    """The exact distribution of a sum of discrete Gaussians, on -bound .. bound."""
    bound = math.ceil(36 * sigma) + 4
    single = np.exp(-(np.arange(-bound, bound + 1.0) ** 2) / (2 * sigma**2))
    single /= single.sum()
    total = single
    for _ in range(shares - 1):
        total = np.convolve(total, single)
    return total


def shifted(probabilities, shift):
    return np.pad(probabilities, (0, shift)), np.pad(probabilities, (shift, 0))


def exact_epsilon(first, second, delta):
    """The smallest epsilon with which the hockey-stick divergences are at most delta, both ways."""
    low, high = 0.0, 60.0
    for _ in range(60):
        epsilon = (low + high) / 2
        excess = max(
            np.maximum(first - math.exp(epsilon) * second, 0).sum(),
            np.maximum(second - math.exp(epsilon) * first, 0).sum(),
        )
        low, high = (epsilon, high) if excess > delta else (low, epsilon)
    return low


SUMS = [(0.5, 1, 1), (0.5, 2, 1), (0.5, 5, 2), (0.7, 3, 1), (1.0, 4, 3), (3.0, 10, 7), (8.0, 2, 30)]


@pytest.mark.parametrize(("sigma", "shares", "shift"), SUMS)
@pytest.mark.parametrize("rate", [1.0, 0.5, 0.05])
def test_never_below_the_exact_epsilon_of_a_sum_in_one_dimension(sigma, shares, shift, rate):
    without, there = shifted(summed_probabilities(sigma, shares), shift)
    sampled = (1 - rate) * without + rate * there
    multiplier = effective_multiplier(sigma, shares, shift, 1)
    accounted = epsilon_of([NoiseEvent(rate, multiplier, 1, "discrete")], DELTA)
    assert accounted >= exact_epsilon(without, sampled, DELTA)
    if rate == 1 and closeness(sigma, shares) < 1e-6:
        assert accounted <= exact_epsilon(without, there, DELTA) * 1.35


@pytest.mark.parametrize(("sigma", "shares", "shift"), [(3.6, 1, 3), (3.6, 3, 7), (4.0, 2, 2), (8.0, 2, 30)])
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_a_sum_costs_no_more_than_the_gaussian_behind_it_and_hardly_less(sigma, shares, shift, rate):
    without, there = shifted(summed_probabilities(sigma, shares), shift)
    sampled = (1 - rate) * without + rate * there
    exact = exact_epsilon(without, sampled, DELTA)
    accounted = epsilon_of([NoiseEvent(rate, gaussian_multiplier(sigma, shares, shift), 1)], DELTA)
    assert exact <= accounted
    plain = epsilon_of([NoiseEvent(rate, math.sqrt(shares) * sigma / shift, 1)], DELTA)
    assert plain * 0.97 < exact


@pytest.mark.parametrize("smoothing", [0.5, 0.6, 0.8, 1.2])
def test_a_gaussian_rounded_to_a_smooth_lattice_is_a_discrete_gaussian(smoothing):
    """The identity that `gaussian_multiplier` rests on, integrated numerically where its error can still be seen."""
    sigma = 3.0
    rest = math.sqrt(sigma**2 - smoothing**2)
    reals = np.arange(-45.0, 45.0, 0.002)
    density = np.exp(-(reals**2) / (2 * rest**2)) * 0.002 / (rest * math.sqrt(2 * math.pi))
    integers = np.arange(-60, 61)
    kernel = np.exp(-((integers[:, None] - reals) ** 2) / (2 * smoothing**2))
    mixed = (kernel / kernel.sum(axis=0)) @ density
    exact = np.exp(-(integers**2.0) / (2 * sigma**2))
    exact /= exact.sum()
    near = np.abs(integers) <= 6 * sigma
    worst = np.abs(mixed[near] / exact[near] - 1).max()
    bound = 3 * 2.1 * math.exp(-2 * math.pi**2 * smoothing**2)
    assert worst <= bound + 1e-9
    if smoothing <= 0.6:
        assert worst > 1e-7


def test_small_shares_are_not_taken_for_a_gaussian():
    with pytest.raises(PrivacyError, match="too small to add up to a Gaussian"):
        gaussian_multiplier(3.5, 4, 1.0)


@pytest.mark.parametrize(("sigma", "shares", "shift"), SUMS)
def test_every_renyi_divergence_is_within_what_is_accounted(sigma, shares, shift):
    without, there = shifted(summed_probabilities(sigma, shares), shift)
    rho = 1 / (2 * effective_multiplier(sigma, shares, shift, 1) ** 2)
    both = (without > 1e-300) & (there > 1e-300)
    for order in (1.01, 1.5, 2.0, 3.0, 5.0, 10.0):
        terms = order * np.log(without[both]) + (1 - order) * np.log(there[both])
        divergence = np.logaddexp.reduce(terms) / (order - 1)
        assert divergence <= order * rho * (1 + 1e-9)


def test_too_small_shares_cost_more_than_their_variance_says():
    """Two shares of half a step are visibly not one share of the same variance: what tau is there for."""
    without, there = shifted(summed_probabilities(0.5, 2), 1)
    one = math.sqrt(2) * 0.5
    assert effective_multiplier(0.5, 2, 1, 1) < one
    assert (
        abs(exact_epsilon(without, there, DELTA) / exact_epsilon(*shifted(summed_probabilities(one, 1), 1), DELTA) - 1)
        > 1e-3
    )


def test_wrapping_is_bounded_for_the_worst_vectors():
    assert wrap_probability(1.0, 2.0**-31, 1, 2, 1.0) == 1.0
    bound = wrap_probability(1.0, 2.0**-20, 10, 4, 1e8)
    assert bound == pytest.approx(20 * math.exp(-((2**30 - 1) ** 2) / (8 * 1e16)))
    assert rounded_sensitivity(1.0, 2.0**-20, 10) == pytest.approx(2.0**20, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"tolerated": 6, "colluding": 4}, "nobody is left to make the noise"),
        ({"tolerated": -1}, "at least 0"),
        ({"clip": 0.0}, "clipping bound"),
        ({"dimension": 0}, "at least one number"),
        ({"noise_multiplier": 0.0}, "noise multiplier of shared noise"),
        ({"noise_multiplier": math.nan}, "noise multiplier of shared noise"),
        ({"step": 1e-12}, "do not fit"),
        ({"step": 2.0**-29, "noise_multiplier": 50.0}, "sigma of a discrete Gaussian"),
        ({"sites": 10_000_000}, "no step suits"),
    ],
)
def test_what_cannot_be_promised_is_refused(arguments, reason):
    given_arguments = {"clip": 1.0, "dimension": 200, "sites": 10, "noise_multiplier": 1.0} | arguments
    with pytest.raises(PrivacyError, match=reason):
        share_noise(**given_arguments)


# A test problem: 100 sites, unit one site, the same epsilon with noise by a trusted server and in shares.

SITES, ROUNDS, EPSILON = 100, 12, 1.0


def server_noise(clip, dimension, rounds, epsilon):
    """(vectors) -> their sum with the noise of a trusted server."""
    std = calibrate(epsilon, DELTA, 1.0, rounds) * clip

    def aggregate(vectors, draws):
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        clipped = vectors * np.minimum(1.0, clip / np.maximum(norms, 1e-12))
        return clipped.sum(axis=0) + std * draws[0].standard(dimension).numpy()

    return aggregate


def shared_noise(clip, dimension, rounds, epsilon):
    """(vectors) -> their sum with every site's share of the noise, ten drop-outs tolerated."""
    shares = share_noise(clip, dimension, SITES, calibrate(epsilon, DELTA, 1.0, rounds), tolerated=10)
    assert epsilon_of([NoiseEvent(1.0, shares.noise_multiplier, rounds)], DELTA) <= epsilon
    return lambda vectors, draws: summed(shares, vectors, draws)


def test_the_mean_is_as_good_as_from_a_trusted_server():
    """Equal epsilon. Mean squared error: theirs, but for the noise that makes up for drop-outs that did not happen."""
    dimension = 20_000
    vectors = bounded(SITES, dimension, 1.0)
    truth = vectors.sum(axis=0)
    server, shared = (
        float(((make(1.0, dimension, 1, 2.0)(vectors, sources(SITES)) - truth) ** 2).mean())
        for make in (server_noise, shared_noise)
    )
    # Two chi-squares of 20000 degrees: 1.4% of standard deviation in their ratio.
    assert shared / server == pytest.approx(100 / 90, rel=0.08)


def problem(seed, dimension=15, examples=40):
    """Sites with examples of the same logistic model, and test data."""
    random = np.random.default_rng(seed)
    truth = random.standard_normal(dimension) * 1.2
    inputs = random.standard_normal((SITES + 25, examples, dimension))
    targets = (random.random((SITES + 25, examples)) < 1 / (1 + np.exp(-inputs @ truth))).astype(float)
    return inputs[:SITES], targets[:SITES], inputs[SITES:], targets[SITES:]


def train(aggregate, seed):
    """Federated logistic regression; the accuracy on test data."""
    inputs, targets, test_inputs, test_targets = problem(seed)
    weights = np.zeros(inputs.shape[2])
    draws = sources(SITES * (seed + 1))[SITES * seed :]
    for _ in range(ROUNDS):
        residuals = targets - 1 / (1 + np.exp(-inputs @ weights))
        updates = 2.0 * np.einsum("se,sed->sd", residuals, inputs) / inputs.shape[1]
        weights = weights + aggregate(updates, draws) / SITES
    return float((((test_inputs @ weights) > 0) == (test_targets > 0.5)).mean())


def test_federated_learning_is_as_accurate_as_with_a_trusted_server():
    makers = {"server": server_noise, "shared": shared_noise}
    accuracies = {
        name: np.array([train(make(1.0, 15, ROUNDS, EPSILON), seed) for seed in range(6)])
        for name, make in makers.items()
    }
    free = np.array([train(lambda vectors, _: vectors.sum(axis=0), seed) for seed in range(6)])
    spread = max(0.01, float(np.std(accuracies["server"] - accuracies["shared"], ddof=1)))
    assert abs(accuracies["server"].mean() - accuracies["shared"].mean()) < 3 * spread / math.sqrt(6) + 0.01
    assert accuracies["shared"].mean() > 0.7
    assert free.mean() >= accuracies["shared"].mean() - 0.02


def test_the_step_depends_on_nothing_that_a_site_knows_alone():
    assert choose_step(1.0, 100, 10, 1.0) == choose_step(1.0, 100, 10, 1.0, honest=10)
    first, second = (share_noise(1.0, 1000, 20, 0.8, tolerated=2, colluding=1) for _ in range(2))
    assert first == second
