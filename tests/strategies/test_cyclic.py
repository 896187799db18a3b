"""Cyclical weight transfer: who is asked when, and what comes of it."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fedclaw.errors import RoundError, UsageError
from fedclaw.protocol.message_identity import number_of
from fedclaw.protocol.terms import CentralNoise, RoundRules, SecureRequest
from fedclaw.server.early_checks import check_combination
from fedclaw.strategies.cyclic import Cyclic
from tests.crashes import server_dies
from tests.least_squares import Bowl, asked, bottom, bowls, place, play

UNLIKE = {"a": Bowl((4.0, 1.0), None, 1), "b": Bowl((-2.0, 0.0), None, 5), "c": Bowl((7.0, -3.0), None, 2)}
IN_ORDER = sorted(UNLIKE, key=number_of)


def test_every_site_has_its_turn_in_the_same_order() -> None:
    asked_nodes = [Cyclic().select_clients(number, [3, 5, 8], 0) for number in range(1, 8)]
    assert asked_nodes == [[3], [5], [8], [3], [5], [8], [3]]


def test_a_shuffled_cycle_still_visits_everybody_and_is_drawn_anew() -> None:
    strategy = Cyclic(order="shuffled")
    nodes = list(range(6))
    cycles = [[strategy.select_clients(6 * cycle + i, nodes, 4)[0] for i in range(1, 7)] for cycle in range(5)]
    assert all(sorted(cycle) == nodes for cycle in cycles)
    assert len({tuple(cycle) for cycle in cycles}) > 1
    assert cycles[0] == [strategy.select_clients(i, nodes, 4)[0] for i in range(1, 7)]
    assert any(strategy.select_clients(i, nodes, 5) != strategy.select_clients(i, nodes, 4) for i in range(1, 7))
    with pytest.raises(ValidationError):
        Cyclic(order="backwards")


def test_the_model_goes_from_site_to_site(tmp_path) -> None:
    """One step of rate 1/2 goes half the way to the site's bottom; nothing is averaged, whatever the weights."""
    outcome = play(tmp_path / "run", asked("cyclic", rounds=5, rate=0.5), bowls(UNLIKE))
    expected = np.zeros(2)
    for number in range(5):
        expected += 0.5 * (np.array(UNLIKE[IN_ORDER[number % 3]].bottom) - expected)
    np.testing.assert_allclose(place(outcome), expected, rtol=1e-6)
    lines = outcome.directory.read_metrics()
    assert [line["answered"] for line in lines] == [[IN_ORDER[number % 3]] for number in range(5)]
    assert {line["test_examples"] for line in lines} == {8}, "everybody evaluates"


def test_it_ends_close_to_pooled_training_when_steps_are_small(tmp_path) -> None:
    """A cycle of small steps is one of the sum of the losses, each site's counted once (Chang et al. 2018, results)."""
    pooled = bottom(UNLIKE, dict.fromkeys(UNLIKE, 1.0))
    distances = []
    for rate, rounds in ((0.4, 15), (0.1, 60)):
        record = asked("cyclic", rounds=rounds, rate=rate, run=f"run-{rate}", metrics=())
        distances.append(np.linalg.norm(place(play(tmp_path / record.run, record, bowls(UNLIKE))) - pooled))
    assert distances[1] < distances[0] / 3
    assert distances[1] < 0.25


@pytest.mark.parametrize("order", ["fixed", "shuffled"])
def test_a_server_that_is_killed_goes_on_with_the_next_site(tmp_path, order) -> None:
    record = asked("cyclic", rounds=7, rate=0.3, settings={"order": order})
    straight = play(tmp_path / "straight", record, bowls(UNLIKE))
    sites = bowls(UNLIKE)
    with server_dies(*sites.values(), in_round=5):
        play(tmp_path / "killed", record, sites)
    resumed = play(tmp_path / "killed", record, bowls(UNLIKE))
    assert np.array_equal(place(resumed), place(straight))


def test_a_site_that_wants_company_refuses(tmp_path) -> None:
    sites = bowls(UNLIKE)
    for site in sites.values():
        site.policy = site.policy.model_copy(update={"minimum_cohort": 2})
    with pytest.raises(RoundError, match=r"a round of 1 site\(s\) was asked for"):
        play(tmp_path / "run", asked("cyclic", rounds=1), sites)


CENTRAL = CentralNoise(unit="site", noise_by="server", epsilon=8, delta=1e-3, clip=1, noise_multiplier=1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"secure": SecureRequest()}, "a secure sum of one hides nothing"),
        ({"central": CENTRAL}, "noise on the sum is that site's own"),
        ({"rules": RoundRules(minimum=1, fraction=0.5)}, "whatever sites.fraction says"),
    ],
)
def test_what_counts_on_several_sites_is_refused(changes, reason) -> None:
    with pytest.raises(UsageError, match=reason):
        check_combination(asked("cyclic", rounds=1, **changes), Cyclic(), torch.nn.Linear(1, 1))


def test_more_sites_may_have_to_be_connected_than_are_asked(tmp_path) -> None:
    record = asked("cyclic", rounds=3, rules=RoundRules(minimum=3))
    check_combination(record, Cyclic(), torch.nn.Linear(1, 1))
    assert len(play(tmp_path / "run", record, bowls(UNLIKE)).directory.read_metrics()) == 3
