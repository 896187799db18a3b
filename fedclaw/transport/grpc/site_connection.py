"""A site's connection to its server: one stream, opened by the site, and opened again whenever it breaks.

And how a site reaches its server: at which address, under which certified name, and through which proxy.
"""

import logging
import os
import random
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
from google.protobuf.message import DecodeError

from fedclaw import __version__
from fedclaw.errors import ConnectionRefused, ProvisionError, TransportError, UsageError
from fedclaw.identity import pki
from fedclaw.identity.at_rest import PLAIN, FileStore
from fedclaw.identity.names import canonical_address, canonical_host, split_address
from fedclaw.identity.site_home import SITE_CERTIFICATE, SiteKeys, renew_advice
from fedclaw.protocol.message_identity import number_of
from fedclaw.transport.base import SiteHandler
from fedclaw.transport.grpc import frames
from fedclaw.transport.grpc.allocator import tune_allocator
from fedclaw.transport.grpc.limits import Limits
from fedclaw.transport.grpc.outbox import Outbox, StoredReply
from fedclaw.transport.grpc.protocol import PROTOCOL_VERSION
from fedclaw.transport.grpc.protocol import link_pb2 as pb
from fedclaw.transport.grpc.sender import Sender
from fedclaw.transport.grpc.worker import TaskReassembler, Worker

log = logging.getLogger(__name__)

_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_EXEMPT = ("no_grpc_proxy", "no_proxy")
"""The environment variables that gRPC reads, in its order; lower case only."""


def channel_target(descriptor_address: str, given: str | None) -> tuple[str, list[tuple[str, Any]]]:
    """The address to connect to, and the channel options for it. Raises ValueError for a malformed address.

    At any address the server has to show a certificate of the federation's CA for the name in the descriptor.
    `given`, if there is one, replaces the descriptor's address; it need not be in the certificate.
    """
    name = canonical_host(split_address(descriptor_address)[0])
    address = canonical_address(given or descriptor_address)
    return address, [("grpc.ssl_target_name_override", name)]


def proxy_for(address: str) -> tuple[str, str] | None:
    """The proxy that gRPC uses for `address`, without user and password, and the variable that names it; or None."""
    found = next(((name, value) for name in _PROXIES if (value := os.environ.get(name))), None)
    if found is None:
        return None
    host = split_address(address)[0]
    exempt = next((value for name in _EXEMPT if (value := os.environ.get(name))), "")
    if any(host.endswith(entry) for item in exempt.split(",") if (entry := item.strip())):
        return None
    name, value = found
    parts = urlsplit(value if "://" in value else f"http://{value}")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}", name


NOTHING_LISTENS = "nobody listens there (connection refused)"
_GLANCE = 0.1
_LEAST_HEARTBEAT = 0.05
"""Seconds: a server cannot make a site send heartbeats faster."""
_LONGEST_DOUBLING = 16


class RunFinished(TransportError):
    """The server said that its run has come to its end."""


class _Stream:
    """One stream, from its connection attempt to its end."""

    def __init__(self, connection: "SiteConnection", channel: Any) -> None:
        self.sender = Sender()
        self.heard = time.monotonic()
        self.welcomed = False
        self.ended = threading.Event()
        self.problem: TransportError | None = None
        self._connection = connection
        call = channel.stream_stream(frames.PATH)
        self.sender.post(frames.hello(PROTOCOL_VERSION, f"fedclaw {__version__}"))
        self._responses = call(self.sender.frames())
        threading.Thread(target=self._read, name="fedclaw-read", daemon=True).start()

    def cancel(self) -> None:
        """Hang up."""
        self.sender.close()
        self._responses.cancel()

    def _read(self) -> None:
        try:
            self._read_all(self._responses)
            self.problem = TransportError("the server ended the stream")
        except TransportError as error:
            self.problem = error
        except DecodeError:
            self.problem = TransportError("the server sent something that is not a frame of this protocol")
        except grpc.RpcError as error:
            self.problem = TransportError(self._connection.describe(error))
        except Exception as error:
            log.exception("the stream failed")
            self.problem = TransportError(f"the stream failed: {type(error).__name__}")
        finally:
            self.sender.close()
            self.ended.set()

    def _read_all(self, responses: Iterable[bytes]) -> None:
        for raw in responses:
            self.heard = time.monotonic()
            chunk = frames.decode_chunk(raw) if self.welcomed else None
            if chunk is not None:
                self._connection.on_chunk(self, chunk)
            else:
                self._connection.on_frame(self, pb.Frame.FromString(raw))


class SiteConnection:
    """Connects a site's handler to its federation's server, and reconnects."""

    def __init__(
        self,
        keys: SiteKeys,
        handler: SiteHandler,
        state: Path,
        limits: Limits | None = None,
        address: str | None = None,
        store: FileStore = PLAIN,
    ) -> None:
        """`state` is the site's state directory (the outbox lies in it); `address` overrides the descriptor's.

        `store` says how the site's files are encrypted. Raises UsageError for a malformed address, EncryptionError for
        an outbox that is encrypted otherwise.
        """
        self._keys = keys
        self._limits = limits or Limits()
        try:
            self._address, self._name = channel_target(keys.descriptor.address, address)
        except ValueError as error:
            raise UsageError(f"server: {error}") from None
        self._outbox = Outbox(state / "outbox", self._limits, store)
        self._reassembler = TaskReassembler(self._limits.intake_bytes)
        self._lock = threading.Lock()
        self._stream: _Stream | None = None
        self._sequence = 0
        self._logged_reasons: set[str] = set()
        """Reasons for having no connection that were logged since the last one."""
        self._heartbeat = self._limits.heartbeat
        self._worker = Worker(
            handler,
            self._outbox,
            keys.sealer(),
            keys.descriptor.name,
            keys.site_name,
            self._limits,
            self._offer_reply,
            self._report_unanswered,
        )

    @property
    def node_id(self) -> int:
        """The number under which Flower knows this site."""
        return number_of(self._keys.site_name)

    @property
    def connected(self) -> bool:
        """Whether the server has welcomed the current stream."""
        stream = self._welcomed()
        return stream is not None and not stream.ended.is_set()

    def _welcomed(self) -> _Stream | None:
        """The current stream, once the server has welcomed it."""
        with self._lock:
            return self._stream if self._stream is not None and self._stream.welcomed else None

    def run(self, stop: threading.Event) -> None:
        """Connect, serve and reconnect until `stop` is set.

        Raises ConnectionRefused when the server refuses this site for good, or when the site's certificate is not
        valid: a server closes such a connection without a reason, so the site has to give it.
        """
        tune_allocator()
        self._worker.start()
        failures = 0
        try:
            while not stop.is_set():
                self._check_certificate()
                welcomed, problem = self._connect_once(stop)
                if isinstance(problem, ConnectionRefused):
                    raise problem
                if stop.is_set():
                    return
                failures = 0 if welcomed else min(failures + 1, _LONGEST_DOUBLING)
                delay = self._delay(failures)
                self._log_outage(problem, welcomed, delay)
                stop.wait(delay)
        finally:
            self._worker.stop()

    def _check_certificate(self) -> None:
        origin = f"the certificate of site {self._keys.site_name!r}, {self._keys.root / SITE_CERTIFICATE},"
        try:
            pki.check_dates(self._keys.certificate, origin, f"{renew_advice(self._keys.root)}, then start again")
        except ProvisionError as error:
            raise ConnectionRefused(str(error)) from error

    def _delay(self, failures: int) -> float:
        """Seconds to wait: exponential, with jitter, so that sites do not all reconnect at the same moment."""
        mean, longest = self._limits.backoff_first * float(2**failures), self._limits.backoff_longest
        spread = random.uniform(0.5, 1.5)  # noqa: S311 - spreads load, hides nothing
        return min(mean * spread, longest * (spread + 1.5) / 3)

    def _log_outage(self, problem: TransportError, welcomed: bool, delay: float) -> None:
        """Log why there is no connection, once per reason until there is one again. A run's end is no warning."""
        if welcomed:
            self._logged_reasons.clear()
        if isinstance(problem, RunFinished):
            log.info("run finished: the server has ended; this site waits for the next one")
            self._logged_reasons.add(NOTHING_LISTENS)
        elif str(problem) not in self._logged_reasons:
            self._logged_reasons.add(str(problem))
            log.warning(
                "%s: %s; next attempt in %.1f s, and again every %g s at most",
                *(self._address, problem, delay, self._limits.backoff_longest),
            )

    def _connect_once(self, stop: threading.Event) -> tuple[bool, TransportError]:
        tls = self._keys.tls()
        credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)
        with grpc.secure_channel(self._address, credentials, [*frames.channel_options(), *self._name]) as channel:
            stream = _Stream(self, channel)
            with self._lock:
                self._stream = stream
            try:
                problem = self._watch(stream, stop)
            finally:
                with self._lock:
                    self._stream = None
                stream.cancel()
                stream.ended.wait(self._limits.handshake)
        return stream.welcomed, stream.problem if isinstance(stream.problem, ConnectionRefused) else problem

    def _watch(self, stream: _Stream, stop: threading.Event) -> TransportError:
        """Send heartbeats until the stream or the site ends; returns why it ended."""
        opened = last = time.monotonic()
        while not stream.ended.wait(min(_GLANCE, self._heartbeat)):
            now = time.monotonic()
            if stop.is_set():
                return TransportError("the site is stopping")
            if not stream.welcomed and now - opened > self._limits.handshake + self._limits.silence:
                return TransportError(f"no server answered{self._proxy_hint()}")
            if stream.welcomed and now - stream.heard > self._heartbeat * self._limits.missed_heartbeats:
                return TransportError("the server fell silent")
            if stream.welcomed and now - last >= self._heartbeat:
                last = now
                self._sequence += 1
                stream.sender.post(frames.heartbeat(self._sequence))
        return stream.problem or TransportError("the stream ended")

    def describe(self, error: grpc.RpcError) -> str:
        """Why a connection failed, as far as this end can tell."""
        details = error.details() if hasattr(error, "details") else ""
        proxy = proxy_for(self._address)
        if proxy is not None and "Connection refused" in (details or ""):
            return f"nobody listens at the proxy (connection refused){self._proxy_hint()}"
        return _describe(error) + ("" if self._welcomed() else self._proxy_hint())

    def _proxy_hint(self) -> str:
        if (proxy := proxy_for(self._address)) is None:
            return ""
        url, variable = proxy
        host = split_address(self._address)[0]
        return (
            f"; the way there is through the proxy {url}, because the variable {variable} is set: have that proxy let "
            f"it through, or add {host} to no_proxy"
        )

    def _offer_reply(self, entry: StoredReply) -> None:
        """Offer a stored reply, if there is a stream; if not, the server asks again when there is."""
        if (stream := self._welcomed()) is not None:
            stream.sender.offer(entry.outgoing())

    def _report_unanswered(self, message_id: str, text: str) -> None:
        """Tell the server that no reply to a task will come; without a stream it asks again."""
        if (stream := self._welcomed()) is not None:
            stream.sender.post(frames.refuse(pb.REASON_UNANSWERED, text, message_id))

    def on_frame(self, stream: _Stream, frame: pb.Frame) -> None:
        """Handle a frame of the server. Raises TransportError if it breaks the protocol or refuses the site."""
        frames.check_frame(frame)
        for identity in frame.also_done if stream.welcomed else ():
            stream.sender.withdraw(identity)
        kind = frame.WhichOneof("body")
        if kind == "refuse" and not frame.refuse.transfer_id:
            self._connection_refused(frame.refuse)
        elif not stream.welcomed:
            if kind != "welcome":
                raise TransportError("the server's first frame is not a welcome")
            self._welcome(stream, frame.welcome)
        elif kind == "offer":
            self._on_offer(stream, frame.offer)
        elif kind == "chunk":
            chunk = frame.chunk
            self.on_chunk(stream, frames.Chunk(chunk.transfer_id, chunk.offset, chunk.data))
        elif kind == "accept":
            stream.sender.start(frame.accept.transfer_id, frame.accept.offset)
        elif kind == "done":
            stream.sender.withdraw(frame.done.transfer_id)
        elif kind == "refuse" and frame.refuse.reason == pb.REASON_RECALLED:
            self._on_recall(stream, frame.refuse.transfer_id)
        elif kind == "refuse":
            self._reply_refused(stream, frame.refuse)
        elif kind != "heartbeat":
            raise TransportError(f"unexpected frame: {kind}")

    def _connection_refused(self, refusal: pb.Refuse) -> None:
        if refusal.reason == pb.REASON_FINISHED:
            raise RunFinished("the run has finished")
        text = f"the server refused this site ({frames.reason_name(refusal.reason)}): {frames.printable(refusal.text)}"
        raise (ConnectionRefused if refusal.reason in frames.FOR_GOOD else TransportError)(text)

    def _welcome(self, stream: _Stream, welcome: pb.Welcome) -> None:
        mine = (self._keys.descriptor.name, self._keys.site_name)
        if welcome.protocol != PROTOCOL_VERSION:
            raise ConnectionRefused(
                f"the server speaks protocol {welcome.protocol}, this site {PROTOCOL_VERSION} (fedclaw {__version__}); "
                "install the same version at both"
            )
        if (welcome.federation, welcome.site) != mine:
            raise ConnectionRefused(f"the server is of another federation: {frames.printable(welcome.federation)!r}")
        if not 0 < welcome.heartbeat < float("inf"):
            raise TransportError("the server's heartbeat is not a time")
        self._heartbeat = max(_LEAST_HEARTBEAT, min(self._limits.heartbeat, welcome.heartbeat))
        self._worker.max_reply_bytes = min(self._limits.max_message_bytes, welcome.max_message_bytes)
        stream.welcomed = True
        log.info("connected to %s as %s", self._address, self._keys.site_name)
        if (trouble := frames.clock_trouble(welcome.clock)) is not None:
            log.warning(
                "this machine's clock is %s the server's; set right the wrong one: certificates are judged by it",
                trouble,
            )

    def _on_offer(self, stream: _Stream, offer: pb.Offer) -> None:
        identity, limit = offer.transfer_id, self._limits.max_message_bytes
        if offer.size > limit:
            text = f"the task is oversized: {offer.size} bytes, limit {limit}"
            self._refuse_task(stream, pb.REASON_OVERSIZED, text, identity)
            return
        try:
            envelope, left = frames.task_of(offer)
            expires = time.monotonic() + left
            if self._worker.holds(envelope, expires):
                stream.sender.confirm(identity)
            elif not self._has_room(offer):
                self._refuse_task(stream, pb.REASON_BUSY, "too many tasks wait at this site", identity)
            elif (offset := self._reassembler.begin(offer, envelope, expires)) == 0 and offer.inline:
                self.on_chunk(stream, frames.Chunk(identity, 0, offer.inline))
            else:
                stream.sender.post(frames.accept(identity, offset))
        except TransportError as error:
            self._refuse_task(stream, pb.REASON_MALFORMED, str(error), identity)

    def _has_room(self, offer: pb.Offer) -> bool:
        if self._reassembler.holds(offer.transfer_id, offer.size):
            return True
        # Of another size it is another task, which needs room of its own.
        self._reassembler.drop(offer.transfer_id)
        return self._worker.has_room() and self._reassembler.has_room(offer.size, self._limits.queued_tasks)

    def on_chunk(self, stream: _Stream, chunk: frames.Chunk) -> None:
        """Handle a chunk of a task."""
        try:
            task = self._reassembler.add(chunk)
        except TransportError as error:
            self._refuse_task(stream, pb.REASON_MALFORMED, str(error), chunk.transfer_id)
            return
        if task is not None:
            # Last, for it wakes a thread that wants the interpreter.
            stream.sender.confirm(chunk.transfer_id)
            self._worker.submit(task.message, task.expires)

    def _reply_refused(self, stream: _Stream, refusal: pb.Refuse) -> None:
        outgoing = stream.sender.withdraw(refusal.transfer_id)
        text = frames.printable(refusal.text)
        log.warning("the server refused a reply (%s): %s", frames.reason_name(refusal.reason), text)
        if refusal.reason == pb.REASON_STALLED and outgoing is not None:
            stream.sender.offer(outgoing)

    def _on_recall(self, stream: _Stream, identity: str) -> None:
        """Nobody waits for that task. If it has not begun it is dropped; if it has, it ends, for it is paid for."""
        stream.sender.withdraw(identity)
        if self._reassembler.drop(identity) or self._worker.drop(identity):
            log.info("the server has recalled a task that had not begun")

    def _refuse_task(self, stream: _Stream, reason: pb.Reason, text: str, identity: str) -> None:
        log.warning("refused a task (%s): %s", frames.reason_name(reason), text)
        stream.sender.post(frames.refuse(reason, text, identity))


def _describe(error: grpc.RpcError) -> str:
    code = error.code().name.lower().replace("_", " ") if hasattr(error, "code") else "error"
    details = error.details() if hasattr(error, "details") else ""
    if "Connection refused" in (details or ""):
        return NOTHING_LISTENS
    if "failed to connect" in (details or "") and "Socket closed" in (details or ""):
        # All that a TLS 1.3 client sees when a server does not accept its certificate.
        return (
            "the server ended the connection before it began: it is full, or does not take this site's certificate "
            "(expired by the server's clock, or of another federation)"
        )
    return f"{code}: {frames.printable(details or 'the stream broke')}"
