"""What is predicted, and how it is judged: the part of a workload that does not depend on what its inputs are.

A `Task` says what a target is, what a model's outputs mean, what training lowers, and which metrics there are. A metric
of a federation is made of sums: each site adds up something over its test examples, the server adds the sites' sums,
and the figure is computed once, from the total. It is then what one evaluation of all examples together would give,
which the mean of the sites' figures is not. Where one example's part of a sum is bounded, the sum can leave with noise.

The numpy half of a task is read with the schema, so importing it must not import torch; `loss`, `link`, `agreement` and
`divergence` are torch's, and import it when they are called.

Legend: N examples, K outputs of the model, D input shape without the batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import DataError
from fedclaw.protocol.arrays import Form

if TYPE_CHECKING:
    import torch

Doubles = NDArray[np.float64]
Targets = NDArray[Any]
"""(N,), of the task's `target_dtype`."""
LARGEST = float(np.finfo(np.float32).max)
"""That an input or a target can be."""
LOSS = "loss"
"""The metric that every task has: the mean of its loss."""


@dataclass(frozen=True)
class Sums:
    """What the test examples of one site add up to."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    lists: Mapping[str, Sequence[float]] = field(default_factory=dict)
    arrays: Mapping[str, Doubles] = field(default_factory=dict)
    deviation: float = 0.0
    """Of the noise in each cell of the arrays."""
    noised: bool = False
    """Whether there is noise on the sums: then they need not be such as any examples add up to."""


@dataclass(frozen=True)
class BoundedSum:
    """A sum over the test examples, each of which moves `values`, all of them together, by at most `sensitivity` (L2).

    Once there is noise on it, a number is clamped to between `least` and `most` times the number of examples, and
    leaves multiplied by `unit`. An array leaves as it is.
    """

    values: Doubles
    """() for a number, else of any shape."""
    sensitivity: float = 1.0
    least: float = 0.0
    most: float = 1.0
    unit: float = 1.0


class Tally(ABC):
    """The server's half: the sites' sums, added, and the figures that are made of them."""

    numbers: tuple[str, ...] = ()
    """Names of the numbers that an answer may hold."""
    lists: tuple[str, ...] = ()
    """Names of the lists of numbers that it may hold."""
    arrays: Mapping[str, Form] = {}
    """Name and form of each array that it may hold."""

    @abstractmethod
    def add(self, sums: Sums, examples: int) -> None:
        """Add one site's sums over so many examples, whole or not at all.

        Raises UpdateError for what so many examples cannot add up to, so that no answer moves a figure further than
        its examples could.
        """

    @property
    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """The figures of all test examples together, by name; one without a value is left out."""

    @property
    @abstractmethod
    def over_sites(self) -> dict[str, dict[str, float]]:
        """Second figures: by metric the example-weighted `mean` over the sites that have cases for it, the `spread`
        (its standard deviation over the sites), and how many `sites` those are."""

    @property
    def beside(self) -> dict[str, Any]:
        """What else the round's line in metrics.jsonl says, as plain values by name."""
        return {}


class Task(ABC):
    """What is predicted. Frozen: made by the schema, from what the federation agreed on."""

    name: ClassVar[str]
    """As runs' records and bundles say it."""
    METRICS: ClassVar[tuple[str, ...]]
    """Every metric that a task of this kind can have, `loss` among them."""
    SHARED: ClassVar[tuple[str, ...]]
    """Those that a site's policy lets leave unless told otherwise: one example can move each by little."""
    NOISED: ClassVar[tuple[str, ...]]
    """Those, and further clauses of a policy, that can leave with noise: one example's part of each sum is bounded."""
    CLAUSES: ClassVar[tuple[str, ...]] = ()
    """What a policy can let leave besides metrics."""
    score: ClassVar[str]
    """The metric by which two models are compared: the larger, the better; 1 is the best there is."""
    head: ClassVar[tuple[str, str]]
    """Names of an exported model's two outputs: as the model gives them, and behind the link."""
    target_dtype: ClassVar[type[np.generic]]

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that a run asks for unless told otherwise."""
        return self.METRICS

    @property
    @abstractmethod
    def outputs(self) -> int:
        """K."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the outputs; none where there are no classes."""
        return ()

    @abstractmethod
    def loss(self, outputs: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        """Mean loss of outputs (N, K) over the batch, a scalar, at least 0; 0 with a zero gradient for an empty batch.

        It is the mean of the examples' own losses, whatever else is in the batch: clipping each example rests on that.
        """

    @abstractmethod
    def link(self, outputs: "torch.Tensor") -> "torch.Tensor":
        """Outputs (N, K) as what they mean: probabilities, a value, a risk. Exported with the model."""

    @abstractmethod
    def evaluate(self, outputs: Doubles, targets: Targets) -> dict[str, float]:
        """The metrics of one test set from outputs (N, K); one without a value is left out."""

    @abstractmethod
    def sums(
        self, wanted: Sequence[str], bins: int | None, own: Mapping[str, float], outputs: Doubles, targets: Targets
    ) -> Sums:
        """What leaves of a test set for the metrics `wanted`, without noise.

        `own` is what `evaluate` gave. `bins` is the plan's `score_bins` where the policy lets histograms leave.
        """

    @abstractmethod
    def bounded(
        self, wanted: Sequence[str], bins: int | None, outputs: Doubles, targets: Targets, loss_bound: float
    ) -> dict[str, BoundedSum]:
        """The sums for those of `wanted` that are in `NOISED`, by name, before noise; without that of the loss.

        `loss_bound` is what a site's policy cuts off an example's part at where nothing else bounds it. Each part is
        bounded whatever the outputs are, infinite and NaN too.
        """

    @abstractmethod
    def tally(self, wanted: Sequence[str], bins: int | None) -> Tally:
        """An empty tally for the metrics `wanted`."""

    @staticmethod
    @abstractmethod
    def told_with(wanted: Sequence[str]) -> tuple[str, ...]:
        """Names of the sums that leave with these metrics, except those named like a metric."""

    @abstractmethod
    def agreement(self, outputs: "torch.Tensor", others: "torch.Tensor") -> float:
        """How well two models' outputs (N, K) agree, 1 if fully: the `score` of one against the other."""

    @abstractmethod
    def divergence(self, student: "torch.Tensor", teacher: "torch.Tensor", temperature: float) -> "torch.Tensor":
        """How far a student's outputs are from its teacher's, summed over the batch: what distillation lowers."""

    def divergence_scale(self, temperature: float) -> float:
        """What the divergence is multiplied by, so that its gradient does not shrink as the temperature rises."""
        return 1.0

    @abstractmethod
    def answers(self, outputs: "torch.Tensor") -> Targets:
        """Targets (N,) that outputs (N, K) amount to. An audit takes them for examples that a model knows."""

    @abstractmethod
    def contradictions(self, outputs: "torch.Tensor") -> Targets:
        """Targets (N,) that outputs (N, K) are furthest from: what an audit plants."""

    @abstractmethod
    def outputs_of(self, targets: "torch.Tensor") -> "torch.Tensor":
        """Outputs (N, K) that stand for these targets (N,): the `agreement` with them is the score."""

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Headers of a prediction's columns in a CSV file."""

    columns_shown: ClassVar[int]
    """How many of them a terminal shows, from the first."""

    @abstractmethod
    def cells(self, answer: NDArray[np.float32], threshold: float | None, digits: int = 6) -> tuple[str, ...]:
        """A prediction as text, a cell for each of `columns`, from one row (K,) behind the link.

        `threshold` is the bundle's, for two classes; `digits` is how many a probability has after the decimal point.
        """

    @abstractmethod
    def facts(self) -> tuple[tuple[str, str], ...]:
        """Rows of a model card's table about the model: what it answers with."""

    @abstractmethod
    def limits(self) -> tuple[str, ...]:
        """Sentences of a model card's section on limits."""

    def describe(self) -> dict[str, Any] | None:
        """JSON-able description of the target for a bundle's manifest, beside the labels; None: they say it all."""
        return None

    @staticmethod
    @abstractmethod
    def nothing_learned(line: Mapping[str, Any]) -> str | None:
        """The warning for a round's line in metrics.jsonl whose model is no better than a constant.

        None: it is better, or that is not known.
        """

    @abstractmethod
    def random_targets(self, count: int, generator: np.random.Generator) -> Targets:
        """(count,) targets that reveal nothing of anybody's data."""

    def check_metrics(self, names: Sequence[str]) -> None:
        """Raise DataError, with the names, for metrics that the task does not have."""
        if unknown := [name for name in names if name not in self.metrics]:
            raise DataError(
                f"a {self.name} task has no metric {', '.join(unknown):.200}; it has {', '.join(self.metrics)}"
            )
