"""How much one unit can change what leaves a site, measured at the real service on neighbouring data sets.

The noise that is accounted for rests on these bounds. Each measurement has to stay below its bound and come close to
it, with an example as loud as can be: a bound that nothing comes near would hide a wrong formula.
"""

import numpy as np
import pytest

from fedclaw.protocol.terms import CentralNoise, PrivacyRequest
from tests.privacy.wire import NAMES, WEIGHTINGS, WireSite, emptied, loud, reaches, sgd, weight_of

CLIP = 0.5
RATE = 0.1
ROUNDING = 0.01
"""What float32 parameters add to a measurement that is made of differences of parameters."""


@pytest.fixture
def wire(tmp_path):
    return WireSite(tmp_path)


@pytest.fixture
def no_noise(monkeypatch):
    """Local noise off: every multiplier is calibrated to zero."""
    monkeypatch.setattr("fedclaw.privacy.mechanisms.local_noise.calibrate", lambda *_: 0.0)


@pytest.fixture
def linear(wire, monkeypatch):
    """A loss whose gradients do not depend on the parameters, so that a round is a linear function of them."""

    def loss(_, outputs, targets):
        return (outputs[:, 0] - 2 * outputs[:, 1]).mean()

    monkeypatch.setattr(type(wire.site.workload), "loss", loss)


def close_below(measured, bound):
    return bound * (1 - 3 * ROUNDING) <= measured <= bound * (1 + ROUNDING)


LOCAL = PrivacyRequest(epsilon=4, delta=1e-3, max_grad_norm=CLIP)


@pytest.mark.parametrize("changes", WEIGHTINGS, ids=NAMES)
@pytest.mark.parametrize(("steps", "momentum"), [(1, 0.0), (1, 0.9), (5, 0.0), (5, 0.9)])
@pytest.mark.usefixtures("no_noise", "linear")
def test_local_noise_one_example_moves_each_step_by_the_clipping_bound(wire, changes, steps, momentum):
    """Through every step of a round and through momentum, which makes an early step count again and again."""
    examples = len(wire.inputs)
    asked = {"training": sgd(steps, 10**6, momentum, RATE), "privacy": LOCAL} | changes
    there = wire.leaves(loud(wire.inputs, 7), **asked)
    gone = wire.leaves(emptied(wire.inputs, 7), **asked)
    one_step = weight_of(changes, examples) * RATE * CLIP / examples
    assert close_below(np.linalg.norm(there - gone), one_step * sum(reaches(steps, momentum)))


@pytest.mark.parametrize("changes", WEIGHTINGS, ids=NAMES)
@pytest.mark.usefixtures("no_noise")
def test_local_noise_under_the_real_loss(wire, changes):
    examples = len(wire.inputs)
    asked = {"training": sgd(1, 10**6, 0.9, RATE), "privacy": LOCAL} | changes
    moved = wire.leaves(loud(wire.inputs, 7), **asked) - wire.leaves(emptied(wire.inputs, 7), **asked)
    assert close_below(np.linalg.norm(moved), weight_of(changes, examples) * RATE * CLIP / examples)


@pytest.mark.parametrize("changes", WEIGHTINGS, ids=NAMES)
@pytest.mark.usefixtures("no_noise")
def test_local_noise_in_samples_and_in_empty_batches(wire, changes):
    """An example that was not sampled changes nothing; an empty batch leaves zero, not the mean over nothing."""
    batch = 2
    asked = {"training": sgd(1, batch, 0.9, RATE), "privacy": LOCAL} | changes
    bound = weight_of(changes, len(wire.inputs)) * RATE * CLIP / batch
    moves, empty = [], 0
    for key in range(12):
        there = wire.leaves(np.repeat(loud(wire.inputs, 7)[7:8], len(wire.inputs), axis=0), key=key, **asked)
        gone = wire.leaves(emptied(wire.inputs, *range(len(wire.inputs))), key=key, **asked)
        assert not gone.any()
        moves.append(np.linalg.norm(there) / bound)
        empty += not there.any()
    # Loud examples alike by label add up: as many bounds as were sampled of one label, against those of the other.
    assert 0 < empty < 12
    assert max(moves) > 0.9
    assert all(abs(move - round(move)) < 2 * ROUNDING * max(move, 1) for move in moves)


@pytest.mark.parametrize("changes", WEIGHTINGS, ids=NAMES)
@pytest.mark.usefixtures("no_noise")
def test_local_noise_on_a_data_set_of_one_example(wire, changes):
    one = loud(wire.inputs, 7)[7:8]
    asked = {"training": sgd(1, 16, 0.9, RATE), "privacy": LOCAL} | changes
    assert close_below(np.linalg.norm(wire.leaves(one, **asked)), RATE * CLIP)
    assert not wire.leaves(emptied(one, 0), **asked).any()


def example_privacy(rate):
    return CentralNoise(
        unit="example",
        noise_by="server",
        epsilon=4,
        delta=1e-3,
        clip=CLIP,
        noise_multiplier=1.0,
        sample_rate=rate,
    )


@pytest.mark.parametrize("rate", [1.0, 0.25])
def test_noise_on_the_sum_one_example_more_or_less(wire, rate):
    """The example is really taken out: the site has one less, weighs one less, and its sum differs by lr C / q."""
    asked = {"training": sgd(1, 16, learning_rate=RATE), "privacy": None, "central": example_privacy(rate)}
    inputs = loud(wire.inputs, -1)
    moves = [
        np.linalg.norm(wire.leaves(inputs, key=key, **asked) - wire.leaves(inputs[:-1], key=key, **asked))
        for key in range(1 if rate == 1 else 12)
    ]
    bound = RATE * CLIP / rate
    assert close_below(max(moves), bound)
    if rate < 1:
        # Where it was not sampled nothing changes, but for the rounding of one weight against another.
        assert min(moves) < ROUNDING * bound


def test_noise_on_the_sum_a_data_set_of_one_example_and_an_empty_sample(wire):
    one = loud(wire.inputs, 7)[7:8]
    asked = {"training": sgd(1, 16, learning_rate=RATE), "privacy": None, "central": example_privacy(0.25)}
    norms = [np.linalg.norm(wire.leaves(one, key=key, **asked)) for key in range(12)]
    assert close_below(max(norms), RATE * CLIP / 0.25)
    assert min(norms) == 0


SITE_PRIVACY = CentralNoise(unit="site", noise_by="server", epsilon=4, delta=1e-3, clip=CLIP, noise_multiplier=1.0)


@pytest.mark.parametrize("changes", WEIGHTINGS, ids=NAMES)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("examples", [1, 30, 363])
def test_a_whole_site_counts_by_its_weight_and_no_more(wire, changes, momentum, examples):
    """The neighbour sends nothing, so the norm of what leaves is the sensitivity: clip x the weight really used."""
    asked = {"training": sgd(20, 16, momentum, 5.0), "privacy": None, "central": SITE_PRIVACY} | changes
    norm = np.linalg.norm(wire.leaves(loud(wire.inputs, 0)[:examples], **asked))
    bound = weight_of(changes, examples) * CLIP
    assert bound * 0.99 < norm <= bound * (1 + 1e-7)


@pytest.mark.parametrize("changes", WEIGHTINGS, ids=NAMES)
def test_a_small_update_of_a_site_is_not_scaled_up(wire, changes):
    asked = {"training": sgd(1, 16, learning_rate=1e-6), "privacy": None, "central": SITE_PRIVACY} | changes
    assert np.linalg.norm(wire.leaves(**asked)) < weight_of(changes, len(wire.inputs)) * CLIP / 100


def test_a_site_whose_training_overflows_sends_zero(wire):
    asked = {"training": sgd(2, 400), "privacy": None, "central": SITE_PRIVACY}
    assert not wire.leaves(emptied(wire.inputs, 3), **asked).any()
