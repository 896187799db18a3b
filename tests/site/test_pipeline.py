"""The type of what leaves holds where the checks before it are taken away."""

import numpy as np
import pytest
from flwr.app import Message

from fedclaw.learning.strategy import ClientUpdate
from fedclaw.privacy.mechanisms.mechanism import Mechanism
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.site.state import Provenance
from fedclaw.strategies.fedavg import FedAvg
from fedclaw.strategies.qfedavg import QFedAvg
from tests.hostile import DP, EXAMPLE, ONE_STEP, SITE, ask, wary_site
from tests.states import newest


@pytest.fixture(autouse=True)
def unchecked(monkeypatch) -> None:
    """Neither server nor site asks a mechanism what it refuses."""
    monkeypatch.setattr(Mechanism, "refuse", lambda *_: None)


def refused(reply: Message, code: RefusalCode) -> str:
    assert reply.has_error(), "it left"
    assert RefusalCode(reply.error.code) is code, reply.error.reason
    return reply.error.reason


def test_what_the_training_loss_made_does_not_leave_as_released(monkeypatch) -> None:
    monkeypatch.setattr(QFedAvg, "refuse", lambda *_: None)
    site = wary_site()
    reason = refused(ask(site, "qfedavg", privacy=DP), RefusalCode.STRATEGY)
    assert (
        reason == "strategy 'qfedavg': the update is worked out from more than noised steps, and no noise covers that"
    )
    assert not newest(site.states, "clinic", "run-1")


def test_what_was_made_of_the_one_clipped_step_has_no_bound(monkeypatch) -> None:
    site, how = wary_site(), {"privacy": None, "central": EXAMPLE, "training": ONE_STEP}
    assert not ask(site, "fedavg", **how).has_error()

    def again(_cls, delta, _context):
        return ClientUpdate({name: array.astype(np.float32) for name, array in delta.items()})

    monkeypatch.setattr(FedAvg, "client_update", classmethod(again))
    assert "one clipped step" in refused(ask(site, "fedavg", **how, round=2), RefusalCode.STRATEGY)


def test_what_was_kept_without_noise_makes_a_noised_round_raw(monkeypatch) -> None:
    """A head that was trained without noise is where a step with it begins: what comes of that tells of both."""
    site = wary_site(allow_training_without_privacy=True, epsilon=None)
    assert not ask(site, "fedper", privacy=None).has_error()
    monkeypatch.setattr(Provenance, "__eq__", lambda *_: True)
    assert "noised steps" in refused(ask(site, "fedper", privacy=DP, round=2), RefusalCode.STRATEGY)


def test_a_step_from_a_head_that_no_noise_covers_has_no_bound() -> None:
    """It would move every gradient of the round, sampled or not."""
    site, how = wary_site(), {"privacy": None, "central": EXAMPLE, "training": ONE_STEP}
    assert not ask(site, "fedper", **how).has_error(), "it begins with what the server sent"
    assert "one clipped step" in refused(ask(site, "fedper", **how, round=2), RefusalCode.STRATEGY)


def test_what_no_noise_covers_is_not_kept_as_covered(monkeypatch, caplog) -> None:
    site = wary_site(allow_training_without_privacy=True, epsilon=None)
    monkeypatch.setattr(Provenance, "covers", lambda *_: True)
    assert ask(site, "feddyn", privacy=None).has_error()
    assert "kept as released" in caplog.text
    assert not newest(site.states, "clinic", "run-1")


def test_a_clause_that_the_policy_lacks_lets_nothing_out(monkeypatch) -> None:
    monkeypatch.setattr("fedclaw.site.training.check_plan", lambda *_, **__: None)
    site = wary_site(trust_server_noise=False, epsilon=None)
    for noise in ({"privacy": None}, {"privacy": None, "central": SITE}):
        reason = refused(ask(site, "fedavg", **noise, run=str(noise)[:20]), RefusalCode.PRIVACY_REQUIRED)
        assert "allow_training_without_privacy" in reason
    assert not ask(wary_site(trust_server_noise=True), "fedavg", privacy=None, central=SITE).has_error()


def test_an_update_that_leaves_in_the_open_is_what_it_was() -> None:
    site = wary_site(allow_training_without_privacy=True, epsilon=None)
    left = ask(site, "fedavg", privacy=None).content.array_records["sum"]
    assert all(np.isfinite(array.numpy()).all() for array in left.values())
