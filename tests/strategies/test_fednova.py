"""FedNova: what each gradient counts by, and sites that train for longer without a louder voice."""

import math

import numpy as np
import pytest
import torch

from fedclaw.errors import UsageError
from fedclaw.learning.strategy import Participation, RoundContext, StepContext
from fedclaw.protocol.arrays import unpack
from fedclaw.protocol.terms import CentralNoise, LocalTraining, PrivacyRequest, RoundRules, SecureRequest
from fedclaw.server.early_checks import check_combination
from fedclaw.strategies.fednova import FedNova, accumulated
from fedclaw.transport.in_process import LocalGrid
from tests.least_squares import PLACE, Bowl, Sampled, asked, bottom, bowls, identified, place, play


def training(**changes) -> LocalTraining:
    return LocalTraining(**{"steps": 1, "batch_size": 1, "learning_rate": 0.5, **changes})


def array(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_plain_steps_count_one_each() -> None:
    assert accumulated(training(), 7, 0.0) == 7


def test_momentum_by_hand() -> None:
    # Wang et al. 2020: a_k = (1 - rho^(tau - k)) / (1 - rho), so 1.75 + 1.5 + 1 for rho = 1/2 and three steps.
    assert accumulated(training(momentum=0.5), 3, 0.0) == pytest.approx(4.25)
    rho, steps = 0.9, 12
    expected = sum((1 - rho ** (steps - k)) / (1 - rho) for k in range(steps))
    assert accumulated(training(momentum=rho), steps, 0.0) == pytest.approx(expected)


def test_the_proximal_term_by_hand() -> None:
    # a_k = (1 - rate mu)^(tau - 1 - k): 0.25 + 0.5 + 1 for rate mu = 1/2 and three steps
    assert accumulated(training(), 3, 1.0) == pytest.approx(1.75)
    assert accumulated(training(), 20, 0.4) == pytest.approx((1 - 0.8**20) / 0.2)


@pytest.mark.parametrize(("momentum", "mu"), [(0.0, 0.0), (0.8, 0.0), (0.0, 0.6), (0.8, 0.6)])
def test_it_is_how_far_torchs_optimiser_goes_along_gradients_of_one(momentum: float, mu: float) -> None:
    start = torch.zeros(1)
    moved = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([moved], lr=0.5, momentum=momentum)
    for _ in range(9):
        moved.grad = torch.ones(1)
        FedNova.correct_gradients([moved], StepContext({"mu": mu}, [start]))
        optimizer.step()
    assert -moved.item() / 0.5 == pytest.approx(accumulated(training(momentum=momentum), 9, mu), rel=1e-5)


def test_both_halves_by_hand() -> None:
    # Two sites: 8 in 4 steps, and 3 in 1; weights 1 and 3.  Normalised 2 and 3, mean 2.75; tau = (4 + 3) / 4 = 1.75.
    sent = []
    for delta, steps in ((8.0, 4), (3.0, 1)):
        context = RoundContext({"mu": 0.0}, training(), steps, lambda: 0.0)
        finished = FedNova.client_update({"w": array(delta)}, context)
        sent.append({**finished.delta, **finished.extras})
    mean = {name: (sent[0][name] + 3 * sent[1][name]) / 4 for name in sent[0]}
    step = FedNova().aggregate(mean, {}, Participation(4.0, 4.0))
    assert {name: values.tolist() for name, values in step.items()} == {"w": [2.75 * 1.75]}


UNEQUAL = {"a": Bowl((4.0,), None, 4), "b": Bowl((-2.0,), None, 40), "c": Bowl((7.0,), None, 16)}
EPOCHS = LocalTraining(epochs=1, batch_size=4, learning_rate=0.02)
"""1, 10 and 4 local steps: every batch is a full batch."""


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_unequal_steps_bias_fedavg_and_not_fednova(tmp_path, momentum) -> None:
    """Wang et al. 2020, theorem 1 and its example: FedAvg ends where sites count by their weight times their steps."""
    schedule = EPOCHS.model_copy(update={"momentum": momentum})
    right = bottom(UNEQUAL, dict.fromkeys(UNEQUAL, 1.0))
    found = {}
    for name in ("fedavg", "fednova"):
        record = asked(name, rounds=50, training=schedule, weighting="uniform", run=name, metrics=())
        start = {PLACE: array(*right)}
        found[name] = place(play(tmp_path / name, record, bowls(UNEQUAL), start))
    steps = {name: accumulated(schedule, -(-bowl.examples // 4), 0.0) for name, bowl in UNEQUAL.items()}
    wrong = bottom(UNEQUAL, steps)
    assert abs(wrong - right)[0] > 2
    assert abs(found["fedavg"] - wrong)[0] < 0.75
    assert abs(found["fednova"] - right)[0] < 0.4


def test_equal_steps_are_fedavg_and_with_a_pull_fedprox(tmp_path) -> None:
    for other, settings in (("fedavg", {}), ("fedprox", {"mu": 0.7})):
        expected = play(tmp_path / other, asked(other, rounds=3, steps=4, settings=settings, run=other), bowls(UNEQUAL))
        record = asked("fednova", rounds=3, steps=4, settings=settings, run=f"nova-{other}")
        np.testing.assert_allclose(
            place(play(tmp_path / record.run, record, bowls(UNEQUAL))), place(expected), rtol=1e-5
        )


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_rounds_in_which_only_some_answer_by_hand(tmp_path, weighting) -> None:
    """Wang et al. 2020, equation 7 with the weights of those that are there."""
    record = asked("fednova", rounds=10, training=EPOCHS, weighting=weighting)
    found = place(play(tmp_path / "run", record, bowls(UNEQUAL), grid=Sampled))
    where = 0.0
    for number in range(record.rounds):
        there = Sampled.COHORTS[number % len(Sampled.COHORTS)]
        weights = {name: UNEQUAL[name].examples if weighting == "examples" else 1 for name in there}
        whole = sum(weights.values())
        # k steps go the share 1 - 0.98^k of the way to the bottom.
        steps = {name: UNEQUAL[name].examples // 4 for name in there}
        gone = {name: (UNEQUAL[name].bottom[0] - where) * (1 - 0.98 ** steps[name]) for name in there}
        direction = sum(weights[name] / whole * gone[name] / steps[name] for name in there)
        where += direction * sum(weights[name] / whole * steps[name] for name in there)
    assert found[0] == pytest.approx(where, rel=1e-4)


def test_a_secure_sum_gives_the_same(tmp_path) -> None:
    record = asked("fednova", rounds=3, training=EPOCHS, rules=RoundRules(minimum=3))
    plain = play(tmp_path / "plain", record, bowls(UNEQUAL))
    secure = SecureRequest(dropouts=0.0, corrupt=0.0, largest_weight=50)
    masked = bowls(UNEQUAL)
    identified(masked)
    outcome = play(tmp_path / "masked", record.model_copy(update={"secure": secure, "run": "masked"}), masked)
    np.testing.assert_allclose(place(outcome), place(plain), rtol=1e-4, atol=1e-5)


def test_what_leaves_under_local_noise_follows_from_the_noised_delta(tmp_path) -> None:
    """The site's own optimiser went by noised gradients alone; beside the delta goes the number of steps."""
    seen = []

    class Listening(LocalGrid):
        def _answer(self, message):
            reply = super()._answer(message)
            seen.append(reply.content)
            return reply

    schedule = LocalTraining(epochs=2, batch_size=4, learning_rate=0.1)
    private = PrivacyRequest(epsilon=4, delta=1e-3, max_grad_norm=1)
    record = asked("fednova", rounds=1, training=schedule, privacy=private, weighting="uniform")
    play(tmp_path / "run", record, bowls({"a": Bowl((1.0,), None, 20), "b": Bowl((2.0,), None, 8)}), grid=Listening)
    sums = [unpack(answer["sum"]) for answer in seen if "sum" in answer.array_records]
    assert sorted(float(left["~accumulated"][0]) * 1024 for left in sums) == [4, 10]
    assert all(set(left) == {PLACE, "~accumulated"} for left in sums)


CENTRAL = CentralNoise(unit="site", noise_by="server", epsilon=8, delta=1e-3, clip=1, noise_multiplier=1)


@pytest.mark.parametrize(
    ("settings", "changes", "reason"),
    [
        ({}, {"training": training(optimizer="adam")}, "which Adam decides anew"),
        ({"mu": 2.0}, {"training": training()}, "leaps over its start"),
        ({}, {"central": CENTRAL}, "sends more than updates"),
        ({}, {"training": training(steps=9000), "secure": SecureRequest(largest_weight=9)}, r"secure\.value_range"),
    ],
)
def test_what_cannot_be_right_is_refused(settings, changes, reason) -> None:
    with pytest.raises(UsageError, match=reason):
        check_combination(asked("fednova", rounds=1, **changes), FedNova(**settings), torch.nn.Linear(1, 1))


def test_a_server_that_sends_nonsense_is_refused() -> None:
    with pytest.raises(KeyError, match="mu"):
        FedNova.check_fields({})
    for mu in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="mu"):
            FedNova.check_fields({"mu": mu})
