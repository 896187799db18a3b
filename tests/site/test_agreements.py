"""The whole run is refused or agreed to at a site's first question, whatever the question is."""

import pytest

from fedclaw.privacy.secure_aggregation import Sessions, local_identities
from fedclaw.protocol.messages import KEYS
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.protocol.terms import PrivacyRequest, SecureAggregation
from fedclaw.site.secure import SecureIdentity
from tests.site.conftest import Asker


def greedy(epsilon):
    return PrivacyRequest(epsilon=epsilon, delta=1e-3, max_grad_norm=1)


def refused(reply):
    assert reply.has_error(), "the site took part"
    assert RefusalCode(reply.error.code) is RefusalCode.BUDGET
    assert not any(character.isdigit() for character in reply.error.reason), "figures tell how many examples there are"


def test_two_rounds_of_which_only_one_can_be_paid(asker, site):
    """The issue's case: most is spent, and a run asks for more than is left."""
    assert not asker.ask(run="before", rounds=1, privacy=greedy(5.5)).has_error()
    spent = site.ledger.spent(1e-3)
    refused(asker.ask(run="two", rounds=2, privacy=greedy(3.5)))
    assert site.ledger.spent(1e-3) == spent
    site.policy = site.policy.model_copy(update={"allow_part_of_a_run": True})
    assert not asker.ask(run="two", rounds=2, privacy=greedy(3.5)).has_error(), "the first of them can be paid"
    refused(asker.ask(run="two", round=2, rounds=2, privacy=greedy(3.5)))


def test_two_runs_that_together_are_too_much(asker, root):
    assert not asker.ask(run="first", rounds=3, privacy=greedy(4)).has_error()
    refused(asker.ask(run="second", rounds=3, privacy=greedy(5)))
    again = Asker(root)
    refused(again.ask(run="second", rounds=3, privacy=greedy(5), identity="after a restart"))
    for number in (2, 3):
        assert not again.ask(run="first", round=number, rounds=3, privacy=greedy(4), identity=str(number)).has_error()


def test_part_of_a_run_needs_the_operators_word(asker, site):
    asker.ask(run="before", rounds=1, privacy=greedy(5))
    site.policy = site.policy.model_copy(update={"allow_part_of_a_run": True})
    asked = {"run": "four", "rounds": 4, "privacy": greedy(5)}
    taken = [not asker.ask(round=number, **asked).has_error() for number in (1, 2, 3, 4)]
    assert taken[0]
    assert not taken[-1]


def test_evaluations_are_agreed_to_for_the_whole_run(root):
    text = (root / "site.yaml").read_text()
    clauses = "metrics_epsilon: 1.0\n  metrics_budget: {epsilon: 2.5, delta: 1.0e-3}\n"
    (root / "site.yaml").write_text(text.replace("policy:\n", f"policy:\n  {clauses}"))
    asker = Asker(root)
    refused(asker.ask("evaluate", rounds=50))
    assert asker.site.test_ledger.rounds("run-1") == 0
    for number in (1, 2):
        assert not asker.ask("evaluate", round=number, rounds=2).has_error()


def one_identity():
    identities, verifier = local_identities("clinic", ["hospital-north"])
    return tuple(identities.values()), verifier


@pytest.mark.parametrize("epsilon", [5, 0.5])
def test_a_session_of_a_run_that_cannot_be_paid_is_not_joined(asker, site, epsilon):
    """Else the site would drop out of it when it is asked to train, and the others with it."""
    (identity,), verifier = one_identity()
    site.secure = SecureIdentity(identity, verifier, Sessions())
    asker.ask(run="before", rounds=1, privacy=greedy(5.5))
    sites = ("hospital-north", "a", "b", "c")
    secure = SecureAggregation(
        session="0" * 32, sites=sites, threshold=4, neighbours=3, minimum=4, length=62, step=0.01, value_range=8.0
    )
    reply = asker.ask(KEYS, run="sum", rounds=4, cohort=4, privacy=greedy(epsilon), secure=secure)
    if epsilon == 5:
        refused(reply)
    else:
        assert not reply.has_error()


def test_a_lowered_budget_is_not_held_off_by_an_agreement(asker, site):
    asker.ask(run="before", rounds=1, privacy=greedy(3))
    assert not asker.ask(round=1).has_error()
    site.policy = site.policy.model_copy(update={"epsilon": 4.0})
    replies = [asker.ask(round=number) for number in (2, 3, 4)]
    refused(replies[-1])
    assert site.ledger.spent(1e-3) <= 4
