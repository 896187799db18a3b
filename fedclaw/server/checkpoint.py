"""Checkpoints: one file a round, whole or absent, with a digest that damage does not survive.

A file is the magic, an .npz archive of the parameters, the optimiser's state and a JSON description, and the SHA-256 of
the archive. It is written from its beginning to its end, so that it can be encrypted as it is written. Before that was
possible the digest stood in front of the archive; such files are read too.
"""

import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import CheckpointError
from fedclaw.identity.at_rest import PLAIN, FileStore
from fedclaw.protocol.arrays import Arrays, read_npz, write_npz

_MAGIC = b"FEDCLAW-CHECKPOINT-2\n"
_EARLIER_MAGIC = b"FEDCLAW-CHECKPOINT-1\n"
_DIGEST_SIZE = hashlib.sha256().digest_size
_PARAMETERS, _OPTIMIZER, _STRATEGY, _ABOUT = "parameters/", "optimizer/", "strategy/", "about"
_BLOCK = 1 << 20
KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """The state after `round` rounds; round 0 is the initial model."""

    round: int
    parameters: Arrays
    optimizer: dict[str, NDArray[Any]]
    clip: float | None = None
    """The adaptive clipping bound, where there is one."""
    strategy: Mapping[str, Arrays] = field(default_factory=dict)
    """By kind, what the strategy's server half remembers."""
    came: Mapping[str, Any] | None = None
    """What the round came to, plain values: who answered it and what it cost. A server that is killed before it has
    evaluated the parameters writes the round's line in the metrics from it."""


def save(directory: Path, checkpoint: Checkpoint, store: FileStore = PLAIN) -> Path:
    """Write `checkpoint` and remove all but the newest `KEPT`. Copies none of its arrays."""
    plain = {"round": checkpoint.round, "clip": checkpoint.clip, "came": checkpoint.came}
    about = np.frombuffer(json.dumps(plain).encode(), dtype=np.uint8)
    parameters = {_PARAMETERS + name: array for name, array in checkpoint.parameters.items()}
    strategy = {
        f"{_STRATEGY}{kind}/{name}": a for kind, arrays in checkpoint.strategy.items() for name, a in arrays.items()
    }
    path = directory / f"checkpoint-{checkpoint.round:04d}.ckpt"
    with store.replacing(path) as file:
        file.write(_MAGIC)
        body = _Hashed(file)
        write_npz(body, {_ABOUT: about, **parameters, **checkpoint.optimizer, **strategy})
        file.write(body.digest())
    for old in existing(directory)[:-KEPT]:
        old.unlink()
    return path


def newest(directory: Path, store: FileStore = PLAIN) -> Checkpoint | None:
    """The newest checkpoint, or None when there is none.

    Raises CheckpointError when it is damaged: going on from an older one would ask the sites for rounds that
    they have already paid for, so that is a person's decision (remove the damaged file to take it).
    """
    found = existing(directory)
    return load(found[-1], store) if found else None


def load(path: Path, store: FileStore = PLAIN) -> Checkpoint:
    """Read one checkpoint. Raises CheckpointError, or EncryptionError for one that does not open."""
    with store.open(path) as file:
        if (body := _checked_body(file)) is None:
            raise CheckpointError(
                f"{path} is damaged: its digest does not match its content; restore it from a backup, "
                "or remove it to go on from the checkpoint before it"
            )
        arrays = read_npz(body, path)
    about = json.loads(arrays.pop(_ABOUT).tobytes())
    parameters = {name.removeprefix(_PARAMETERS): a for name, a in arrays.items() if name.startswith(_PARAMETERS)}
    optimizer = {name: a for name, a in arrays.items() if name.startswith(_OPTIMIZER)}
    strategy: dict[str, Arrays] = {}
    for label, array in arrays.items():
        if label.startswith(_STRATEGY):
            kind, name = label.removeprefix(_STRATEGY).split("/", 1)
            strategy.setdefault(kind, {})[name] = array
    return Checkpoint(about["round"], parameters, optimizer, about.get("clip"), strategy, about.get("came"))


def existing(directory: Path) -> list[Path]:
    """The checkpoints in a directory, the newest last."""
    return sorted(directory.glob("checkpoint-*.ckpt"), key=lambda path: int(path.stem.rpartition("-")[2]))


def _checked_body(file: BinaryIO) -> "_Body | None":
    """The archive in a checkpoint's file, if its digest is right."""
    magic, size = file.read(len(_MAGIC)), file.seek(0, io.SEEK_END)
    file.seek(len(_MAGIC))
    if magic == _EARLIER_MAGIC:
        expected, start, end = file.read(_DIGEST_SIZE), len(_MAGIC) + _DIGEST_SIZE, size
    else:
        start, end = len(_MAGIC), size - _DIGEST_SIZE
        file.seek(max(end, 0))
        expected = file.read()
    if magic not in (_MAGIC, _EARLIER_MAGIC) or end < start:
        return None
    body = _Body(file, start, end)
    return body if _digest_of(body) == expected else None


def _digest_of(body: "_Body") -> bytes:
    digest = hashlib.sha256()
    while block := body.read(_BLOCK):
        digest.update(block)
    body.seek(0)
    return digest.digest()


class _Hashed(io.RawIOBase):
    """The archive in a file that is being written, as a file of its own, and its digest."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self._size = file, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self._file.write(data)
        self._size += (size := memoryview(data).nbytes)
        return size

    def digest(self) -> bytes:
        return self._hash.digest()


class _Body(io.RawIOBase):
    """A part of a file that is read, as a file of its own: an archive's offsets begin there."""

    def __init__(self, file: IO[bytes], start: int, end: int) -> None:
        self._file, self._start, self._end = file, start, end
        self.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: self._start, os.SEEK_CUR: self._file.tell(), os.SEEK_END: self._end}[whence]
        return self._file.seek(max(base + offset, self._start)) - self._start

    def tell(self) -> int:
        return self._file.tell() - self._start

    def read(self, size: int | None = -1) -> bytes:
        rest = max(0, self._end - self._file.tell())
        return self._file.read(rest if size is None or size < 0 else min(size, rest))
