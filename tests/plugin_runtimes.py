"""Runs federations of the page's plug-ins: `python tests/plugin_runtimes.py ROOT (RUNTIME RUN SETTINGS)...`.

A process of its own, for the plug-ins are installed where only it looks. `ROOT/sites` and `ROOT/series.yaml` are made
by `deal`; a run is ROOT/runs/RUN.
"""

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

SITES = 3
FEDERATION = "clinic"
SITE = """
name: {name}
workload: series
schema_file: ../../series.yaml
data: {{train: train.npz, test: test.npz}}
policy:
  workloads: [series]
  strategies: [fedpull]
  epsilon: null
  delta: 1.0e-3
  allow_training_without_privacy: true
"""
COMMON = f"tracking=none sites.minimum={SITES}"
PLAIN = (
    "privacy=none strategy=fedpull strategy.pull=0.05 workload=series workload.model.name=net "
    "workload.model.args={width:8} "
    "training.epochs=null training.steps=2 training.batch_size=100000 training.learning_rate=0.5 rounds=3"
)


def deal(root: Path) -> list[Path]:
    """Three sites' files, whose two classes rise and fall."""
    (root / "series.yaml").write_text("{steps: 12, labels: [falls, rises]}\n")
    sites = []
    for number in range(SITES):
        site = root / "sites" / f"site-{number}"
        site.mkdir(parents=True)
        (site / "site.yaml").write_text(SITE.format(name=site.name))
        generator = np.random.default_rng(number)
        for name, count in (("train", 40 + 10 * number), ("test", 20)):
            y = generator.integers(0, 2, count)
            x = generator.normal(size=(count, 12)) + np.linspace(-1, 1, 12) * (2 * y - 1)[:, None]
            np.savez(site / f"{name}.npz", x=x, y=y)
        sites.append(site)
    return sites


def in_process(root: Path, name: str, settings: str) -> None:
    """The server's loop and the sites' code in this process."""
    from fedclaw.transport.in_process import open_sites, simulate

    simulate(_begin(root, name, settings), open_sites(_sites(root), FEDERATION))


def simulation(root: Path, name: str, settings: str) -> None:
    """Simulated clients in two worker processes, each tested on its own examples."""
    from fedclaw.learning.registry import schema_class, workload_class
    from fedclaw.learning.workload import Table
    from fedclaw.server.run_directory import RunDirectory
    from fedclaw.simulation import SimulatedFederation, SimulationSettings, simulate_cohorts, simulated
    from fedclaw.site.settings import load_site_settings

    schema = schema_class("series").parse((root / "series.yaml").read_text(), "series.yaml")
    parts = [schema.read_examples(site / f"{part}.npz") for part in ("train", "test") for site in _sites(root)]
    rows = [np.arange(*pair) for pair in pairwise(np.cumsum([0, *map(len, parts)]))]
    inputs, targets = (np.concatenate([getattr(part, name) for part in parts]) for name in ("inputs", "targets"))
    workload = workload_class("series")(schema)
    policy = load_site_settings(_sites(root)[0]).policy
    federation = SimulatedFederation(workload, Table(inputs, targets), rows[:SITES], tests=rows[SITES:], policy=policy)
    way = SimulationSettings(workers=2)
    record = simulated(_record(root, name, settings), way, SITES)
    simulate_cohorts(RunDirectory.create(root / "runs" / name, record), federation, way)


def flower(root: Path, name: str, settings: str) -> None:
    """FedClaw's Flower apps on Flower's own grid and link state, with a thread for each SuperNode."""
    from fedclaw.transport.flower.rounds import run_over
    from tests.transport.flower.conftest import Fleet

    fleet = Fleet()
    for site in _sites(root):
        fleet.join(site)
    run_over(fleet.grid, _begin(root, name, settings), _settings(root, name, settings).sites, [])
    for node in fleet.nodes:
        node.close()


def ray(root: Path, name: str, settings: str) -> None:
    """Flower's simulation engine on Ray."""
    from fedclaw.transport.ray import RaySettings, simulate_on_ray

    simulate_on_ray(_begin(root, name, settings), _sites(root), RaySettings(cpus=2, object_store=100 << 20))


def _sites(root: Path) -> list[Path]:
    return sorted((root / "sites").iterdir())


def _settings(root: Path, name: str, settings: str) -> Any:
    from fedclaw.transport.flower.server import read_settings

    given = {"federation": FEDERATION, "runs": str(root / "runs"), "run": name, "settings": f"{COMMON} {settings}"}
    return read_settings({**given, "workload.schema_file": str(root / "series.yaml")})


def _record(root: Path, name: str, settings: str) -> Any:
    from fedclaw.protocol.terms import RoundRules
    from fedclaw.server.session import make_record

    return make_record(_settings(root, name, settings), FEDERATION, name, RoundRules(minimum=SITES))


def _begin(root: Path, name: str, settings: str) -> Any:
    from fedclaw.server.run_directory import RunDirectory

    return RunDirectory.create(root / "runs" / name, _record(root, name, settings))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    place, *wanted = sys.argv[1:]
    for runtime, run, asked in zip(wanted[::3], wanted[1::3], wanted[2::3], strict=True):
        globals()[runtime](Path(place), run, asked)
