"""An A/B test learns which version is best, keeps trying the others, and says with which probability it drew."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from fedclaw.serve.routing.controller import Controller, add_version, start_ab
from fedclaw.serve.routing.keys import KeyHash
from fedclaw.serve.routing.plan import FLOOR, read_plan
from fedclaw.serve.routing.thompson import (
    ArmRewards,
    chances_of_being_best,
    propensities,
    sum_rewards,
)
from fedclaw.serve.state.store import StateStore
from tests.chance import FAR, TINY
from tests.serve.routing.conftest import Clock


@dataclass
class Said:
    version: str
    reward: Any
    key: Any = "k"
    propensity: Any = 0.5
    issued: Any = 100
    body: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.body = {"reward": self.reward, "key": self.key, "propensity": self.propensity, "issued": self.issued}


def test_two_arms_have_a_closed_form():
    """P(X > Y) for X ~ Beta(2, 1), Y ~ Beta(1, 1) is E[X] = 2/3."""
    assert chances_of_being_best([(2.0, 1.0), (1.0, 1.0)]) == pytest.approx([2 / 3, 1 / 3], abs=1e-4)
    assert chances_of_being_best([(3.0, 4.0)] * 4) == pytest.approx([0.25] * 4, abs=1e-9)


@pytest.mark.parametrize(
    "posteriors",
    [
        [(1.0, 1.0), (50.0, 60.0), (9.0, 9.0)],
        [(5e4, 5.1e4), (5e4, 5e4), (30.0, 29.0), (2.0, 2.0)],
        [(1e5, 1.0), (1.0, 1e5)],
    ],
)
def test_chances_are_those_of_many_draws(posteriors: list[tuple[float, float]]):
    draws = 200_000
    rng = np.random.default_rng(1)
    best = np.argmax([rng.beta(a, b, draws) for a, b in posteriors], axis=0)
    found = np.bincount(best, minlength=len(posteriors)) / draws
    chances = chances_of_being_best(posteriors)
    assert np.abs(chances - found).max() < 0.001 + FAR * 0.5 / np.sqrt(draws)
    assert chances.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("arms", [2, 3, 7, 20])
def test_every_version_keeps_its_floor(arms: int):
    posteriors = [(1e4, 1.0)] + [(1.0, 1e4)] * (arms - 1)
    shares = propensities(posteriors, FLOOR)
    assert min(shares) >= FLOOR - 1e-12
    assert sum(shares) == pytest.approx(1.0, abs=1e-12)
    assert shares[0] == pytest.approx(1 - FLOOR * (arms - 1), abs=1e-5)


def test_the_floor_is_mixed_in():
    assert propensities([(2.0, 1.0), (1.0, 1.0)], 0.05) == pytest.approx((0.05 + 0.9 * 2 / 3, 0.05 + 0.9 / 3), abs=1e-4)


def test_a_key_counts_once_and_only_what_was_drawn_counts():
    said = [
        Said("a", 1.0, "x"), Said("a", 0.0, "x"), Said("a", 1.0, "y"), Said("b", 0.25, "z"),
        Said("b", 1.0, "w", propensity=0.0), Said("b", 1.0, "v", issued=99), Said("c", 1.0, "u"),
        Said("b", None), Said("b", True), Said("b", 7.0), Said("b", "1"), Said("b", 1.0, None),
    ]  # fmt: skip
    assert sum_rewards(["a", "b"], said, 100) == {"a": ArmRewards(2, 1.5), "b": ArmRewards(1, 0.25)}
    assert ArmRewards(2, 1.5).posterior == (2.5, 1.5)


def trial(rng: np.random.Generator, means: list[float], keys: int, *, learn: bool) -> list[tuple[str, float, float]]:
    """(version, propensity, reward) of each key; propensities follow each hundredth key's feedback."""
    arms = [f"v{number}" for number in range(len(means))]
    sums = {arm: ArmRewards() for arm in arms}
    hashed, drawn = KeyHash("m", f"{rng.integers(2**62):032x}"), list[tuple[str, float, float]]()
    for number in range(keys):
        if number % 100 == 0 and (learn or number == 0):
            shares = propensities([sums[arm].posterior for arm in arms], FLOOR)
        arm = int(np.searchsorted(np.cumsum(shares), hashed.share(f"k{number}"), side="right"))
        arm = min(arm, len(arms) - 1)
        reward = float(rng.random() < means[arm])
        before = sums[arms[arm]]
        sums[arms[arm]] = ArmRewards(before.keys + 1, before.rewards + reward)
        drawn.append((arms[arm], shares[arm], reward))
    return drawn


def test_it_regrets_much_less_than_equal_shares_and_goes_on_trying():
    rng = np.random.default_rng(3)
    means, keys = [0.5, 0.6, 0.4], 4000
    regret = 0.0
    for _ in range(3):
        drawn = trial(rng, means, keys, learn=True)
        regret += sum(max(means) - means[int(version[1])] for version, _, _ in drawn) / 3
        late = [version for version, _, _ in drawn[2000:]]
        for version in ("v0", "v1", "v2"):
            assert late.count(version) >= binom.ppf(TINY, len(late), FLOOR)
    uniform = keys * (max(means) - float(np.mean(means)))
    assert regret < 0.4 * uniform


def inverse_propensity_mean(drawn: list[tuple[str, float, float]], version: str) -> float:
    """The estimate of a version's mean reward from (version, propensity, reward) of all keys that were assigned."""
    return sum(reward / propensity for one, propensity, reward in drawn if one == version) / len(drawn)


def test_estimates_by_inverse_propensity_are_unbiased():
    rng = np.random.default_rng(4)
    means = [0.5, 0.6, 0.3]
    estimates = np.array(
        [
            [inverse_propensity_mean(drawn, f"v{arm}") for arm in range(3)]
            for drawn in (trial(rng, means, 200, learn=True) for _ in range(60))
        ]
    )
    error = estimates.std(0) / np.sqrt(len(estimates))
    assert (np.abs(estimates.mean(0) - means) < FAR * error).all()
    assert (error < 0.03).all()


def test_propensities_follow_the_feedback_in_the_store_whoever_computes_them(store: StateStore, clock: Clock):
    clock.now = store.now()
    add_version(store, "m", "v1", "ann", clock())
    start_ab(store, "m", ["v2", "v3"], "ann", clock())

    def plan():
        stored = read_plan(store, "m")
        assert stored is not None
        return stored.plan

    assert plan().propensities == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    for number in range(60):
        for version, reward in (("v1", number % 2), ("v2", 1.0), ("v3", 0)):
            body = {"reward": reward, "key": f"{version}-{number}", "propensity": 1 / 3, "issued": int(clock()) + 1}
            assert store.credit(f"{version}-{number}", "m", version, body)
    controllers = [Controller(store), Controller(store)]
    changed = [controllers[number % 2].step(clock.now + 10 * number) for number in range(6)]
    assert sum(changed) == 1
    after = plan()
    assert after.propensities[1] == pytest.approx(0.9, abs=0.01)
    assert min(after.propensities) >= FLOOR
    event = store.events("m")[-1]
    assert event.kind == "propensities"
    assert event.body["v1"] == {"keys": 60, "rewards": 30.0, "propensity": after.propensities[0]}
    assert event.body["v2"] == {"keys": 60, "rewards": 60.0, "propensity": after.propensities[1]}
