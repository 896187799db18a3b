"""A FedClaw site as a plain Flower ClientApp, asked by a plain Flower strategy."""

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from fedclaw.protocol.arrays import pack, unpack
from fedclaw.protocol.message_identity import number_of
from fedclaw.protocol.terms import RoundRules
from fedclaw.transport.flower.client import app
from fedclaw.transport.flower.strategy import FlowerStrategy
from fedclaw.transport.grpc.apps import ClientAppHandler
from fedclaw.transport.in_process import LocalGrid
from tests.samples import run_record
from tests.site.conftest import Asker


def record_of(asker):
    return run_record(
        schema_text=asker.site.workload.schema.to_json(),
        training=asker.plan.training,
        privacy=asker.plan.privacy,
        rules=RoundRules(minimum=1),
    )


@pytest.fixture
def alone(root):
    text = (root / "site.yaml").read_text()
    (root / "site.yaml").write_text(text.replace("minimum_cohort: 2", "minimum_cohort: 1"))
    asker = Asker(root)
    asker.site.ledger.close()
    return asker


def test_flowers_own_objects_train_and_pay(alone, root):
    config = {"site": str(root), "federation": "clinic"}
    handler = ClientAppHandler(app, number_of("north"), config, {})
    grid = LocalGrid({"north": handler}, 1)
    result = FlowerStrategy(record_of(alone)).start(grid, pack(alone.parameters), num_rounds=2)
    trained = unpack(result.arrays)
    assert not any(np.array_equal(trained[name], alone.parameters[name]) for name in trained)
    assert 0 < result.evaluate_metrics_clientapp[2]["accuracy"] <= 1
    again = Asker(root)
    assert again.site.ledger.rounds("run-1") == 2
    assert (root / "state" / "outbound.jsonl").read_text().count('"train"') == 2


def test_a_node_that_is_not_configured_says_so(alone):
    context = Context(run_id=1, node_id=99, node_config={}, state=RecordDict(), run_config={})
    with pytest.raises(Exception, match="site=PATH"):
        app(alone.message(), context)
