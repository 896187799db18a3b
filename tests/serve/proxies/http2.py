"""HTTP/2 frames written by hand, so that they can be wrong (RFC 9113; header blocks by RFC 7541 without a table)."""

import socket
import struct
from collections.abc import Sequence

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, GOAWAY, CONTINUATION = 0, 1, 3, 4, 7, 9
END_STREAM, END_HEADERS = 1, 4

Fields = Sequence[tuple[str, str]]


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def block(fields: Fields) -> bytes:
    """Each field as a literal that no table keeps."""
    return b"".join(b"\x00" + _text(name) + _text(value) for name, value in fields)


def _text(text: str) -> bytes:
    raw = text.encode("latin-1")
    if len(raw) < 127:
        return bytes((len(raw),)) + raw
    size, rest = b"\x7f", len(raw) - 127
    while rest >= 128:
        size, rest = size + bytes((rest % 128 + 128,)), rest // 128
    return size + bytes((rest,)) + raw


def request(fields: Fields, body: bytes | None = None, stream: int = 1) -> bytes:
    flags = END_HEADERS | (END_STREAM if body is None else 0)
    sent = frame(HEADERS, flags, stream, block(fields))
    return sent if body is None else sent + frame(DATA, END_STREAM, stream, body)


def opening() -> bytes:
    return PREFACE + frame(SETTINGS, 0, 0)


def frames(connection: socket.socket, most: int = 200) -> list[tuple[int, int, int, bytes]]:
    """Kind, flags, stream and payload of what comes until an answer is whole or the connection ends."""
    found: list[tuple[int, int, int, bytes]] = []
    try:
        while len(found) < most:
            head = _exactly(connection, 9)
            size = int.from_bytes(head[:3])
            found.append((head[3], head[4], int.from_bytes(head[5:9]) & 0x7FFFFFFF, _exactly(connection, size)))
            kind, flags = found[-1][:2]
            if kind in {RST_STREAM, GOAWAY} or (kind in {DATA, HEADERS} and flags & END_STREAM):
                break
    except OSError:
        pass
    return found


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionResetError("closed")
        data += part
    return data
