"""Ditto: a model of each site's own, held near the global one."""

import math

import numpy as np
import pytest
import torch

from fedclaw.errors import UsageError
from fedclaw.learning.strategy import PERSONAL, StepContext
from fedclaw.protocol.arrays import unpack
from fedclaw.protocol.terms import CentralNoise
from fedclaw.server.early_checks import check_combination
from fedclaw.strategies.ditto import Ditto
from fedclaw.transport.in_process import LocalGrid
from tests.crashes import server_dies
from tests.least_squares import FEDERATION, PLACE, Bowl, asked, bottom, bowls, place, play
from tests.states import newest

SITES = {"a": Bowl((1.0,), None, 3), "b": Bowl((1.5,), None, 2), "odd": Bowl((9.0,), (2.0,), 1)}


def test_a_step_by_hand() -> None:
    # gradient + lambda (v - w0) = 1 + 0.5 * (4 - 1)
    moved, frozen = torch.tensor([4.0], requires_grad=True), torch.zeros(1, requires_grad=True)
    moved.grad = torch.tensor([1.0])
    context = StepContext({"regularisation": 0.5}, [torch.tensor([1.0]), torch.tensor([7.0])])
    Ditto.correct_personal_gradients([moved, frozen], context)
    assert moved.grad.tolist() == [2.5]
    assert frozen.grad is None
    Ditto.correct_gradients([moved], context)
    assert moved.grad.tolist() == [2.5], "the global model's steps are FedAvg's"


def owned(sites, run: str) -> dict[str, np.ndarray]:
    return {name: newest(site.states, FEDERATION, run)[PERSONAL][PLACE] for name, site in sites.items()}


def test_the_rounds_by_hand(tmp_path) -> None:
    """Algorithm 1 for parabolas, in float64; the personal model starts from the first round's global one."""
    rate, steps, strength = 0.2, 3, 0.7
    record = asked("ditto", rounds=3, steps=steps, rate=rate, settings={"regularisation": strength})
    sites = bowls(SITES)
    outcome = play(tmp_path / "run", record, sites)
    w, own = 0.0, dict.fromkeys(SITES, 0.0)
    for _ in range(3):
        mean = 0.0
        for name, bowl in SITES.items():
            curvature, v, y = (bowl.curvature or (1.0,))[0], own[name], w
            for _ in range(steps):
                y -= rate * curvature * (y - bowl.bottom[0])
                v -= rate * (curvature * (v - bowl.bottom[0]) + strength * (v - w))
            own[name] = v
            mean += bowl.examples / 6 * (y - w)
        w += mean
    assert place(outcome)[0] == pytest.approx(w, rel=1e-5)
    for name, found in owned(sites, record.run).items():
        assert found[0] == pytest.approx(own[name], rel=1e-5)


def test_the_global_model_is_fedavgs(tmp_path) -> None:
    ditto = play(tmp_path / "ditto", asked("ditto", rounds=3, steps=2), bowls(SITES))
    plain = play(tmp_path / "plain", asked("fedavg", rounds=3, steps=2, run="plain"), bowls(SITES))
    assert np.array_equal(place(ditto), place(plain))


def test_a_model_of_its_own_serves_an_odd_site_and_a_strong_pull_makes_it_the_global_one(tmp_path) -> None:
    """Li et al. 2021, section 3: lambda goes between purely local models and the global one."""
    distances, odd = {}, {}
    for strength in (0.0, 1.0, 10.0, 100.0):
        record = asked(
            "ditto", rounds=4, steps=100, rate=0.01, settings={"regularisation": strength}, run=f"l{strength:g}"
        )
        sites = bowls(SITES)
        outcome = play(tmp_path / record.run, record, sites, {PLACE: bottom(SITES).astype(np.float32)})
        own = owned(sites, record.run)
        distances[strength] = max(float(abs(found - place(outcome))[0]) for found in own.values())
        odd[strength] = (float((own["odd"] - 9)[0] ** 2), float((place(outcome) - 9)[0] ** 2))
    assert odd[0.0][0] < 1e-3 * odd[0.0][1]
    assert all(personal < common for personal, common in odd.values())
    assert distances[0.0] > distances[1.0] > 5 * distances[10.0] / 2 > 5 * distances[100.0]
    assert distances[100.0] < 0.03 * distances[0.0]


def test_a_site_is_evaluated_with_its_own_model_which_does_not_leave(tmp_path) -> None:
    seen = []

    class Listening(LocalGrid):
        def _answer(self, message):
            reply = super()._answer(message)
            seen.append(reply.content)
            return reply

    found = {}
    for strength in (0.0, 5.0):
        record = asked(
            "ditto", rounds=4, steps=50, rate=0.1, settings={"regularisation": strength}, run=f"l{strength:g}"
        )
        found[strength] = play(tmp_path / record.run, record, bowls(SITES), grid=Listening).metrics["loss"]
    assert found[0.0] < 1e-6 < found[5.0]
    assert all(set(unpack(left["sum"])) == {PLACE} for left in seen if "sum" in left.array_records)


def test_what_is_a_sites_own_survives_it(tmp_path) -> None:
    record = asked("ditto", rounds=5, steps=3, rate=0.1, settings={"regularisation": 1.0})
    undisturbed = bowls(SITES)
    play(tmp_path / "straight", record, undisturbed)
    sites = bowls(SITES, tmp_path / "sites")
    with server_dies(list(sites.values())[-1], in_round=3):
        play(tmp_path / "killed", record, sites)
    resumed = bowls(SITES, tmp_path / "sites")
    play(tmp_path / "killed", record, resumed)
    expected = owned(undisturbed, record.run)
    assert {name: found.tolist() for name, found in owned(resumed, record.run).items()} == {
        name: found.tolist() for name, found in expected.items()
    }


def test_what_cannot_be_right_is_refused() -> None:
    model = torch.nn.Linear(1, 1)
    with pytest.raises(UsageError, match="needs a learning rate of at most 1 over it"):
        check_combination(asked("ditto", rounds=1, rate=0.1), Ditto(regularisation=11), model)
    central = CentralNoise(unit="site", noise_by="server", epsilon=8, delta=1e-3, clip=1, noise_multiplier=1)
    with pytest.raises(UsageError, match="second model at each site"):
        check_combination(asked("ditto", rounds=1, central=central), Ditto(), model)
    check_combination(asked("ditto", rounds=1, rate=0.1), Ditto(), model)
    with pytest.raises(KeyError, match="regularisation"):
        Ditto.check_fields({})
    for strength in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="regularisation"):
            Ditto.check_fields({"regularisation": strength})
