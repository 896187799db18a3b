"""FedDyn: both halves by hand, and the stationary point of the global objective."""

import math

import numpy as np
import pytest
import torch

from fedclaw.errors import UsageError
from fedclaw.learning.strategy import Participation, RoundContext, StepContext
from fedclaw.protocol.arrays import unpack
from fedclaw.protocol.terms import CentralNoise, LocalTraining, RoundRules, SecureRequest
from fedclaw.server.early_checks import check_combination
from fedclaw.strategies.feddyn import FedDyn
from fedclaw.transport.in_process import LocalGrid
from tests.crashes import server_dies
from tests.least_squares import PLACE, Bowl, Sampled, asked, bottom, bowls, identified, place, play

PLAIN = LocalTraining(steps=4, batch_size=8, learning_rate=0.5)
UNLIKE = {"a": Bowl((4.0,), (1.0,), 1), "b": Bowl((-2.0,), (0.3,), 3), "c": Bowl((7.0,), (2.0,), 2)}


def array(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_a_step_by_hand() -> None:
    # The site has moved by 3 before, so g_i = -alpha 3 = -6: 1 + alpha (w - w0) - g_i = 1 + 2 * 1.5 + 6 = 10
    moved, frozen = torch.tensor([2.0], requires_grad=True), torch.zeros(1, requires_grad=True)
    moved.grad = torch.tensor([1.0])
    kept, start = [torch.tensor([3.0]), torch.tensor([9.0])], [torch.tensor([0.5]), torch.tensor([1.0])]
    FedDyn.correct_gradients([moved, frozen], StepContext({"alpha": 2.0}, start, {}, {"moved": kept}))
    assert moved.grad.tolist() == [10.0]
    assert frozen.grad is None


def test_a_rounds_end_by_hand() -> None:
    context = RoundContext({"alpha": 2.0}, PLAIN, 4, lambda: 0.0, {}, {"moved": {"w": array(3.0)}})
    finished = FedDyn.client_update({"w": array(-1.0)}, context)
    assert finished.delta["w"].tolist() == [-1.0]
    assert finished.state["moved"]["w"].tolist() == [2.0]
    assert not finished.extras


def test_the_server_by_hand() -> None:
    # Two of four equal sites: h / alpha = -1/2 * 4 = -2, the step is 4 + 2 = 6; then all: -2 - 1 = -3, 1 + 3 = 4.
    strategy = FedDyn()
    state = strategy.server_state({"w": array(0.0)})
    assert strategy.aggregate({"w": array(4.0)}, state, Participation(2.0, 4.0))["w"].tolist() == [6.0]
    assert strategy.aggregate({"w": array(1.0)}, state, Participation(4.0, 4.0))["w"].tolist() == [4.0]


def algorithm_1(sites, cohorts, rounds, steps, rate, alpha, weights):
    """Algorithm 1 as printed, its argmin by gradient steps, in float64, for parabolas; means weighted."""
    w, h, own = 0.0, 0.0, dict.fromkeys(sites, 0.0)
    everyone = sum(weights.values())
    for number in range(rounds):
        cohort = cohorts[number % len(cohorts)]
        heavy, mean, change = sum(weights[name] for name in cohort), 0.0, 0.0
        for name in cohort:
            y = w
            for _ in range(steps):
                y -= rate * ((sites[name].curvature[0]) * (y - sites[name].bottom[0]) - own[name] + alpha * (y - w))
            own[name] -= alpha * (y - w)
            mean += weights[name] / heavy * y
            change += weights[name] / everyone * (y - w)
        h -= alpha * change
        w = mean - h / alpha
    return w


@pytest.mark.parametrize(
    ("grid", "cohorts", "weighting"),
    [(LocalGrid, (tuple(UNLIKE),), "examples"), (Sampled, Sampled.COHORTS, "uniform")],
)
def test_it_is_algorithm_1(tmp_path, grid, cohorts, weighting) -> None:
    weights = {name: float(bowl.examples) if weighting == "examples" else 1.0 for name, bowl in UNLIKE.items()}
    record = asked("feddyn", rounds=9, steps=5, rate=0.2, weighting=weighting, settings={"alpha": 1.0})
    expected = algorithm_1(UNLIKE, cohorts, 9, 5, 0.2, 1.0, weights)
    assert place(play(tmp_path / "run", record, bowls(UNLIKE), grid=grid))[0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("grid", "rounds"), [(LocalGrid, 25), (Sampled, 60)])
def test_it_ends_at_the_stationary_point_of_the_global_objective(tmp_path, grid, rounds) -> None:
    """Acar et al. 2021, section 3: exact minimisation at the sites, and no bias; FedAvg's is large."""
    right = bottom(UNLIKE)
    found = {}
    for name, settings in (("fedavg", {}), ("feddyn", {"alpha": 1.0})):
        record = asked(name, rounds=rounds, steps=20, rate=0.2, run=name, settings=settings, metrics=())
        found[name] = place(play(tmp_path / name, record, bowls(UNLIKE), grid=grid))
    assert abs(found["fedavg"] - right)[0] > 0.5
    assert abs(found["feddyn"] - right)[0] < 2e-2


def test_a_server_and_sites_that_are_killed_go_on_as_if_nothing_had_been(tmp_path) -> None:
    record = asked("feddyn", rounds=5, steps=4, rate=0.2, settings={"alpha": 1.0})
    straight = play(tmp_path / "straight", record, bowls(UNLIKE))
    sites = bowls(UNLIKE, tmp_path / "sites")
    with server_dies(list(sites.values())[-1], in_round=3):
        play(tmp_path / "killed", record, sites)
    resumed = play(tmp_path / "killed", record, bowls(UNLIKE, tmp_path / "sites"))
    assert np.array_equal(place(resumed), place(straight))


def test_a_secure_sum_gives_the_same(tmp_path) -> None:
    record = asked("feddyn", rounds=4, steps=6, rate=0.2, settings={"alpha": 1.0}, rules=RoundRules(minimum=3))
    plain = play(tmp_path / "plain", record, bowls(UNLIKE))
    secure = SecureRequest(dropouts=0.0, corrupt=0.0, largest_weight=4)
    masked = bowls(UNLIKE)
    identified(masked)
    outcome = play(tmp_path / "masked", record.model_copy(update={"secure": secure, "run": "masked"}), masked)
    np.testing.assert_allclose(place(outcome), place(plain), rtol=0, atol=1e-4)


def test_nothing_leaves_but_the_delta(tmp_path) -> None:
    seen = []

    class Listening(LocalGrid):
        def _answer(self, message):
            reply = super()._answer(message)
            seen.append(reply.content)
            return reply

    play(tmp_path / "run", asked("feddyn", rounds=2), bowls(UNLIKE), grid=Listening)
    assert all(set(unpack(left["sum"])) == {PLACE} for left in seen if "sum" in left.array_records)


def test_what_cannot_be_right_is_refused() -> None:
    central = CentralNoise(unit="site", noise_by="server", epsilon=8, delta=1e-3, clip=1, noise_multiplier=1)
    model = torch.nn.Linear(1, 1)
    with pytest.raises(UsageError, match="which noise on the sum changes"):
        check_combination(asked("feddyn", rounds=1, central=central), FedDyn(), model)
    with pytest.raises(UsageError, match="which compression changes"):
        check_combination(asked("feddyn", rounds=1, compression={"method": "fp16"}), FedDyn(), model)
    with pytest.raises(UsageError, match="leaps over"):
        check_combination(asked("feddyn", rounds=1, rate=0.1), FedDyn(alpha=20), model)
    check_combination(asked("feddyn", rounds=1, rate=0.1), FedDyn(), model)
    with pytest.raises(KeyError, match="alpha"):
        FedDyn.check_fields({})
    for alpha in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="alpha"):
            FedDyn.check_fields({"alpha": alpha})
