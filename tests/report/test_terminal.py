"""What a person at the terminal sees at the end of a run."""

import json
from io import StringIO

import pytest
from rich.console import Console

from fedclaw.learning.registry import schema_class
from fedclaw.protocol.terms import PrivacyRequest, SecureRequest
from fedclaw.report.terminal import MOST_SITES, privacy_words, receipt_table
from fedclaw.server.run_directory import SiteReceipt
from tests.hostile import EXAMPLE, ONE_STEP, SITE, central
from tests.samples import receipt, run_record


def schema_text(**changes):
    columns = [{"name": "age", "kind": "numeric", "center": 50, "scale": 20}]
    plain = {"columns": columns, "target": {"name": "outcome", "labels": ["no", "yes"]}, **changes}
    return schema_class("tabular").parse(json.dumps(plain), "test schema").to_json()


def shown(receipts):
    console = Console(file=StringIO(), width=160)
    console.print(receipt_table(receipts))
    return console.file.getvalue()


def test_every_site_of_a_federation_has_a_row():
    text = shown({f"site-{n:02}": SiteReceipt(examples=9, receipt=receipt()) for n in range(MOST_SITES)})
    assert all(f"site-{n:02}" in text for n in range(MOST_SITES))
    assert "receipts.json" not in text


def test_of_a_thousand_simulated_clients_those_that_paid_most_are_shown():
    receipts = {
        f"client-{n}": SiteReceipt(examples=9, receipt=receipt(epsilon_run=None if n == 7 else n / 1000))
        for n in range(1000)
    }
    lines = shown(receipts).splitlines()
    named = {line.split()[1] for line in lines if "client-" in line}
    assert named == {"client-7", *(f"client-{n}" for n in range(981, 1000))}
    assert lines[-1].strip() == "and 980 sites that paid no more than these; receipts.json has all"


OWN = PrivacyRequest(epsilon=2, delta=1e-6, max_grad_norm=1)
AT_EACH_SITE, IN_THE_SUM = "epsilon 2, delta 1e-06 at each site (unit example)", "epsilon 3, delta 1e-05 in the sum"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"privacy": None}, "without differential privacy"),
        ({"privacy": None, "secure": SecureRequest()}, "secure aggregation"),
        ({"privacy": OWN}, AT_EACH_SITE),
        ({"privacy": None, "central": SITE}, f"{IN_THE_SUM} (unit site) by the server"),
        (
            {"privacy": OWN, "central": central("site", "sites"), "weighting": "uniform", "secure": SecureRequest()},
            f"{AT_EACH_SITE}, {IN_THE_SUM} (unit site) by all sites together, secure aggregation",
        ),
    ],
)
def test_what_a_run_promises_is_said_in_a_few_words(asked, words):
    assert privacy_words(run_record(**asked, schema_text=schema_text())) == words


def test_a_schema_that_names_persons_makes_them_the_unit():
    record = run_record(privacy=OWN, schema_text=schema_text(person="patient"))
    assert privacy_words(record) == AT_EACH_SITE.replace("example", "person")
    asked = {"privacy": None, "central": EXAMPLE, "training": ONE_STEP}
    assert "(unit person) by the server" in privacy_words(record.model_copy(update=asked))
