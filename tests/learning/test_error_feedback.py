"""Random positions, error feedback, what a site keeps: through the postprocessors, as sites and server call them."""

import numpy as np
import pytest
from scipy.stats import chi2

from fedclaw.learning import postprocess
from fedclaw.learning.postprocess import ERROR, WARM, SiteContext, positions
from fedclaw.privacy.mechanisms.sum_noise import clip_to
from fedclaw.privacy.noise import GaussianSource
from fedclaw.privacy.provenance import Released
from fedclaw.protocol.arrays import Update, shapes_of
from fedclaw.protocol.terms import CentralNoise, PowerSgd, Quantisation, RandomK, TopK
from fedclaw.server.training import WeightedSum
from tests.samples import plan_of, run_record

SOURCE = GaussianSource()
PINNED = [5, 13, 14, 16, 25, 26]


def plan(compression, round=1, **changes):
    made = plan_of(run_record(privacy=None, weighting="uniform", compression=compression, **changes))
    return made.model_copy(update={"round": round})


def at_site(arrays, asked, state=None):
    copies = {name: np.array(a, np.float32) for name, a in arrays.items()}
    return postprocess.at_site(Released(Update(copies, 1.0, 1)), asked, SiteContext(SOURCE, state or {})).value


def minimised(compression, rounds=300, rate=0.03):
    """Two sites, f_i(x) = |x - b_i|^2 / 2 each, whose large coordinate cancels; the optimum is (0, 1, 1)."""
    targets = [np.array([3, 1, 1]), np.array([-3, 1, 1])]
    x, states = np.zeros(3), [{}, {}]
    for round in range(1, rounds + 1):
        asked = plan(compression, round)
        parameters = {"w": x.astype(np.float32)}
        total = WeightedSum(postprocess.template(parameters, asked))
        for index, target in enumerate(targets):
            sent = at_site({"w": -rate * (x - target)}, asked, states[index])
            states[index] = {**states[index], **sent.state}
            total.add(sent.arrays, sent.weight, 1)
        x = x + postprocess.at_server(total.take(), asked, shapes_of(parameters)).arrays["w"]
    return np.linalg.norm(x - [0, 1, 1])


def test_top_k_reaches_the_optimum_with_feedback_and_does_not_without():
    assert minimised(TopK(method="topk", fraction=0.3)) < 0.2
    assert minimised(TopK(method="topk", fraction=0.3, feedback=False)) == pytest.approx(np.sqrt(2))


def test_random_k_reaches_it_either_way():
    """Without feedback it is a randomised coordinate descent, scaled to be right in the mean."""
    assert minimised(RandomK(method="randk", fraction=0.3, feedback=True)) < 0.2
    assert minimised(RandomK(method="randk", fraction=0.3, feedback=False)) < 0.2


def test_what_was_not_sent_goes_with_the_next_update():
    asked = plan(TopK(method="topk", fraction=0.25))
    first = at_site({"w": [4, 3, 2, 1]}, asked)
    assert first.arrays["w"].tolist() == [4, 0, 0, 0]
    assert first.state[ERROR]["w"].tolist() == [0, 3, 2, 1]
    second = at_site({"w": [4, 3, 2, 1]}, asked, first.state)
    assert second.arrays["w"].tolist() == [0, 6, 0, 0]
    assert second.state[ERROR]["w"].tolist() == [4, 0, 4, 2]


def test_random_k_keeps_what_it_does_not_send():
    request = RandomK(method="randk", fraction=0.5, seed=4, feedback=True)
    arrays = {"w": np.arange(1.0, 9.0)}
    first = at_site(arrays, plan(request))
    second = at_site(arrays, plan(request, 2), first.state)
    chosen = [positions(request, number, "w", 8) for number in (1, 2)]
    assert first.arrays["w"].tolist() == arrays["w"][chosen[0]].tolist()
    waiting = np.where(np.isin(range(8), chosen[0]), 0, arrays["w"])
    assert second.arrays["w"].tolist() == (arrays["w"] + waiting)[chosen[1]].tolist()


def test_the_memory_of_other_terms_is_left_behind():
    """A run's memory, made without noise, has no place in an update that has it."""
    request = TopK(method="topk", fraction=0.25)
    kept = at_site({"w": [4, 3, 2, 1]}, plan(request)).state
    private = plan_of(run_record(weighting="uniform", compression=request))
    for other in (private, plan(TopK(method="topk", fraction=0.3))):
        found = at_site({"w": [1, 1, 1, 2]}, other, kept).arrays["w"]
        assert not np.isin(found, [3, 4, 5]).any(), "something of the memory was sent"
    other_shape = at_site({"w": [1, 5]}, plan(request), kept)
    assert other_shape.arrays["w"].tolist() == [0, 5]


def test_powersgd_keeps_its_factors_and_its_error():
    matrix = np.random.default_rng(0).normal(size=(12, 20)).astype(np.float32)
    sent = at_site({"w": matrix, "b": np.ones(3)}, plan(PowerSgd(method="powersgd", rank=2)))
    assert sent.state[WARM]["w"].shape == (20, 2)
    np.testing.assert_allclose(sent.arrays["w"] + sent.state[ERROR]["w"], matrix, atol=1e-6)
    assert not sent.state[ERROR]["b"].any()


@pytest.mark.parametrize("request_", [TopK(method="topk"), Quantisation(method="int4"), PowerSgd(method="powersgd")])
def test_an_update_that_is_not_finite_says_so_and_leaves_the_memory_alone(request_):
    sent = at_site({"w": np.full((20, 20), np.nan)}, plan(request_))
    assert not sent.state
    assert any(np.isnan(a).any() for a in sent.encoded.values() if a.dtype.kind == "f")


@pytest.mark.parametrize("request_", [TopK(method="topk"), Quantisation(method="int8"), RandomK(method="randk")])
def test_what_a_strategy_adds_travels_as_it_is(request_):
    extra = np.linspace(-1, 1, 77).astype(np.float32)
    sent = at_site({"w": np.ones(40), "~control": extra}, plan(request_))
    assert sent.leaving["~control"].tolist() == extra.tolist()
    assert sent.arrays["~control"].tolist() == extra.tolist()


# Random positions


def test_positions_are_the_same_wherever_they_are_worked_out():
    """Pinned: sites and server may have different releases of numpy."""
    request = RandomK(method="randk", fraction=0.2, seed=7)
    assert positions(request, 3, "head.weight", 30).tolist() == PINNED
    assert positions(request, 4, "head.weight", 30).tolist() != PINNED
    assert positions(request, 3, "head.bias", 30).tolist() != PINNED


def test_random_k_is_right_in_the_mean_and_only_when_scaled():
    """Over rounds, each number is sent as d / k times itself with probability k / d."""
    request = RandomK(method="randk", fraction=0.25, feedback=False)
    array = np.random.default_rng(2).normal(size=200).astype(np.float32) + 2
    rounds = 1500
    total = np.zeros(200)
    for round in range(1, rounds + 1):
        asked = plan(request, round)
        sent = at_site({"w": array}, asked)
        total += postprocess.at_server(sent, asked, {"w": (200,)}).arrays["w"]

    def unlikely(mean):
        # The k positions of a round exclude each other: their counts have the covariance of a draw without replacement.
        z = (mean / array - 1) / np.sqrt(3 / rounds)
        return chi2.sf((z**2).sum() * 199 / 200, 199)

    assert unlikely(total / rounds) > 1e-8
    assert unlikely(total / rounds * 0.9) < 1e-12


def test_under_central_noise_what_is_clipped_is_what_is_sent():
    """Leaving numbers out enlarges no norm, so the noise is made for the bound, and only where numbers were sent."""
    central = CentralNoise(unit="site", noise_by="server", epsilon=8, delta=1e-3, clip=1.0, noise_multiplier=1e-3)
    request = RandomK(method="randk", fraction=0.25, feedback=False)
    asked = plan(request, central=central)
    update = {"w": np.full(400, 3.0)}
    sent = at_site(update, asked)
    assert sent.arrays["w"].shape == (100,)
    assert clip_to({"w": sent.arrays["w"].copy()}, 1.0) == pytest.approx(1, rel=1e-4)
    total = WeightedSum(postprocess.template({"w": np.zeros(400, np.float32)}, asked))
    total.add(sent.arrays, 1.0, 1)
    mean = postprocess.at_server(total.take(), asked, {"w": (400,)}).arrays["w"]
    assert np.count_nonzero(mean) == 100
    # 1 / sqrt(100) each, times d / k
    assert mean[mean != 0].mean() == pytest.approx(0.4, rel=0.02)
    assert 0.5 < mean[mean != 0].std() / (1e-3 * 4) < 2
