"""What a site remembers of a run from round to round: control variates, a personal model.

It is made from the site's data, so it never leaves, and its files are the site's alone (0600). A round that is asked a
second time begins with what the round began with the first time: what is kept is the state before the newest round and
the one after it.

What a round leaves is *staged* under the name of its charge, before its answer is stored, and *committed*, by a rename,
when that answer is about to leave and its charge is settled. So nothing stays of training whose answer never left, and
whatever stays was paid for: a question whose reservation is taken up again begins where it began the first time, and a
site that was killed commits what it had staged when it sends the stored answer.
"""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedclaw.errors import CheckpointError
from fedclaw.federation.arrays import Arrays
from fedclaw.federation.run_directory import arrays_to_npz, npz_to_arrays
from fedclaw.files import PRIVATE_MODE, sync_directory, write_atomic

State = Mapping[str, Arrays]
"""By kind, arrays by parameter name."""

_ROUND, _BEFORE, _AFTER = "round", "before", "after"
_STAGED = ".staged"
_AT_ONCE = "0"


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
    _staged: dict[str, tuple[str, _Remembered]] = field(default_factory=dict, init=False, repr=False)

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
        self.stage(federation, run, round, state, _AT_ONCE)
        self.commit(federation, run, _AT_ONCE)

    def stage(self, federation: str, run: str, round: int, state: State, charge: str) -> None:
        """Have `state` ready as what `round` left, in the place of whatever of this run was staged before.

        `charge` is the hash of what was paid for it. Durable when it returns; `commit` makes it count.
        """
        key = _key(federation, run)
        self._unstage(key)
        if not state:
            return
        before = self.before(federation, run, round)
        remembered = _Remembered(round, before, {**before, **state})
        if self.root is None:
            self._staged[key] = (charge, remembered)
        else:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomic(self._staging(key, charge), _packed(remembered), PRIVATE_MODE)

    def commit(self, federation: str, run: str, charge: str) -> None:
        """Remember what was staged for `charge`, from now on; nothing if that is done, or there is none. Durable."""
        key = _key(federation, run)
        if self.root is None:
            if key in self._staged and self._staged[key][0] == charge:
                self._memory[key] = self._staged.pop(key)[1]
            return
        with suppress(FileNotFoundError):
            self._staging(key, charge).replace(self.root / f"{key}.npz")
            sync_directory(self.root)

    def discard(self, charge: str) -> None:
        """Forget what was staged for `charge`, if anything was."""
        self._staged = {key: staged for key, staged in self._staged.items() if staged[0] != charge}
        if self.root is not None:
            for leftover in self.root.glob(f"*.{charge[:32]}{_STAGED}"):
                leftover.unlink(missing_ok=True)

    def _staging(self, key: str, charge: str) -> Path:
        assert self.root is not None
        return self.root / f"{key}.{charge[:32]}{_STAGED}"

    def _unstage(self, key: str) -> None:
        self._staged.pop(key, None)
        if self.root is not None:
            for leftover in self.root.glob(f"{key}.*{_STAGED}"):
                leftover.unlink(missing_ok=True)

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
