"""One sentence about unit, relation, trust and what is not covered, the same wherever it is printed."""

import json
from pathlib import Path
from typing import get_args

import pytest

from fedclaw.errors import PrivacyError
from fedclaw.privacy.claims import Claim, claim_in, claim_of, every_claim, weakest
from fedclaw.protocol.receipt import Receipt, Trust
from fedclaw.protocol.statistics import StatisticsReceipt
from fedclaw.server.run_directory import SiteReceipt
from tests.samples import receipt

DOCS = Path(__file__).parent.parent.parent / "docs" / "privacy.md"


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("claim", every_claim(), ids=lambda claim: f"{claim.unit}-{claim.relation}-{claim.trust}")
def test_the_documentation_says_the_very_same(claim):
    text = words(DOCS.read_text())
    for sentence in (claim.protects, claim.against, *claim.not_covered):
        assert sentence in text


def test_every_claim_is_a_sentence_of_its_own():
    """No two guarantees are said alike, but that without noise there is none."""
    private = [claim for claim in every_claim() if claim.trust != "everybody"]
    assert len({claim.protects for claim in private}) == 5
    assert len({claim.against for claim in every_claim()}) == len(get_args(Trust))
    assert len({(claim.protects, claim.against) for claim in private}) == len(private)
    (nobody,) = {claim.protects for claim in every_claim() if claim.trust == "everybody"}
    assert "e^epsilon" not in nobody


@pytest.mark.parametrize(
    "fields",
    [
        {"unit": "site"},
        {"unit": "hospital"},
        {"relation": "whatever"},
        {"relation": "replace-one"},
        {"trust": "the sites"},
        {"unit": None},
    ],
)
def test_a_receipt_makes_no_claim_that_there_are_no_words_for(fields):
    """A site's training receipt is for its own examples or persons, never for a unit that it makes up."""
    with pytest.raises(ValueError, match=next(iter(fields))):
        receipt(**fields)
    if fields != {"unit": "site"}:
        with pytest.raises(PrivacyError, match="no claim"):
            claim_in(fields)


def test_a_site_has_no_number_to_declare_for_itself():
    with pytest.raises(PrivacyError, match="no claim"):
        Claim("site", "add-or-remove")


def test_receipts_of_before_the_fields_are_for_an_example_whose_number_left():
    plain = json.loads(receipt().model_dump_json())
    del plain["unit"], plain["relation"]
    old = Receipt.model_validate_json(json.dumps(plain))
    assert claim_of(old) == claim_in(plain) == Claim("example", "zero-out", "nobody")
    statistics = {"delta": 1e-5, "epsilon_run": 1.0, "epsilon_lifetime": 1.0, "epsilon_left": None}
    statistics |= {"noise_multiplier": 3.0, "ledger_head": "ab" * 32, "mechanism": "statistics", "unit": "example"}
    assert claim_of(StatisticsReceipt.model_validate(statistics)) == Claim()


@pytest.mark.parametrize("claim", [claim for claim in every_claim() if claim.unit != "site"], ids=str)
def test_a_receipt_carries_all_that_its_sentences_are_made_of(claim):
    """What noise on the sum promises to a whole site is in a field of its own."""
    told = receipt(unit=claim.unit, relation=claim.relation, trust=claim.trust)
    assert claim_of(Receipt.model_validate_json(told.model_dump_json())) == claim
    assert claim_in(json.loads(told.model_dump_json())) == claim


def test_what_holds_for_all_is_the_weakest_of_each():
    """A declared number that stays is a public number that stays: zero-out holds for both, add-or-remove for one."""
    declared, counted = Claim("person", "add-or-remove", "aggregation"), Claim("person", "zero-out", "nobody")
    assert weakest([declared, counted]) == weakest([counted, declared]) == Claim("person", "zero-out", "aggregation")
    assert weakest([declared, declared]) == declared
    assert weakest([Claim(trust=trust) for trust in get_args(Trust)]).trust == "everybody"
    with pytest.raises(PrivacyError, match="example, person"):
        weakest([Claim("example"), Claim("person")])


def test_within_a_run_a_relation_never_gets_better():
    before, now = receipt(relation="zero-out"), receipt(relation="add-or-remove")
    assert now.after(before).relation == before.after(now).relation == "zero-out"
    assert now.after(now).relation == "add-or-remove"


def test_a_number_that_changes_within_a_run_was_not_declared():
    """What a server can see of a site that calls a counted number a declared one."""
    told = receipt(relation="add-or-remove")
    before, same, other = (SiteReceipt(examples=number, receipt=told) for number in (120, 120, 121))
    assert same.after(before).receipt.relation == "add-or-remove"
    changed = other.after(before)
    assert changed.receipt.relation == "zero-out"
    assert SiteReceipt(examples=121, receipt=told).after(changed).receipt.relation == "zero-out", "for the whole run"
