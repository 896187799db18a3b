"""Made sites whose rows were followed for some time: days until death or the end of the study, by arm of treatment."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.made_tables import NAMES

DAYS = [0, 3000]
SCHEMA = {
    "columns": [
        {"name": "days", "kind": "numeric", "range": DAYS},
        {"name": "age", "kind": "numeric"},
        {"name": "relapsed", "kind": "boolean"},
        {"name": "arm", "kind": "categorical", "levels": ["old", "new"]},
        {"name": "code", "kind": "categorical", "levels": [f"c{number}" for number in range(200)]},
    ],
    "target": {"name": "outcome", "labels": ["alive", "dead"]},
}


def make_survival_sites(root: Path, *, rows: int = 200, count: int = 3, **policy: Any) -> tuple[Path, ...]:
    """Write `count` sites of `rows` training rows; days are Weibull, longer on the new arm, a tenth of them missing."""
    directories = []
    rules = {
        "workloads": ["tabular"],
        "strategies": ["fedavg"],
        "epsilon": None,
        "delta": 1e-3,
        "statistics": {"epsilon": 1e6, "survival": True},
        **policy,
    }
    for number in range(count):
        directory = root / "sites" / NAMES[number]
        directory.mkdir(parents=True)
        random = np.random.default_rng(number)
        for name in ("train.csv", "test.csv"):
            (directory / name).write_text(_table(random, rows))
        (directory / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
        site = {
            "name": NAMES[number],
            "workload": "tabular",
            "schema_file": "schema.yaml",
            "data": {"train": "train.csv", "test": "test.csv"},
            "policy": rules,
        }
        (directory / "site.yaml").write_text(yaml.safe_dump(site))
        directories.append(directory)
    (root / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
    return tuple(directories)


def _table(random: np.random.Generator, rows: int) -> str:
    new = random.integers(0, 2, rows)
    until_death = random.weibull(1.2, rows) * np.where(new, 1800, 900)
    until_end = random.uniform(300, 2900, rows)
    days = np.clip(np.minimum(until_death, until_end), *DAYS)
    lines = ["days,age,relapsed,arm,code,outcome"]
    for row in zip(days, random.normal(60, 9, rows), random.integers(0, 2, rows), new, strict=True):
        died = "dead" if until_death[len(lines) - 1] <= until_end[len(lines) - 1] else "alive"
        time = "" if random.random() < 0.1 else repr(float(row[0]))
        lines.append(f"{time},{row[1]:.1f},{row[2]},{('old', 'new')[row[3]]},c{row[2]},{died}")
    return "\n".join(lines) + "\n"
