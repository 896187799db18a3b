"""Checkpoints: one file a round, whole or absent, with a digest that damage does not survive.

A file is the magic, the SHA-256 of the rest, and an .npz archive of the parameters, the optimiser's state and a
JSON description.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import CheckpointError
from fedclaw.federation.arrays import Arrays
from fedclaw.federation.run_directory import arrays_to_npz, npz_to_arrays
from fedclaw.files import write_atomic

_MAGIC = b"FEDCLAW-CHECKPOINT-1\n"
_DIGEST_SIZE = hashlib.sha256().digest_size
_PARAMETERS, _OPTIMIZER, _STRATEGY, _ABOUT = "parameters/", "optimizer/", "strategy/", "about"
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


def save(directory: Path, checkpoint: Checkpoint) -> Path:
    """Write `checkpoint` and remove all but the newest `KEPT`."""
    about = np.frombuffer(json.dumps({"round": checkpoint.round, "clip": checkpoint.clip}).encode(), dtype=np.uint8)
    parameters = {_PARAMETERS + name: array for name, array in checkpoint.parameters.items()}
    strategy = {
        f"{_STRATEGY}{kind}/{name}": a for kind, arrays in checkpoint.strategy.items() for name, a in arrays.items()
    }
    content = arrays_to_npz({_ABOUT: about, **parameters, **checkpoint.optimizer, **strategy})
    path = directory / f"checkpoint-{checkpoint.round:04d}.ckpt"
    write_atomic(path, _MAGIC + hashlib.sha256(content).digest() + content)
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
    content = path.read_bytes()
    body = content[len(_MAGIC) + _DIGEST_SIZE :]
    digest = content[len(_MAGIC) : len(_MAGIC) + _DIGEST_SIZE]
    if not content.startswith(_MAGIC) or hashlib.sha256(body).digest() != digest:
        raise CheckpointError(
            f"{path} is damaged: its digest does not match its content; restore it from a backup, "
            "or remove it to go on from the checkpoint before it"
        )
    arrays = npz_to_arrays(body, path)
    about = json.loads(arrays.pop(_ABOUT).tobytes())
    parameters = {name.removeprefix(_PARAMETERS): a for name, a in arrays.items() if name.startswith(_PARAMETERS)}
    optimizer = {name: a for name, a in arrays.items() if name.startswith(_OPTIMIZER)}
    strategy: dict[str, Arrays] = {}
    for label, array in arrays.items():
        if label.startswith(_STRATEGY):
            kind, name = label.removeprefix(_STRATEGY).split("/", 1)
            strategy.setdefault(kind, {})[name] = array
    return Checkpoint(about["round"], parameters, optimizer, about.get("clip"), strategy)


def _existing(directory: Path) -> list[Path]:
    return sorted(directory.glob("checkpoint-*.ckpt"), key=lambda path: int(path.stem.rpartition("-")[2]))
