"""The frames that the two ends of a stream exchange, checks on them, and gRPC's options on both ends.

Chunk frames are encoded and decoded without the copies that protobuf's classes make of the data. The bytes are exactly
the Frame{chunk} of link.proto, with `data` last. Valid frames in any other form (fields in another order, another
implementation) are left to protobuf.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedclaw.errors import TransportError
from fedclaw.protocol.message_identity import Envelope
from fedclaw.transport.grpc import connection_limiter
from fedclaw.transport.grpc.limits import MAX_FRAME_BYTES, MAX_METADATA_BYTES, WINDOW_BYTES, Limits
from fedclaw.transport.grpc.protocol import METHOD, SERVICE
from fedclaw.transport.grpc.protocol import link_pb2 as pb

PATH = f"/{SERVICE}/{METHOD}"

FOR_GOOD = frozenset({pb.REASON_VERSION, pb.REASON_IDENTITY, pb.REASON_REVOKED, pb.REASON_EXPIRED, pb.REASON_REPLACED})
"""Reasons after which a site must not reconnect."""

MAX_CONFIRMATIONS = 64
"""Confirmations that go along with one frame."""
_MAX_ID = 256
_MAX_TEXT = 500
_MAX_STAMP = 64
_MAX_SEAL_HEADER = 4096
_CLOCK_SKEW = 60.0
"""Seconds that two clocks may differ before a warning."""


def common_options() -> list[tuple[str, Any]]:
    """gRPC options of both ends."""
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


def unidentified_connections(limits: Limits) -> int:
    """How many connections of peers that have not identified themselves the server keeps."""
    return 2 * limits.max_sites + 16


def server_options(limits: Limits) -> list[tuple[str, Any]]:
    """gRPC options of the server: what one connection, authenticated or not, may cost it."""
    return [
        *common_options(),
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", 2),
        ("grpc.server_handshake_timeout_ms", int(limits.handshake * 1000)),
        # A connection of no use is closed: one that finished TLS and then opened no stream.
        ("grpc.max_connection_idle_ms", int(limits.handshake * 1000)),
        ("grpc.max_allowed_incoming_connections", connection_limiter.room(unidentified_connections(limits))),
        ("grpc.http2.max_ping_strikes", 2),
        ("grpc.http2.min_ping_interval_without_data_ms", 5000),
    ]


def channel_options() -> list[tuple[str, Any]]:
    """gRPC options of a site, which opens a new channel for each attempt and times the attempts itself."""
    return [*common_options(), ("grpc.use_local_subchannel_pool", 1)]


def envelope_to_proto(envelope: Envelope) -> pb.Envelope:
    """The protobuf form, for an Offer."""
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
    """The envelope of an offered task by this machine's clock, and the seconds that the server waits for its reply.

    A server older than `seconds_left` gives its own clock's time only; then that is used. Raises TransportError.
    """
    envelope = envelope_from_proto(offer.envelope)
    if not offer.seconds_left:
        return envelope, envelope.created_at + envelope.ttl - time.time()
    if not (math.isfinite(offer.seconds_left) and offer.seconds_left > 0):
        raise TransportError("the task's time is not a time")
    left = min(offer.seconds_left, envelope.ttl)
    return replace(envelope, created_at=time.time() + left - envelope.ttl), left


def check_frame(frame: pb.Frame) -> None:
    """Raises TransportError for a frame with a longer identifier than ours have: we would send it back."""
    body = getattr(frame, frame.WhichOneof("body") or "", None)
    if len(frame.also_done) > MAX_CONFIRMATIONS:
        raise TransportError(f"a frame confirms more than {MAX_CONFIRMATIONS} transfers")
    if any(len(identity) > _MAX_ID for identity in (getattr(body, "transfer_id", ""), *frame.also_done)):
        raise TransportError(f"an identifier is longer than {_MAX_ID} characters")


def check_offer(offer: pb.Offer) -> None:
    """Raises TransportError for an offer with parts longer than ours: it is kept until its turn comes."""
    if not 0 < len(offer.stamp) <= _MAX_STAMP or len(offer.seal_header) > _MAX_SEAL_HEADER:
        raise TransportError("the offer's stamp or seal is not of a length that they have")
    if offer.inline and len(offer.inline) != offer.size:
        raise TransportError("the offer's content is not of the size that it says")


def hello(version: int, software: str) -> pb.Frame:
    """A site's first frame."""
    return pb.Frame(hello=pb.Hello(protocol=version, software=software, clock=time.time()))


def clock_trouble(theirs: float) -> str | None:
    """How far our clock is from `theirs` (seconds since the epoch, now; 0: unknown), in words; None if it is close."""
    if not theirs or not math.isfinite(theirs):
        return None
    ahead = time.time() - theirs
    if abs(ahead) < _CLOCK_SKEW:
        return None
    return f"{min(abs(ahead), 1e12):.0f} s {'ahead of' if ahead > 0 else 'behind'}"


def heartbeat(sequence: int) -> pb.Frame:
    """Shows that this end is alive."""
    return pb.Frame(heartbeat=pb.Heartbeat(sequence=sequence))


def accept(transfer_id: str, offset: int) -> pb.Frame:
    """Asks the peer to send that transfer from `offset` on."""
    return pb.Frame(accept=pb.Accept(transfer_id=transfer_id, offset=offset))


def done(transfer_id: str) -> pb.Frame:
    """Confirms that the transfer has arrived completely."""
    return pb.Frame(done=pb.Done(transfer_id=transfer_id))


def refuse(reason: pb.Reason, text: str, transfer_id: str = "") -> pb.Frame:
    """Refuses a transfer or, without an id, the connection."""
    return pb.Frame(refuse=pb.Refuse(reason=reason, text=text[:_MAX_TEXT], transfer_id=transfer_id))


def reason_name(reason: int) -> str:
    """`not asked` for REASON_NOT_ASKED; `reason N` for an unknown number."""
    try:
        return pb.Reason.Name(reason).removeprefix("REASON_").lower().replace("_", " ")
    except ValueError:
        return f"reason {reason}"


def printable(text: str) -> str:
    """A peer's text on one line, without control characters, cut to a sane length."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:_MAX_TEXT])


Buffer = bytes | memoryview

_FRAME_CHUNK = pb.Frame.CHUNK_FIELD_NUMBER << 3 | 2
_TRANSFER_ID = pb.Chunk.TRANSFER_ID_FIELD_NUMBER << 3 | 2
_OFFSET = pb.Chunk.OFFSET_FIELD_NUMBER << 3
_DATA = pb.Chunk.DATA_FIELD_NUMBER << 3 | 2
_LONGEST_VARINT = 10


@dataclass(frozen=True)
class Chunk:
    """A part of a transfer. `data` may be a view into the frame that it came in."""

    transfer_id: str
    offset: int
    data: Buffer


def encode_chunk(transfer_id: str, offset: int, data: Sequence[Buffer]) -> bytes:
    """The frame of a chunk whose data is the concatenation of `data`. Copies once."""
    size = sum(map(len, data))
    head = pb.Chunk(transfer_id=transfer_id, offset=offset).SerializeToString() + bytes([_DATA]) + _varint(size)
    return b"".join((bytes([_FRAME_CHUNK]), _varint(len(head) + size), head, *data))


def decode_chunk(raw: bytes) -> Chunk | None:
    """The chunk in a frame; None for any other frame, or a chunk in another form."""
    if not raw or raw[0] != _FRAME_CHUNK:
        return None
    length, at = read_varint(raw, 1)
    if at + length != len(raw):
        return None
    transfer_id, offset = b"", 0
    # Each field once and in the order of encode_chunk: a peer cannot make us loop by repeating them.
    if raw[at : at + 1] == bytes([_TRANSFER_ID]):
        size, at = read_varint(raw, at + 1)
        transfer_id, at = raw[at : at + size], at + size
    if raw[at : at + 1] == bytes([_OFFSET]):
        offset, at = read_varint(raw, at + 1)
    if raw[at : at + 1] != bytes([_DATA]) or len(transfer_id) > _MAX_ID:
        return None
    size, at = read_varint(raw, at + 1)
    if at + size != len(raw):
        return None
    try:
        return Chunk(transfer_id.decode(), offset, memoryview(raw)[at:])
    except UnicodeDecodeError:
        return None


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(raw: bytes, at: int) -> tuple[int, int]:
    """The value and the position after it. For an invalid varint that position is outside `raw`."""
    value = 0
    for shift, byte in enumerate(raw[at : at + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, at + shift + 1
    return value, len(raw) + 1
