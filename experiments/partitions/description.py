"""What a partition is, in numbers: for a run's record, a terminal and a plot."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedclaw.protocol.frozen import Frozen
from fedclaw.simulation.partitions.base import Indices, Partition

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


class InputChange(Frozen):
    """What clients' instruments do to their inputs."""

    kind: str
    unit: str
    levels: tuple[float, ...]
    """By client."""


class Description(Frozen):
    """partition.json."""

    dataset: str | None = None
    seed: int | None = None
    settings: dict[str, Any]
    """The method's, by name."""
    label: str
    """The method and its settings in a line."""
    clients: int = Field(ge=1)
    names: tuple[str, ...] | None = None
    """Of the clients, if they have any; they are counted from 0 otherwise."""
    examples: int = Field(ge=1)
    labels: tuple[str, ...]
    minimum: int = Field(ge=1)
    """The fewest examples that every client was to get."""
    sizes: dict[str, float]
    """Quantiles of the clients' numbers of examples, by probability, and their mean."""
    labels_per_client: dict[str, float]
    """Quantiles of how many different labels a client has, and their mean."""
    total_variation: dict[str, float]
    """mean and largest: of the clients' total-variation distances, half the sum of absolute differences, between
    their shares of labels and everybody's (0: the same; towards 1: nothing in common). if_iid: the mean that clients
    of these sizes would have if labels were dealt at random, by one seeded draw: small clients are never alike."""
    inputs: InputChange | None = None
    label_counts: tuple[tuple[int, ...], ...]
    """By client, then by label."""

    def to_json(self) -> str:
        """The JSON text, with a line for each client's label counts."""
        head = json.dumps(self.model_dump(mode="json", exclude={"label_counts"}), indent=2, ensure_ascii=False)
        rows = ",\n".join(f"    {json.dumps(list(row))}" for row in self.label_counts)
        return head.removesuffix("\n}") + f',\n  "label_counts": [\n{rows}\n  ]\n}}\n'


def describe(
    partition: Partition,
    targets: Indices,
    *,
    seed: int | None = None,
    dataset: str | None = None,
    labels: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
) -> Description:
    """Describe a partition of rows with `targets` (N,), class indices.

    `seed` and `dataset` say what it was dealt from; `labels` names the classes, their indices being their names
    otherwise, and `names` the clients. The description has counts of the clients' labels: it is for data that is made
    up into sites, not for a real site's.
    """
    classes = len(labels) if labels is not None else int(targets.max()) + 1
    cells = partition.owners * classes + targets
    counts = np.bincount(cells, minlength=partition.clients * classes).reshape(partition.clients, classes)
    sizes = counts.sum(axis=1)
    pooled = counts.sum(axis=0) / counts.sum()
    distances = _distances(counts, pooled)
    # A description of the same partition is the same text: this draw has a seed of its own.
    chance = np.random.default_rng(0).multinomial(sizes, pooled)
    transform = partition.transform
    return Description(
        dataset=dataset,
        seed=seed,
        settings=partition.method.model_dump(mode="json"),
        label=partition.method.label,
        clients=partition.clients,
        names=None if names is None else tuple(names),
        examples=len(targets),
        labels=tuple(labels) if labels is not None else tuple(str(label) for label in range(classes)),
        minimum=partition.method.fewest(len(targets), partition.clients),
        sizes=_quantiles(sizes),
        labels_per_client=_quantiles((counts > 0).sum(axis=1)),
        total_variation={
            "mean": _short(distances.mean()),
            "largest": _short(distances.max()),
            "if_iid": _short(_distances(chance, pooled).mean()),
        },
        inputs=None
        if transform is None
        else InputChange(kind=transform.kind, unit=transform.unit, levels=tuple(map(_short, transform.levels))),
        label_counts=tuple(map(tuple, counts.tolist())),
    )


def label_distances(description: Description) -> NDArray[np.float64]:
    """(K,) each client's total-variation distance, as in `Description.total_variation`."""
    counts = np.array(description.label_counts)
    return _distances(counts, counts.sum(axis=0) / counts.sum())


def _distances(counts: Indices, pooled: NDArray[np.float64]) -> NDArray[np.float64]:
    """(K,) total-variation distances of the rows of `counts` from `pooled`."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    distances: NDArray[np.float64] = np.abs(shares - pooled).sum(axis=1) / 2
    return distances


def _quantiles(values: Indices) -> dict[str, float]:
    found = np.quantile(values, QUANTILES)
    named = {f"{probability:g}": _short(value) for probability, value in zip(QUANTILES, found, strict=True)}
    return named | {"mean": _short(values.mean())}


def _short(value: float) -> float:
    """Four decimals: enough to look at, and no more digits than the number means."""
    return round(float(value), 4)
