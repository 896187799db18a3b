"""A federation whose every answer can be worked out by hand: each site's loss is a parabola with its own bottom.

Site i has the loss 1/2 sum_j a_ij (w_j - b_ij)^2, the same for each of its examples, so that a batch of any size is a
full batch, and nothing is random. The sites, the loop and the wire between them are the real ones.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from flwr.app import Message
from torch import nn

from fedclaw.errors import DataError
from fedclaw.learning.workload import Floats, Schema, Table, Workload
from fedclaw.privacy.secure_aggregation import Sessions, local_identities
from fedclaw.protocol.terms import LocalTraining, ModelSpec, RoundRules, StrategyRecord
from fedclaw.server.coordinator import run_rounds
from fedclaw.server.round_report import Outcome
from fedclaw.server.run_directory import RunDirectory, RunRecord
from fedclaw.site.journal.ledger import Ledger
from fedclaw.site.policy.policy import Policy
from fedclaw.site.secure import SecureIdentity
from fedclaw.site.service import SiteService
from fedclaw.site.site import SiteData
from fedclaw.site.state import SiteStates
from fedclaw.transport.base import SiteHandler
from fedclaw.transport.in_process import LocalGrid, local_grid
from tests.samples import run_record

PLACE = "place"
FEDERATION = "clinic"


@dataclass(frozen=True)
class Bowl:
    """One site's loss, and how many examples it has."""

    bottom: tuple[float, ...]
    curvature: tuple[float, ...] | None = None
    """None: 1 in every coordinate."""
    examples: int = 1

    @property
    def table(self) -> Table:
        """Rows of (square root of the curvature, bottom)."""
        curvature = self.curvature or (1.0,) * len(self.bottom)
        row = np.concatenate([np.sqrt(curvature), self.bottom]).astype(np.float32)
        return Table(np.tile(row, (self.examples, 1)), np.zeros(self.examples, np.int64))


class Point(nn.Module):
    """The parameters are the place itself."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(size))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(N, 2D) -> (N, D)."""
        root, bottom = inputs.chunk(2, dim=1)
        return root * (self.place - bottom)


class Bowls(Schema):
    """A table of `Bowl.table`'s rows for places of `size` coordinates; there are no files."""

    name: ClassVar[str] = "least_squares"

    def __init__(self, size: int) -> None:
        self.size = size

    @classmethod
    def parse(cls, text: str, origin: str) -> Self:
        return cls(json.loads(text)["size"])

    def to_json(self) -> str:
        return json.dumps({"size": self.size})

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (2 * self.size,)

    @property
    def labels(self) -> tuple[str, ...]:
        return ("none",)

    def read_examples(self, path: Path) -> Table:
        raise DataError(f"{path}: a bowl is made, not read")

    def read_inputs(self, path: Path) -> Floats:
        raise DataError(f"{path}: a bowl is made, not read")

    def describe_inputs(self) -> Mapping[str, Any]:
        return {}

    def synthetic_inputs(self, count: int, generator: np.random.Generator) -> Floats:
        return generator.normal(size=(count, 2 * self.size)).astype(np.float32)


class LeastSquares(Workload):
    """Half the mean squared output."""

    name: ClassVar[str] = "least_squares"

    def __init__(self, size: int) -> None:
        super().__init__(Bowls(size))
        self.size = size

    def default_model(self) -> ModelSpec:
        return ModelSpec(name="point")

    def build(self, spec: ModelSpec) -> nn.Module:
        return Point(self.size)

    def spec_of(self, model: nn.Module) -> ModelSpec:
        return self.default_model()

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return logits.square().sum() / 2 / max(len(targets), 1)

    def evaluate(self, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        return {"loss": float(self.loss(logits, targets))}


def service(
    name: str, workload: Workload, train: Table, *, test: Table | None = None, root: Path | None = None, **policy: Any
) -> SiteService:
    """A site that refuses nothing but by `policy`; it keeps its states in `root`, if that is given."""
    open_policy = {
        "allow_training_without_privacy": True,
        "epsilon": None,
        "delta": 0.1,
        "minimum_cohort": 1,
        "minimum_test_examples": 1,
    }
    rules = {"workloads": (workload.name,), "max_local_steps": None, **open_policy, **policy}
    strategies = tuple(sorted(path.stem for path in (Path(__file__).parents[1] / "conf" / "strategy").glob("*.yaml")))
    return SiteService(
        name=name,
        federation=FEDERATION,
        workload=workload,
        schema_digest=run_record().schema_digest,
        data=SiteData(train, test, fingerprint=name),
        policy=Policy(**{"strategies": strategies, "metrics": ("loss", "accuracy"), **rules}),
        ledger=Ledger.open(":memory:", name),
        states=SiteStates(root),
    )


class Sampled(LocalGrid):
    """Everybody is connected, and only those of COHORTS answer."""

    COHORTS: ClassVar = (("a", "b"), ("c",), ("b", "c"), ("a",))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        messages = list(messages)
        cohort = self.COHORTS[(int(messages[0].metadata.group_id) - 1) % len(self.COHORTS)]
        there = [message for message in messages if self.site_name(message.metadata.dst_node_id) in cohort]
        return super().send_and_receive(there, timeout=timeout)


def identified(services: Mapping[str, SiteService]) -> None:
    """Give the sites what secure aggregation needs."""
    identities, verifier = local_identities(FEDERATION, sorted(services))
    for name, site in services.items():
        site.secure = SecureIdentity(identities[name], verifier, Sessions())


def bowls(sites: Mapping[str, Bowl], root: Path | None = None) -> dict[str, SiteService]:
    """A site for each, by name; tested on what it is trained on."""
    made = {}
    for name, bowl in sites.items():
        states = None if root is None else root / name
        table = bowl.table
        made[name] = service(name, LeastSquares(len(bowl.bottom)), table, test=table, root=states)
    return made


def asked(strategy: str, *, rounds: int, steps: int = 1, rate: float = 0.1, **changes: Any) -> RunRecord:
    """A run of `steps` full-batch steps a round; `settings` are the strategy's."""
    settings = changes.pop("settings", {})
    fields: dict[str, Any] = {
        "workload": LeastSquares.name,
        "model": ModelSpec(name="point"),
        "strategy": StrategyRecord(name=strategy, settings=settings),
        "rounds": rounds,
        "training": LocalTraining(steps=steps, batch_size=1000, learning_rate=rate),
        "privacy": None,
        "metrics": ("loss",),
        "rules": RoundRules(minimum=1),
    }
    return run_record(**{**fields, **changes})


def play(
    root: Path,
    record: RunRecord,
    sites: Mapping[str, SiteHandler],
    start: Mapping[str, np.ndarray] | None = None,
    grid: type[LocalGrid] = LocalGrid,
) -> Outcome:
    """Run, or go on with, the run in `root`; from zero, if `start` says nothing."""
    directory = RunDirectory(root) if (root / "run.json").exists() else RunDirectory.create(root, record)
    if start is None:
        first: Any = next(iter(sites.values()))
        start = {PLACE: np.zeros(first.workload.size, np.float32)}
    made = local_grid(sites, record.run)
    return run_rounds(made if grid is LocalGrid else grid(sites, made.run.run_id), directory, start)


def place(outcome: Outcome) -> np.ndarray:
    """Where a run ended."""
    return outcome.parameters[PLACE]


def bottom(sites: Mapping[str, Bowl], weights: Mapping[str, float] | None = None) -> np.ndarray:
    """Where the weighted mean of the sites' losses is least; weighted by examples, if `weights` says nothing."""
    top, below = 0.0, 0.0
    for name, bowl in sites.items():
        weight = bowl.examples if weights is None else weights[name]
        curvature = np.array(bowl.curvature or (1.0,) * len(bowl.bottom))
        top, below = top + weight * curvature * np.array(bowl.bottom), below + weight * curvature
    return top / below
