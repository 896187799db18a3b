"""runtime=simulation of `experiments.run`: clients dealt in memory, trained by `fedclaw.simulation`."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from experiments.attacks.base import Attack
from experiments.attacks.simulated import simulate_attacked_cohorts
from experiments.partitions.in_memory import InMemory, in_memory
from experiments.partitions.record import write_record
from experiments.settings import SimulationRuntime
from experiments.sources import DatasetSettings
from fedclaw.files import write_atomic
from fedclaw.learning.registry import workload_class
from fedclaw.server.round_report import Observer, Outcome
from fedclaw.server.run_directory import RunDirectory
from fedclaw.simulation import SimulatedFederation, simulate_cohorts
from fedclaw.simulation.partitions.settings import PartitionSettings

MOST_PLOTTED = 1000
"""Clients up to which the partition is described and plotted beside the run."""


def deal_in_memory(dataset: DatasetSettings, partition: PartitionSettings, runtime: SimulationRuntime) -> InMemory:
    """All clients' data. Raises UsageError naming the setting that the data cannot bear."""
    return in_memory(dataset, partition, runtime.clients or dataset.sites)


def write_root(dealt: InMemory, runs: Path, identity: str) -> Path:
    """A directory with the clients' schema, and the partition's record, found again by `identity`."""
    root = runs / "data" / f"simulated-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    if not (root / "schema.yaml").is_file():
        if len(dealt.shares) <= MOST_PLOTTED:
            root.mkdir(parents=True, exist_ok=True)
            write_record(dealt.description, root)
        write_atomic(root / "schema.yaml", dealt.schema.to_json().encode())
    return root


def federation_of(dealt: InMemory) -> SimulatedFederation:
    """Clients are evaluated on their own test data, or, where they have none, as a whole on the public data."""
    workload = workload_class(dealt.workload)(dealt.schema)
    if all(len(own) for own in dealt.tests):
        return SimulatedFederation(workload, dealt.table, dealt.shares, tests=dealt.tests)
    return SimulatedFederation(workload, dealt.table, dealt.shares, test=dealt.public)


def run_simulated(
    directory: RunDirectory,
    dealt: InMemory,
    runtime: SimulationRuntime,
    observers: Sequence[Observer],
    attack: Attack | None = None,
) -> Outcome:
    """Run, or go on with, the run in `directory`."""
    if attack is not None and attack.sites:
        return simulate_attacked_cohorts(directory, federation_of(dealt), attack, runtime, observers)
    return simulate_cohorts(directory, federation_of(dealt), runtime, observers)
