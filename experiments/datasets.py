"""Data sets of `experiments.sources`, dealt out to sites as files, each site's in its own directory.

    python -m experiments.datasets output=quickstart
    python -m experiments.datasets output=quickstart dataset=digits dataset.sites=3 partition=shards partition.shards=4

    ROOT/schema.yaml            what the federation agreed on
    ROOT/public/                a small public reference set of the coordinator: one half as inputs alone, the other
                                half labelled
    ROOT/sites/NAME/            site.yaml  schema.yaml  data/train.*  data/test.*

Which site has what, partition= says (see `experiments.partitions`); if nothing else is asked for, sites differ by label
and by size, as real ones do. The schema's constants come from the public reference set, so that no site's data goes
into them.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("experiments.datasets", __doc__)

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import Field

from experiments.partitions.dealing import Dealt, deal_out
from experiments.sources import PERSON, DatasetSettings, Source, pixels, schema_of
from fedclaw.cli import make_console, run_main, settings_of
from fedclaw.clients.arrays import PERSONS
from fedclaw.errors import UsageError
from fedclaw.learning.registry import STRATEGIES, installed
from fedclaw.learning.tasks.classification import Classification
from fedclaw.learning.tasks.regression import Regression
from fedclaw.protocol.frozen import Frozen
from fedclaw.simulation.partitions.base import Indices
from fedclaw.simulation.partitions.labels import Dirichlet
from fedclaw.simulation.partitions.settings import PartitionSettings
from fedclaw.site.policy.policy import SAFE_METRICS
from fedclaw.site.settings import SITE_FILE

SITE_NAMES = ("hospital-north", "hospital-east", "hospital-south", "hospital-west")
USUAL = Dirichlet()
"""How data is dealt where nothing is said: what conf/partition/dirichlet.yaml has."""


class DealSettings(Frozen):
    """conf/datasets.yaml, checked."""

    dataset: DatasetSettings
    partition: PartitionSettings
    output: Path
    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)


@dataclass(frozen=True)
class SitePolicy:
    """The policy that each made-up site writes into its site.yaml."""

    epsilon: float | None
    delta: float
    allow_training_without_privacy: bool = False
    trust_server_noise: bool = False
    require_secure_aggregation: bool = False
    minimum_cohort: int = 2
    strategies: tuple[str, ...] = field(default_factory=lambda: tuple(sorted(installed(STRATEGIES))))
    """By default all that are installed."""
    metrics: tuple[str, ...] = SAFE_METRICS


def site_names(count: int) -> tuple[str, ...]:
    """Names for `count` sites."""
    more = tuple(f"hospital-{number}" for number in range(len(SITE_NAMES) + 1, count + 1))
    return (SITE_NAMES + more)[:count]


def names_of(source: Source, count: int) -> tuple[str, ...]:
    """Of `count` sites: what the data calls them, as far as that is a site's name, or made-up ones."""
    own = tuple(re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] for name in source.site_names or ())
    usable = len(own) == count and len(set(own)) == count and all(own)
    return own if usable else site_names(count)


def write_sites(
    root: Path, settings: DatasetSettings, policy: SitePolicy, partition: PartitionSettings = USUAL
) -> tuple[Path, ...]:
    """Write the whole layout under `root` and return the sites' directories.

    Raises UsageError naming the setting that the data cannot bear.
    """
    dealt = deal_out(settings, partition)
    source, public = dealt.source, dealt.public
    count = len(public) // 2
    schema = schema_of(source, public)
    root.mkdir(parents=True, exist_ok=True)
    _write_yaml(root / "schema.yaml", schema)
    _write_table(root / "public" / "inputs", source, source.inputs[public[:count]])
    labelled = public[count:]
    _write_labelled(root / "public" / "labelled", source, labelled, source.inputs[labelled])
    directories = []
    for client, name in enumerate(names_of(source, settings.sites)):
        directory = root / "sites" / name
        files = _write_data(directory / "data", dealt, client)
        _write_yaml(directory / "schema.yaml", schema)
        _write_yaml(directory / SITE_FILE, _site(name, source, directory, files, policy))
        directories.append(directory)
    return tuple(directories)


def _write_data(directory: Path, dealt: Dealt, client: int) -> dict[str, Path]:
    """The client's files, by what they are for; `test` is left out where nothing is held out."""
    inputs, rows = dealt.inputs(client), dealt.rows(client)
    held_out = dealt.held_out(client)
    parts = {"train": slice(held_out, None), "test": slice(held_out)}
    return {
        name: _write_labelled(directory / name, dealt.source, rows[part], inputs[part])
        for name, part in parts.items()
        if name == "train" or held_out
    }


def _write_labelled(stem: Path, source: Source, rows: Indices, inputs: NDArray[Any]) -> Path:
    """The source's `rows` (N,) as `inputs` (N, *D) have them, with their targets and, if that is said, persons."""
    owners = source.owners[rows] if source.owners is not None and source.says_whose else None
    return _write_table(stem, source, inputs, source.targets[rows], owners)


def _write_table(
    stem: Path,
    source: Source,
    inputs: NDArray[Any],
    targets: NDArray[Any] | None = None,
    owners: Indices | None = None,
) -> Path:
    stem.parent.mkdir(parents=True, exist_ok=True)
    if source.workload == "vision":
        path = stem.with_suffix(".npz")
        images = pixels(source, inputs)
        named: dict[str, NDArray[Any] | None] = {"images": images, "labels": targets, PERSONS: owners}
        arrays = {name: array for name, array in named.items() if array is not None}
        np.savez_compressed(path, allow_pickle=False, **arrays)
        return path
    path = stem.with_suffix(".csv")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        persons = [] if owners is None else [PERSON]
        writer.writerow(source.features if targets is None else [*persons, *source.features, source.target])
        for row, numbers in enumerate(inputs):
            values: Sequence[Any] = [repr(float(value)) for value in numbers]
            person = [] if owners is None else [int(owners[row])]
            writer.writerow(values if targets is None else [*person, *values, _cell(source, targets[row])])
    return path


def _cell(source: Source, target: Any) -> str:
    return source.labels[target] if source.range is None else repr(float(target))


def _site(name: str, source: Source, directory: Path, files: dict[str, Path], policy: SitePolicy) -> dict[str, Any]:
    task = Classification if source.range is None else Regression
    return {
        "name": name,
        "workload": source.workload,
        "schema_file": "schema.yaml",
        "data": {part: str(path.relative_to(directory)) for part, path in files.items()},
        "policy": {
            "workloads": [source.workload],
            "strategies": list(policy.strategies),
            "epsilon": policy.epsilon,
            "delta": policy.delta,
            "allow_training_without_privacy": policy.allow_training_without_privacy,
            "trust_server_noise": policy.trust_server_noise,
            "require_secure_aggregation": policy.require_secure_aggregation,
            "minimum_cohort": policy.minimum_cohort,
            "metrics": [metric for metric in policy.metrics if metric in (*task.METRICS, *task.CLAUSES)],
        },
    }


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False, default_flow_style=None), encoding="utf-8")


def main(arguments: Sequence[str]) -> None:
    """Write the layout as the command line says."""
    settings = settings_of(arguments, "datasets", DealSettings)
    if settings.output.exists():
        raise UsageError(f"{settings.output} exists already; choose another output=")
    directories = write_sites(
        settings.output, settings.dataset, SitePolicy(settings.epsilon, settings.delta), settings.partition
    )
    console = make_console()
    console.print(f"schema: {settings.output / 'schema.yaml'}")
    for directory in directories:
        console.print(f"site:   {directory}")


if __name__ == "__main__":
    run_main("experiments.datasets", __doc__ or "", main)
