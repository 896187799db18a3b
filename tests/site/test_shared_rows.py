"""Test data that is training data: found by its rows, refused or charged, and told by check."""

import numpy as np
import pytest
import yaml

from fedclaw.learning.workload import Table
from fedclaw.protocol.receipt import Receipt
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.protocol.terms import PrivacyRequest
from fedclaw.site.directory import open_service
from fedclaw.site.journal.reconciliation import open_journal
from fedclaw.site.policy.policy import Policy
from fedclaw.site.preflight.check import examine
from fedclaw.site.settings import load_site_settings
from fedclaw.site.shared_rows import are_held_out, note_on_shared_rows, shared_rows
from tests.site.conftest import Asker

NOISED = {"metrics": ["accuracy"], "metrics_epsilon": 0.5, "metrics_budget": {"epsilon": 3.0, "delta": 1e-3}}


def table(inputs, targets=None):
    values = np.asarray(inputs, np.float32)
    return Table(values, np.zeros(len(values), np.int64) if targets is None else np.asarray(targets, np.int64))


def change(root, data=None, **clauses):
    path = root / "site.yaml"
    site = yaml.safe_load(path.read_text())
    site["policy"].update(clauses)
    site["data"].update(data or {})
    path.write_text(yaml.safe_dump(site))


def lines(path):
    return path.read_text().splitlines(keepends=True)


def same_file(root):
    change(root, {"test": load_site_settings(root).data.train.relative_to(root).as_posix()})


def same_content(root):
    data = load_site_settings(root).data
    data.test.write_bytes(data.train.read_bytes())


def same_rows(root):
    """In another order, with one row of its own: another file, other bytes."""
    data = load_site_settings(root).data
    title, *rows = lines(data.train)
    data.test.write_text("".join([title, *rows[::-1], lines(data.test)[1]]))


def one_row(root):
    data = load_site_settings(root).data
    with data.test.open("a") as file:
        file.write(lines(data.train)[3])


KINDS = (same_file, same_content, same_rows, one_row)


@pytest.mark.parametrize("share", KINDS)
def test_exact_metrics_of_training_rows_do_not_leave(root, share, caplog):
    assert not Asker(root).ask("evaluate").has_error()
    share(root)
    asker = Asker(root)
    reply = asker.ask("evaluate", identity="shared")
    assert reply.has_error(), "exact metrics of training examples left"
    assert RefusalCode(reply.error.code) is RefusalCode.METRICS
    assert not any(letter.isdigit() for letter in reply.error.reason), "a figure of the data"
    assert "test rows are training rows" in caplog.text
    assert any("no metrics leave" in warning for warning in examine(root, asker.settings).findings.warnings)
    assert not asker.ask().has_error(), "it trains all the same"


def test_held_out_data_is_told_nothing_about(root):
    findings = examine(root, load_site_settings(root)).findings
    assert not any("training rows" in warning for warning in findings.warnings)


def test_metrics_with_noise_are_charged_to_the_training_data(root):
    change(root, **NOISED)
    one_row(root)
    asker = Asker(root)
    reply = asker.ask("evaluate")
    receipt = Receipt.model_validate_json(reply.content["receipt"]["json"])
    assert receipt.mechanism == "metrics"
    assert 0 < asker.site.ledger.spent(1e-3) == receipt.epsilon_lifetime
    assert receipt.epsilon_left == pytest.approx(6 - receipt.epsilon_lifetime)
    spending = open_journal(root).spending()
    assert spending.data_set("hospital-north").open == 0, "what left is settled"
    assert [item.charges for item in spending.data_sets] == [1]
    assert any("charged to the training" in warning for warning in examine(root, asker.settings).findings.warnings)


def test_training_and_its_evaluations_are_agreed_to_beside_each_other(root):
    """Both on one budget, by turns: neither takes the place of the other."""
    change(root, **NOISED)
    one_row(root)
    asker = Asker(root)
    privacy = PrivacyRequest(epsilon=3, delta=1e-3, max_grad_norm=1)
    for number in (1, 2):
        assert not asker.ask(round=number, privacy=privacy).has_error()
        assert not asker.ask("evaluate", round=number).has_error()
    agreements = asker.site.ledger.index().agreements
    assert sorted(key[3] for key in agreements) == ["", "metrics"]
    assert {agreement.charges for agreement in agreements.values()} == {2}


def test_the_operator_may_say_that_rows_repeat(root):
    one_row(root)
    change(root, maximum_shared_test_rows=0.05)
    asker = Asker(root)
    assert not asker.ask("evaluate").has_error()
    assert any("which the policy allows" in warning for warning in examine(root, asker.settings).findings.warnings)
    same_rows(root)
    assert Asker(root).ask("evaluate", identity="more").has_error()


def test_where_nothing_is_protected_metrics_leave(root):
    same_content(root)
    change(root, epsilon=None, allow_training_without_privacy=True)
    assert not Asker(root).ask("evaluate").has_error()


def test_rows_are_compared_by_value_and_label():
    train = table([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]], [0, 1, 0])
    assert shared_rows(train, None) == 0
    assert shared_rows(train, table([[0.0, 1.0], [0.0, 1.0], [9.0, 9.0]])) == 2
    assert shared_rows(train, table([[-0.0, 1.0]])) == 1
    assert shared_rows(train, table([[2.0, 3.0]], [0])) == 0, "another label"
    assert shared_rows(train, table([[1.0, 0.0], [0.0, np.nextafter(np.float32(1), np.float32(2))]])) == 0
    assert shared_rows(train, table(np.zeros((0, 2)))) == 0


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 200, 200)])
def test_images_are_rows_too(shape):
    source = np.random.default_rng(1)
    train = source.random((200, *shape), np.float32)
    test = source.random((50, *shape), np.float32)
    test[[3, 4, 40]] = train[[7, 7, 199]]
    almost = test[3].copy()
    almost.reshape(-1)[-1] += 0.5
    test[5] = almost
    assert shared_rows(table(train), table(test)) == 3


def test_many_rows_are_digested_in_blocks(monkeypatch):
    monkeypatch.setattr("fedclaw.site.shared_rows._BLOCK", 64)
    train = np.arange(3000, dtype=np.float32).reshape(1000, 3)
    assert shared_rows(table(train), table(train[::7])) == len(train[::7])
    assert shared_rows(table(train), table(train + np.float32(0.5))) == 0


def test_what_counts_as_held_out():
    policy = Policy(workloads=("tabular",), strategies=("fedavg",), epsilon=1.0)
    assert are_held_out(policy, 0, 10)
    assert not are_held_out(policy, 1, 10)
    assert note_on_shared_rows(policy, 0, 10) is None
    some = policy.model_copy(update={"maximum_shared_test_rows": 0.1})
    assert are_held_out(some, 1, 10)
    assert not are_held_out(some, 2, 10)


def test_metrics_with_noise_are_of_rows_by_themselves(root):
    """In a batch, how one row is rounded can depend on the others: one example would count for many."""
    change(root, **NOISED)
    asker = Asker(root)
    sizes = set()
    model = asker.site.model(asker.model, asker.parameters)
    model.register_forward_hook(lambda _model, inputs, _outputs: sizes.add(len(inputs[0])))
    assert not asker.ask("evaluate").has_error()
    assert sizes == {1}


def test_a_site_in_memory_settles_what_its_training_data_was_charged(root):
    """There the two data sets have a ledger each."""
    change(root, **NOISED)
    one_row(root)
    asker = Asker(root)
    asker.site = open_service(root, asker.settings, "clinic", durable=False)
    assert not asker.ask("evaluate").has_error()
    ledger = asker.site.ledger
    assert ledger.spent(1e-3) > 0
    assert [entry.body["kind"] for entry in ledger.entries()] == ["open", "reserve", "settle"]
