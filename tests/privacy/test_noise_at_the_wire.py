"""The noise on what leaves a site has the scale that its ledger was charged for, measured on what leaves."""

import itertools
import math

import numpy as np
import pytest

from fedclaw.privacy.noise import GaussianSource
from fedclaw.protocol.terms import ModelSpec, PrivacyRequest
from tests.chance import is_standard_normal, scale_is_right, uncorrelated
from tests.privacy.wire import NAMES, WEIGHTINGS, WireSite, emptied, reaches, sgd, weight_of

ROUNDS = 4
"""Times 2114 parameters: a scale that is 10% too small lies 12 standard errors away."""
CLIP = 0.5
PRIVACY = PrivacyRequest(epsilon=2, delta=1e-3, max_grad_norm=CLIP)


@pytest.fixture
def wire(tmp_path):
    site = WireSite(tmp_path)
    site.take(ModelSpec(name="mlp", args={"hidden": [64]}))
    return site


@pytest.fixture
def too_small(monkeypatch):
    """Noise of nine tenths of the scale that was asked for."""
    honest = GaussianSource.perturb_
    monkeypatch.setattr(GaussianSource, "perturb_", lambda self, values, std: honest(self, values, 0.9 * std))


def claimed(wire, changes, training):
    """The noise's standard deviation, from the receipt and the plan: that of each step times how often it counts."""
    receipt, examples = wire.receipt, len(wire.inputs)
    step = training.learning_rate * receipt.noise_multiplier * receipt.max_grad_norm
    step /= receipt.sample_rate * examples
    return weight_of(changes, examples) * step * math.hypot(*reaches(training.steps, training.momentum))


def noise_alone(wire, changes, training):
    """Standardised noise of some rounds over data that adds nothing: many batches are empty, the rest are zero."""
    nothing = emptied(wire.inputs, *range(len(wire.inputs)))
    rounds = [wire.leaves(nothing, training=training, privacy=PRIVACY, **changes) for _ in range(ROUNDS)]
    return np.concatenate(rounds) / claimed(wire, changes, training)


def noise_on_data(wire, changes, training):
    """Standardised differences of pairs of rounds: the same question on the same full batch, so the data cancels."""
    ask = {"training": training, "privacy": PRIVACY} | changes
    pairs = [wire.leaves(**ask) - wire.leaves(**ask) for _ in range(ROUNDS)]
    return np.concatenate(pairs) / (math.sqrt(2) * claimed(wire, changes, training))


SAMPLED = [sgd(1, 1), sgd(6, 1), sgd(6, 40, 0.9)]
FULL = [sgd(1, 10**6), sgd(1, 10**6, 0.9)]


@pytest.mark.parametrize("changes", WEIGHTINGS, ids=NAMES)
@pytest.mark.parametrize("training", SAMPLED, ids=["one step", "empty batches", "momentum"])
def test_noise_alone_has_the_claimed_scale(wire, changes, training):
    assert scale_is_right(noise_alone(wire, changes, training))


@pytest.mark.parametrize("changes", WEIGHTINGS, ids=NAMES)
@pytest.mark.parametrize("training", FULL, ids=["plain", "momentum"])
def test_noise_on_real_data_has_the_claimed_scale(wire, changes, training):
    assert scale_is_right(noise_on_data(wire, changes, training))


@pytest.mark.parametrize("changes", WEIGHTINGS, ids=NAMES)
@pytest.mark.usefixtures("too_small")
def test_noise_that_is_a_tenth_too_small_is_found(wire, changes):
    assert not scale_is_right(noise_alone(wire, changes, SAMPLED[-1]))
    assert not scale_is_right(noise_on_data(wire, changes, FULL[0]))


def test_noise_for_another_number_of_steps_is_found(wire):
    """One step's noise under a receipt for two: what counting rounds instead of steps would look like."""
    noise = noise_alone(wire, WEIGHTINGS[0], sgd(2, 40)) * math.sqrt(2)
    assert not scale_is_right(noise)


def test_noise_is_normal_and_fresh_in_every_number_and_every_round(wire):
    noise = noise_alone(wire, WEIGHTINGS[0], sgd(1, 40)).reshape(ROUNDS, -1)
    assert is_standard_normal(noise)
    # Parameters are float32, so some differences of parameters coincide.
    assert len(np.unique(noise)) > 0.95 * noise.size
    assert all(uncorrelated(*pair) for pair in itertools.combinations(noise, 2))
