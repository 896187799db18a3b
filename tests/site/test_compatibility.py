"""What a site refuses of a plan that an honest server would not have made, before it pays."""

import numpy as np
import pytest
import torch
from flwr.app import Message

from fedclaw.errors import PluginError
from fedclaw.learning.strategy import ClientUpdate, RoundContext, checked_client_update
from fedclaw.protocol.arrays import Arrays
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.protocol.terms import AdaptiveClip, ModelSpec
from fedclaw.site.service import SiteService
from fedclaw.strategies.ditto import Ditto
from fedclaw.strategies.fedavg import FedAvg
from fedclaw.strategies.qfedavg import QFedAvg
from tests.hostile import DP, EXAMPLE, ONE_STEP, SITE, SOME_STEPS, ask, central, session, wary_site
from tests.least_squares import identified
from tests.states import newest


@pytest.fixture
def site() -> SiteService:
    return wary_site()


def refused(reply: Message, site: SiteService, code: RefusalCode = RefusalCode.STRATEGY) -> str:
    assert reply.has_error(), "the site took part"
    assert RefusalCode(reply.error.code) is code, reply.error.reason
    assert site.ledger.rounds("run-1") == 0, "it was paid for"
    assert not newest(site.states, "clinic", "run-1")
    return reply.error.reason


@pytest.mark.parametrize(
    ("strategy", "changes", "reason"),
    [
        ("qfedavg", {}, "which no noise covers"),
        ("qfedavg", {"privacy": None, "central": SITE, "weighting": "uniform"}, "more than updates"),
        ("scaffold", {"privacy": None, "central": EXAMPLE, "training": ONE_STEP}, "more than updates"),
        ("fednova", {"privacy": None, "central": SITE}, "more than updates"),
        ("ditto", {"privacy": None, "central": SITE}, "second model at each site"),
        ("feddyn", {"privacy": None, "central": SITE}, "remembers at each site"),
        ("fedper", {"privacy": None, "central": EXAMPLE, "training": ONE_STEP}, "trains without noise"),
        ("fedbn", {"privacy": None, "central": EXAMPLE, "training": ONE_STEP, "model": "normed"}, "without noise"),
        ("fedrep", {"privacy": None, "central": EXAMPLE, "training": ONE_STEP}, "one step a round"),
        ("median", {"privacy": None, "central": SITE}, "takes no mean"),
        ("median", {"secure": session(), "kind": "query.keys"}, "has to see every update by itself"),
        ("fedbuff", {"privacy": None, "central": SITE}, "discounts late answers"),
        ("cyclic", {"privacy": None, "central": SITE}, "asks one site a round"),
        ("cyclic", {"secure": session(), "kind": "query.keys"}, "a secure sum of one"),
        ("fedper", {"settings": {"head": [""]}}, "does not part into both"),
        ("feddyn", {"settings": {"alpha": 100.0}}, "leaps over"),
    ],
)
def test_a_combination_that_no_honest_server_asks_for_is_refused_before_it_is_paid(
    site: SiteService, strategy: str, changes: dict, reason: str
) -> None:
    identified({"a": site})
    assert reason in refused(ask(site, strategy, **changes), site)


ADAPTIVE = AdaptiveClip(count_noise=9.0)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"central": EXAMPLE, "training": SOME_STEPS}, "one plain step a round"),
        ({"central": EXAMPLE, "training": ONE_STEP.model_copy(update={"momentum": 0.9})}, "one plain step a round"),
        ({"central": EXAMPLE, "training": ONE_STEP, "privacy": DP}, "goes without local noise"),
        ({"central": EXAMPLE, "training": ONE_STEP, "weighting": "uniform"}, "weighting: examples"),
        ({"central": central("site", "sites")}, "has to know the largest weight"),
        ({"central": central("site", "sites", sample_rate=0.5), "weighting": "uniform"}, "asks every site"),
        ({"central": central("site", "server", sample_rate=0.5)}, "weighting: uniform"),
        ({"central": central("site", "server", adaptive=ADAPTIVE)}, "weighting: uniform"),
        ({"central": central("example", "server", adaptive=ADAPTIVE), "training": ONE_STEP}, "adaptive clipping bound"),
        ({"central": central("site", "sites", adaptive=ADAPTIVE), "weighting": "uniform"}, "adaptive clipping bound"),
        ({"central": central("site", "server", adaptive=AdaptiveClip(count_noise=0.5))}, "count_noise has to be above"),
        ({"central": SITE, "weighting": "capped"}, "weight_cap goes with"),
        ({"central": SITE, "weight_cap": 3}, "weight_cap goes with"),
    ],
)
def test_settings_whose_guarantee_would_not_hold_are_no_plan(
    site: SiteService, kind: str, changes: dict, reason: str
) -> None:
    """What a server looks at before a run, a site looks at in each question, whatever it is for."""
    assert reason in refused(ask(site, "fedavg", kind, **{"privacy": None, **changes}), site, RefusalCode.MALFORMED)


@pytest.mark.parametrize("privacy", [DP, None])
def test_a_site_keeps_a_model_of_its_own_or_parameters_of_the_shared_one(monkeypatch, privacy) -> None:
    """As both are kept under one name, what no noise covers would be where the next noised round begins."""
    monkeypatch.setattr(Ditto, "personal", lambda *_: frozenset({"head.weight", "head.bias"}))
    site = wary_site(allow_training_without_privacy=True, epsilon=None)
    assert "it can do one" in refused(ask(site, "ditto", privacy=privacy), site)


def test_it_is_refused_at_the_first_stage_of_a_secure_sum_too(site: SiteService) -> None:
    identified({"a": site})
    by_sites = central("example", "sites")
    changes = {"privacy": None, "central": by_sites, "training": ONE_STEP, "secure": session()}
    for strategy, reason in (("scaffold", "more than updates"), ("fedper", "trains without noise")):
        for kind in ("query.keys", "train"):
            reply = ask(site, strategy, kind, **changes)
            if kind == "query.keys":
                assert reason in refused(reply, site)
            else:
                refused(reply, site, RefusalCode.SECURE_AGGREGATION)
    assert not ask(site, "fedavg", "query.keys", **changes).has_error()


@pytest.mark.parametrize("kind", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("strategy", "personal"),
    [("fedavg", ("head.weight",)), ("ditto", ("head.bias",)), ("fedper", ()), ("fedper", ("body.weight",))],
)
def test_what_a_plan_calls_personal_is_what_the_strategy_says(
    site: SiteService, kind: str, strategy: str, personal: tuple[str, ...]
) -> None:
    assert "personal" in refused(ask(site, strategy, kind, personal=personal), site)
    assert not ask(site, strategy).has_error(), "as the strategy says"


def test_what_is_refused_is_judged_by_the_settings_that_are_used(site: SiteService) -> None:
    """A setting that is sent as a field, and another that the site is told to judge by."""
    changes = {"strategy_fields": {"alpha": 100.0}, "strategy_settings": {"alpha": 0.1}}
    assert "do not follow from the settings" in refused(ask(site, "feddyn", **changes), site)
    assert "leaps over" in refused(ask(site, "feddyn", **changes | {"strategy_settings": {}}), site)
    assert "beta" in refused(ask(site, "feddyn", strategy_settings={"beta": 1}), site)


def test_what_somebody_elses_strategy_refuses_a_site_refuses(site: SiteService, monkeypatch) -> None:
    seen = []

    def refuse(self, terms, model):
        seen.append((terms.privacy, terms.rounds, sorted(dict(model.named_parameters()))))
        return "counts on a clipping norm of 2" if terms.privacy and terms.privacy.max_grad_norm != 2 else None

    monkeypatch.setattr(FedAvg, "refuse", refuse)
    assert "clipping norm of 2" in refused(ask(site, "fedavg"), site)
    assert seen == [(DP, 5, ["body.weight", "head.bias", "head.weight"])]
    assert not ask(site, "fedavg", privacy=DP.model_copy(update={"max_grad_norm": 2.0})).has_error()


def test_a_step_that_waits_for_its_noise_is_not_for_a_strategy_to_change(site: SiteService, monkeypatch) -> None:
    how = {"privacy": None, "central": EXAMPLE, "training": ONE_STEP}
    monkeypatch.setattr(FedAvg, "client_update", classmethod(lambda _cls, delta, _context: ClientUpdate(delta)))
    assert "makes more of a site's step" in refused(ask(site, "fedavg", **how), site)
    monkeypatch.undo()
    assert not ask(site, "fedavg", **how).has_error()


def finishing(monkeypatch, site: SiteService, finish) -> None:
    """What a strategy returns beyond what it declares leaves nothing and keeps nothing."""
    monkeypatch.setattr(FedAvg, "client_update", classmethod(lambda _cls, delta, context: finish(delta, context)))
    reply = ask(site, "fedavg")
    assert reply.has_error()
    assert RefusalCode(reply.error.code) is RefusalCode.FAILED
    assert not newest(site.states, "clinic", "run-1")


def test_what_a_strategy_does_not_declare_does_not_leave(site: SiteService, monkeypatch, caplog) -> None:
    one = np.ones(1, np.float32)
    for finish, reason in (
        (lambda delta, _: ClientUpdate({**delta, "loss": one}), "delta that client_update returned"),
        (lambda delta, _: ClientUpdate(dict(list(delta.items())[1:])), "delta that client_update returned"),
        (lambda delta, _: ClientUpdate(delta, extras={"~loss": one}), "extras that client_update returned"),
        (lambda delta, _: ClientUpdate(delta, state={"loss": {}}), "keeps 'loss'"),
        (lambda delta, _: ClientUpdate(delta, state={"personal": delta}), "keeps 'personal'"),
        (lambda delta, _: ClientUpdate({n: a.astype(np.float64) for n, a in delta.items()}), "float32"),
        (lambda delta, context: ClientUpdate({n: a * context.loss() for n, a in delta.items()}), "uses_training_loss"),
    ):
        finishing(monkeypatch, site, finish)
        assert reason in caplog.text
        caplog.clear()
        monkeypatch.undo()
    assert not ask(site, "fedavg").has_error()


def test_a_training_loss_is_for_those_that_declare_it() -> None:
    def delta() -> Arrays:
        return {"w": np.ones(2, np.float32)}

    context = RoundContext({"q": 1.0}, SOME_STEPS, 3, lambda: 2.0)
    left = checked_client_update(QFedAvg, delta(), context)
    assert left.delta["w"].tolist() == [2, 2]
    assert set(left.extras) == {"~curvature"}

    class Untold(QFedAvg):
        uses_training_loss = False

    with pytest.raises(PluginError, match="does not declare uses_training_loss"):
        checked_client_update(Untold, delta(), context)


def test_the_model_that_a_strategy_is_asked_about_takes_no_memory(site: SiteService) -> None:
    shell = site.shell(ModelSpec(name="parted"))
    assert {parameter.device for parameter in shell.parameters()} == {torch.device("meta")}
