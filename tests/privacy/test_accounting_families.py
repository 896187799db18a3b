"""Sums of discrete Gaussians in the accounts: stored, never too cheap, and composed with what was there before."""

import json
import math

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclaw.errors import PrivacyError
from fedclaw.privacy import accounting
from fedclaw.privacy.accounting import SMALLEST_NOISE, NoiseEvent, calibrate, epsilon_of, event_from_json, event_to_json
from fedclaw.site.journal.history import History

DELTA = 1e-5
RATES = st.sampled_from([0.003, 0.02, 0.1, 0.5, 1.0])
DISCRETE = st.builds(
    NoiseEvent,
    sample_rate=RATES,
    noise_multiplier=st.floats(0.7, 8.0),
    steps=st.integers(1, 1000),
    family=st.just("discrete"),
)
GAUSSIAN = st.builds(NoiseEvent, sample_rate=RATES, noise_multiplier=st.floats(0.7, 8.0), steps=st.integers(1, 1000))


@given(st.floats(SMALLEST_NOISE, 1e100), st.floats(1e-9, 1.0), st.integers(0, 10**9))
def test_discrete_events_survive_json_to_the_last_bit(noise: float, rate: float, steps: int) -> None:
    mechanism = NoiseEvent(rate, noise, steps, "discrete")
    assert event_from_json(json.loads(json.dumps(event_to_json(mechanism)))) == mechanism


def test_a_discrete_event_is_a_poisson_sampled_concentrated_one() -> None:
    event = event_to_json(NoiseEvent(0.25, 2.0, 7, "discrete"))
    step = {"event": "ZCDpEvent", "fields": {"rho": 0.125, "xi": 0.0}}
    sampled = {"event": "PoissonSampledDpEvent", "fields": {"sampling_probability": 0.25, "event": step}}
    assert event == {"event": "SelfComposedDpEvent", "fields": {"event": sampled, "count": 7}}


def test_ledgers_of_before_the_families_are_read() -> None:
    step = {"event": "GaussianDpEvent", "fields": {"noise_multiplier": 1.5}}
    sampled = {"event": "PoissonSampledDpEvent", "fields": {"sampling_probability": 0.1, "event": step}}
    old = {"event": "SelfComposedDpEvent", "fields": {"event": sampled, "count": 3}}
    assert event_from_json(old) == NoiseEvent(0.1, 1.5, 3)
    assert event_to_json(NoiseEvent(0.1, 1.5, 3)) == old


@pytest.mark.parametrize(
    "fields",
    [{"rho": 0.0}, {"rho": -1.0}, {"rho": math.nan}, {"rho": math.inf}, {"rho": 0.5, "xi": 0.1}, {"xi": 0.0}, {}],
)
def test_concentrated_events_that_are_nobodys_are_refused(fields: dict[str, float]) -> None:
    plain = json.loads(json.dumps(event_to_json(NoiseEvent(0.25, 2.0, 7, "discrete"))))
    plain["fields"]["event"]["fields"]["event"]["fields"] = {"xi": 0.0} | fields if "rho" in fields else fields
    with pytest.raises(PrivacyError):
        event_from_json(plain)


@pytest.mark.parametrize("noise", [0.0, SMALLEST_NOISE / 2, 1e101])
def test_discrete_noise_outside_its_range_is_refused(noise: float) -> None:
    with pytest.raises(PrivacyError, match="noise multiplier of a discrete mechanism"):
        NoiseEvent(0.5, noise, 1, "discrete")


def test_a_family_has_a_name() -> None:
    with pytest.raises(PrivacyError, match="gaussian or discrete"):
        NoiseEvent(0.5, 1.0, 1, "laplace")  # type: ignore[arg-type]


@settings(max_examples=12, deadline=None)
@given(DISCRETE, st.sampled_from([1e-3, 1e-5, 1e-9]))
def test_never_below_the_gaussian_of_the_same_multiplier(mechanism: NoiseEvent, delta: float) -> None:
    gaussian = NoiseEvent(mechanism.sample_rate, mechanism.noise_multiplier, mechanism.steps)
    assert epsilon_of([mechanism], delta) >= epsilon_of([gaussian], delta) * (1 - 1e-9)


@pytest.mark.parametrize(("rate", "steps"), [(1.0, 1), (1.0, 20), (0.5, 5), (0.1, 100), (0.01, 1000)])
@pytest.mark.parametrize(("sigma", "sensitivity"), [(0.7, 1), (1.0, 1), (3.0, 2), (5.0, 1), (20.0, 9)])
def test_never_below_the_privacy_loss_of_a_discrete_gaussian(
    rate: float, steps: int, sigma: float, sensitivity: int
) -> None:
    exact = (
        pld.from_discrete_gaussian_mechanism(
            sigma,
            sensitivity,
            value_discretization_interval=1e-3,
            pessimistic_estimate=False,
            sampling_prob=rate,
        )
        .self_compose(steps)
        .get_epsilon_for_delta(DELTA)
    )
    assert epsilon_of([NoiseEvent(rate, sigma / sensitivity, steps, "discrete")], DELTA) >= exact


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("noise", [0.6, 1.0, 4.0, 100.0])
def test_curves_are_those_of_dp_accounting_at_integer_orders(rate: float, noise: float) -> None:
    orders = [2, 3, 5, 8, 24, 1024]
    accountant = RdpAccountant(orders=orders)
    accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)))
    curve = accounting.sampled_curve(rate, 1 / (2 * noise**2))
    # dp_accounting adds up a sum around 1 and divides: its small values are exact to some 1e-14.
    there = curve[np.searchsorted(accounting.ORDERS, orders)]
    assert np.all(np.abs(there / accountant.rdp - 1) < 1e-9 + 1e-13 / accountant.rdp)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([0.01, 0.1, 0.5, 0.9]), st.floats(0.5, 5.0), st.integers(1, 4), st.floats(1.05, 12.0))
def test_both_directions_of_a_sampled_discrete_gaussian_are_bounded(
    rate: float, sigma: float, shift: int, order: float
) -> None:
    """What the symmetry of the noise is needed for: D(Q || S), not only D(S || Q), at fractional orders too."""
    values = np.arange(-math.ceil(36 * sigma), math.ceil(36 * sigma) + shift + 1)
    absent = np.exp(-(values**2.0) / (2 * sigma**2))
    there = np.exp(-((values - shift) ** 2.0) / (2 * sigma**2))
    absent, sampled = absent / absent.sum(), (1 - rate) * absent / absent.sum() + rate * there / there.sum()
    curve = accounting.sampled_curve(rate, shift**2 / (2 * sigma**2))
    bound = curve[np.searchsorted(accounting.ORDERS, order)]
    both = (absent > 1e-280) & (sampled > 1e-280)
    for first, second in ((absent, sampled), (sampled, absent)):
        terms = order * np.log(first[both]) + (1 - order) * np.log(second[both])
        assert np.logaddexp.reduce(terms) / (order - 1) <= bound * (1 + 1e-9) + 1e-12


def test_tiny_rates_keep_their_digits() -> None:
    """The leading term is rate^2 (exp(2 rho) - 1) at order 2; a sum around 1 would lose it."""
    curve = accounting.sampled_curve(1e-9, 0.5)
    assert curve[np.searchsorted(accounting.ORDERS, 2.0)] == pytest.approx(1e-18 * math.expm1(1.0), rel=1e-6)


def test_the_price_of_renyi_accounting_is_moderate() -> None:
    for rate, noise, steps in ((1.0, 2.0, 1), (1.0, 10.0, 50), (0.1, 2.0, 300), (0.02, 1.1, 1500)):
        gaussian = epsilon_of([NoiseEvent(rate, noise, steps)], DELTA)
        assert epsilon_of([NoiseEvent(rate, noise, steps, "discrete")], DELTA) < gaussian * 1.15


@settings(max_examples=8, deadline=None)
@given(st.lists(GAUSSIAN, min_size=1, max_size=2), st.lists(DISCRETE, min_size=1, max_size=2))
def test_mixed_histories_cost_more_than_either_half_and_no_more_than_their_sum(
    gaussian: list[NoiseEvent], discrete: list[NoiseEvent]
) -> None:
    both = epsilon_of([*gaussian, *discrete], DELTA)
    assert both == epsilon_of([*reversed(discrete), *gaussian], DELTA)
    assert both >= epsilon_of(gaussian, DELTA)
    assert both >= epsilon_of(discrete, DELTA) * (1 - 1e-9)
    assert both <= epsilon_of(gaussian, DELTA / 2) + epsilon_of(discrete, DELTA / 2)


@pytest.mark.parametrize("steps", [(1, 1), (50, 2), (3, 60)])
def test_mixed_histories_are_never_below_their_joint_privacy_loss(steps: tuple[int, int]) -> None:
    settings_of_both = {"value_discretization_interval": 2e-4, "pessimistic_estimate": False}
    joint = (
        pld.from_gaussian_mechanism(2.0, sampling_prob=0.3, **settings_of_both)
        .self_compose(steps[0])
        .compose(
            pld.from_discrete_gaussian_mechanism(3.0, 2, sampling_prob=0.5, **settings_of_both).self_compose(steps[1])
        )
        .get_epsilon_for_delta(DELTA)
    )
    mixed = [NoiseEvent(0.3, 2.0, steps[0]), NoiseEvent(0.5, 1.5, steps[1], "discrete")]
    assert joint <= epsilon_of(mixed, DELTA) <= joint * 1.6


def test_no_noise_anywhere_is_infinite() -> None:
    discrete = NoiseEvent(0.5, 2.0, 3, "discrete")
    assert epsilon_of([discrete, NoiseEvent(0.5, 0.0, 1)], DELTA) == math.inf
    assert epsilon_of([discrete, NoiseEvent(0.5, 0.0, 0)], DELTA) == epsilon_of([discrete], DELTA)
    assert epsilon_of([NoiseEvent(0.5, 2.0, 0, "discrete")], DELTA) == 0


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps"), [(1.0, 1.0, 1), (8.0, 1.0, 40), (3.0, 0.1, 300), (0.2, 0.5, 10), (100.0, 1.0, 2)]
)
def test_calibration_of_discrete_noise(epsilon: float, rate: float, steps: int) -> None:
    noise = calibrate(epsilon, DELTA, rate, steps, "discrete")
    assert epsilon_of([NoiseEvent(rate, noise, steps, "discrete")], DELTA) <= epsilon
    assert epsilon_of([NoiseEvent(rate, noise / 1.01, steps, "discrete")], DELTA) > epsilon
    assert noise >= calibrate(epsilon, DELTA, rate, steps) * 0.999


def test_a_history_keeps_the_families_apart() -> None:
    history = History()
    for mechanism in (NoiseEvent(1.0, 4.0, 3), NoiseEvent(1.0, 4.0, 2, "discrete"), NoiseEvent(1.0, 4.0, 1)):
        history.add(mechanism)
    assert history.epsilon(DELTA) == epsilon_of([NoiseEvent(1.0, 4.0, 4), NoiseEvent(1.0, 4.0, 2, "discrete")], DELTA)
    assert history.epsilon(DELTA) > epsilon_of([NoiseEvent(1.0, 4.0, 6)], DELTA)
