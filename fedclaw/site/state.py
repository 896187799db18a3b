"""What a site remembers of a run from round to round: control variates, a personal model.

It is made from the site's data, so it never leaves, and its files are the site's alone (0600). A round that is asked a
second time begins with what the round began with the first time: what is kept is the state before the newest round and
the one after it.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedclaw.errors import CheckpointError
from fedclaw.federation.arrays import Arrays
from fedclaw.federation.run_directory import arrays_to_npz, npz_to_arrays
from fedclaw.files import PRIVATE_MODE, write_atomic

State = Mapping[str, Arrays]
"""By kind, arrays by parameter name."""

_ROUND, _BEFORE, _AFTER = "round", "before", "after"


@dataclass(frozen=True)
class _Remembered:
    round: int
    before: State
    after: State


@dataclass
class SiteStates:
    """The states of all runs of one site: in memory, or in files in the directory `root`."""

    root: Path | None = None
    _memory: dict[str, _Remembered] = field(default_factory=dict, init=False, repr=False)

    def before(self, federation: str, run: str, round: int) -> State:
        """What the site begins `round` with; empty the first time. Raises CheckpointError for a damaged file.

        Empty for round 1, too, whatever an earlier run of that name left.
        """
        if round <= 1:
            return {}
        remembered = self._find(federation, run)
        if remembered is None:
            return {}
        return remembered.after if round > remembered.round else remembered.before

    def newest(self, federation: str, run: str) -> State:
        """What the site has after the last round that it trained in. Raises CheckpointError for a damaged file."""
        remembered = self._find(federation, run)
        return remembered.after if remembered else {}

    def keep(self, federation: str, run: str, round: int, state: State) -> None:
        """Remember `state` as what `round` left; a kind that it lacks stays as it was. Durable when it returns."""
        before = self.before(federation, run, round)
        remembered = _Remembered(round, before, {**before, **state})
        key = _key(federation, run)
        if self.root is None:
            self._memory[key] = remembered
        else:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomic(self.root / f"{key}.npz", _packed(remembered), PRIVATE_MODE)

    def _find(self, federation: str, run: str) -> _Remembered | None:
        key = _key(federation, run)
        if self.root is None:
            return self._memory.get(key)
        path = self.root / f"{key}.npz"
        return _unpacked(path) if path.is_file() else None


def _key(federation: str, run: str) -> str:
    """A file name: what a server calls its run is not one."""
    return hashlib.sha256(f"{federation}\n{run}".encode()).hexdigest()[:32]


def _packed(remembered: _Remembered) -> bytes:
    arrays = {_ROUND: np.array(remembered.round)}
    for part, state in ((_BEFORE, remembered.before), (_AFTER, remembered.after)):
        for kind, values in state.items():
            arrays |= {f"{part}/{kind}/{name}": array for name, array in values.items()}
    return arrays_to_npz(arrays)


def _unpacked(path: Path) -> _Remembered:
    arrays = npz_to_arrays(path.read_bytes(), path)
    parts: dict[str, dict[str, Arrays]] = {_BEFORE: {}, _AFTER: {}}
    try:
        number = int(arrays.pop(_ROUND))
        for label, array in arrays.items():
            part, kind, name = label.split("/", 2)
            parts[part].setdefault(kind, {})[name] = array
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged; restore it from a backup, or remove it to begin that run's state anew"
        ) from error
    return _Remembered(number, parts[_BEFORE], parts[_AFTER])
