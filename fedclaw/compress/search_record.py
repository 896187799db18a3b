"""What a search leaves: its candidates, the Pareto front, and which of them was chosen."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime

from pydantic import Field

from fedclaw.compress.intervals import Difference, Interval
from fedclaw.compress.record import Precision, SitesReport, StepInputs
from fedclaw.protocol.frozen import Frozen

DIRECTORY, CANDIDATES, RESULT, PLOT = "search", "candidates.jsonl", "search.json", "search.png"
BATCH_OF_ONE = "1"
ROUNDING = 1e-9
LATENCY_STEP = 1.05
"""Latencies of one step, which is a factor, are alike: timing is no more certain."""


class PrecisionForm(Frozen):
    """One candidate in one precision."""

    precision: Precision
    file_bytes: int = Field(ge=1)
    """Of the ONNX file."""
    latency_ms: dict[str, float]
    """Median by batch size; ONNX Runtime, CPU, one thread."""
    latency_ratio: dict[str, float]
    """By that of the uncompressed model in float32, timed in turns with it."""
    score: float
    interval: Interval | None
    difference: Difference
    """Its score less that of the uncompressed model, on the same examples."""


class Candidate(Frozen):
    """One fraction and one way of recovery, measured in every precision."""

    digest: str
    """Of all that it depends on: model, settings, files."""
    fraction: float
    mode: tuple[str, ...]
    parameters: int = Field(default=0, ge=0)
    epsilon: float | None = 0.0
    """What it cost a site beyond the run, the highest of all sites; None: no bound."""
    at_sites: SitesReport | None = None
    """Its recovery at the sites, which was charged for whether it is chosen or not."""
    forms: tuple[PrecisionForm, ...] = ()
    failed: str = ""
    """Why it could not be made."""


class FrontPoint(Frozen):
    """A form of a candidate, with the four figures that are weighed."""

    fraction: float
    mode: tuple[str, ...]
    parameters: int
    epsilon: float | None
    form: PrecisionForm
    on_front: bool = False
    chosen: bool = False

    @property
    def costs(self) -> tuple[float, float, float, float]:
        """Bytes, steps of latency at batch 1, score missing to 1, epsilon: the less, the better."""
        epsilon = float("inf") if self.epsilon is None else self.epsilon
        steps = round(math.log(self.form.latency_ratio[BATCH_OF_ONE]) / math.log(LATENCY_STEP))
        return self.form.file_bytes, steps, 1 - self.form.score, epsilon


class SearchResult(Frozen):
    """search.json."""

    version: int = 1
    run: str
    score: str
    """The task's: accuracy, or of a value R2."""
    measure: str
    """What the scores are of."""
    loss: float
    selection: StepInputs
    calibration: StepInputs
    teacher: PrecisionForm
    """The uncompressed model in float32."""
    points: tuple[FrontPoint, ...]
    failed: dict[str, str] = {}
    """Candidates that could not be made, and why."""
    created: datetime = Field(default_factory=lambda: datetime.now(UTC))

    @property
    def chosen(self) -> FrontPoint | None:
        """The smallest within the loss; None: there is none."""
        return next((point for point in self.points if point.chosen), None)


def front(points: Sequence[FrontPoint]) -> list[bool]:
    """Whether each point is on the Pareto front: no other one is as good in every figure and better in one."""
    costs = [point.costs for point in points]

    def dominated(own: tuple[float, ...]) -> bool:
        return any(other != own and all(a <= b for a, b in zip(other, own, strict=True)) for other in costs)

    return [not dominated(own) for own in costs]


def weigh(points: Sequence[FrontPoint], loss: float) -> tuple[FrontPoint, ...]:
    """The points with the front and the chosen one marked: the smallest file whose score is within the loss."""
    marked = [
        point.model_copy(update={"on_front": on_front}) for point, on_front in zip(points, front(points), strict=True)
    ]
    within = [point for point in marked if point.form.difference.value >= -loss - ROUNDING]
    best = min(within, key=lambda point: (point.form.file_bytes, *point.costs), default=None)
    return tuple(point.model_copy(update={"chosen": point is best}) for point in marked)
