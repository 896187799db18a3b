"""Encodes and decodes chunk frames without the copies that protobuf's classes make of the data.

The bytes are exactly the Frame{chunk} of link.proto, with `data` last. Valid frames in any other form (fields in
another order, another implementation) are left to protobuf.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedclaw.transport.grpc.protocol import link_pb2 as pb

Buffer = bytes | memoryview

_FRAME_CHUNK = pb.Frame.CHUNK_FIELD_NUMBER << 3 | 2
_TRANSFER_ID = pb.Chunk.TRANSFER_ID_FIELD_NUMBER << 3 | 2
_OFFSET = pb.Chunk.OFFSET_FIELD_NUMBER << 3
_DATA = pb.Chunk.DATA_FIELD_NUMBER << 3 | 2
_LONGEST_VARINT = 10
_LONGEST_ID = 256


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
    if raw[at : at + 1] != bytes([_DATA]) or len(transfer_id) > _LONGEST_ID:
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
