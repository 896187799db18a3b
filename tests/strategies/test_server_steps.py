"""Each strategy's server half against answers worked out by hand, with sites of unequal weight."""

import math
from itertools import pairwise

import pytest
import torch

from fedclaw.learning.strategy import Strategy
from fedclaw.strategies.fedadagrad import FedAdagrad
from fedclaw.strategies.fedadam import FedAdam
from fedclaw.strategies.fedavg import FedAvg
from fedclaw.strategies.fedavgm import FedAvgM
from fedclaw.strategies.fedprox import FedProx
from fedclaw.strategies.fedyogi import FedYogi

Site = tuple[float, list[float]]
"""A site's weight and its parameter delta."""


def play(strategy: Strategy, start: list[float], rounds: list[list[Site]]) -> list[list[float]]:
    """The global parameters after each round, float64."""
    parameter = torch.tensor(start, dtype=torch.float64)
    optimizer = strategy.server_optimizer([parameter])
    seen = []
    for sites in rounds:
        total = sum(weight for weight, _ in sites)
        mean = sum(weight * torch.tensor(delta, dtype=torch.float64) for weight, delta in sites) / total
        parameter.grad = -mean
        optimizer.step()
        seen.append(parameter.tolist())
    return seen


# weights 1 and 3: mean = (1 * 4 + 3 * 0) / 4 = 1 and (1 * 0 + 3 * 8) / 4 = 6
UNEQUAL: list[Site] = [(1.0, [4.0, 0.0]), (3.0, [0.0, 8.0])]
# weights 2 and 6: mean = (2 * 5 + 6 * 1) / 8 = 2 and (2 * 4 + 6 * -4) / 8 = -2
SECOND: list[Site] = [(2.0, [5.0, 4.0]), (6.0, [1.0, -4.0])]


def alone(*delta: float) -> list[Site]:
    return [(7.0, list(delta))]


def test_fedavg_is_the_weighted_mean_of_the_models() -> None:
    # models [14, 20] and [10, 28] with weights 1 and 3
    assert play(FedAvg(), [10, 20], [UNEQUAL, SECOND]) == [[11, 26], [13, 24]]


def test_fedavg_takes_part_of_the_mean() -> None:
    assert play(FedAvg(server_learning_rate=0.5), [10, 20], [UNEQUAL]) == [[10.5, 23]]


def test_fedprox_averages_at_the_server_like_fedavg() -> None:
    assert play(FedProx(server_learning_rate=0.5, mu=3.0), [10, 20], [UNEQUAL]) == [[10.5, 23]]


def test_fedavgm() -> None:
    # v = [1, 6], then 0.5 * [1, 6] + [2, -2] = [2.5, 1]
    assert play(FedAvgM(momentum=0.5), [10, 20], [UNEQUAL, SECOND]) == [[11, 26], [13.5, 27]]


def test_fedavgm_nesterov() -> None:
    # steps 0.5 v + d = [1.5, 9], then 0.5 * [2.5, 1] + [2, -2] = [3.25, -1.5]
    assert play(FedAvgM(momentum=0.5, nesterov=True), [10, 20], [UNEQUAL, SECOND]) == [[11.5, 29], [14.75, 27.5]]


def test_fedavgm_without_momentum_is_fedavg() -> None:
    plain = play(FedAvg(server_learning_rate=0.3), [1, 2], [UNEQUAL, SECOND])
    assert play(FedAvgM(server_learning_rate=0.3, momentum=0, nesterov=True), [1, 2], [UNEQUAL, SECOND]) == plain


def test_fedadagrad() -> None:
    # tau = 3, so v begins at 9.  Round 1: v = [9 + 16, 9], steps 4 / (5 + 3) = 0.5 and 0.
    # Round 2: v = [25 + 144, 9 + 16], steps 12 / (13 + 3) = 0.75 and -4 / (5 + 3) = -0.5.  Times the rate of 2.
    strategy = FedAdagrad(server_learning_rate=2, tau=3)
    assert play(strategy, [1, 0], [alone(4, 0), alone(12, -4)]) == [[2, 0], [3.5, -1]]


def test_fedadagrad_weighs_before_it_squares() -> None:
    # the mean delta is (1 * 16 + 3 * 0) / 4 = 4: as above, not the mean of the squares
    strategy = FedAdagrad(server_learning_rate=2, tau=3)
    assert play(strategy, [1], [[(1.0, [16.0]), (3.0, [0.0])]]) == [[2]]


def test_fedadam() -> None:
    # Round 1: m = 2, m^ = 2 / 0.5 = 4; v = 4, v^ = 4 / 0.25 = 16; step 4 / (4 + 1) = 0.8.
    # Round 2: m = 1, m^ = 1 / 0.75; v = 3, v^ = 3 / (1 - 0.75^2) = 48 / 7.
    strategy = FedAdam(server_learning_rate=1, beta1=0.5, beta2=0.75, tau=1)
    first, second = play(strategy, [0, 10], [[(1.0, [16.0, -16.0]), (3.0, [0.0, 0.0])], alone(0, 0)])
    assert first == pytest.approx([0.8, 9.2], abs=1e-12)
    step = (4 / 3) / (math.sqrt(48 / 7) + 1)
    assert second == pytest.approx([0.8 + step, 9.2 - step], abs=1e-12)


def test_fedyogi() -> None:
    # tau = 2, so v begins at 4.  Round 1, d = [4, 1]: m = [2, 0.5];
    # v = [4 + 0.25 * 16, 4 - 0.25 * 1] = [8, 3.75], for 4 < 16 and 4 > 1.
    # Round 2, d = [2, 0]: m = [2, 0.25]; v = [8 - 0.25 * 4, 3.75] = [7, 3.75].
    strategy = FedYogi(server_learning_rate=1, beta1=0.5, beta2=0.75, tau=2)
    first, second = play(strategy, [0, 0], [[(1.0, [16.0, 1.0]), (3.0, [0.0, 1.0])], alone(2, 0)])
    one = [2 / (math.sqrt(8) + 2), 0.5 / (math.sqrt(3.75) + 2)]
    assert first == pytest.approx(one, abs=1e-12)
    two = [one[0] + 2 / (math.sqrt(7) + 2), one[1] + 0.25 / (math.sqrt(3.75) + 2)]
    assert second == pytest.approx(two, abs=1e-12)


def papers_algorithm_2(rule: str, deltas: list[float], rate: float, beta1: float, beta2: float, tau: float) -> list:
    """Reddi et al. 2021, Algorithm 2, one coordinate, as printed: the steps taken."""
    mean, square, steps = 0.0, tau**2, []
    for delta in deltas:
        mean = beta1 * mean + (1 - beta1) * delta
        if rule == "yogi":
            square = square - (1 - beta2) * delta**2 * math.copysign(1, square - delta**2)
        elif rule == "adagrad":
            square = square + delta**2
        else:
            square = beta2 * square + (1 - beta2) * delta**2
        steps.append(rate * mean / (math.sqrt(square) + tau))
    return steps


def steps_of(strategy: Strategy, deltas: list[float]) -> list[float]:
    places = [0.0] + [place[0] for place in play(strategy, [0.0], [alone(delta) for delta in deltas])]
    return [after - before for before, after in pairwise(places)]


def test_fedyogi_is_the_papers_algorithm() -> None:
    deltas = [0.3, -0.1, 0.02, 0.5, 0.0, -0.7]
    expected = papers_algorithm_2("yogi", deltas, 0.03, 0.9, 0.99, 1e-3)
    assert steps_of(FedYogi(), deltas) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_fedadagrad_is_the_papers_algorithm(beta1: float) -> None:
    deltas = [0.3, -0.1, 0.02, 0.5, 0.0, -0.7]
    expected = papers_algorithm_2("adagrad", deltas, 0.1, beta1, 0.5, 1e-3)
    assert steps_of(FedAdagrad(beta1=beta1), deltas) == pytest.approx(expected, rel=1e-9)


def test_fedadam_without_bias_correction_is_the_papers_algorithm() -> None:
    deltas = [0.3, -0.1, 0.02, 0.5, 0.0, -0.7]
    expected = papers_algorithm_2("adam", deltas, 0.03, 0.9, 0.99, 1e-3)
    assert steps_of(FedAdam(bias_correction=False), deltas) == pytest.approx(expected, rel=1e-9)


def test_adagrad_and_yogi_are_one_where_v_stays_below_every_squared_delta() -> None:
    # Yogi's v is then (1 - beta2) times Adagrad's, which its smaller rate makes up for.
    deltas = [0.3, -0.31, 0.32, 0.4, 0.3]
    yogi = FedYogi(server_learning_rate=0.01, beta2=0.999, tau=1e-12)
    adagrad = FedAdagrad(server_learning_rate=0.01 / math.sqrt(0.001), beta1=0.9, tau=1e-12)
    assert steps_of(adagrad, deltas) == pytest.approx(steps_of(yogi, deltas), rel=1e-9)


def test_fedadam_differs_from_the_papers_as_its_docstring_says() -> None:
    deltas = [5.0] * 40  # far above tau
    ours = steps_of(FedAdam(), deltas)
    papers = papers_algorithm_2("adam", deltas, 0.03, 0.9, 0.99, 1e-3)
    for t, (own, printed) in enumerate(zip(ours, papers, strict=True), start=1):
        assert printed / own == pytest.approx((1 - 0.9**t) / math.sqrt(1 - 0.99**t), rel=1e-2)
    assert papers[0] / ours[0] == pytest.approx(1, rel=1e-2)
    assert papers[9] / ours[9] > 2
