"""`python -m fedclaw.client site=… check`: what it tells the operator, and that it writes and asks nothing."""

import re
import socket
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import yaml

from fedclaw import client
from fedclaw.errors import DataError, FedClawError, LedgerError, ProvisionError, UsageError
from fedclaw.identity import pki, provisioning
from fedclaw.learning.registry import strategy_class
from fedclaw.privacy.claims import Claim
from fedclaw.protocol.questions import Outgoing, question
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.protocol.terms import PrivacyRequest
from fedclaw.site.policy.policy import Policy, sentences
from fedclaw.site.settings import load_site_settings
from tests.conftest import run_module
from tests.site.conftest import Asker


def change(root: Path, **clauses) -> None:
    path = root / "site.yaml"
    site = yaml.safe_load(path.read_text())
    site["policy"].update(clauses)
    path.write_text(yaml.safe_dump(site))


def rename(root: Path, name: str) -> None:
    path = root / "site.yaml"
    site = yaml.safe_load(path.read_text())
    site["data"]["name"] = name
    path.write_text(yaml.safe_dump(site))


@pytest.fixture
def said(root, capsys):
    """What check prints, on one line; a failure is under `failure`, as the entry point would print it."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        try:
            client.main([f"site={root}", "check", *arguments])
        except FedClawError as error:
            run.failure = error
        else:
            run.failure = None
        return " ".join(capsys.readouterr().out.split())

    run.failure = None
    return run


@pytest.fixture
def enrolled(root, tmp_path):
    federation = tmp_path / "federation"
    provisioning.initialise(federation, "clinic", "127.0.0.1:9443")
    request = provisioning.request_site(root, federation / "federation.json", root.name)
    provisioning.accept(root, provisioning.approve(federation, request))
    return federation


def files(root: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(root)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_before_enrolment_it_says_what_is_missing_and_all_the_rest(root, said):
    before = files(root)
    text = said()
    assert said.failure is None
    assert "not enrolled yet: no federation.json, no keys/site.key, no keys/site.crt" in text
    assert "provision request" in text
    assert "epsilon 6 at delta 0.001" in text
    assert "data set hospital-north: nothing spent yet, 6.000 of 6 left" in text
    assert Claim("example", "zero-out").protects in " ".join(text.split())
    assert files(root) == before, "nothing was written"


def test_it_says_what_a_run_promises_before_there_is_one(root, said):
    site = yaml.safe_load((root / "site.yaml").read_text())
    site["data"]["public_examples"] = 400
    (root / "site.yaml").write_text(yaml.safe_dump(site))
    assert Claim("example", "add-or-remove").protects in " ".join(said().split())
    assert said.failure is None


def test_between_request_and_certificate(root, tmp_path, said):
    federation = tmp_path / "federation"
    provisioning.initialise(federation, "clinic", "127.0.0.1:9443")
    provisioning.request_site(root, federation / "federation.json", root.name)
    text = said()
    assert "of federation clinic, server 127.0.0.1:9443" in text
    assert "not enrolled yet: no keys/site.crt; " in text
    assert "provision install" in text


@pytest.mark.usefixtures("enrolled")
def test_an_enrolled_site(root, said):
    before = files(root)
    text = said()
    assert said.failure is None
    assert "not enrolled" not in text
    assert "certificate valid until" in text
    assert "!" not in text, "there is nothing to warn of"
    assert files(root) == before


@pytest.mark.parametrize(("left", "word"), [(3, "expires in 3 days"), (-1, None)])
@pytest.mark.usefixtures("enrolled")
def test_a_certificate_that_expires(root, said, monkeypatch, left, word):
    until = pki.parse_certificate((root / "keys" / "site.crt").read_bytes(), "").not_valid_after_utc
    monkeypatch.setattr(pki, "now", lambda: until - timedelta(days=left))
    text = said()
    if word:
        assert word in text
        assert "provision renew" in text
        assert said.failure is None
    else:
        assert isinstance(said.failure, ProvisionError)
        assert "expired" in str(said.failure)
        assert "6.000 of 6 left" in text, "the rest is told all the same"


@pytest.mark.usefixtures("enrolled")
def test_a_certificate_of_another_site(root, said):
    path = root / "site.yaml"
    path.write_text(path.read_text().replace("name: hospital-north", "name: hospital-east"))
    said()
    assert "certificate says 'hospital-north'" in str(said.failure)


def test_what_is_left_of_each_budget(root, said):
    noised = {"metrics_epsilon": 0.5, "metrics_budget": {"epsilon": 2.0, "delta": 1e-3}}
    change(root, **noised, budgets={"hospital-north": {"epsilon": 5.0, "delta": 1e-3}, "ward": {"epsilon": 1.0}})
    asker = Asker(root)
    assert not asker.ask().has_error()
    assert not asker.ask("evaluate").has_error()
    spent = asker.site.ledger.spent(1e-3)
    asker.site.ledger.close()
    before = files(root)
    text = said()
    assert f"data set hospital-north: spent epsilon {spent:.3f} at delta 0.001 by 1 run(s) in 1 round(s)" in text
    assert f"{5 - spent:.3f} of 5 left" in text
    assert "data set hospital-north/test: spent epsilon 0.4" in text
    assert "of 2 left" in text
    assert files(root) == before
    rename(root, "ward")
    (root / "data" / "train.csv").write_text((root / "data" / "train.csv").read_text() + "\n")
    text = said()
    assert "data set ward: nothing spent yet, 1.000 of 1 left" in text
    assert "data set hospital-north (not served now): spent" in text


def test_training_without_privacy_leaves_nothing_to_count(root, said):
    change(root, epsilon=None, allow_training_without_privacy=True)
    asker = Asker(root)
    assert not asker.ask(privacy=None).has_error()
    asker.site.ledger.close()
    assert "spent without bound at delta 0.001 by 1 run(s) in 1 round(s), without a limit" in said()


def test_content_that_has_another_name_or_has_changed(root, said):
    asker = Asker(root)
    asker.ask()
    asker.site.ledger.close()
    path, train = root / "site.yaml", root / "data" / "train.csv"
    settings = path.read_text()
    rename(root, "ward")
    said()
    assert isinstance(said.failure, UsageError)
    assert "charged as the data set 'hospital-north'" in str(said.failure)
    path.write_text(settings)
    train.write_text(train.read_text() + "\n")
    assert "its content has changed since it was last charged; the budget goes on" in said()
    assert said.failure is None


def test_a_ledger_that_is_damaged_or_gone(root, said):
    asker = Asker(root)
    asker.ask()
    asker.site.ledger.close()
    ledger = root / "state" / "ledger.sqlite"
    whole = ledger.read_bytes()
    ledger.write_bytes(whole.replace(b'"run":"run-1"', b'"run":"run-2"'))
    text = said()
    assert isinstance(said.failure, LedgerError)
    assert "entry 2 has been changed" in str(said.failure)
    assert "Strategies that may run here" in text, "the policy is explained all the same"
    ledger.unlink()
    said()
    assert "is not in this ledger" in str(said.failure)


def test_how_many_cells_are_missing(root, said):
    assert "training data: no cells are missing in" in said()
    train = root / "data" / "train.csv"
    lines = train.read_text().splitlines()
    names = lines[0].split(",")
    lines[1] = ",".join(["", *lines[1].split(",")[1:]])
    lines[2] = ",".join(["", "", *lines[2].split(",")[2:]])
    train.write_text("\n".join(lines) + "\n")
    text = said()
    assert f"training data: 2 of {len(lines) - 1} rows have missing cells ({names[0]} 2, {names[1]} 1)" in text
    assert "test data: no cells are missing in" in text


def test_data_that_cannot_be_read_is_an_error(root, said):
    (root / "data" / "train.csv").unlink()
    said()
    assert isinstance(said.failure, DataError)


@pytest.mark.usefixtures("enrolled")
@pytest.mark.parametrize(
    ("clauses", "warning"),
    [
        ({"strategies": ["fedavg", "fedprx"]}, "nothing that is called 'fedprx' is installed here"),
        ({"workloads": ["vision"]}, "does not allow this site's own workload, tabular"),
        ({"federations": ["outbreak"]}, "does not allow the federation that this site is enrolled in, clinic"),
        ({"combinations": [{"federation": "outbreak"}]}, "does not allow the federation that this site is enrolled in"),
        ({"delta": 0.1}, "delta 0.1 is not below one over the number of training examples"),
        ({"minimum_test_examples": 10_000}, "no metrics leave"),
    ],
)
def test_warnings(root, said, clauses, warning):
    change(root, **clauses)
    assert f"! {warning}" in said().replace("! the policy ", "! ").replace("! the test data", "! test data") or (
        warning in said()
    )
    assert said.failure is None


def test_when_the_next_round_may_come(root, said):
    change(root, rounds_per_day=1)
    assert "at most 1 in 24 hours" in said()
    asker = Asker(root)
    asker.ask()
    asker.site.ledger.close()
    assert "a round would be refused now: asked too often" in said()


def test_what_a_run_would_cost_is_what_it_then_costs(root, said):
    text = said("epsilon=4", "rounds=4", "epochs=1", "batch_size=16", "cohort=3")
    assert "Such a run would be accepted" in text
    asker = Asker(root)
    for number in range(1, 5):
        assert not asker.ask(round=number).has_error()
    spent = asker.site.ledger.spent(1e-3)
    asker.site.ledger.close()
    assert f"epsilon {spent:.3f} would be spent on the data set in all, and {6 - spent:.3f} would be left" in text
    question = ("epsilon=5.5", "rounds=4", "epochs=1", "batch_size=16", "cohort=3")
    greedy = {"run": "greedy", "privacy": PrivacyRequest(epsilon=5.5, delta=1e-3, max_grad_norm=1)}
    refusal = said(*question)
    assert "Such a run would be refused: privacy budget" in refusal
    assert "the whole run, 4 round(s) from here" in refusal, "to its operator the site says why"
    asker = Asker(root)
    assert RefusalCode(asker.ask(identity="greedy", **greedy).error.code) is RefusalCode.BUDGET
    asker.site.ledger.close()
    change(root, allow_part_of_a_run=True)
    (most,) = re.findall(r"accepted for (\d) of its 4 rounds; then the budget is not enough", said(*question))
    asker = Asker(root)
    taken = [not asker.ask(round=number, identity=f"greedy-{number}", **greedy).has_error() for number in range(1, 5)]
    assert sum(taken) == int(most) > 0


def allow(root, *strategies):
    change(root, strategies=["fedavg", *strategies])


def test_content_that_was_charged_under_another_name_lets_no_run_in(root, said):
    asker = Asker(root)
    asker.ask()
    asker.site.ledger.close()
    rename(root, "ward-9")
    text = said("epsilon=1")
    assert "Such a run would be refused: the client does not start" in text
    assert "accepted" not in text


def test_a_combination_that_the_site_refuses_is_refused_when_asked_about(root, said):
    allow(root, "qfedavg", "scaffold", "fedper", "ditto")
    assert "would be refused: strategy 'qfedavg'" in said("epsilon=1", "strategy_name=qfedavg")
    assert "would be accepted" in said("epsilon=1", "strategy_name=scaffold"), "what a server would tell is made up"
    asker = Asker(root)
    for name in ("fedavg", "scaffold", "qfedavg", "ditto"):
        said_so = "would be accepted" in said("epsilon=1", f"strategy_name={name}", "cohort=3", "rounds=4")
        assert said_so == takes(asker, name), name


def takes(asker, name):
    """Whether the site takes part when a server asks for that strategy."""
    strategy = strategy_class(name)()
    model = {"fields": dict(strategy.client_fields()), "settings": strategy.model_dump(mode="json")}
    plan = asker.plan.model_copy(
        update={
            "run": name,
            "strategy": name,
            "strategy_fields": model["fields"],
            "strategy_settings": model["settings"],
            "privacy": PrivacyRequest(epsilon=1, delta=1e-3, max_grad_norm=1),
        }
    )
    zeros = {key: np.zeros_like(value) for key, value in asker.parameters.items()}
    told = dict.fromkeys(strategy.broadcast_kinds, zeros)
    return not asker.ask(content=question(plan, Outgoing(asker.parameters, broadcast=told))).has_error()


def test_an_unfinished_run_is_counted_when_another_is_asked_about(root, said):
    asker = Asker(root)
    asker.ask(privacy=PrivacyRequest(epsilon=5, delta=1e-3, max_grad_norm=1))
    asker.site.ledger.close()
    before = files(root)
    assert "run run-1 of federation clinic is agreed to: up to 3 more round(s), kept free of others until" in said()
    assert "beside 1 unfinished run" in said("epsilon=5", "rounds=4")
    assert "would be accepted" in said("epsilon=0.5", "rounds=4")
    assert files(root) == before


def test_a_round_too_many_a_day_is_told(root, said):
    change(root, rounds_per_day=1)
    asker = Asker(root)
    asker.ask()
    asker.site.ledger.close()
    assert "Such a run would be refused: asked too often" in said("epsilon=1")


def test_the_delta_that_a_server_asks_for_is_told_where_it_is_another(root, said):
    assert "asks for 1e-05." in said("epsilon=1")
    assert "asks for" not in said("epsilon=1", "delta=1e-5")
    change(root, delta=1e-6)
    assert "asks for 1e-05, which is refused here." in said("epsilon=1")


def test_defaults_do_not_refuse_each_other(root, said):
    """A policy of the three lines that have to be written, and a server that is told nothing."""
    site = yaml.safe_load((root / "site.yaml").read_text())
    site["policy"] = {"workloads": ["tabular"], "strategies": ["fedavg"], "epsilon": 8.0}
    (root / "site.yaml").write_text(yaml.safe_dump(site))
    conf = Path(client.__file__).parents[1] / "conf"
    asked = {name: yaml.safe_load((conf / f"{name}.yaml").read_text()) for name in CONFIGURED}
    policy = load_site_settings(root).policy
    for name, values in asked.items():
        assert float(values["delta"]) <= policy.delta, name
        assert float(values["epsilon"]) <= policy.epsilon, name
    privacy = PrivacyRequest(**asked["privacy/dp"])
    assert "would be accepted" in said(f"epsilon={privacy.epsilon}", "rounds=20")
    assert "would be accepted" in said(f"epsilon={privacy.epsilon}", f"delta={privacy.delta}", "rounds=20")
    asker = Asker(root)
    assert not asker.ask(rounds=20, privacy=privacy).has_error()


CONFIGURED = ("privacy/dp", "central/example", "central/site", "statistics")


def test_a_run_is_refused_as_it_would_be(root, said):
    assert "would be refused: epsilon 9 was asked for; this site allows at most 6 per data set" in said("epsilon=9")
    assert "would be refused: training without differential privacy" in said("rounds=3")
    assert "would be refused: strategy 'median'" in said("epsilon=1", "strategy_name=median")
    assert "would be refused: a round of 1 site(s)" in said("epsilon=1", "cohort=1")
    assert "steps here" in said("epsilon=1", "steps=7")
    assert "Such a run" not in said()
    said("epsilon=1", "epochs=null")
    assert "epochs and steps" in str(said.failure)
    said("epsilon=0")
    assert "epsilon" in str(said.failure)


def test_every_field_of_a_policy_is_in_its_sentences():
    """A clause that is changed changes what is said."""
    plain = {"workloads": ["tabular"], "strategies": ["fedavg"], "epsilon": 8.0}
    noised = {"metrics_epsilon": 0.5, "metrics_budget": {"epsilon": 2.0}, "metrics": ["accuracy", "loss", "f1"]}
    changes = {
        "workloads": ["vision"],
        "strategies": ["fedprox"],
        "federations": ["clinic"],
        "combinations": [{"federation": "clinic", "strategies": ["fedavg"]}],
        "epsilon": 7.0,
        "delta": 1e-6,
        "budgets": {"north": {"epsilon": 3.0}},
        "epsilon_per_run": 2.0,
        "allow_part_of_a_run": True,
        "agreement_days": 30.0,
        "trust_server_noise": True,
        "assumed_dishonest": 0.25,
        "allow_data_dependent_preprocessing": True,
        "require_secure_aggregation": True,
        "minimum_cohort": 5,
        "max_local_steps": 17,
        "max_update_mb": 3.0,
        "rounds_per_day": 4,
        "minimum_seconds_between_rounds": 90.0,
        "metrics": ["f1"],
        "allow_metrics_of_own_models": True,
        "minimum_test_examples": 33,
        "maximum_shared_test_rows": 0.25,
        "metrics_epsilon": 0.7,
        "metrics_budget": {"epsilon": 3.0},
        "metrics_loss_bound": 9.0,
        "statistics": {"epsilon": 0.5},
        "allow_training_without_privacy": True,
    }
    assert set(changes) == set(Policy.model_fields)
    for name, value in changes.items():
        base = plain | (noised if name.startswith("metrics_") else {})
        if name == "allow_training_without_privacy":
            base = plain | {"epsilon": None}
        other = base | {name: value}
        assert sentences(Policy(**base), "north") != sentences(Policy(**other), "north"), name


def test_as_a_process_it_connects_to_nobody(root, tmp_path):
    federation = tmp_path / "federation"
    with socket.create_server(("127.0.0.1", 0)) as server:
        provisioning.initialise(federation, "clinic", f"127.0.0.1:{server.getsockname()[1]}")
        request = provisioning.request_site(root, federation / "federation.json", root.name)
        provisioning.accept(root, provisioning.approve(federation, request))
        done = run_module("fedclaw.client", f"site={root}", "check", "epsilon=1")
        assert done.code == 0, done.errors
        assert "Such a run would be accepted" in done.output
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
