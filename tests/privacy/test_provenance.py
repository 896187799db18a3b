"""Where a value comes from, as a type: what may be made of it, and what may leave."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fedclaw.errors import PrivacyError
from fedclaw.learning import postprocess
from fedclaw.learning.postprocess import SiteContext
from fedclaw.privacy.distributed import Nearest, SumWithShare, share_noise
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.mechanisms.local_noise import OwnNoise
from fedclaw.privacy.mechanisms.mechanism import UNPROTECTED, Charge
from fedclaw.privacy.mechanisms.shared_noise import with_share
from fedclaw.privacy.noise import GaussianSource
from fedclaw.privacy.provenance import Bounded, Permitted, Raw, Released, leaving
from fedclaw.protocol.arrays import Update
from tests.hostile import DP, EXAMPLE, ONE_STEP, SITE, plan_for, wary_site


@dataclass(frozen=True)
class Clauses:
    """A policy, as far as it is asked."""

    trust_server_noise: bool = False
    metrics_without_noise: bool = False


def update() -> Update:
    return Update({"w": np.full(4, 3.0, np.float32)}, 1.0, 20)


def mechanism(**changes: Any) -> Any:
    return mechanism_of(plan_for(wary_site(), "fedavg", **{"privacy": None, **changes}))


def test_only_what_is_released_or_permitted_leaves() -> None:
    assert leaving(Released(1), Clauses()) == 1
    assert leaving(Permitted(2, "metrics_without_noise"), Clauses(metrics_without_noise=True)) == 2
    for clause in ("metrics_without_noise", "trust_server_noise", "allow_training_without_privacy"):
        with pytest.raises(PrivacyError, match=f"has no {clause}"):
            leaving(Permitted(2, clause), Clauses())
    for part in (Raw(3), Bounded(3, 0.0)):
        with pytest.raises(PrivacyError, match="neither released nor permitted"):
            leaving(part, Clauses(True, True))  # type: ignore[arg-type]


def test_what_is_made_of_a_value_is_what_the_value_was() -> None:
    double = lambda value: 2 * value  # noqa: E731
    assert Released(3).then(double) == Released(6)
    assert Raw(3).then(double) == Raw(3).scaled(2.0, double) == Raw(6)
    assert Bounded(3, 0.5).scaled(2.0, double) == Bounded(6, 1.0)
    assert Bounded(3, 0.5).then(double) == Raw(6), "whoever does not say how far it stretches, has no bound"


def test_local_noise_lets_out_what_noised_steps_came_to_and_nothing_else() -> None:
    local = mechanism(privacy=DP)
    assert local.outcome({"w": np.ones(2)}, 20) == Released({"w": pytest.approx(np.ones(2))})
    for part in (Raw(update()), Bounded(update(), 1.0)):
        with pytest.raises(PrivacyError, match=r"^the update is worked out from more than noised steps"):
            local.bound(part)
        with pytest.raises(PrivacyError, match=r"^the update is worked out from more than noised steps"):
            local.let_out(part, Charge("dp-sgd", None, "nobody"))
    # Noise on the sum beside it still clips.
    both = mechanism(privacy=DP, central=SITE)
    assert np.linalg.norm(both.bound(Released(update())).value.arrays["w"]) == pytest.approx(1, rel=1e-5)


def test_noise_on_the_sum_takes_what_it_has_bounded() -> None:
    site, example = mechanism(central=SITE), mechanism(central=EXAMPLE, training=ONE_STEP)
    clipped = site.bound(Raw(update()))
    assert isinstance(clipped, Bounded)
    assert clipped.sensitivity == 1
    assert np.linalg.norm(clipped.value.arrays["w"]) == pytest.approx(1, rel=1e-5)
    step = example.outcome({"w": np.ones(2)}, 20)
    assert step.sensitivity == pytest.approx(0.1 * 1 / (0.5 * 20)), "learning rate x clip / (rate x examples)"
    with pytest.raises(PrivacyError, match=r"^the update is more than the one clipped step"):
        example.bound(Raw(update()))
    with pytest.raises(PrivacyError, match=r"^the update is not within the bound that the noise"):
        site.let_out(Raw(update()), UNPROTECTED)
    vector, source = np.ones(3), GaussianSource()
    with pytest.raises(PrivacyError, match=r"^the update is not within the bound that"):
        site.encode(Raw(vector), Nearest(1.0, 8.0), UNPROTECTED, source)
    assert isinstance(site.encode(Bounded(vector, 1.0), Nearest(1.0, 8.0), UNPROTECTED, source), Permitted)
    assert site.let_out(clipped, UNPROTECTED).clause == "allow_training_without_privacy"
    assert site.let_out(clipped, Charge("central", None, "server")).clause == "trust_server_noise"


@pytest.mark.parametrize(
    ("weighting", "cap", "weight"), [("uniform", None, 1), ("capped", 5, 5), ("examples", None, 20)]
)
def test_a_weight_and_a_learning_rate_are_in_the_sensitivity(weighting: str, cap: int | None, weight: int) -> None:
    """What leaves is as long as the sensitivity says that one unit can make it: noise is made for that."""
    plan = plan_for(wary_site(), "fedavg", privacy=None, central=SITE, weighting=weighting, weight_cap=cap)
    left = postprocess.at_site(Raw(update()), plan, SiteContext(GaussianSource()))
    assert isinstance(left, Bounded)
    assert left.sensitivity == weight
    assert np.linalg.norm(left.value.arrays["w"]) == pytest.approx(weight, rel=1e-5)
    plan = plan_for(wary_site(), "fedavg", privacy=None, central=EXAMPLE, training=ONE_STEP)
    step = mechanism_of(plan).outcome({"w": np.ones(2)}, 20).scaled(1.0, lambda arrays: Update(arrays, 1.0, 20))
    left = postprocess.at_site(step, plan, SiteContext(GaussianSource()))
    assert isinstance(left, Bounded)
    assert left.sensitivity == pytest.approx(0.1 * 1 / 0.5), "in the sum, whatever the site's examples"


def test_a_share_of_noise_is_for_what_is_within_its_bound() -> None:
    shares = share_noise(1.0, 3, 3, 1.0)
    integers, source = SumWithShare(shares), GaussianSource()
    vector = np.full(3, 0.1)
    assert isinstance(with_share(Bounded(vector, 1.0), shares, integers, source), Released)
    for part in (Raw(vector), Bounded(vector, 1.001)):
        with pytest.raises(PrivacyError, match="within the bound"):
            with_share(part, shares, integers, source)


def test_own_noise_is_made_for_the_sensitivity_that_comes_with_the_answer() -> None:
    """Four times the sensitivity, four times the noise; without one, nothing."""
    noise, zeros = OwnNoise(2.0), np.zeros(100_000)
    for sensitivity in (1.0, 4.0):
        left = noise.let_out(Bounded(zeros, sensitivity), GaussianSource())
        assert np.std(left.value) == pytest.approx(2.0 * sensitivity, rel=0.02)
    with pytest.raises(PrivacyError, match="no bound"):
        noise.let_out(Raw(zeros), GaussianSource())
