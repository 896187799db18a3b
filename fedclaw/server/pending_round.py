"""The round in flight, written down before its questions go out (round.json).

A server that is killed in mid-round resumes with the same parameters, plan and cohort, so the questions are byte for
byte the same, and a site that has answered already answers from its outbox at no further cost.
"""

from pathlib import Path
from typing import Self

from pydantic import Field

from fedclaw.errors import CheckpointError
from fedclaw.files import PRIVATE_MODE, write_atomic
from fedclaw.protocol.frozen import Frozen

PENDING = "round.json"


class PendingRound(Frozen):
    """The nodes that the round in flight asks."""

    round: int
    nodes: tuple[int, ...]
    connected: int = Field(default=0, ge=0)
    """Sites that the cohort was selected from."""
    unmasking: bool = False
    """Whether its sites were asked to unmask a secure sum, which they do once for a round: it is not asked again."""

    @classmethod
    def read(cls, root: Path) -> Self | None:
        """The round that was in flight when the run in `root` stopped. Raises CheckpointError for a damaged record."""
        path = root / PENDING
        if not path.is_file():
            return None
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged; remove it to sample a new cohort for the round") from error

    def write(self, root: Path) -> None:
        """Write the record; it is on disk on return."""
        write_atomic(root / PENDING, self.model_dump_json().encode(), PRIVATE_MODE)

    @classmethod
    def drop(cls, root: Path) -> None:
        """Give up the round in flight, so that it is asked of whoever is connected when it begins again.

        With another number of sites that is a new question: a site that had answered the old one trains, and pays,
        again. A round whose sites have begun to unmask a secure sum is not given up but passed over.
        """
        pending = cls.read(root)
        if pending is None or not pending.unmasking:
            cls.remove(root)

    @classmethod
    def remove(cls, root: Path) -> None:
        """Remove the record: no round is in flight."""
        (root / PENDING).unlink(missing_ok=True)
