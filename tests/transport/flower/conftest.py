"""A stock Flower Grid with its own state behind it, and threads in place of SuperNodes: no Ray, no processes."""

import logging
import secrets
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.linkstate import InMemoryLinkState, LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import RunRecord
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import InMemoryGrid

from experiments.datasets import DatasetSettings, SitePolicy, write_sites
from fedclaw.protocol.message_identity import assume_server_identity, empty_run
from fedclaw.transport.flower.client import app

HEARTBEAT = 3600.0
RUN = 11


class Node:
    """What a SuperNode does: takes messages one by one, has the app answer, hands the replies back."""

    def __init__(self, fleet: "Fleet", client: ClientApp, config: dict[str, str]) -> None:
        self.state = fleet.state
        self.client = client
        self.config = config
        self.lost: Callable[[Message], bool] = lambda _: False
        """To which messages Flower's own services answer that the reply could not be had."""
        self.node_id = self.state.create_node("owner", "name", secrets.token_bytes(32), heartbeat_interval=HEARTBEAT)
        self.state.acknowledge_node_heartbeat(self.node_id, HEARTBEAT)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def leave(self) -> None:
        self.state.deactivate_node(self.node_id)
        self.close()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stop.wait(0.01):
            for message in self.state.get_message_ins(self.node_id, limit=1):
                context = Context(RUN, self.node_id, dict(self.config), RecordDict(), {})
                reply = self.client(message, context)
                if self.lost(message):
                    reply = Message(Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "lost"), reply_to=message)
                reply.metadata.__dict__["_message_id"] = str(uuid.uuid4())
                self.state.store_message_res(reply)


class Fleet:
    """Flower's state and Grid, and the nodes that have been started."""

    def __init__(self) -> None:
        assume_server_identity(RUN)
        factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
        state = factory.state()
        assert isinstance(state, InMemoryLinkState)
        self.state = state
        run = empty_run(RUN)
        run.primary_task_id, run.federation_id = 1, NOOP_FEDERATION_ID
        state.run_ids[RUN] = RunRecord(run=run)
        state.task_store[1] = Task(task_id=1, run_id=RUN)
        self.grid = InMemoryGrid(factory, pull_interval=0.01)
        self.grid.set_run(run)
        self.nodes: list[Node] = []

    def join(self, site: Path, client: ClientApp = app) -> Node:
        node = Node(self, client, {"site": str(site), "federation": "clinic"})
        self.nodes.append(node)
        return node


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    made = Fleet()
    yield made
    for node in made.nodes:
        node.close()


@pytest.fixture
def sites(tmp_path: Path) -> tuple[Path, ...]:
    policy = SitePolicy(epsilon=8.0, delta=1e-3)
    return write_sites(tmp_path, DatasetSettings(name="breast_cancer", sites=2), policy)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One site alone."""
    policy = SitePolicy(epsilon=6.0, delta=1e-3, minimum_cohort=1)
    return write_sites(tmp_path, DatasetSettings(name="breast_cancer", sites=1), policy)[0]


@pytest.fixture(autouse=True)
def _logging_is_set_up(_plain_logging: None) -> None:
    """A node's app sets logging up where nobody has: here somebody has, so that tests see what it says."""
    logging.getLogger("fedclaw").addHandler(logging.NullHandler())
