"""What compression leaves in a run directory: compressed/model.npz and compressed/compression.json."""

import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from fedclaw.array_files import arrays_to_npz, npz_to_arrays
from fedclaw.errors import CheckpointError, UsageError
from fedclaw.files import PUBLIC_MODE, sync_directory, write_atomic
from fedclaw.protocol.arrays import Arrays
from fedclaw.protocol.frozen import Frozen, explain
from fedclaw.protocol.terms import ModelSpec
from fedclaw.server.run_directory import RunDirectory

MODEL, RECORD = "model.npz", "compression.json"
_LEFTOVER, _REPLACED = ".compressed.", "old"

Measure = Literal["evaluation file", "federated evaluation", "agreement with the teacher"]
"""What the accuracies of a record measure: labelled public data, the sites' own test data, or, as no accuracy at all,
agreement with the teacher on held-out proxy inputs: the share of equal classes, or R2 with the teacher's values as the
targets."""


class Side(Frozen):
    """One model's figures."""

    parameters: int = Field(ge=1)
    multiply_adds: int = Field(ge=0)
    """Of one example, in linear and convolution layers."""
    file_bytes: int = Field(ge=0)
    latency_ms: dict[str, float]
    """Median of a forward pass by batch size; CPU, one thread."""
    metrics: dict[str, float]
    """What `Compression.accuracy_measure` says, by the names of the task's metrics."""


class Control(Frozen):
    """A baseline: the same pruned shapes, trained in another way."""

    name: Literal["fine-tuned without teacher", "distilled from scratch"]
    accuracy: float | None
    """On the evaluation file; None without one."""
    agreement: float
    """With the teacher, on held-out proxy inputs."""


class ProxyReport(Frozen):
    """Recovery at the coordinator: post-processing, so it cost no privacy."""

    mode: Literal["proxy"] = "proxy"
    inputs: str
    """Where the proxy inputs came from, and how many."""
    steps: int
    """Optimiser steps taken."""
    agreement_pruned: float
    agreement_after: float
    """The student's agreement with the teacher on held-out proxy inputs (`Task.agreement`)."""
    controls: tuple[Control, ...] = ()


class SitesReport(Frozen):
    """Recovery at the sites, under differential privacy unless their policies allowed none."""

    mode: Literal["federated"] = "federated"
    run: str
    """The recovery's own name on the sites' ledgers."""
    directory: str
    """Its run directory, inside that of the teacher; holds the receipts."""
    rounds: int
    epsilon: dict[str, float | None]
    """Spent by the recovery, by site, beyond what the teacher cost; None: unbounded."""


class Compression(Frozen):
    """compression.json. Accuracies are of the metric `score`, at most 1, measured as `accuracy_measure` says."""

    version: int = 1
    run: str
    model: ModelSpec
    teacher_sha256: str
    """Of the model.npz that was compressed."""
    fraction: float
    """Asked for; what came out is parameters_after / parameters_before."""
    parameters_before: int
    parameters_after: int
    score: str = "accuracy"
    """The task's: accuracy, or of a value R2; a record that does not say so is of accuracies."""
    accuracy_measure: Measure
    accuracy_examples: int
    accuracy_before: float
    accuracy_pruned: float
    """After pruning and before recovery."""
    accuracy_after: float
    before: Side
    after: Side
    recovery: ProxyReport | SitesReport = Field(discriminator="mode")
    seed: int
    created: datetime = Field(default_factory=lambda: datetime.now(UTC))


def require_room(run: RunDirectory, overwrite: bool) -> None:
    """Raise UsageError when <run>/compressed is there and may not be replaced."""
    _put_back(run)
    if run.compressed.exists() and not overwrite:
        raise UsageError(f"{run.compressed} already holds a result; pass overwrite=true to replace it")


def write_compressed(run: RunDirectory, record: Compression, parameters: Arrays) -> Path:
    """Write <run>/compressed atomically: both files to a temporary directory, then a rename. An older result goes last.

    At any moment the older result exists under one of two names; after a crash in between `require_room` restores it.
    """
    _put_back(run)
    for stale in run.root.glob(f"{_LEFTOVER}*"):
        shutil.rmtree(stale)
    temporary = Path(tempfile.mkdtemp(dir=run.root, prefix=_LEFTOVER))
    temporary.chmod(0o755)
    write_atomic(temporary / MODEL, arrays_to_npz(parameters), PUBLIC_MODE)
    write_atomic(temporary / RECORD, record.model_dump_json(indent=2).encode(), PUBLIC_MODE)
    if run.compressed.exists():
        old = Path(tempfile.mkdtemp(dir=run.root, prefix=_LEFTOVER))
        run.compressed.rename(old / _REPLACED)
        temporary.rename(run.compressed)
        shutil.rmtree(old)
    else:
        temporary.rename(run.compressed)
    sync_directory(run.root)
    return run.compressed


def _put_back(run: RunDirectory) -> None:
    """Undo a replacement that stopped between its two renames."""
    replaced = sorted(run.root.glob(f"{_LEFTOVER}*/{_REPLACED}"))
    if replaced and not run.compressed.exists():
        replaced[0].rename(run.compressed)


def read_compressed(run: RunDirectory) -> tuple[Compression, Arrays]:
    """The compressed model of a run. Raises UsageError when there is none, CheckpointError when it is damaged."""
    path = run.compressed / RECORD
    if not path.is_file():
        raise UsageError(f"{run.root} has no compressed model: run python -m fedclaw.compress run={run.root}")
    try:
        record = Compression.model_validate_json(path.read_bytes())
        content = (run.compressed / MODEL).read_bytes()
    except ValidationError as error:
        raise CheckpointError(f"{path} is damaged: {explain(error)}") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{run.compressed} lacks {MODEL}; compress the run again") from error
    return record, npz_to_arrays(content, run.compressed / MODEL)
