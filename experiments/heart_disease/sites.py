"""The hospitals as FedClaw's own sites: directories with a policy, a schema and two tables."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from experiments.heart_disease.prepare import Hospitals, Part, Split
from fedclaw.site.settings import SITE_FILE

Standardise = Literal["site", "federated"]
"""By each site's own training rows, as FLamby does; or by statistics of the federation."""

OUTCOME = "outcome"
LABELS = ("absent", "present")
STRATEGIES = ("fedavg", "fedavgm", "fedprox", "fedadagrad", "fedadam", "fedyogi", "scaffold", "cyclic")

RANGES = {
    "age": (20.0, 90.0),
    "trestbps": (0.0, 250.0),
    "chol": (0.0, 700.0),
    "thalach": (40.0, 240.0),
    "oldpeak": (-5.0, 10.0),
}
"""Smallest and largest value of a measurement: years, mm Hg, mg/dl, beats a minute, mm. From what is known of such
measurements, not from the data; 0 stands for a blood pressure or cholesterol that was not measured. All other features
are 0 or 1."""


@dataclass(frozen=True)
class HospitalPolicy:
    """What each hospital allows. With an epsilon it is the budget of training and statistics together."""

    epsilon: float | None = None
    delta: float = 1e-3
    statistics_epsilon: float | None = None
    minimum_cohort: int = 1


def write_schema(path: Path, features: tuple[str, ...], standardise: Standardise) -> Path:
    """The schema that all of them agree on: every feature is a number."""
    columns = [{"name": name, "kind": "numeric", "range": list(RANGES.get(name, (0.0, 1.0)))} for name in features]
    content = {"columns": columns, "target": {"name": OUTCOME, "labels": list(LABELS)}, "standardise": standardise}
    _write_yaml(path, content)
    return path


def write_hospitals(
    root: Path, hospitals: Hospitals, standardise: Standardise, policy: HospitalPolicy
) -> dict[str, Path]:
    """The directories of the hospitals' sites, by name, and ROOT/schema.yaml."""
    schema = write_schema(root / "schema.yaml", hospitals.features, standardise)
    return {
        name: _write_site(root / name, name, schema, hospitals.features, split, policy)
        for name, split in hospitals.splits.items()
    }


def write_pooled(root: Path, hospitals: Hospitals) -> Path:
    """The directory of one site with everybody's rows, which it standardises by their mean and deviation."""
    schema = write_schema(root / "schema.yaml", hospitals.features, "site")
    return _write_site(root / "pooled", "pooled", schema, hospitals.features, hospitals.pooled(), HospitalPolicy())


def _write_site(
    directory: Path, name: str, schema: Path, features: tuple[str, ...], split: Split, policy: HospitalPolicy
) -> Path:
    files = {"train": "train.csv", "test": "test.csv"}
    directory.mkdir(parents=True)
    for part, rows in (("train", split.train), ("test", split.test)):
        _write_table(directory / files[part], features, rows)
    content = {
        "name": name,
        "workload": "tabular",
        "schema_file": str(schema.absolute()),
        "data": files,
        "policy": _policy(policy),
    }
    _write_yaml(directory / SITE_FILE, content)
    return directory


def _policy(policy: HospitalPolicy) -> dict[str, Any]:
    return {
        "workloads": ["tabular"],
        "strategies": list(STRATEGIES),
        "epsilon": policy.epsilon,
        "delta": policy.delta,
        "allow_training_without_privacy": policy.epsilon is None,
        "minimum_cohort": policy.minimum_cohort,
        "statistics": None if policy.statistics_epsilon is None else {"epsilon": policy.statistics_epsilon},
    }


def _write_table(path: Path, features: tuple[str, ...], rows: Part) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*features, OUTCOME])
        for numbers, label in zip(rows.features, rows.labels, strict=True):
            writer.writerow([*(repr(float(number)) for number in numbers), LABELS[label]])


def _write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False, default_flow_style=None), encoding="utf-8")
