import math
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from fedclaw.errors import PrivacyError
from fedclaw.privacy.accounting import (
    LARGEST_NOISE,
    SMALLEST_NOISE,
    NoiseEvent,
    calibrate,
    epsilon_of,
    event_from_json,
    event_to_json,
)
from fedclaw.site.policy.policy import MAX_PRIVATE_STEPS

# Of Opacus' accountants, the references here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Optimal order is the:UserWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning"),
]

MECHANISMS = st.builds(
    NoiseEvent,
    sample_rate=st.sampled_from([0.003, 0.02, 0.1, 0.5, 1.0]),
    noise_multiplier=st.floats(0.7, 6.0),
    steps=st.integers(1, 2000),
)


def exact_gaussian(noise: float, delta: float) -> float:
    """Balle and Wang 2018, theorem 8: the exact epsilon of one Gaussian mechanism of sensitivity 1."""

    def excess(epsilon: float) -> float:
        left = norm.cdf(0.5 / noise - epsilon * noise)
        return left - math.exp(epsilon) * norm.cdf(-0.5 / noise - epsilon * noise) - delta

    return brentq(excess, 0, 600)


def event_of(plain: dict[str, Any]) -> dp_accounting.DpEvent:
    """What a ledger's JSON names, as dp_accounting has it."""
    fields = plain.get("fields", {})
    return getattr(dp_accounting, plain["event"])(
        **{name: event_of(value) if isinstance(value, dict) else value for name, value in fields.items()}
    )


def reference(mechanisms: list[NoiseEvent], delta: float, interval: float = 4e-4) -> float:
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, interval)
    for mechanism in mechanisms:
        accountant.compose(event_of(event_to_json(mechanism)))
    return float(accountant.get_epsilon(delta))


def test_published_figure() -> None:
    assert epsilon_of([NoiseEvent(0.02, 1.1, 1500)], 1e-5) == pytest.approx(4.02, abs=0.005)


@pytest.mark.parametrize("noise", [0.2, 1.0, 5.0])
def test_one_gaussian_against_the_exact_formula(noise: float) -> None:
    exact = exact_gaussian(noise, 1e-5)
    assert exact * (1 - 1e-9) <= epsilon_of([NoiseEvent(1.0, noise, 1)], 1e-5) <= exact * 1.005


def test_full_batches_compose_like_one_gaussian_with_less_noise() -> None:
    assert epsilon_of([NoiseEvent(1.0, 10.0, 100)], 1e-6) == pytest.approx(exact_gaussian(1.0, 1e-6), rel=0.005)


def within_reach_of_prv(*mechanisms: NoiseEvent, delta: float) -> float:
    """Epsilon by our accountant, where PRV can say one: it takes exp(epsilon), too large for a double from 709 on."""
    epsilon = epsilon_of(mechanisms, delta)
    assume(epsilon < 600)
    return epsilon


def opacus(accountant: PRVAccountant | RDPAccountant, *mechanisms: NoiseEvent) -> Any:
    accountant.history = [(each.noise_multiplier, each.sample_rate, each.steps) for each in mechanisms]
    return accountant


@settings(max_examples=8, deadline=None)
@given(MECHANISMS, st.sampled_from([1e-3, 1e-5, 1e-6]))
def test_between_the_fine_pld_and_renyi(mechanism: NoiseEvent, delta: float) -> None:
    epsilon = epsilon_of([mechanism], delta)
    fine = reference([mechanism], delta, min(4e-4, mechanism.sample_rate / mechanism.noise_multiplier / 25))
    assert fine * (1 - 1e-4) <= epsilon <= fine * 1.01 + 1e-4
    assert epsilon <= opacus(RDPAccountant(), mechanism).get_epsilon(delta=delta)


@settings(max_examples=8, deadline=None)
@given(MECHANISMS, st.sampled_from([1e-3, 1e-5, 1e-6]))
def test_agrees_with_prv_within_the_errors_that_it_states(mechanism: NoiseEvent, delta: float) -> None:
    error, epsilon = 0.01, within_reach_of_prv(mechanism, delta=delta)
    prv = opacus(PRVAccountant(), mechanism)._get_dprv(eps_error=error, delta_error=delta / 1000)
    lower, _, upper = prv.compute_epsilon(delta, delta / 1000, error)
    assert max(0.0, lower) <= epsilon <= upper * 1.005


@settings(max_examples=2, deadline=None)
@given(MECHANISMS, MECHANISMS)
def test_two_mechanisms_agree_with_prv_and_renyi(first: NoiseEvent, second: NoiseEvent) -> None:
    epsilon = within_reach_of_prv(first, second, delta=1e-5)
    prv = opacus(PRVAccountant(), first, second)._get_dprv(eps_error=0.02, delta_error=1e-8)
    lower, _, upper = prv.compute_epsilon(1e-5, 1e-8, 0.02)
    assert max(0.0, lower) <= epsilon <= upper * 1.005
    assert epsilon <= opacus(RDPAccountant(), first, second).get_epsilon(delta=1e-5)


def test_mixtures_compose_in_any_order_and_grouping() -> None:
    parts = [NoiseEvent(0.1, 2.0, 50), NoiseEvent(0.02, 1.1, 500), NoiseEvent(1.0, 20.0, 10), NoiseEvent(0.1, 2.0, 50)]
    whole = epsilon_of(parts, 1e-5)
    assert whole == epsilon_of(reversed(parts), 1e-5)
    assert whole == epsilon_of([NoiseEvent(0.1, 2.0, 100), *parts[1:3]], 1e-5)
    assert (fine := reference(parts, 1e-5)) * (1 - 1e-3) <= whole <= fine * 1.01
    assert whole > max(epsilon_of([part], 1e-5) for part in parts)


def test_extremes() -> None:
    assert epsilon_of([], 1e-5) == 0
    assert epsilon_of([NoiseEvent(0.5, 1.0, 0)], 1e-5) == 0
    assert epsilon_of([NoiseEvent(0.5, 0.0, 1)], 1e-5) == math.inf
    assert epsilon_of([NoiseEvent(0.5, 0.0, 1), NoiseEvent(0.5, 9.0, 1)], 1e-5) == math.inf
    assert epsilon_of([NoiseEvent(1e-7, 1e4, 1)], 1e-5) == pytest.approx(0, abs=1e-9)
    assert 1e4 < epsilon_of([NoiseEvent(1.0, SMALLEST_NOISE, 100_000)], 1e-5) < math.inf
    assert 1e4 < epsilon_of([NoiseEvent(0.9, SMALLEST_NOISE, 100_000)], 1e-5) < math.inf


def test_a_delta_below_the_distributions_is_bounded_by_renyi() -> None:
    tiny = epsilon_of([NoiseEvent(0.02, 1.1, 1500)], 1e-20)
    assert epsilon_of([NoiseEvent(0.02, 1.1, 1500)], 1e-9) < tiny < math.inf


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_outside_its_range_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyError, match="delta lies in"):
        epsilon_of([NoiseEvent(0.5, 1.0, 1)], delta)


@pytest.mark.parametrize(
    "values", [(0.0, 1.0, 1), (1.01, 1.0, 1), (math.nan, 1.0, 1), (0.5, -1.0, 1), (0.5, math.nan, 1), (0.5, 1.0, -1)]
)
def test_impossible_mechanisms_are_refused(values: tuple[float, float, int]) -> None:
    with pytest.raises(PrivacyError):
        NoiseEvent(*values)


@pytest.mark.parametrize(
    ("epsilon", "delta", "rate", "steps"),
    [
        (8.0, 1e-5, 0.02, 1500),
        (1.0, 1e-5, 0.1, 300),
        (2.0, 1e-5, 0.25, 40),
        (0.1, 1e-6, 0.01, 10_000),
        (8.0, 1e-5, 1.0, 1),
        (3.0, 1e-5, 1.0, 200),
        (1.0, 1e-2, 0.5, 1),
        (500.0, 1e-5, 0.5, 10),
        pytest.param(8.0, 1e-5, 0.01, MAX_PRIVATE_STEPS, marks=pytest.mark.slow),
    ],
)
def test_calibration_is_enough_and_one_per_cent_less_is_not(
    epsilon: float, delta: float, rate: float, steps: int
) -> None:
    noise = calibrate(epsilon, delta, rate, steps)
    assert epsilon_of([NoiseEvent(rate, noise, steps)], delta) <= epsilon
    assert epsilon_of([NoiseEvent(rate, noise / 1.01, steps)], delta) > epsilon


def test_calibration_does_not_go_below_the_floor() -> None:
    assert calibrate(1e9, 1e-5, 0.5, 1) == SMALLEST_NOISE


def test_an_unreachable_epsilon_is_one_clear_error() -> None:
    with pytest.raises(PrivacyError, match=f"no noise multiplier up to {LARGEST_NOISE:g} keeps 100000 steps"):
        calibrate(1e-6, 1e-9, 1.0, 100_000)
    with pytest.raises(PrivacyError, match="epsilon is a number above 0"):
        calibrate(0.0, 1e-5, 0.5, 1)


@given(MECHANISMS)
def test_events_survive_json(mechanism: NoiseEvent) -> None:
    assert event_from_json(event_to_json(mechanism)) == mechanism


def test_training_without_privacy_is_an_event_too() -> None:
    assert event_from_json(event_to_json(None)) is None


@pytest.mark.parametrize(
    "plain", [{}, {"event": "LaplaceDpEvent", "fields": {"noise_multiplier": 1.0}}, {"event": "__import__('os')"}]
)
def test_unknown_events_are_refused(plain: dict[str, object]) -> None:
    with pytest.raises(PrivacyError, match="cannot account"):
        event_from_json(plain)
