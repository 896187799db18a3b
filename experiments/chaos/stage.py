"""What every trial needs: bundles, tokens, nodes, clients; and how a finding is told."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from rich.console import Console

from experiments.benchmarks.report import Figure, Row
from experiments.serving.bundles import Digits, Foundry
from experiments.serving.clients import Crowd
from experiments.serving.issuer import Issuer
from experiments.serving.servers import Node, NodePorts
from fedclaw.protocol.frozen import Frozen
from fedclaw.serve.publish import AdminClient

MODEL = "digits"
PRINCIPALS = 5
"""Clients of so many names ask: what only one of them sees is not believed at once."""


class ChaosSettings(Frozen):
    """conf/chaos.yaml, checked."""

    trials: int = Field(ge=1)
    only: tuple[str, ...] | None
    clients: int = Field(ge=1, le=64)
    together: int = Field(ge=1, le=64)
    keys: int = Field(ge=10)
    patience: float = Field(gt=0)
    bundles: Path | None


@dataclass(frozen=True)
class Finding:
    """Of one kind of trial: rows for people, figures for machines."""

    rows: Sequence[Row]
    figures: Mapping[str, Figure]


@dataclass
class Stage:
    """Where the trials are played; each node has a directory of its own under `root`."""

    settings: ChaosSettings
    root: Path
    console: Console
    digits: Digits = field(default_factory=Digits.load)

    def __post_init__(self) -> None:
        kept = self.settings.bundles or self.root / "bundles"
        kept.mkdir(parents=True, exist_ok=True)
        self.foundry = Foundry(kept, self.digits)
        self.issuer = Issuer(self.root / "jwks.json")
        self.tokens = [self.issuer.token(subject=f"client-{place}") for place in range(PRINCIPALS)]
        self.operator = self.issuer.token(subject="operator")
        self._numbers = itertools.count()

    def say(self, words: str) -> None:
        """A line of progress."""
        self.console.print(words, style="dim", markup=False)

    def node(
        self,
        models: Sequence[str] = (MODEL,),
        workers: int = 2,
        root: Path | None = None,
        ports: NodePorts | None = None,
        name: str = "node",
        **settings: Any,
    ) -> Node:
        """A node at which every model has one version, `cnn`; `settings` with __ for a dot."""
        place = root or self.root / f"node-{next(self._numbers)}"
        told = {key.replace("__", "."): value for key, value in settings.items()}
        bundle = str(self.foundry.bundle("cnn"))
        served = {model: {"bundle": bundle} for model in models}
        given = {"workers": workers, **told}
        return Node(place, self.foundry, self.issuer, served, ports=ports, name=name, settings=given)

    def admin(self, node: Node) -> AdminClient:
        """An operator's access to a node."""
        return AdminClient(node.admin, self.operator, None)

    def crowd(self, url: str, model: str = MODEL, *, white: bool = False, **more: Any) -> Crowd:
        """Clients of all principals; with `white` they ask what `errs` fails on."""
        prefix = f"{next(self._numbers)}-"
        rows = self.white if white else self.digit
        return Crowd(url, self.tokens, model, rows, more.pop("clients", self.settings.clients), prefix=prefix, **more)

    def digit(self, number: int) -> NDArray[np.uint8]:
        """The n-th digit, one row."""
        place = number % len(self.digits.pixels)
        return self.digits.pixels[place : place + 1]

    def white(self, number: int) -> NDArray[np.uint8]:
        """A white image."""
        return np.full((1, *self.digits.pixels.shape[1:]), 255, np.uint8)


def worst(values: Sequence[float | None]) -> float:
    """The largest; infinity where one of them never came."""
    return max(float("inf") if value is None else value for value in values)


def tell_seconds(value: float) -> str:
    """For a table."""
    return "never" if value == float("inf") else f"{value:.2f} s"
