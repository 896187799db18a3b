"""A site's receipts say for which unit and between which data sets their figures hold."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fedclaw.privacy.claims import Claim, claim_in
from fedclaw.site.journal.ledger import Ledger
from tests.hostile import EXAMPLE, ONE_STEP, SITE, ask, wary_site

ROWS = 20


def claim_of_reply(reply):
    assert not reply.has_error(), reply.error.reason
    return claim_in(json.loads(str(reply.content["receipt"]["json"])))


@pytest.mark.parametrize(
    ("declared", "persons", "number", "claim"),
    [
        (None, None, 20, Claim("example", "zero-out")),
        (25, None, 25, Claim("example", "add-or-remove")),
        (None, np.arange(ROWS) // 2, 10, Claim("person", "zero-out")),
        (12, np.arange(ROWS) // 2, 12, Claim("person", "add-or-remove")),
    ],
)
def test_a_rounds_receipt_and_the_number_beside_it(declared, persons, number, claim):
    site = wary_site()
    site.data = replace(site.data, train=replace(site.data.train, persons=persons), public_examples=declared)
    reply = ask(site, "fedavg")
    assert claim_of_reply(reply) == claim
    assert reply.content["metrics"]["examples"] == number


@pytest.mark.parametrize("central", [EXAMPLE, SITE], ids=["example", "site"])
def test_the_relation_is_the_sites_whoever_adds_the_noise(central):
    site = wary_site()
    changes = {"privacy": None, "central": central} | ({"training": ONE_STEP} if central is EXAMPLE else {})
    assert claim_of_reply(ask(site, "fedavg", **changes)) == Claim("example", "zero-out", "server")
    site.data = replace(site.data, public_examples=25)
    assert claim_of_reply(ask(site, "fedavg", **changes, run="another")) == Claim("example", "add-or-remove", "server")


@pytest.mark.parametrize("declared", [None, 25])
def test_the_receipt_of_noised_metrics_is_for_the_test_data(declared):
    site = wary_site(metrics_epsilon=1.0, metrics_budget={"epsilon": 9.0, "delta": 1e-5})
    site.test_ledger = Ledger.open(":memory:", "a/test")
    site.data = replace(site.data, public_examples=25, public_test_examples=declared)
    told = claim_of_reply(ask(site, "fedavg", "evaluate"))
    assert told == Claim("example", "zero-out" if declared is None else "add-or-remove")
