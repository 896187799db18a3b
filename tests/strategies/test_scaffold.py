"""SCAFFOLD: both halves by hand, and sites that no longer pull the model to their own optima."""

import numpy as np
import pytest
import torch

from fedclaw.errors import RoundError, UsageError
from fedclaw.learning.strategy import Participation, RoundContext, StepContext
from fedclaw.protocol.arrays import unpack
from fedclaw.protocol.terms import CentralNoise, LocalTraining, PrivacyRequest, RoundRules, SecureRequest
from fedclaw.server.early_checks import check_combination
from fedclaw.strategies.scaffold import Scaffold
from fedclaw.transport.in_process import LocalGrid
from tests.crashes import server_dies
from tests.least_squares import PLACE, Bowl, asked, bottom, bowls, identified, place, play

PLAIN = LocalTraining(steps=4, batch_size=8, learning_rate=0.5)


def array(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_a_step_by_hand() -> None:
    # g - c_i + c = 1 - 3 + 5, with c and c_i kept in steps of 0.5: 2.5 and 1.5
    moved, frozen = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    moved.grad = torch.tensor([1.0])
    kept = [torch.tensor([1.5]), torch.tensor([9.0])]
    sent = [torch.tensor([2.5]), torch.tensor([9.0])]
    context = StepContext({}, [], {"control": sent}, {"control": kept}, learning_rate=0.5)
    Scaffold.correct_gradients([moved, frozen], context)
    assert moved.grad.tolist() == [3.0]
    assert frozen.grad is None


def test_a_rounds_end_by_hand() -> None:
    # K = 4 steps went from w0 to w0 - 8: (w0 - w) / K = 2 a step.  c_i+ = c_i - c + 2 = 1.5 - 2.5 + 2 = 1.
    context = RoundContext({}, PLAIN, 4, lambda: 0.0, {"control": {"w": array(2.5)}}, {"control": {"w": array(1.5)}})
    finished = Scaffold.client_update({"w": array(-8.0)}, context)
    assert finished.delta["w"].tolist() == [-8.0]
    assert finished.state["control"]["w"].tolist() == [1.0]
    assert finished.extras["~w"].tolist() == [1.0 - 1.5]


def test_the_servers_control_follows_the_sites_that_answered() -> None:
    # Equal weights, 2 of 8 sites: c moves by |S| / N = 1/4 of the mean change.
    strategy = Scaffold()
    state = strategy.server_state({"w": array(0.0)})
    assert strategy.broadcast(state)["control"]["w"].tolist() == [0.0]
    delta = strategy.aggregate({"w": array(3.0), "~w": array(4.0)}, state, Participation(2.0, 8.0))
    assert {name: values.tolist() for name, values in delta.items()} == {"w": [3.0]}
    assert strategy.broadcast(state)["control"]["w"].tolist() == [1.0]
    strategy.aggregate({"w": array(0.0), "~w": array(-2.0)}, state, Participation(4.0, 8.0))
    assert strategy.broadcast(state)["control"]["w"].tolist() == [0.0]


def algorithm_1(sites, cohorts, rounds, steps, rate, weights):
    """Algorithm 1, option II, as printed, in float64, for parabolas; means weighted."""
    names = list(sites)
    w, c, own = 0.0, 0.0, dict.fromkeys(names, 0.0)
    everyone = sum(weights.values())
    for number in range(rounds):
        cohort = cohorts[number % len(cohorts)]
        heavy = sum(weights[name] for name in cohort)
        step, change = 0.0, 0.0
        for name in cohort:
            y = w
            for _ in range(steps):
                gradient = (sites[name].curvature or (1.0,))[0] * (y - sites[name].bottom[0])
                y -= rate * (gradient - own[name] + c)
            new = own[name] - c + (w - y) / (steps * rate)
            step += weights[name] / heavy * (y - w)
            change += weights[name] / heavy * (new - own[name])
            own[name] = new
        w += step
        c += heavy / everyone * change
    return w


UNLIKE = {"a": Bowl((4.0,), (1.0,), 1), "b": Bowl((-2.0,), (0.2,), 3), "c": Bowl((7.0,), (2.0,), 2)}


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_it_is_algorithm_1(tmp_path, weighting) -> None:
    weights = {name: float(bowl.examples) if weighting == "examples" else 1.0 for name, bowl in UNLIKE.items()}
    record = asked("scaffold", rounds=7, steps=5, rate=0.2, weighting=weighting)
    expected = algorithm_1(UNLIKE, [list(UNLIKE)], 7, 5, 0.2, weights)
    assert place(play(tmp_path / "run", record, bowls(UNLIKE)))[0] == pytest.approx(expected, abs=1e-5)


class Sampled(LocalGrid):
    """Everybody is connected, and only those of COHORTS answer."""

    COHORTS = (("a", "b"), ("c",), ("b", "c"), ("a",))

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        cohort = self.COHORTS[(int(messages[0].metadata.group_id) - 1) % len(self.COHORTS)]
        there = [message for message in messages if self.site_name(message.metadata.dst_node_id) in cohort]
        return super().send_and_receive(there, timeout=timeout)


def test_it_is_algorithm_1_when_some_sites_answer(tmp_path) -> None:
    record = asked("scaffold", rounds=9, steps=3, rate=0.2, weighting="uniform")
    expected = algorithm_1(UNLIKE, Sampled.COHORTS, 9, 3, 0.2, dict.fromkeys(UNLIKE, 1.0))
    found = place(play(tmp_path / "run", record, bowls(UNLIKE), grid=Sampled))
    assert found[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("weighting", "grid"), [("uniform", LocalGrid), ("examples", LocalGrid), ("examples", Sampled)]
)
def test_many_local_steps_on_unlike_data_reach_the_right_point(tmp_path, weighting, grid) -> None:
    """Karimireddy et al. 2020, theorem III: no bias by heterogeneity; FedAvg has one (theorem I, and figure 3)."""
    weights = None if weighting == "examples" else dict.fromkeys(UNLIKE, 1.0)
    right = bottom(UNLIKE, weights)
    found = {}
    for name in ("fedavg", "scaffold"):
        record = asked(name, rounds=15 if grid is LocalGrid else 40, steps=10, rate=0.1, weighting=weighting, run=name)
        found[name] = place(play(tmp_path / name, record, bowls(UNLIKE), grid=grid))
    assert abs(found["fedavg"] - right)[0] > 0.3
    assert found["scaffold"] == pytest.approx(right, abs=2e-3)


def test_a_server_and_sites_that_are_killed_go_on_as_if_nothing_had_been(tmp_path) -> None:
    record = asked("scaffold", rounds=6, steps=4, rate=0.2)
    straight = play(tmp_path / "straight", record, bowls(UNLIKE))

    sites = bowls(UNLIKE, tmp_path / "sites")
    with server_dies(list(sites.values())[-1], in_round=4):
        play(tmp_path / "killed", record, sites)
    # The others have trained in round 4 already, and are asked again: they begin it where they began it before.
    resumed = play(tmp_path / "killed", record, bowls(UNLIKE, tmp_path / "sites"))
    assert np.array_equal(place(resumed), place(straight))
    forgetful = play(tmp_path / "other", record, bowls(UNLIKE))
    assert np.array_equal(place(forgetful), place(straight))


def test_the_state_at_the_sites_matters(tmp_path) -> None:
    record = asked("scaffold", rounds=6, steps=4, rate=0.2)
    straight = play(tmp_path / "straight", record, bowls(UNLIKE))
    half = asked("scaffold", rounds=3, steps=4, rate=0.2)
    play(tmp_path / "run", half, bowls(UNLIKE))
    (tmp_path / "run" / "run.json").write_text(record.model_dump_json())
    assert not np.array_equal(place(play(tmp_path / "run", record, bowls(UNLIKE))), place(straight))


def test_a_secure_sum_gives_the_same(tmp_path) -> None:
    sites = {name: Bowl(UNLIKE[name].bottom * 2, None, UNLIKE[name].examples) for name in UNLIKE}
    record = asked("scaffold", rounds=4, steps=6, rate=0.2, rules=RoundRules(minimum=3))
    plain = play(tmp_path / "plain", record, bowls(sites))
    secure = SecureRequest(dropouts=0.0, corrupt=0.0, largest_weight=4)
    masked = bowls(sites)
    identified(masked)
    outcome = play(tmp_path / "masked", record.model_copy(update={"secure": secure, "run": "masked"}), masked)
    np.testing.assert_allclose(place(outcome), place(plain), rtol=0, atol=1e-5)


def test_what_leaves_follows_from_the_delta_and_what_was_sent(tmp_path) -> None:
    """Under local noise the delta alone is private: nothing else may leave but a function of it."""
    seen = []

    class Listening(LocalGrid):
        def _answer(self, message):
            reply = super()._answer(message)
            seen.append((message.content, reply.content))
            return reply

    private = PrivacyRequest(epsilon=4, delta=1e-3, max_grad_norm=1)
    training = LocalTraining(steps=5, batch_size=4, learning_rate=0.2)
    record = asked("scaffold", rounds=3, training=training, privacy=private, weighting="uniform")
    sites = {name: Bowl(bowl.bottom, bowl.curvature, 20) for name, bowl in UNLIKE.items()}
    play(tmp_path / "run", record, bowls(sites), grid=Listening)
    trained = [(asked, answer) for asked, answer in seen if "sum" in answer.array_records]
    assert len(trained) == 9
    for asked_for, answer in trained:
        sent, left = unpack(asked_for["sent"]), unpack(answer["sum"])
        assert set(left) == {PLACE, f"~{PLACE}"}
        expected = -sent[f"control/{PLACE}"] - left[PLACE] / np.float32(5)
        np.testing.assert_allclose(left[f"~{PLACE}"], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("sent", [{}, {"control": {PLACE: array(1.0, 2.0)}}, {"control": {"other": array(1.0)}}])
def test_a_question_without_the_servers_control_is_refused_before_it_is_paid_for(tmp_path, monkeypatch, sent) -> None:
    monkeypatch.setattr(Scaffold, "broadcast", lambda _strategy, _state: sent)
    sites = bowls(UNLIKE)
    with pytest.raises(RoundError, match="needs the server's 'control' for each parameter"):
        play(tmp_path / "run", asked("scaffold", rounds=1), sites)
    assert not any(site.ledger.rounds("run-1") for site in sites.values())


@pytest.mark.parametrize("training", [{"optimizer": "adam"}, {"momentum": 0.9}])
def test_local_optimisers_that_hide_the_gradient_are_refused(training) -> None:
    changed = LocalTraining(steps=1, batch_size=1, learning_rate=0.1, **training)
    with pytest.raises(UsageError, match="plain steps alone"):
        check_combination(asked("scaffold", rounds=1, training=changed), Scaffold(), torch.nn.Linear(1, 1))


def test_noise_on_the_sum_is_refused() -> None:
    central = CentralNoise(unit="site", noise_by="server", epsilon=8, delta=1e-3, clip=1, noise_multiplier=1)
    with pytest.raises(UsageError, match="sends more than updates"):
        check_combination(asked("scaffold", rounds=1, central=central), Scaffold(), torch.nn.Linear(1, 1))
    check_combination(asked("scaffold", rounds=1), Scaffold(), torch.nn.Linear(1, 1))


def test_participation() -> None:
    exact = Participation.of(3.0, 2, 5, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert (exact.weight, exact.total_weight, exact.share) == (3.0, 15.0, 0.2)
    assert Participation.of(3.0, 2, 4, [1.0, 2.0]).total_weight == 6.0, "two are unknown, taken for 1.5 each"
    assert Participation.of(3.0, 2, 1, [1.0, 2.0, 3.0]).total_weight == 6.0, "those that are away now count"
    assert Participation.of(2.0, 2, 8, []).share == 0.25
    assert Participation.of(0.0, 0, 0, []).share == 0.0
