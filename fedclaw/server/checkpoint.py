"""Checkpoints: one file a round, whole or absent, with a digest that damage does not survive.

A file is the magic, the SHA-256 of the rest, and an .npz archive of the parameters, the optimiser's state and a
JSON description.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import CheckpointError
from fedclaw.files import replacing
from fedclaw.protocol.arrays import Arrays, read_npz, write_npz

_MAGIC = b"FEDCLAW-CHECKPOINT-1\n"
_DIGEST_SIZE = hashlib.sha256().digest_size
_PARAMETERS, _OPTIMIZER, _STRATEGY, _ABOUT = "parameters/", "optimizer/", "strategy/", "about"
_HEAD = len(_MAGIC) + _DIGEST_SIZE
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


def save(directory: Path, checkpoint: Checkpoint) -> Path:
    """Write `checkpoint` and remove all but the newest `KEPT`. Copies none of its arrays."""
    plain = {"round": checkpoint.round, "clip": checkpoint.clip, "came": checkpoint.came}
    about = np.frombuffer(json.dumps(plain).encode(), dtype=np.uint8)
    parameters = {_PARAMETERS + name: array for name, array in checkpoint.parameters.items()}
    strategy = {
        f"{_STRATEGY}{kind}/{name}": a for kind, arrays in checkpoint.strategy.items() for name, a in arrays.items()
    }
    path = directory / f"checkpoint-{checkpoint.round:04d}.ckpt"
    with replacing(path) as file:
        file.write(_MAGIC + bytes(_DIGEST_SIZE))
        write_npz(_Body(file), {_ABOUT: about, **parameters, **checkpoint.optimizer, **strategy})
        digest = _digest_of_body(file)
        file.seek(len(_MAGIC))
        file.write(digest)
    for old in _existing(directory)[:-KEPT]:
        old.unlink()
    return path


def newest(directory: Path) -> Checkpoint | None:
    """The newest checkpoint, or None when there is none.

    Raises CheckpointError when it is damaged: going on from an older one would ask the sites for rounds that
    they have already paid for, so that is a person's decision (remove the damaged file to take it).
    """
    existing = _existing(directory)
    return load(existing[-1]) if existing else None


def load(path: Path) -> Checkpoint:
    """Read one checkpoint. Raises CheckpointError."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
        if not head.startswith(_MAGIC) or _digest_of_body(file) != head[len(_MAGIC) :]:
            raise CheckpointError(
                f"{path} is damaged: its digest does not match its content; restore it from a backup, "
                "or remove it to go on from the checkpoint before it"
            )
        arrays = read_npz(_Body(file), path)
    about = json.loads(arrays.pop(_ABOUT).tobytes())
    parameters = {name.removeprefix(_PARAMETERS): a for name, a in arrays.items() if name.startswith(_PARAMETERS)}
    optimizer = {name: a for name, a in arrays.items() if name.startswith(_OPTIMIZER)}
    strategy: dict[str, Arrays] = {}
    for label, array in arrays.items():
        if label.startswith(_STRATEGY):
            kind, name = label.removeprefix(_STRATEGY).split("/", 1)
            strategy.setdefault(kind, {})[name] = array
    return Checkpoint(about["round"], parameters, optimizer, about.get("clip"), strategy, about.get("came"))


def _digest_of_body(file: IO[bytes]) -> bytes:
    file.flush()
    file.seek(_HEAD)
    digest = hashlib.sha256()
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.digest()


class _Body(io.RawIOBase):
    """The part of a checkpoint's file after the digest, as a file of its own: the archive's offsets begin there."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek(0)

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset + (_HEAD if whence == io.SEEK_SET else 0), whence) - _HEAD

    def tell(self) -> int:
        return self._file.tell() - _HEAD

    def read(self, size: int | None = -1) -> bytes:
        return self._file.read(-1 if size is None else size)

    def write(self, data: Any) -> int:
        return self._file.write(data)


def _existing(directory: Path) -> list[Path]:
    return sorted(directory.glob("checkpoint-*.ckpt"), key=lambda path: int(path.stem.rpartition("-")[2]))
