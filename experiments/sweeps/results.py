"""What one run came to, read from its directory."""

from typing import Any

from experiments.sweeps.directory import Member, SweepDirectory
from experiments.sweeps.wire import bytes_up
from fedclaw.privacy.accounting import epsilon_of_sum, largest
from fedclaw.protocol.frozen import Frozen
from fedclaw.server.run_directory import RunDirectory, RunRecord

_NO_WORD = (
    "it has not finished: it is still running, or its process ended without a word; the same command continues it"
)


class Point(Frozen):
    """A run after one of its rounds."""

    round: int
    metrics: dict[str, float]
    bytes_up: int
    """Of all rounds so far."""


class RunResult(Frozen):
    """A member of a sweep and its numbers."""

    settings: dict[str, str]
    """Its overrides."""
    run: str | None
    status: str
    reason: str | None = None
    asked_epsilon: float | None = None
    """The epsilon that its configuration asks for; None: none."""
    epsilon: float | None = None
    """The largest that a site's ledger holds for it; of the noise on the sum where the unit is a site. None:
    unbounded."""
    seconds: float = 0.0
    """Training and evaluating, all rounds together."""
    points: tuple[Point, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether it got to its last round."""
        return self.status == "finished"

    def last(self, metric: str) -> float | None:
        """A metric after the last round."""
        return self.points[-1].metrics.get(metric) if self.points else None

    @property
    def bytes_up(self) -> int:
        """Of all rounds."""
        return self.points[-1].bytes_up if self.points else 0


def read_results(sweep: SweepDirectory) -> list[RunResult]:
    """All runs of the sweep, in its order. Raises CheckpointError for a damaged file."""
    return [_read(sweep, member) for member in sweep.members()]


def _read(sweep: SweepDirectory, member: Member) -> RunResult:
    known: dict[str, Any] = {"settings": member.settings, "run": member.run}
    root = sweep.run_directory(member)
    if member.status != "finished" or root is None:
        return RunResult(**known, status="failed", reason=member.reason or _NO_WORD)
    directory = RunDirectory.open(root)
    record, lines = directory.record(), directory.read_metrics()
    parameters = sum(array.size for array in directory.read_model().values())
    points, sent = [], 0
    for line in lines:
        sent += bytes_up(line, parameters)
        points.append(Point(round=line["round"], metrics=line["metrics"], bytes_up=sent))
    return RunResult(
        **known,
        status="finished",
        asked_epsilon=_asked(record),
        epsilon=_spent(record, lines),
        seconds=sum(line["train_seconds"] + line["evaluate_seconds"] for line in lines),
        points=tuple(points),
    )


def _asked(record: RunRecord) -> float | None:
    asked = record.privacy or record.central
    return asked.epsilon if asked else None


def _spent(record: RunRecord, lines: list[dict[str, Any]]) -> float | None:
    central = record.central
    if central is not None and central.unit == "site":
        # Receipts are about examples.
        return epsilon_of_sum(central, len(lines))
    return largest(lines[-1]["epsilon"].values()) if lines else None
