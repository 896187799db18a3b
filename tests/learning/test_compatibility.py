"""One rule for both ends: what a server lets be made, and asks by it, no site refuses for its combination."""

from itertools import product

import pytest
from torch import nn

from fedclaw.learning.compatibility import refusal, strategy_of
from fedclaw.learning.registry import STRATEGIES, installed, strategy_class
from fedclaw.learning.strategy import Strategy
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.protocol.questions import Outgoing
from fedclaw.protocol.terms import CentralNoise, LocalTraining, Plan, PrivacyRequest, RoundRules, SecureRequest
from fedclaw.server.session import make_plan
from fedclaw.server.training import session_of
from tests.hostile import EXAMPLE, ONE_STEP, SITE
from tests.least_squares import asked
from tests.small_nets import SmallNets, first

SITES = ("a", "b", "c", "d", "e", "f")
MECHANISMS = {
    "none": {},
    "local": {"privacy": PrivacyRequest(epsilon=4, delta=1e-5, max_grad_norm=1)},
    "example": {"central": EXAMPLE, "training": ONE_STEP},
    "site": {"central": SITE},
}
WEIGHTINGS = ({}, {"weighting": "uniform"}, {"weighting": "capped", "weight_cap": 7})
SECURE = (None, SecureRequest(largest_weight=500), SecureRequest(value_range=2.0, largest_weight=500))
SETTINGS = {"fednova": {"mu": 0.5}, "feddyn": {"alpha": 0.25}, "fedper": {"head": ["head."]}, "krum": {"hostile": 2}}


def of(strategy: Strategy, model: nn.Module, plan: Plan) -> str | None:
    assert strategy_of(plan) == strategy, "a site judges by the settings of the run"
    return refusal(plan, strategy_of(plan), model)


@pytest.mark.parametrize("name", sorted(installed(STRATEGIES)))
def test_a_site_refuses_no_run_that_a_server_makes(name: str) -> None:
    training = LocalTraining(epochs=2, batch_size=8, learning_rate=0.1)
    model_name = "normed" if name == "fedbn" else "parted"
    model, parameters, made = SmallNets(3).build(asked(name, rounds=1).model), first(model_name, 3), 0
    for mechanism, weighting, secure in product(MECHANISMS.values(), WEIGHTINGS, SECURE):
        fields = {"training": training, **mechanism, **weighting, "secure": secure, "rules": RoundRules(minimum=7)}
        try:
            record = asked(name, rounds=3, workload=SmallNets.name, settings=SETTINGS.get(name, {}), **fields)
        except ValueError:
            continue
        record = record.model_copy(update={"model": record.model.model_copy(update={"name": model_name})})
        model = SmallNets(3).build(record.model)
        strategy = strategy_class(name).model_validate(record.strategy.settings)
        if refusal(record, strategy, model):
            continue
        record = record.model_copy(update={"personal": tuple(sorted(strategy.personal(model)))})
        plan = make_plan(record, strategy, 1, len(SITES))
        if secure is not None:
            plan = session_of(plan, SITES, Outgoing(parameters), secure, 4)
            assert mechanism_of(plan).largest_update == pytest.approx(mechanism_of(record).largest_update)
        assert of(strategy, model, Plan.model_validate_json(plan.model_dump_json())) is None
        made += 1
    assert made >= 3, "nothing to compare"


def test_noise_of_the_sites_is_judged_at_both_ends() -> None:
    """Its session says no range of values."""
    by_sites = CentralNoise(**{**SITE.model_dump(), "noise_by": "sites"})
    record = asked(
        "fedavg", rounds=3, workload=SmallNets.name, central=by_sites, secure=SecureRequest(), weighting="uniform"
    )
    strategy, model = strategy_class("fedavg")(), SmallNets(3).build(record.model)
    plan = session_of(make_plan(record, strategy, 1, 6), SITES, Outgoing(first("parted", 3)), SecureRequest(), 6)
    assert refusal(record, strategy, model) is None
    assert of(strategy, model, plan) is None
