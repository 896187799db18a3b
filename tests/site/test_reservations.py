"""A charge is for one question, and what a site remembers of it stays only if its answer left."""

from pathlib import Path

import numpy as np
import pytest
from flwr.app import Error, Message

from fedclaw.protocol.arrays import unpack
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.protocol.terms import LocalTraining
from tests import warm
from tests.conftest import environment
from tests.site.conftest import Asker
from tests.states import newest

KILLER = Path(__file__).with_name("site_killer.py")
REMEMBERS = {"strategy": "feddyn", "strategy_fields": {"alpha": 0.1}, "privacy": None}
"""A strategy that keeps the sum of all that it sent, so that nothing of a training that counted is lost."""


@pytest.fixture
def asker(root):
    """A site that trains without noise, so that what it keeps is seen, at a cost that is counted in rounds."""
    asker = Asker(root)
    clauses = {"epsilon": None, "allow_training_without_privacy": True, "strategies": ("fedavg", "feddyn")}
    asker.site.policy = asker.site.policy.model_copy(update=clauses)
    asker.plan = asker.plan.model_copy(update=REMEMBERS)
    return asker


def charges(asker):
    return [entry.body for entry in asker.site.ledger.entries() if entry.body["kind"] == "reserve"]


def kept(asker):
    return newest(asker.site.states, "clinic", "run-1").get("moved", {})


def same(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def test_another_round_under_the_same_name_is_charged_anew(asker):
    """The attack: one message id, 25 round numbers, and no answer stored until the last."""
    for number in range(1, 26):
        assert not asker.ask(identity="same", round=number, rounds=25, release=False).has_error()
    assert [charge["round"] for charge in charges(asker)] == list(range(1, 26))
    assert kept(asker) == {}, "nothing stays of training whose answer never left"


def test_other_parameters_under_the_same_name_are_charged_anew(asker):
    asker.ask(identity="same", release=False)
    asker.parameters = {name: array + 1 for name, array in asker.parameters.items()}
    asker.ask(identity="same", release=False)
    assert len(charges(asker)) == 2


def test_other_settings_under_the_same_name_are_charged_anew(asker):
    asker.ask(identity="same", release=False)
    asker.ask(identity="same", release=False, training=LocalTraining(epochs=1, batch_size=16, learning_rate=0.2))
    assert len(charges(asker)) == 2


def test_a_repeated_question_finds_the_state_that_it_began_with(asker):
    """Trained five times under one charge; what leaves and what stays are of the last time alone."""
    full = {"training": LocalTraining(steps=3, batch_size=10_000, learning_rate=0.1)}
    asker.ask(round=1, **full)
    begun = kept(asker)
    again = [asker.ask(round=2, identity="same", release=False, **full) for _ in range(4)]
    assert same(kept(asker), begun)
    last = asker.ask(round=2, identity="same", **full)
    for reply in again:
        first = unpack(reply.content["sum"])
        assert all(
            np.allclose(array, first[name], rtol=1e-3, atol=1e-4) for name, array in unpack(last.content["sum"]).items()
        )
    assert len(charges(asker)) == 2
    assert not same(kept(asker), begun)


def failed(message):
    """What a runtime makes of an answer that cannot be sent: the server says how large one may be."""
    return Message(Error(RefusalCode.UPDATE_SIZE, "the reply has 4711 bytes, the limit is 1"), reply_to=message)


def test_an_answer_that_cannot_be_sent_uses_its_charge_up_and_leaves_no_state(asker):
    """Else a server that takes no answer has as many trainings, each from where the last ended, as it likes."""
    for number in range(3):
        message = asker.message(identity="same")
        assert not asker.site.answer(message).has_error()
        asker.site.release(message, failed(message), 10, "00" * 32)
        assert len(charges(asker)) == number + 1
        assert kept(asker) == {}
    assert not list(asker.site.states.root.glob("*.staged"))


def test_a_refusal_leaves_though_the_ledger_cannot_be_written(asker):
    message = asker.message(identity="same")
    asker.site.answer(message)
    asker.site.ledger.close()
    asker.site.release(message, failed(message), 10, "00" * 32)
    assert kept(asker) == {}


def test_a_stored_answer_commits_its_own_state_and_no_other(asker):
    """Two rounds under one name, both stored: each answer settles its own charge; the later one's state is not lost."""
    first, second = asker.message(identity="same", round=1), asker.message(identity="same", round=2)
    replies = [asker.site.answer(message) for message in (first, second)]
    asker.site.release(first, replies[0], 10, "00" * 32)
    assert kept(asker) == {}, "what was staged belongs to the second charge"
    asker.site.release(second, replies[1], 10, "11" * 32)
    assert kept(asker)
    settled = [entry.body["reserve"] for entry in asker.site.ledger.entries() if entry.body["kind"] == "settle"]
    assert settled == [charge["sequence"] for charge in charges(asker)]


def test_an_evaluation_or_another_run_does_not_commit_what_was_trained(asker):
    asker.ask(identity="same", release=False)
    asker.ask("evaluate", identity="same")
    asker.ask(identity="same", run="run-2")
    assert kept(asker) == {}


def test_a_ledger_of_before_has_open_charges_that_no_question_takes_up(asker, root):
    """They say nothing of the content: they stand, and the question is paid anew."""
    plan = asker.plan
    asker.site.ledger.reserve("old", plan.federation, plan.run, plan.round, None, budget=unlimited())
    asker.ask(identity="old")
    assert len(charges(asker)) == 2
    asker.site.ledger.settle("old")
    assert asker.site.ledger.spent(1e-3) == float("inf")


def unlimited():
    from fedclaw.site.journal.ledger import Budget

    return Budget(None, 1e-3)


@pytest.mark.timeout(300)
def test_kill_nine_at_every_step_leaves_one_charge_one_answer_and_its_state(tmp_path):
    """From before the reservation to after the line in the outbound log: see `site_killer`."""
    done = warm.run([KILLER, tmp_path], env=environment(), timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    places, answered_before = done.stdout.split()[-2:]
    assert int(places) >= 15
    assert 0 < int(answered_before) < int(places), "some were killed before the answer was stored, some after"
