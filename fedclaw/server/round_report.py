"""The outcome of a round: the report for observers, and the record in the checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from pydantic import ConfigDict

from fedclaw.errors import CheckpointError
from fedclaw.privacy.distributed import Price
from fedclaw.protocol.arrays import Arrays
from fedclaw.protocol.frozen import Frozen
from fedclaw.server.checkpoint import Checkpoint
from fedclaw.server.cohort_question import Declined
from fedclaw.server.evaluation import EvaluationQuestion
from fedclaw.server.run_directory import RunDirectory, RunRecord, SiteReceipt
from fedclaw.server.training import TrainingQuestion


@dataclass(frozen=True)
class RoundReport:
    """The report of one round. Metrics are of the parameters after the round; seconds are wall-clock."""

    round: int
    rounds: int
    answered: tuple[str, ...]
    declined: tuple[Declined, ...]
    silent: tuple[str, ...]
    update_norm: float
    train_seconds: float
    evaluate_seconds: float
    metrics: Mapping[str, float]
    test_examples: int
    receipts: Mapping[str, SiteReceipt]
    price: Price | None = None
    """What the sites' noise on the sum cost beside a trusted server's, where they brought it."""
    bytes_up: int = 0
    """Of the arrays of all answers that were added."""
    bytes_down: int = 0
    """Of the arrays that the sites of those answers trained from."""
    over_sites: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Second figures: of each metric that is a ratio the mean over the sites, its spread, and how many they are."""
    beside: Mapping[str, Any] = field(default_factory=dict)
    """What else the task makes of the sums, as plain values: figures by class, bounds, a constant answer's figure."""

    @classmethod
    def of(
        cls,
        number: int,
        rounds: int,
        result: "RoundResult",
        evaluated: EvaluationQuestion | None,
        receipts: Mapping[str, SiteReceipt],
    ) -> "RoundReport":
        """The report of round `number` of `rounds`; `evaluated` None: nobody was asked."""
        tally = evaluated.read() if evaluated else None
        return cls(
            round=number,
            rounds=rounds,
            answered=result.answered,
            declined=tuple(Declined(*item) for item in result.declined),
            silent=result.silent,
            update_norm=result.update_norm,
            train_seconds=result.seconds,
            evaluate_seconds=evaluated.seconds if evaluated else 0.0,
            metrics=tally.metrics if tally else {},
            test_examples=evaluated.examples if evaluated else 0,
            receipts=receipts,
            price=None if result.price is None else Price(**result.price),
            bytes_up=result.bytes_up,
            bytes_down=result.bytes_down,
            over_sites=tally.over_sites if tally else {},
            beside=tally.beside if tally else {},
        )

    def as_line(self) -> dict[str, Any]:
        """The round's line in the run's metrics, as plain values."""
        price = {} if self.price is None else {"noise_price": asdict(self.price)}
        return {
            **price,
            "over_sites": {name: dict(values) for name, values in self.over_sites.items()},
            **self.beside,
            "metrics": dict(self.metrics),
            "test_examples": self.test_examples,
            "answered": list(self.answered),
            "declined": {declined.site: declined.code for declined in self.declined},
            "silent": list(self.silent),
            "update_norm": self.update_norm,
            "train_seconds": round(self.train_seconds, 4),
            "evaluate_seconds": round(self.evaluate_seconds, 4),
            "epsilon": {site: item.receipt.epsilon_run for site, item in self.receipts.items()},
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
        }


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves."""

    directory: RunDirectory
    parameters: Arrays
    metrics: dict[str, float] = field(default_factory=dict)
    receipts: dict[str, SiteReceipt] = field(default_factory=dict)


class Observer(Protocol):
    """Follows a run, as the terminal and MLflow do."""

    def started(self, record: RunRecord, first_round: int) -> None:
        """The run begins, or goes on, with `first_round`."""

    def finished_round(self, report: RoundReport) -> None:
        """A round counts: its checkpoint is on disk."""

    def finished(self, outcome: Outcome) -> None:
        """The last round is done."""


class RoundResult(Frozen):
    """Who answered in a round, and at what cost. It is in the round's checkpoint, for the round's line in the metrics
    is written later."""

    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="constants")
    """A model that overflows has an infinite update, and its round counts."""

    answered: tuple[str, ...]
    declined: tuple[tuple[str, str, str], ...] = ()
    """Site, code and reason."""
    silent: tuple[str, ...] = ()
    update_norm: float = 0.0
    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    price: dict[str, float] | None = None

    @classmethod
    def of(cls, trained: TrainingQuestion, norm: float) -> "RoundResult":
        """The result of a round that has counted."""
        price = trained.price
        return cls(
            answered=tuple(trained.answered),
            declined=tuple((item.site, item.code, item.reason) for item in trained.declined),
            silent=tuple(trained.silent),
            update_norm=norm,
            seconds=trained.seconds,
            bytes_up=trained.bytes_up,
            bytes_down=trained.bytes_down,
            price=None if price is None else asdict(price),
        )


def result_of(saved: Checkpoint | None) -> RoundResult | None:
    """The result in a checkpoint; None if there is none. Raises CheckpointError when it is damaged."""
    if saved is None or saved.came is None:
        return None
    try:
        return RoundResult.model_validate(saved.came)
    except ValueError as error:
        raise CheckpointError(f"the checkpoint of round {saved.round} is damaged in what the round came to") from error
