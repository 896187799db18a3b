"""A site on real data, and questions to ask it."""

from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from experiments.datasets import DatasetSettings, SitePolicy, write_sites
from fedclaw.learning.tasks.classification import METRICS
from fedclaw.protocol.arrays import pack
from fedclaw.protocol.message_identity import assign_message_id, assume_server_identity
from fedclaw.protocol.terms import LocalTraining, ModelSpec, Plan, PrivacyRequest
from fedclaw.site.directory import open_service
from fedclaw.site.service import SiteService
from fedclaw.site.settings import load_site_settings


class Asker:
    """Asks one site; `plan` is what an honest server would send, `ask` sends a changed one."""

    def __init__(self, root: Path) -> None:
        assume_server_identity(1)
        self.settings = load_site_settings(root)
        self.site = open_service(root, self.settings, "clinic")
        self.model = ModelSpec(name="logistic")
        # A server that asks again after a restart of the site asks the same: with these very parameters.
        torch.manual_seed(0)
        network = self.site.workload.build(self.model)
        self.parameters = {name: p.detach().numpy().copy() for name, p in network.named_parameters()}
        self.plan = Plan(
            federation="clinic",
            run="run-1",
            round=1,
            rounds=4,
            cohort=3,
            workload="tabular",
            schema_digest=self.site.schema_digest,
            model=self.model,
            strategy="fedavg",
            training=LocalTraining(epochs=1, batch_size=16, learning_rate=0.1),
            privacy=PrivacyRequest(epsilon=4, delta=1e-3, max_grad_norm=1),
            metrics=METRICS,
        )
        self._count = 0

    def message(self, kind="train", *, identity=None, content=None, **changes):
        plan = self.plan.model_copy(update=changes)
        if content is None:
            record = ConfigRecord({"json": plan.model_dump_json()})
            content = RecordDict({"arrays": pack(self.parameters), "plan": record})
        message = Message(content, dst_node_id=7, message_type=kind, group_id=str(plan.round))
        self._count += 1
        assign_message_id(message, identity or f"message-{self._count}")
        return message

    def ask(self, kind="train", *, release=True, **changes):
        message = self.message(kind, **changes)
        reply = self.site.answer(message)
        if release:
            self.site.release(message, reply, 10, "00" * 32)
        return reply


@pytest.fixture
def root(tmp_path) -> Path:
    (directory,) = write_sites(
        tmp_path,
        DatasetSettings(name="breast_cancer", sites=1),
        SitePolicy(epsilon=6.0, delta=1e-3, strategies=("fedavg", "fedavgm", "fedprox", "fedadam")),
    )
    return directory


@pytest.fixture
def asker(root) -> Asker:
    return Asker(root)


@pytest.fixture
def site(asker) -> SiteService:
    return asker.site
