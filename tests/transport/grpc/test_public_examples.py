"""Two client processes whose data differ in one row that no sample takes: what they put on the wire is the same.

The hashes of a ledger's entries are under a secret of that ledger's, and differ between any two. Sealed bytes are
random: of them the sizes are compared, and what they hold after the server has opened them.
"""

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from flwr.app import ConfigRecord, Message, RecordDict

from fedclaw.identity import provisioning
from fedclaw.protocol.arrays import pack
from fedclaw.protocol.message_identity import assume_server_identity
from fedclaw.protocol.messages import ARRAYS, JSON, PLAN
from fedclaw.protocol.questions import questions
from fedclaw.protocol.statistics import REQUEST, STATISTICS, StatisticsRequest
from fedclaw.protocol.terms import LocalTraining, ModelSpec, Plan, PrivacyRequest
from fedclaw.site.directory import open_service
from fedclaw.site.settings import load_site_settings
from fedclaw.transport.grpc.grid import GrpcGrid
from fedclaw.transport.grpc.message_codec import encode
from fedclaw.transport.grpc.protocol import link_pb2 as pb
from tests.conftest import environment
from tests.made_tables import make_sites

CLIENT = Path(__file__).with_name("recorded_site.py")
ROWS, DECLARED, RUN_ID = 100, 130, 77
NAMES = ("ward-a", "ward-b")


@pytest.fixture
def sites(tmp_path: Path) -> dict[str, Path]:
    """The same site twice, the second with a row more."""
    made = make_sites(tmp_path / "made", count=1, standardise="schema").directories[0]
    lines = (made / "train.csv").read_text().splitlines(keepends=True)
    roots = {}
    for number, name in enumerate(NAMES):
        root = tmp_path / name
        shutil.copytree(made, root)
        (root / "train.csv").write_text("".join(lines[: 1 + ROWS + number]))
        site = yaml.safe_load((root / "site.yaml").read_text())
        site["name"] = name
        site["data"] |= {"public_examples": DECLARED, "public_test_examples": 200}
        site["policy"] |= {"minimum_cohort": 2, "epsilon": 20.0, "delta": 1e-3, "metrics": ["accuracy", "loss"]}
        site["policy"] |= {"metrics_epsilon": 1.0, "metrics_budget": {"epsilon": 5.0, "delta": 1e-3}}
        site["policy"] |= {"max_local_steps": 40}
        (root / "site.yaml").write_text(yaml.safe_dump(site))
        roots[name] = root
    return roots


@contextmanager
def client(root: Path, port: int, frames: Path) -> Iterator[None]:
    words = [sys.executable, str(CLIENT), str(root), str(port), str(ROWS), str(frames)]
    process = subprocess.Popen(words, env=environment(), cwd=Path(__file__).parents[3])
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def asked(root: Path) -> list[tuple[str, int, RecordDict]]:
    """Training with the site's own noise, twice; what is refused for the number of examples; and all other kinds."""
    settings = load_site_settings(root)
    site = open_service(root, settings, "clinic", durable=False)
    torch.manual_seed(0)
    built = site.workload.build(ModelSpec(name="logistic"))
    arrays = pack({name: value.detach().numpy().copy() for name, value in built.named_parameters()})
    plan = Plan(
        federation="clinic",
        run="run-1",
        round=1,
        rounds=2,
        cohort=2,
        workload="tabular",
        schema_digest=site.schema_digest,
        model=ModelSpec(name="logistic"),
        strategy="fedavg",
        training=LocalTraining(epochs=1, batch_size=16, learning_rate=0.1),
        privacy=PrivacyRequest(epsilon=4, delta=1e-4, max_grad_norm=1),
        metrics=("accuracy", "loss"),
    )
    request = StatisticsRequest(
        federation="clinic",
        run="statistics-1",
        cohort=2,
        workload="tabular",
        schema_digest=site.schema_digest,
        columns=("dose", "age"),
        bins=16,
        epsilon=0.5,
        delta=1e-4,
    )

    def content(of: Plan) -> RecordDict:
        return RecordDict({ARRAYS: arrays, PLAN: ConfigRecord({JSON: of.model_dump_json()})})

    small = LocalTraining(epochs=1, batch_size=2, learning_rate=0.1)
    return [
        ("train", 1, content(plan)),
        ("train", 2, content(plan.model_copy(update={"round": 2}))),
        ("train", 3, content(plan.model_copy(update={"run": "run-2", "training": small}))),
        ("evaluate", 1, content(plan)),
        (STATISTICS, 0, RecordDict({REQUEST: ConfigRecord({JSON: request.model_dump_json()})})),
    ]


def plain(reply: Message) -> bytes:
    """What was sealed, without the hashes of the ledger's entries (its head, and the charge)."""
    raw = b"".join(bytes(part) for part in encode(reply.error if reply.has_error() else reply.content).parts)
    return re.sub(rb"[0-9a-f]{64}", b"-", raw)


def shapes_of(frames: Path) -> list[tuple[str, Mapping[str, int]]]:
    """Of each frame but heartbeats and confirmations, which go by the clock, what it is and the sizes in it."""
    raw, at, found = frames.read_bytes(), 0, []
    while at < len(raw):
        size = int.from_bytes(raw[at : at + 4], "big")
        frame = pb.Frame.FromString(raw[at + 4 : at + 4 + size])
        at += 4 + size
        kind = frame.WhichOneof("body")
        if kind == "offer":
            offer = frame.offer
            sizes = {"size": offer.size, "plain": offer.plain_size, "inline": len(offer.inline)}
            sizes |= {"header": len(offer.seal_header), "stamp": len(offer.stamp)}
            found.append((kind, sizes))
        elif kind == "chunk":
            found.append((kind, {"offset": frame.chunk.offset, "data": len(frame.chunk.data)}))
        elif kind == "refuse":
            found.append((kind, {"text": len(frame.refuse.text), "reason": frame.refuse.reason}))
        elif kind == "accept":
            found.append((kind, {"offset": frame.accept.offset}))
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_two_clients_put_on_the_wire_is_the_same(sites: dict[str, Path], tmp_path: Path) -> None:
    home = provisioning.initialise(tmp_path / "federation", "clinic", "127.0.0.1:9443")
    for name, root in sites.items():
        request = provisioning.request_site(root, tmp_path / "federation" / "federation.json", name)
        provisioning.accept(root, provisioning.approve(tmp_path / "federation", request))
    to_ask = asked(sites[NAMES[0]])
    assume_server_identity(RUN_ID)
    told: dict[str, list[bytes]] = {name: [] for name in NAMES}
    with GrpcGrid(home, address="127.0.0.1:0", run_id=RUN_ID) as grid, ExitStack() as clients:
        for name, root in sites.items():
            clients.enter_context(client(root, grid.port, tmp_path / f"{name}.frames"))
        assert grid.wait_for_sites(2, 120) == NAMES
        for kind, number, content in to_ask:
            messages = questions(grid.get_node_ids(), number, kind, content, 100.0)
            for reply in grid.send_and_receive(messages, timeout=100.0):
                told[grid.site_name(reply.metadata.src_node_id)].append(plain(reply))
    one, other = told.values()
    assert len(one) == len(other) == len(to_ask)
    assert one[:4] == other[:4]
    assert b"add-or-remove" in one[0]
    assert b"local steps" in one[2], "refused"
    assert str(DECLARED).encode() not in one[4]
    # Statistics are of all rows: the noised numbers differ, by the row, and nothing else.
    assert len(one[4]) == len(other[4])
    ours, theirs = (shapes_of(tmp_path / f"{name}.frames") for name in NAMES)
    assert ours == theirs
    assert [kind for kind, _ in ours].count("offer") == len(to_ask)
