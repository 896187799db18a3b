"""How a site answers: it trains, evaluates, pays, logs; and it refuses, each time with a reason."""

import json
import re
import sqlite3

import numpy as np
import pytest
import torch
import yaml
from flwr.app import ConfigRecord, Error, RecordDict

from fedclaw.errors import LedgerError
from fedclaw.protocol.arrays import pack, unpack
from fedclaw.protocol.message_identity import envelope_of, rebuild
from fedclaw.protocol.receipt import Receipt
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.protocol.terms import Distillation, LocalTraining, ModelSpec, PrivacyRequest
from fedclaw.site.journal.outbound import OutboundLog
from tests.site.conftest import Asker


def receipt_of(reply):
    return Receipt.model_validate_json(reply.content["receipt"]["json"])


def outbound(root):
    path = root / "state" / "outbound.jsonl"
    return [json.loads(line)["entry"] for line in path.read_text().splitlines()]


def refused(reply, code):
    assert reply.has_error(), "the site took part"
    assert RefusalCode(reply.error.code) is code
    return reply.error.reason


def test_training_returns_a_weighted_delta_and_a_receipt(asker, site):
    reply = asker.ask()
    examples = len(site.data.train)
    assert reply.content["metrics"] == {"weight": examples, "examples": examples}
    total = unpack(reply.content["sum"])
    assert {name: array.shape for name, array in total.items()} == {
        name: array.shape for name, array in asker.parameters.items()
    }
    assert any(np.any(array) for array in total.values())
    receipt = receipt_of(reply)
    assert receipt.mechanism == "dp-sgd"
    assert receipt.sample_rate == pytest.approx(16 / examples)
    assert receipt.steps == -(-examples // 16)
    assert 0 < receipt.epsilon_run < 4
    assert receipt.epsilon_left == pytest.approx(6 - receipt.epsilon_lifetime)


def test_all_rounds_together_spend_what_was_asked_and_not_more(asker):
    spent = [receipt_of(asker.ask(round=number)).epsilon_run for number in range(1, 5)]
    assert spent == sorted(spent)
    assert 3.8 < spent[-1] <= 4


def test_uniform_weighting_counts_each_site_once_and_does_not_hide_its_number_of_examples(asker, site):
    reply = asker.ask(weighting="uniform")
    assert reply.content["metrics"] == {"weight": 1, "examples": len(site.data.train)}
    assert 16 / receipt_of(reply).sample_rate == pytest.approx(len(site.data.train))


def test_two_answers_to_the_same_question_differ_by_their_noise(asker):
    first, second = (unpack(asker.ask().content["sum"]) for _ in range(2))
    assert not any(np.array_equal(first[name], second[name]) for name in first)


def test_an_open_reservation_is_used_again_a_settled_one_is_not(asker, site):
    asker.ask(identity="same", release=False)
    once = site.ledger.spent(1e-3)
    asker.ask(identity="same")
    assert site.ledger.spent(1e-3) == once
    asker.ask(identity="same")
    assert site.ledger.spent(1e-3) > once
    assert site.ledger.rounds("run-1") == 2


def test_what_leaves_is_logged_with_its_receipt(asker, root):
    asker.ask()
    asker.ask("evaluate")
    asker.ask(strategy="fedyogi-of-another-kind")
    entries = outbound(root)
    assert [entry["kind"] for entry in entries] == ["train", "evaluate", "train"]
    assert entries[0]["receipt"]["mechanism"] == "dp-sgd"
    assert entries[1]["receipt"] is None
    assert {entry["run"] for entry in entries} == {"run-1"}
    OutboundLog(root / "state" / "outbound.jsonl").verify()


def test_evaluation_sends_only_permitted_metrics(asker, site):
    record = asker.ask("evaluate", metrics=("loss", "accuracy")).content["metrics"]
    assert set(record) == {"weight", "examples", "accuracy"}
    assert 0 <= record["accuracy"] <= record["weight"] == len(site.data.test)
    assert site.ledger.spent(1e-3) == 0


def test_refusals(asker):
    say = refused
    assert "'outbreak'" in say(asker.ask(federation="outbreak"), RefusalCode.FEDERATION)
    assert "'vision'" in say(asker.ask(workload="vision"), RefusalCode.WORKLOAD)
    assert "schema" in say(asker.ask(schema_digest="0"), RefusalCode.SCHEMA)
    assert "'median'" in say(asker.ask(strategy="median"), RefusalCode.STRATEGY)
    assert "without differential privacy" in say(asker.ask(privacy=None), RefusalCode.PRIVACY_REQUIRED)
    assert "at least 2" in say(asker.ask(cohort=1), RefusalCode.COHORT)
    assert "at least 2" in say(asker.ask("evaluate", cohort=1), RefusalCode.COHORT)
    assert "loss" in say(asker.ask("evaluate", metrics=("loss",)), RefusalCode.METRICS)
    assert "version 9" in say(asker.ask(version=9), RefusalCode.MALFORMED)
    greedy = PrivacyRequest(epsilon=20, delta=1e-3, max_grad_norm=1)
    assert "at most 6" in say(asker.ask(privacy=greedy), RefusalCode.EPSILON)
    assert asker.site.ledger.spent(1e-3) == 0, "nothing was charged for what was refused"


def test_a_runs_own_limit_bounds_all_that_it_spends(asker, site):
    """A server that claims `rounds=1` again and again under one name is stopped by epsilon_per_run."""
    site.policy = site.policy.model_copy(update={"epsilon_per_run": 4.0})
    replies = [asker.ask(rounds=1, privacy=PrivacyRequest(epsilon=3, delta=1e-3, max_grad_norm=1)) for _ in range(4)]
    assert not replies[0].has_error()
    refused(replies[-1], RefusalCode.BUDGET)
    assert site.ledger.spent(1e-3, run="run-1") <= 4


def test_preprocessing_that_epsilon_does_not_cover_needs_the_operators_word(root):
    schema = yaml.safe_load((root / "schema.yaml").read_text())
    columns = [{"name": column["name"], "kind": "numeric"} for column in schema["columns"]]
    (root / "schema.yaml").write_text(yaml.safe_dump(schema | {"columns": columns, "standardise": "site"}))
    asker = Asker(root)
    assert "epsilon does not cover" in refused(asker.ask(), RefusalCode.PRIVACY_REQUIRED)
    constants = root / "state" / "preprocessing.json"
    assert constants.stat().st_mode & 0o777 == 0o600
    assert abs(asker.site.data.train.inputs.mean()) < 1e-3
    asker.site.policy = asker.site.policy.model_copy(update={"allow_data_dependent_preprocessing": True})
    assert not asker.ask().has_error()


def test_strategy_fields_are_looked_at_before_anything_is_paid(asker):
    assert "mu" in refused(asker.ask(strategy="fedprox"), RefusalCode.STRATEGY)
    assert "mu" in refused(asker.ask(strategy="fedprox", strategy_fields={"mu": -1.0}), RefusalCode.STRATEGY)
    assert asker.site.ledger.spent(1e-3) == 0
    assert not asker.ask(strategy="fedprox", strategy_fields={"mu": 0.1}).has_error()


def test_names_from_the_server_are_never_import_paths(asker):
    spec = ModelSpec.model_construct(name="os.system", args={})
    assert refused(asker.ask(model=spec), RefusalCode.MALFORMED)
    assert refused(asker.ask(model=ModelSpec(name="resnet")), RefusalCode.MODEL)
    assert refused(asker.ask(strategy="builtins:eval"), RefusalCode.STRATEGY)


def test_parameters_of_another_model_are_refused(asker):
    asker.parameters = {"w": np.zeros(3, np.float32)}
    assert "logistic" in refused(asker.ask(), RefusalCode.MODEL)


@pytest.mark.parametrize("text", ["", "{}", "[1]", "no json", '{"version": "x"}'])
def test_a_plan_that_cannot_be_read_is_refused(asker, text):
    content = RecordDict({"arrays": pack(asker.parameters), "plan": ConfigRecord({"json": text})})
    refused(asker.ask(content=content), RefusalCode.MALFORMED)


def test_a_message_without_a_plan_or_arrays_is_refused(asker):
    refused(asker.ask(content=RecordDict()), RefusalCode.MALFORMED)
    plan = ConfigRecord({"json": asker.plan.model_dump_json()})
    refused(asker.ask(content=RecordDict({"plan": plan})), RefusalCode.MALFORMED)


def test_a_message_of_another_type_is_refused(asker):
    assert "query" in refused(asker.ask("query"), RefusalCode.MALFORMED)


def test_the_budget_ends(asker, site, caplog):
    """Runs of epsilon 3 until the lifetime budget of 6 is gone; the ledger never exceeds it."""
    plan = {"rounds": 1, "privacy": PrivacyRequest(epsilon=3, delta=1e-3, max_grad_norm=1)}
    replies = [asker.ask(run=f"run-{number}", **plan) for number in range(6)]
    assert not replies[0].has_error()
    reason = refused(replies[-1], RefusalCode.BUDGET)
    assert "privacy budget" in reason
    assert not any(character.isdigit() for character in reason), "figures tell how many examples there are"
    assert re.search(r"steps at sample rate", caplog.text), "the operator finds them in the log"
    assert 3 < site.ledger.spent(1e-3) <= 6


def test_a_failure_says_nothing_of_its_cause_on_the_wire(asker, site, monkeypatch):
    def broken(*_):
        raise RuntimeError("patient 4711 is the cause")

    monkeypatch.setattr(type(site.workload), "loss", broken)
    reason = refused(asker.ask(), RefusalCode.FAILED)
    assert "4711" not in reason


def test_a_tampered_ledger_blocks_training(asker, site, root):
    asker.ask()
    site.ledger.close()
    with sqlite3.connect(root / "state" / "ledger.sqlite") as connection:
        connection.execute("DROP TRIGGER no_update")
        connection.execute("UPDATE entries SET body = replace(body, 'run-1', 'run-2') WHERE sequence = 2")
    with pytest.raises(LedgerError, match="entry 2"):
        Asker(root)


def opinions(site, spec, arrays):
    """Class probabilities on the site's training inputs."""
    model = site.workload.build(spec)
    model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})
    with torch.no_grad():
        return model(torch.from_numpy(site.data.train.inputs)).softmax(1).numpy()


def test_distillation_trains_towards_the_teacher(asker, site):
    """Without privacy and with all weight on the teacher, the student comes to the teacher's opinions."""
    site.policy = site.policy.model_copy(update={"epsilon": None, "allow_training_without_privacy": True})
    plan = asker.plan.model_copy(
        update={
            "privacy": None,
            "distillation": Distillation(teacher=asker.model, temperature=2.0, weight=1.0),
            "training": LocalTraining(epochs=30, batch_size=16, learning_rate=0.5),
        }
    )
    generator = np.random.default_rng(0)
    teacher = {name: generator.normal(size=a.shape).astype(np.float32) for name, a in asker.parameters.items()}
    record = ConfigRecord({"json": plan.model_dump_json()})
    content = RecordDict({"arrays": pack(asker.parameters), "teacher": pack(teacher), "plan": record})
    reply = asker.ask(content=content)
    delta, weight = unpack(reply.content["sum"]), reply.content["metrics"]["weight"]
    student = {name: array + delta[name] / weight for name, array in asker.parameters.items()}
    wanted = opinions(site, asker.model, teacher)
    before = np.abs(opinions(site, asker.model, asker.parameters) - wanted).mean()
    assert np.abs(opinions(site, asker.model, student) - wanted).mean() < before / 4


def test_a_second_round_of_the_same_model_is_warm_and_starts_from_what_was_sent(asker, site):
    """The site keeps the module, not its weights: the same question without noise gives the same answer."""
    site.policy = site.policy.model_copy(update={"epsilon": None, "allow_training_without_privacy": True})
    full = LocalTraining(steps=3, batch_size=len(site.data.train), learning_rate=0.1)
    first, second = (unpack(asker.ask(privacy=None, training=full).content["sum"]) for _ in range(2))
    for name in first:
        assert np.allclose(first[name], second[name], rtol=1e-3, atol=1e-4)


def test_an_unreachable_epsilon_is_refused_without_figures_of_the_site(asker):
    reason = refused(asker.ask(privacy=PrivacyRequest(epsilon=1e-9, delta=1e-9, max_grad_norm=1)), RefusalCode.EPSILON)
    assert "sample rate" not in reason
    assert asker.site.ledger.spent(1e-3) == 0


def test_a_plan_that_would_keep_the_site_busy_for_ever_is_refused(asker, monkeypatch):
    """One small message must not hang a site in the calibration of its noise."""
    monkeypatch.setattr(
        "fedclaw.privacy.mechanisms.local_noise.calibrate", lambda *_: pytest.fail("the noise was calibrated")
    )
    forever = LocalTraining(steps=9_000, batch_size=16, learning_rate=0.1)
    refused(asker.ask(rounds=10**8), RefusalCode.MALFORMED)
    refused(asker.ask(rounds=100_000, training=forever), RefusalCode.LOCAL_STEPS)
    refused(asker.ask(training=forever.model_copy(update={"steps": 10_001})), RefusalCode.LOCAL_STEPS)


def test_what_a_run_spent_is_counted_by_federation(asker, site):
    """Two federations may give their runs the same name."""
    alone = receipt_of(asker.ask())
    site.federation = "outbreak"
    other = receipt_of(asker.ask(federation="outbreak"))
    assert (alone.rounds, other.rounds) == (1, 1)
    assert other.epsilon_run == pytest.approx(alone.epsilon_run)
    assert other.epsilon_lifetime > alone.epsilon_lifetime


def without_content(message):
    """What a restarted client hands to `release`: the question is gone, its envelope is not."""
    return rebuild(envelope_of(message), Error(0))


def test_after_a_restart_the_log_still_knows_the_run(asker, site, root):
    for kind, refused_too in (("train", False), ("evaluate", False), ("train", True)):
        message = asker.message(kind, **({"workload": "vision"} if refused_too else {}))
        site.release(without_content(message), site.answer(message), 10, "00" * 32)
    assert [entry["run"] for entry in outbound(root)] == ["run-1", "run-1", "number 1"]


def test_a_question_without_content_is_refused(asker, site):
    refused(site.answer(without_content(asker.message())), RefusalCode.MALFORMED)


def changed_by_one_byte(root):
    path = root / "data" / "train.csv"
    path.write_bytes(path.read_bytes() + b"\n")


def reserved(site):
    return [entry.body for entry in site.ledger.entries() if entry.body["kind"] == "reserve"]


def test_a_changed_byte_gives_no_new_budget(root, caplog):
    first = Asker(root)
    first.ask()
    spent = first.site.ledger.spent(1e-3)
    first.site.ledger.close()
    changed_by_one_byte(root)
    second = Asker(root)
    assert second.site.ledger.spent(1e-3) == spent > 0
    assert "content of data set hospital-north has changed" in caplog.text
    second.ask()
    charges = reserved(second.site)
    assert {charge["data_set"] for charge in charges} == {"hospital-north"}
    assert [charge["fingerprint"] for charge in charges] == [
        first.site.data.fingerprint,
        second.site.data.fingerprint,
    ]
    assert charges[0]["fingerprint"] != charges[1]["fingerprint"]


def test_a_reply_of_before_the_change_settles_after_it(root):
    first = Asker(root)
    message = first.message()
    reply = first.site.answer(message)
    first.site.ledger.close()
    changed_by_one_byte(root)
    second = Asker(root)
    second.site.release(without_content(message), reply, 10, "00" * 32)
    assert [entry.body["kind"] for entry in second.site.ledger.entries()] == ["open", "reserve", "settle"]
    assert outbound(root)[0]["receipt"]["rounds"] == 1


def renamed(root, name):
    settings = yaml.safe_load((root / "site.yaml").read_text())
    settings["data"]["name"] = name
    (root / "site.yaml").write_text(yaml.safe_dump(settings))


def test_the_operator_names_the_data_set(root):
    renamed(root, "ward-4.2025")
    first = Asker(root)
    first.ask()
    assert reserved(first.site)[0]["data_set"] == "ward-4.2025"
    first.site.ledger.close()
    renamed(root, "ward-5")
    with pytest.raises(LedgerError, match=r"charged as the data set 'ward-4\.2025'"):
        Asker(root)
    changed_by_one_byte(root)
    assert Asker(root).site.ledger.spent(1e-3) == 0, "other data, by the operator's word"


WIDE = ModelSpec(name="mlp", args={"hidden": [4096] * 10})
"""160 million parameters: 640 MB as float32."""


@pytest.fixture
def allocated(site, monkeypatch):
    """Parameters of each model that the site builds for real."""
    sizes = []
    build = type(site.workload).build

    def watched(workload, spec):
        model = build(workload, spec)
        if not any(parameter.is_meta for parameter in model.parameters()):
            sizes.append(sum(parameter.numel() for parameter in model.parameters()))
        return model

    monkeypatch.setattr(type(site.workload), "build", watched)
    return sizes


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_model_is_not_built_before_its_parameters_have_arrived(asker, allocated, kind):
    """A few bytes that name a wide model must not cost the site its memory."""
    assert "'mlp'" in refused(asker.ask(kind, model=WIDE), RefusalCode.MODEL)
    assert allocated == []
    assert not asker.ask(kind).has_error()
    assert len(allocated) == 1


def test_a_teacher_is_not_built_before_its_parameters_have_arrived(asker, site, allocated):
    plan = asker.plan.model_copy(update={"distillation": Distillation(teacher=WIDE)})
    record = ConfigRecord({"json": plan.model_dump_json()})
    parameters = pack(asker.parameters)
    content = RecordDict({"arrays": parameters, "teacher": parameters, "plan": record})
    refused(asker.ask(content=content), RefusalCode.MODEL)
    assert max(allocated) == sum(array.size for array in asker.parameters.values())
    assert site.ledger.spent(1e-3) == 0


def test_evaluation_and_teacher_keep_to_the_size_limit(asker, site):
    spec = ModelSpec(name="mlp", args={"hidden": [64]})
    big = {name: p.detach().numpy().copy() for name, p in site.workload.build(spec).named_parameters()}
    site.policy = site.policy.model_copy(update={"max_update_mb": 0.001})
    plan = asker.plan.model_copy(update={"distillation": Distillation(teacher=spec)})
    record = ConfigRecord({"json": plan.model_dump_json()})
    content = RecordDict({"arrays": pack(asker.parameters), "teacher": pack(big), "plan": record})
    assert "at most 0.001 MB" in refused(asker.ask(content=content), RefusalCode.UPDATE_SIZE)
    assert not asker.ask("evaluate").has_error()
    asker.parameters = big
    refused(asker.ask("evaluate", model=spec), RefusalCode.UPDATE_SIZE)
    refused(asker.ask("train", model=spec), RefusalCode.UPDATE_SIZE)


def test_only_the_models_used_last_stay_warm(asker, site, allocated):
    """A server that asks for one model after another must not fill the site's memory."""
    cold = []
    for width in (1, 2, 3, 1, 4, 1, 2):
        spec = ModelSpec(name="mlp", args={"hidden": [width]})
        network = site.workload.build(spec)
        asker.parameters = {name: p.detach().numpy().copy() for name, p in network.named_parameters()}
        allocated.clear()
        assert not asker.ask("evaluate", model=spec).has_error()
        cold.append(bool(allocated))
    assert cold == [True, True, True, False, True, False, True]
    assert len(site._models) == 3


def test_the_operator_may_choose_how_a_private_step_is_worked_out(root, caplog):
    path = root / "site.yaml"
    path.write_text(path.read_text() + "speed: {mode: opacus, chunk_size: 4}\n")
    asker = Asker(root)
    caplog.set_level("DEBUG", logger="fedclaw.privacy")
    assert not asker.ask().has_error()
    assert asker.site.speed.mode == "opacus"
    assert "bookkeeping" not in caplog.text


def test_a_refusal_is_logged_once_in_a_run_and_answered_each_time(asker, caplog):
    for number in (1, 2, 3):
        assert "a round of 1 site(s)" in refused(asker.ask(round=number, cohort=1), RefusalCode.COHORT)
    refused(asker.ask(round=3, cohort=1, run="another"), RefusalCode.COHORT)
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert sum("a round of 1 site(s)" in message for message in warned) == 2
