"""q-FedAvg: both halves by hand, and losses that come closer together as q grows."""

import math

import numpy as np
import pytest
import torch

from fedclaw.errors import UsageError
from fedclaw.learning.strategy import Participation, RoundContext
from fedclaw.protocol.terms import CentralNoise, LocalTraining, PrivacyRequest
from fedclaw.server.early_checks import check_combination
from fedclaw.strategies.qfedavg import QFedAvg
from tests.least_squares import Bowl, asked, bowls, place, play

HALF = LocalTraining(steps=1, batch_size=8, learning_rate=0.5)


def array(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def sent(q: float, delta: np.ndarray, loss: float) -> dict[str, np.ndarray]:
    finished = QFedAvg.client_update({"w": delta}, RoundContext({"q": q}, HALF, 1, lambda: loss))
    return {**finished.delta, **finished.extras}


def test_a_site_by_hand() -> None:
    # L = 2, F = 3, q = 2, |delta|^2 = 25: D / L = 9 delta;  h / L = q F L |delta|^2 + F^2 = 2 * 3 * 2 * 25 + 9
    left = sent(2.0, array(3.0, -4.0), 3.0)
    assert left["w"].tolist() == [27.0, -36.0]
    assert left["~curvature"].tolist() == [309.0]


def test_two_sites_of_unequal_weight_by_hand() -> None:
    # q = 1: losses 1 and 4, deltas 1 and -1, weights 1 and 3. D / L = 1 and -4; h / L = 2 + 1 = 3 and 2 + 4 = 6.
    sites = [sent(1.0, array(1.0), 1.0), sent(1.0, array(-1.0), 4.0)]
    mean = {name: (sites[0][name] + 3 * sites[1][name]) / 4 for name in sites[0]}
    step = QFedAvg().aggregate(mean, {}, Participation(4.0, 4.0))
    assert step["w"].tolist() == pytest.approx([(1 - 12) / (3 + 18)])


def test_a_loss_of_zero_is_no_division_by_zero() -> None:
    left = sent(0.5, array(1.0), 0.0)
    assert all(np.isfinite(values).all() for values in left.values())


UNLIKE = {"a": Bowl((4.0, 0.0), None, 1), "b": Bowl((-2.0, 1.0), (3.0, 3.0), 3), "c": Bowl((7.0, -3.0), None, 2)}


def test_q_zero_is_fedavg_and_asks_for_no_loss(tmp_path) -> None:
    plain = play(tmp_path / "plain", asked("fedavg", rounds=3, steps=3, run="plain"), bowls(UNLIKE))
    fair = play(tmp_path / "fair", asked("qfedavg", rounds=3, steps=3, settings={"q": 0.0}), bowls(UNLIKE))
    np.testing.assert_allclose(place(fair), place(plain), rtol=1e-6)

    def never() -> float:
        raise AssertionError("the loss was asked for")

    QFedAvg.client_update({"w": array(1.0)}, RoundContext({"q": 0.0}, HALF, 1, never))


def losses(at: np.ndarray) -> np.ndarray:
    return np.array(
        [
            np.sum(np.array(bowl.curvature or (1.0, 1.0)) * (at - np.array(bowl.bottom)) ** 2) / 2
            for bowl in UNLIKE.values()
        ]
    )


def test_the_sites_losses_come_closer_together_as_q_grows(tmp_path) -> None:
    """Li et al. 2020, table 1 and figure 1: the variance of the losses falls with q, their mean rises a little."""
    found = {}
    for q in (0.0, 1.0, 5.0):
        record = asked("qfedavg", rounds=30, steps=2, rate=0.1, settings={"q": q}, run=f"q-{q:g}", metrics=())
        found[q] = losses(place(play(tmp_path / record.run, record, bowls(UNLIKE))))
    assert found[0.0].var() > 1.5 * found[1.0].var() > 1.5 * found[5.0].var()
    assert found[5.0].max() < found[1.0].max() < found[0.0].max()
    weights = [bowl.examples for bowl in UNLIKE.values()]
    assert np.average(found[0.0], weights=weights) < np.average(found[5.0], weights=weights)


def test_it_minimises_its_objective(tmp_path) -> None:
    """Where it comes to rest with one local step, the gradient of the mean of F^(q+1) is zero."""
    record = asked("qfedavg", rounds=60, rate=0.1, settings={"q": 1.0}, metrics=())
    at = place(play(tmp_path / "run", record, bowls(UNLIKE))).astype(float)
    gradient = np.zeros(2)
    for bowl, loss in zip(UNLIKE.values(), losses(at), strict=True):
        slope = np.array(bowl.curvature or (1.0, 1.0)) * (at - np.array(bowl.bottom))
        gradient += bowl.examples / 6 * loss * slope
    assert np.linalg.norm(gradient) < 0.02 * losses(at).max()


CENTRAL = CentralNoise(unit="site", noise_by="server", epsilon=8, delta=1e-3, clip=1, noise_multiplier=1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"privacy": PrivacyRequest(epsilon=1, delta=1e-5, max_grad_norm=1)}, "which no noise covers"),
        ({"central": CENTRAL}, "sends more than updates"),
    ],
)
def test_differential_privacy_is_refused(changes, reason) -> None:
    record = asked("qfedavg", rounds=1, **changes)
    with pytest.raises(UsageError, match=reason):
        check_combination(record, QFedAvg(), torch.nn.Linear(1, 1))
    assert "which no noise covers" in (QFedAvg().refuse(record, torch.nn.Linear(1, 1)) or "")


def test_a_server_that_sends_nonsense_is_refused() -> None:
    with pytest.raises(KeyError, match="q"):
        QFedAvg.check_fields({})
    for q in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="q must"):
            QFedAvg.check_fields({"q": q})
