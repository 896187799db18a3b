"""A sweep's directory: what was asked, and for each run where it is and how it stands.

    sweep.json                       the command's overrides
    members/DIGEST.json              a run of the sweep, written by whichever process runs it
    comparison.csv  comparison.json  and the plots: experiments.sweeps.report

The runs themselves are directories of their own beside other runs, so that two sweeps share what they have in common.
"""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, ValidationError

from fedclaw.errors import CheckpointError, UsageError
from fedclaw.files import write_atomic
from fedclaw.protocol.frozen import Frozen, explain

R = TypeVar("R", bound=Frozen)


class SweepRecord(Frozen):
    """sweep.json."""

    name: str
    overrides: tuple[str, ...]
    """As they were given, ranges and all."""
    created: datetime = Field(default_factory=lambda: datetime.now(UTC))


class Member(Frozen):
    """A run of a sweep. Identical configurations are one member."""

    digest: str
    number: int = Field(ge=0)
    """Its place in the sweep."""
    settings: dict[str, str]
    """Its overrides, value by key."""
    run: str | None = None
    """Its run directory, relative to the sweep's; None: it did not come that far."""
    status: Literal["running", "finished", "failed"]
    reason: str | None = None
    """Why it failed."""


class SweepDirectory:
    """runs/sweeps/NAME/."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def open(cls, root: Path) -> "SweepDirectory":
        """A sweep that was begun. Raises UsageError when `root` is none."""
        directory = cls(root)
        if not directory._record_path.is_file():
            raise UsageError(
                f"{root} is not a sweep's directory: it has no sweep.json (it is one like runs/sweeps/NAME)"
            )
        return directory

    @property
    def _record_path(self) -> Path:
        return self.root / "sweep.json"

    def begin(self, record: SweepRecord) -> None:
        """Write what was asked, unless an earlier command has."""
        if not self._record_path.is_file():
            write_atomic(self._record_path, record.model_dump_json(indent=2).encode())

    def record(self) -> SweepRecord:
        """What was asked. Raises CheckpointError when the file is damaged."""
        return _read(self._record_path, SweepRecord)

    def members(self) -> list[Member]:
        """All runs that were begun, in the sweep's order. Raises CheckpointError for a damaged file."""
        found = [_read(path, Member) for path in (self.root / "members").glob("*.json")]
        return sorted(found, key=lambda member: (member.number, member.digest))

    def member(self, digest: str) -> Member | None:
        """The run of that configuration, if it was begun."""
        path = self._member_path(digest)
        return _read(path, Member) if path.is_file() else None

    def note(self, member: Member) -> None:
        """Write down how a run stands."""
        write_atomic(self._member_path(member.digest), member.model_dump_json(indent=2).encode())

    def _member_path(self, digest: str) -> Path:
        return self.root / "members" / f"{digest}.json"

    def relative(self, run: Path) -> str:
        """A run directory as a member names it."""
        return os.path.relpath(run.resolve(), self.root.resolve())

    def run_directory(self, member: Member) -> Path | None:
        """Where the member's run is."""
        return None if member.run is None else Path(os.path.normpath(self.root.resolve() / member.run))


def read_overrides(overrides: tuple[str, ...] | list[str]) -> dict[str, str]:
    """Value by key of Hydra overrides; an override that adds (+key=value) is one that sets."""
    parts = (override.lstrip("+").partition("=") for override in overrides)
    return {key: value for key, _, value in parts}


def _read(path: Path, kind: type[R]) -> R:
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise CheckpointError(f"{path} is damaged: {explain(error)}; remove it and start the sweep again") from error
