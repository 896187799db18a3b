"""A site standardises by the constants that a plan brings: once each, and only such as the schema allows."""

import json
from datetime import UTC, datetime

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedclaw.errors import DataError
from fedclaw.protocol.arrays import pack
from fedclaw.protocol.message_identity import assign_message_id, assume_server_identity
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.protocol.terms import LocalTraining, ModelSpec, Plan, PrivacyRequest
from fedclaw.site import site as site_data
from fedclaw.site.directory import open_service
from fedclaw.site.policy.policy import DataSetBudget
from fedclaw.site.settings import load_site_settings
from fedclaw.site.site import prepare
from tests.made_tables import make_sites

MOMENTS = {"dose": (5000.0, 3000.0**2), "age": (50.0, 144.0)}


@pytest.fixture
def root(tmp_path):
    return make_sites(tmp_path, count=1).directories[0]


@pytest.fixture
def site(root):
    assume_server_identity(1)
    return open_service(root, load_site_settings(root), "clinic")


def asked(site, preprocessing, kind="train", **changes):
    model = ModelSpec(name="logistic")
    fields = {
        "federation": "clinic",
        "run": "run-1",
        "round": 1,
        "rounds": 4,
        "cohort": 3,
        "workload": "tabular",
        "schema_digest": site.schema_digest,
        "model": model,
        "strategy": "fedavg",
        "training": LocalTraining(epochs=1, batch_size=16, learning_rate=0.1),
        "privacy": PrivacyRequest(epsilon=4, delta=1e-3, max_grad_norm=1),
        "metrics": ("accuracy",),
        "preprocessing": preprocessing,
    }
    plan = Plan(**{**fields, **changes})
    network = site.workload.build(model)
    parameters = {name: p.detach().numpy().copy() for name, p in network.named_parameters()}
    content = RecordDict({"arrays": pack(parameters), "plan": ConfigRecord({"json": plan.model_dump_json()})})
    message = Message(content, dst_node_id=7, message_type=kind, group_id="1")
    assign_message_id(message)
    return site.answer(message)


def test_tables_and_tensors_are_those_of_the_newest_constants(site):
    first = site.workload.schema.shared_constants(MOMENTS)
    raw = site.data.train.inputs[:, 0] * 10000 + 5000
    assert not asked(site, first).has_error()
    assert site.data.train.inputs[:, 0] == pytest.approx((raw - 5000) / 3000, abs=1e-3)
    second = site.workload.schema.shared_constants(MOMENTS | {"dose": (6000.0, 100.0**2)})
    assert not asked(site, second, "evaluate").has_error()
    assert site.on_device("train")[0][:, 0].numpy() == pytest.approx((raw - 6000) / 100, abs=2e-2)
    assert site.data.test.inputs[:, 0].std() > 10


def test_the_same_constants_are_read_by_once(site, monkeypatch):
    constants = site.workload.schema.shared_constants(MOMENTS)
    prepare(site, constants)
    table = site.data.train.inputs
    monkeypatch.setattr(site_data, "load_data", lambda *_: pytest.fail("the files were read again"))
    prepare(site, constants)
    assert site.data.train.inputs is table


def test_missing_cells_become_the_center_and_epsilon_covers_the_constants(site):
    constants = site.workload.schema.shared_constants(MOMENTS)
    assert not asked(site, constants).has_error()
    assert not site.policy.allow_data_dependent_preprocessing
    assert np.count_nonzero(site.data.train.inputs[:, 1] == 0) > 5


def test_refusals(site):
    def refused(preprocessing, code=RefusalCode.SCHEMA):
        reply = asked(site, preprocessing)
        assert RefusalCode(reply.error.code) is code
        return reply.error.reason

    assert "brings no constants" in refused(None)
    assert "the plan's preprocessing: not YAML" in refused("{")
    wild = json.loads(site.workload.schema.shared_constants(MOMENTS))
    wild["columns"]["dose"]["deviation"] = 1e-200
    assert "'dose' leave its range" in refused(json.dumps(wild))
    assert site.ledger.spent(1e-3) == 0


def test_constants_for_a_schema_that_takes_none_are_refused(tmp_path):
    (root,) = make_sites(tmp_path, count=1, standardise="schema").directories
    assume_server_identity(1)
    site = open_service(root, load_site_settings(root), "clinic")
    reply = asked(site, '{"schema_digest": "0", "columns": {}}')
    assert RefusalCode(reply.error.code) is RefusalCode.SCHEMA


@pytest.mark.parametrize("standardise", ["schema", "site"])
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_server_cannot_ask_the_data_by_constants_of_its_own(tmp_path, standardise, kind):
    """Whether the data can be read again with them would tell, at no cost, how large its numbers are."""
    (root,) = make_sites(
        tmp_path, count=1, standardise=standardise, allow_data_dependent_preprocessing=True
    ).directories
    assume_server_identity(1)
    site = open_service(root, load_site_settings(root), "clinic")
    before = site.data
    digest = site.workload.schema._digest()
    largest = float(np.nanmax([float(line.split(",")[0]) for line in (root / "train.csv").read_text().split()[1:]]))
    for center in (largest, largest + 1.0):
        columns = {"dose": {"mean": center, "deviation": 1e-300}, "age": {"mean": 0.0, "deviation": 1.0}}
        reply = asked(site, json.dumps({"schema_digest": digest, "columns": columns}), kind)
        assert RefusalCode(reply.error.code) is RefusalCode.SCHEMA
        assert "takes none" in reply.error.reason
    assert site.data is before


@pytest.mark.parametrize("name", ["train.csv", "test.csv"])
def test_files_that_have_changed_are_not_read_again(site, root, name):
    (root / name).write_text((root / name).read_text() + "5000,50,1,a,yes\n")
    with pytest.raises(DataError, match=rf"{name} has changed since the client read it; start the client again"):
        prepare(site, site.workload.schema.shared_constants(MOMENTS))
    assert site.preprocessing is None


REFUSED = {
    "strategy": {"strategy": "fedbest"},
    "epsilon": {"privacy": PrivacyRequest(epsilon=500, delta=1e-3, max_grad_norm=1)},
    "no privacy": {"privacy": None},
    "cohort": {"cohort": 1},
    "model": {"model": ModelSpec(name="mlp", args={"hidden": [3]})},
    "unknown kind": {"kind": "query.everything"},
    "metrics": {"kind": "evaluate", "metrics": ("recall",)},
}


def with_policy(site, **changes):
    site.policy = site.policy.model_copy(update=changes)
    return site


@pytest.mark.parametrize("why", [*REFUSED, "budget", "frequency", "metrics' budget", "metrics' frequency"])
def test_no_constants_make_a_site_read_its_data_for_a_question_that_it_refuses(site, monkeypatch, why):
    """All data is read again for new constants, which any question may bring: what can be refused is refused first."""
    constants = [site.workload.schema.shared_constants(MOMENTS | {"age": (50.0, 100.0 + n)}) for n in range(3)]
    with_policy(site, metrics=("accuracy",), minimum_cohort=2)
    changes = dict(REFUSED.get(why, {}))
    if why == "budget":
        with_policy(site, epsilon=0.5)
    if why == "metrics' budget":
        budget = DataSetBudget(epsilon=0.01, delta=1e-6)
        with_policy(site, metrics_epsilon=1.0, metrics_budget=budget)
        site.test_ledger = site.ledger
        changes["kind"] = "evaluate"
    if "frequency" in why:
        changes["kind"] = "evaluate" if "metrics" in why else "train"
        assert not asked(site, constants[0], **changes).has_error()
        with_policy(site, minimum_seconds_between_rounds=3600.0)
        site.outbound = Evaluated()
    monkeypatch.setattr(site_data, "load_data", lambda *_: pytest.fail("the files were read"))
    for text in constants[1:]:
        reply = asked(site, text, **changes)
        assert reply.has_error()
        assert reply.error.code != RefusalCode.FAILED, "it was refused, and did not fail"


class Evaluated:
    """An outbound log that has one evaluation, of just now."""

    def evaluation_times(self, last):
        return [datetime.now(UTC).isoformat(timespec="seconds")]


def test_the_question_that_brought_the_constants_is_answered_with_them(site):
    """After the checks: the first answer is by the new tables already."""
    constants = site.workload.schema.shared_constants(MOMENTS | {"dose": (6000.0, 100.0**2)})
    assert not asked(site, constants, "evaluate").has_error()
    assert site.preprocessing == constants
