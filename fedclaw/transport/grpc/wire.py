"""Frames: what the two ends of a stream say to each other, and gRPC's settings on both."""

import math
import time
from dataclasses import replace
from typing import Any

from fedclaw.errors import TransportError
from fedclaw.protocol.message_identity import Envelope
from fedclaw.transport.grpc import door
from fedclaw.transport.grpc.limits import MAX_FRAME_BYTES, MAX_METADATA_BYTES, WINDOW_BYTES, Limits
from fedclaw.transport.grpc.protocol import METHOD, SERVICE
from fedclaw.transport.grpc.protocol import link_pb2 as pb

PATH = f"/{SERVICE}/{METHOD}"

FOR_GOOD = frozenset({pb.REASON_VERSION, pb.REASON_IDENTITY, pb.REASON_REVOKED, pb.REASON_EXPIRED, pb.REASON_REPLACED})
"""Reasons after which a site must not reconnect."""

_MAX_ID = 256
_MAX_TEXT = 500
_MAX_STAMP = 64
_MAX_SEAL_HEADER = 4096
_CLOCK_SKEW = 60.0
"""Seconds that two clocks may be apart before somebody is told."""


def common_options() -> list[tuple[str, Any]]:
    """gRPC channel arguments of both ends."""
    return [
        ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
        ("grpc.max_send_message_length", MAX_FRAME_BYTES),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.enable_retries", 0),
        # A fixed window instead of one that grows with bandwidth: that much, and no more, is read ahead of us.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
    ]


def held_strangers(limits: Limits) -> int:
    """Connections that the server holds of peers that have not said who they are."""
    return 2 * limits.max_sites + 16


def server_options(limits: Limits) -> list[tuple[str, Any]]:
    """What one connection, authenticated or not, may cost the server."""
    return [
        *common_options(),
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", 2),
        ("grpc.server_handshake_timeout_ms", int(limits.handshake * 1000)),
        # A connection of no use is closed: one that finished TLS and then opened no stream.
        ("grpc.max_connection_idle_ms", int(limits.handshake * 1000)),
        ("grpc.max_allowed_incoming_connections", door.room(held_strangers(limits))),
        ("grpc.http2.max_ping_strikes", 2),
        ("grpc.http2.min_ping_interval_without_data_ms", 5000),
    ]


def channel_options() -> list[tuple[str, Any]]:
    """A site makes a new channel for each attempt and keeps the time between them itself."""
    return [*common_options(), ("grpc.use_local_subchannel_pool", 1)]


def envelope_to_proto(envelope: Envelope) -> pb.Envelope:
    """Ready to go into an Offer."""
    return pb.Envelope(
        run_id=envelope.run_id,
        message_id=envelope.message_id,
        reply_to_message_id=envelope.reply_to_message_id,
        src_node_id=envelope.src_node_id,
        dst_node_id=envelope.dst_node_id,
        group_id=envelope.group_id,
        message_type=envelope.message_type,
        created_at=envelope.created_at,
        ttl=envelope.ttl,
    )


def envelope_from_proto(wire: pb.Envelope) -> Envelope:
    """Raises TransportError for an envelope whose fields are out of bounds."""
    texts = (wire.message_id, wire.reply_to_message_id, wire.group_id, wire.message_type)
    if any(len(text) > _MAX_ID for text in texts):
        raise TransportError(f"an identifier of the message is longer than {_MAX_ID} characters")
    if not (math.isfinite(wire.created_at) and math.isfinite(wire.ttl) and wire.ttl > 0):
        raise TransportError("the message's times are not finite numbers")
    return Envelope(
        run_id=wire.run_id,
        message_id=wire.message_id,
        reply_to_message_id=wire.reply_to_message_id,
        src_node_id=wire.src_node_id,
        dst_node_id=wire.dst_node_id,
        group_id=wire.group_id,
        message_type=wire.message_type,
        created_at=wire.created_at,
        ttl=wire.ttl,
    )


def task_of(offer: pb.Offer) -> tuple[Envelope, float]:
    """The envelope of an offered task by this machine's clock, and the seconds for which its reply is waited for.

    A server of before `seconds_left` says it by its own clock alone, which is then believed. Raises TransportError.
    """
    envelope = envelope_from_proto(offer.envelope)
    if not offer.seconds_left:
        return envelope, envelope.created_at + envelope.ttl - time.time()
    if not (math.isfinite(offer.seconds_left) and offer.seconds_left > 0):
        raise TransportError("the task's time is not a time")
    left = min(offer.seconds_left, envelope.ttl)
    return replace(envelope, created_at=time.time() + left - envelope.ttl), left


def check_frame(frame: pb.Frame) -> None:
    """Raises TransportError for a frame whose identifier is longer than any of ours: it would be said back."""
    body = getattr(frame, frame.WhichOneof("body") or "", None)
    if len(getattr(body, "transfer_id", "")) > _MAX_ID:
        raise TransportError(f"an identifier is longer than {_MAX_ID} characters")


def check_offer(offer: pb.Offer) -> None:
    """Raises TransportError for an offer whose parts are longer than they can be: it is kept until its turn comes."""
    if not 0 < len(offer.stamp) <= _MAX_STAMP or len(offer.seal_header) > _MAX_SEAL_HEADER:
        raise TransportError("the offer's stamp or seal is not of a length that they have")
    if offer.inline and len(offer.inline) != offer.size:
        raise TransportError("the offer's content is not of the size that it says")


def hello(version: int, software: str) -> pb.Frame:
    """A site's first frame."""
    return pb.Frame(hello=pb.Hello(protocol=version, software=software, clock=time.time()))


def clock_trouble(theirs: float) -> str | None:
    """How far our clock is from `theirs` (seconds since the epoch, said just now; 0: not said), if it is too far."""
    if not theirs or not math.isfinite(theirs):
        return None
    ahead = time.time() - theirs
    if abs(ahead) < _CLOCK_SKEW:
        return None
    return f"{min(abs(ahead), 1e12):.0f} s {'ahead of' if ahead > 0 else 'behind'}"


def heartbeat(sequence: int) -> pb.Frame:
    """A sign of life."""
    return pb.Frame(heartbeat=pb.Heartbeat(sequence=sequence))


def accept(transfer_id: str, offset: int) -> pb.Frame:
    """Send that transfer, from `offset` on."""
    return pb.Frame(accept=pb.Accept(transfer_id=transfer_id, offset=offset))


def done(transfer_id: str) -> pb.Frame:
    """That transfer has arrived whole."""
    return pb.Frame(done=pb.Done(transfer_id=transfer_id))


def refuse(reason: pb.Reason, text: str, transfer_id: str = "") -> pb.Frame:
    """No, to a transfer or (without an id) to the connection."""
    return pb.Frame(refuse=pb.Refuse(reason=reason, text=text[:_MAX_TEXT], transfer_id=transfer_id))


def reason_name(reason: int) -> str:
    """REASON_NOT_ASKED as `not asked`; a number nobody knows as itself."""
    try:
        return pb.Reason.Name(reason).removeprefix("REASON_").lower().replace("_", " ")
    except ValueError:
        return f"reason {reason}"


def printable(text: str) -> str:
    """A peer's words on one line, without control characters, cut to a sane length."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:_MAX_TEXT])
