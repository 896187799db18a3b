"""A provisioned federation on disk, a server on a real socket, and sites that connect to it."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedclaw.errors import FedClawError
from fedclaw.identity import provisioning
from fedclaw.identity.federation_home import FederationHome
from fedclaw.identity.site_home import SiteKeys
from fedclaw.protocol.message_identity import number_of
from fedclaw.transport.grpc import frames
from fedclaw.transport.grpc.grid import GrpcGrid
from fedclaw.transport.grpc.limits import Limits
from fedclaw.transport.grpc.protocol import PROTOCOL_VERSION
from fedclaw.transport.grpc.protocol import link_pb2 as pb
from fedclaw.transport.grpc.site_connection import SiteConnection

RUN_ID = 77
QUICK = Limits(heartbeat=0.15, missed_heartbeats=40, backoff_first=0.05, backoff_longest=0.2, handshake=5)
"""Heartbeats and new attempts come soon. Silence takes long: a machine that is busy for a second is none."""


class Clock:
    """The monotonic clock of this process, which a test moves forward instead of waiting."""

    def __init__(self) -> None:
        self._real, self._ahead = time.monotonic, 0.0

    def __call__(self) -> float:
        return self._real() + self._ahead

    def forward(self, seconds: float) -> None:
        self._ahead += seconds


class Federation:
    """A federation directory and the site directories beside it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = provisioning.initialise(root / "federation", "clinics", "127.0.0.1:9443")

    def site(self, name: str) -> SiteKeys:
        path = self.root / name
        if not path.exists():
            request = provisioning.request_site(path, self.root / "federation" / "federation.json", name)
            provisioning.accept(path, provisioning.approve(self.root / "federation", request))
        return SiteKeys.open(path)

    def revoke(self, name: str) -> None:
        provisioning.revoke(self.root / "federation", name)

    def reopen(self) -> FederationHome:
        return FederationHome.open(self.root / "federation")


class Echo:
    """A site that answers with what it was asked, and keeps count."""

    def __init__(self) -> None:
        self.asked: list[Message] = []
        self.released: list[tuple[str, int, str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.working = threading.Event()
        self.release_error: Exception | None = None

    def answer(self, message: Message) -> Message:
        self.asked.append(message)
        self.working.set()
        self.gate.wait(30)
        return Message(RecordDict(dict(message.content)), reply_to=message)

    def release(self, message: Message, reply: Message, size: int, digest: str) -> None:
        if self.release_error is not None:
            raise self.release_error
        self.released.append((message.metadata.message_id, size, digest))


class Running:
    """A SiteConnection on its own thread."""

    def __init__(self, link: SiteConnection) -> None:
        self.link = link
        self.error: FedClawError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.link.run(self._stop)
        except FedClawError as error:
            self.error = error

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(10)
        assert not self._thread.is_alive()

    def ended(self) -> FedClawError | None:
        self._thread.join(10)
        assert not self._thread.is_alive()
        return self.error


class RawSite:
    """A peer that says exactly what a test wants, with a site's certificate."""

    def __init__(self, keys: SiteKeys, port: int) -> None:
        tls = keys.tls()
        credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)
        self.channel = grpc.secure_channel(f"127.0.0.1:{port}", credentials, frames.channel_options())
        call = self.channel.stream_stream(
            frames.PATH, request_serializer=None, response_deserializer=pb.Frame.FromString
        )
        self._out: queue.Queue[bytes | None] = queue.Queue()
        self.responses = call(iter(self._out.get, None))

    def say(self, frame: pb.Frame | bytes) -> None:
        self._out.put(frame if isinstance(frame, bytes) else frame.SerializeToString())

    def hear(self, kind: str) -> pb.Frame:
        """The next frame of that kind, or that another confirms; other frames are passed over, refusals are not."""
        for frame in self.responses:
            if kind == "done" and frame.also_done:
                return frames.done(frame.also_done[0])
            found = frame.WhichOneof("body")
            if found == kind:
                return frame
            assert found != "refuse", frame
        raise AssertionError(f"the stream ended before a {kind} frame")

    def enter(self) -> None:
        self.say(frames.hello(PROTOCOL_VERSION, "test"))
        self.hear("welcome")

    def close(self) -> None:
        self._out.put(None)
        self.channel.close()


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition that is bound to come true."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.01)


def content(size: int = 4, seed: int = 0) -> RecordDict:
    """Arrays of `size` float32, a metric and a configuration value."""
    values = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    return RecordDict(
        {
            "arrays": ArrayRecord({"w": Array(values)}),
            "metrics": MetricRecord({"n": 3}),
            "config": ConfigRecord({"a": "b"}),
        }
    )


class Kit:
    """What the tests of this directory share; closes what it opened."""

    until = staticmethod(until)
    content = staticmethod(content)
    number_of = staticmethod(number_of)
    Echo = Echo
    RUN_ID = RUN_ID
    QUICK = QUICK

    def __init__(self, federation: Federation, scratch: Path) -> None:
        self.federation = federation
        self.scratch = scratch
        self._closing: list[Callable[[], None]] = []

    def grid(self, limits: Limits = QUICK, address: str = "127.0.0.1:0") -> GrpcGrid:
        grid = GrpcGrid(self.federation.reopen(), address=address, run_id=RUN_ID, limits=limits)
        grid.__enter__()
        self._closing.append(lambda: grid.__exit__(None, None, None))
        return grid

    def link(
        self,
        name: str,
        port: int,
        handler: object | None = None,
        limits: Limits = QUICK,
        state: Path | None = None,
        keys: SiteKeys | None = None,
    ) -> Running:
        keys = keys or self.federation.site(name)
        state = state or self.scratch / f"state-{name}"
        running = Running(SiteConnection(keys, handler or Echo(), state, limits, f"127.0.0.1:{port}"))  # type: ignore[arg-type]
        self._closing.append(running.stop)
        return running

    def raw(self, name: str, port: int) -> RawSite:
        site = RawSite(self.federation.site(name), port)
        self._closing.append(site.close)
        return site

    def message(self, name: str, body: RecordDict | None = None, group: str = "1", ttl: float = 60.0) -> Message:
        return Message(body or content(), number_of(name), "train", group_id=group, ttl=ttl)

    @staticmethod
    def memory(grid: GrpcGrid) -> int:
        """Bytes of memory that incoming replies take now."""
        buffers = grid._connections.replies._buffers
        with buffers.lock:
            return sum(reply.memory for reply in buffers.accepted.values())

    def close(self) -> None:
        for close in reversed(self._closing):
            close()


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return Federation(tmp_path_factory.mktemp("federation"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What a question's time and a reply's rate are measured by, here at both ends."""
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


@pytest.fixture
def kit(federation: Federation, tmp_path: Path) -> Iterator[Kit]:
    kit = Kit(federation, tmp_path)
    yield kit
    kit.close()
