"""What a site remembers of a run from round to round: control variates, a personal model.

It is made from the site's data, so it never leaves, and its files are the site's alone (0600), encrypted where the site
has a key for that. With it stands what it
was made under (`Provenance`): what no noise covers has no place in a round whose noise is made for released values
alone, and what one strategy calls its own none in another's. A round that is asked a
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
from fedclaw.files import PRIVATE_MODE, sync_directory
from fedclaw.identity.at_rest import PLAIN, FileStore
from fedclaw.learning.strategy import PERSONAL
from fedclaw.privacy.mechanisms.mechanism import Origin
from fedclaw.protocol.arrays import Arrays, arrays_to_npz, npz_to_arrays
from fedclaw.protocol.terms import Compression, ModelSpec, Weighting

State = Mapping[str, Arrays]
"""By kind, arrays by parameter name."""

_ROUND, _BEFORE, _AFTER, _MADE = "round", "before", "after", "made"
_STAGED = ".staged"


class Provenance(Origin):
    """What a run's state was made under. One run has one: a mix is refused."""

    strategy: str
    own_model: bool
    """Whether the strategy trains a second model at the site, without noise."""
    model: ModelSpec
    personal: tuple[str, ...]
    """Parameters that stay at the site, sorted."""
    compression: Compression | None
    weighting: Weighting
    weight_cap: int | None

    def covers(self, kind: str) -> bool:
        """Whether what is kept of that kind follows from noised steps alone: is released."""
        return self.local and not (kind == PERSONAL and self.own_model)

    def __str__(self) -> str:
        """In words, to be compared with another's."""
        return f"strategy {self.strategy!r}, model {self.model.name!r}, {self.noise_words}"


@dataclass(frozen=True)
class Remembered:
    """What a site has of a run."""

    round: int
    """The newest that it trained in."""
    before: State
    after: State
    made: Provenance | None = None
    """None: it was kept by a version that did not note it, and may be anything that the data make."""

    def beginning(self, round: int) -> State:
        """What `round` begins with: after what the newest left, or, asked again, where it began.

        Nothing for round 1, whatever an earlier run of that name left.
        """
        if round <= 1:
            return {}
        return self.after if round > self.round else self.before


@dataclass
class SiteStates:
    """The states of all runs of one site: in memory, or in files in the directory `root`."""

    root: Path | None = None
    store: FileStore = PLAIN
    """How those files are read and written."""
    _memory: dict[str, Remembered] = field(default_factory=dict, init=False, repr=False)
    _staged: dict[str, tuple[str, Remembered]] = field(default_factory=dict, init=False, repr=False)

    def stage(
        self,
        federation: str,
        run: str,
        round: int,
        state: State,
        charge: str,
        made: Provenance | None,
        before: State,
    ) -> None:
        """Have `state` ready as what `round` left under `made`, in the place of whatever of this run was staged before.

        `charge` is the hash of what was paid for it; `before` what the round began with: a kind that `state` lacks
        stays as it was. Durable when it returns; `commit` makes it count.
        """
        key = _key(federation, run)
        self._unstage(key)
        if not state:
            return
        remembered = Remembered(round, before, {**before, **state}, made)
        if self.root is None:
            self._staged[key] = (charge, remembered)
        else:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            # By the name that it will have: a commit renames it.
            self.store.write(self._staging(key, charge), _packed(remembered), PRIVATE_MODE, state_name(f"{key}.npz"))

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

    def find(self, federation: str, run: str) -> Remembered | None:
        """All that is remembered of a run. Raises CheckpointError for a damaged file."""
        key = _key(federation, run)
        if self.root is None:
            return self._memory.get(key)
        path = self.root / f"{key}.npz"
        return _unpacked(self.store.read(path, state_name(path.name)), path) if path.is_file() else None


def state_files(root: Path) -> list[tuple[Path, str]]:
    """The files of all states in `root`, committed or staged, with their names for the store."""
    found = [*root.glob("*.npz"), *root.glob(f"*{_STAGED}")]
    return [(path, state_name(f"{path.name.partition('.')[0]}.npz")) for path in sorted(found)]


def state_name(file: str) -> str:
    """What the store calls a state's file."""
    return f"state/strategy/{file}"


def _key(federation: str, run: str) -> str:
    """A file name: what a server calls its run is not one."""
    return hashlib.sha256(f"{federation}\n{run}".encode()).hexdigest()[:32]


def _packed(remembered: Remembered) -> bytes:
    arrays = {_ROUND: np.array(remembered.round)}
    if remembered.made is not None:
        arrays[_MADE] = np.array(remembered.made.model_dump_json())
    for part, state in ((_BEFORE, remembered.before), (_AFTER, remembered.after)):
        for kind, values in state.items():
            arrays |= {f"{part}/{kind}/{name}": array for name, array in values.items()}
    return arrays_to_npz(arrays)


def _unpacked(content: bytes, path: Path) -> Remembered:
    arrays = npz_to_arrays(content, path)
    parts: dict[str, dict[str, Arrays]] = {_BEFORE: {}, _AFTER: {}}
    try:
        number = int(arrays.pop(_ROUND))
        made = Provenance.model_validate_json(str(arrays.pop(_MADE))) if _MADE in arrays else None
        for label, array in arrays.items():
            part, kind, name = label.split("/", 2)
            parts[part].setdefault(kind, {})[name] = array
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged; restore it from a backup, or remove it to begin that run's state anew"
        ) from error
    return Remembered(number, parts[_BEFORE], parts[_AFTER], made)
