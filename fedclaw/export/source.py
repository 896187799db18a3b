"""What is exported: the model of a run, rebuilt, the facts about it that a bundle states, and who may sign it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedclaw.compress.record import RECORD, Compression, read_compressed
from fedclaw.errors import BundleError, CheckpointError
from fedclaw.export.statement import Receipts
from fedclaw.export.training_record import (
    Acceptance,
    CompressionFiles,
    RunFiles,
    RunTraining,
    TrainingRecord,
    configuration_of,
    heads_of,
    rounds_of,
)
from fedclaw.files import sha256_file
from fedclaw.identity.federation_home import FederationHome
from fedclaw.learning.workload import Schema, load_parameters
from fedclaw.protocol.frozen import explain
from fedclaw.protocol.terms import ModelSpec
from fedclaw.server.run_directory import PendingRound, RunDirectory, RunRecord, SiteReceipt
from fedclaw.server.software import software

if TYPE_CHECKING:
    from torch import nn


class RoundCosts(BaseModel):
    """What a line of metrics.jsonl says of who took part in its round, and what the run had cost each by then."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    answered: list[str] = []
    epsilon: dict[str, float | None] = {}
    test_examples: int | None = Field(default=None, ge=0)


@dataclass(frozen=True)
class SourceRun:
    """A run that the model went through, as its directory has it."""

    record: RunRecord
    metrics: tuple[Mapping[str, Any], ...]
    files: RunFiles
    costs: tuple[RoundCosts, ...]
    """In the order of `metrics`."""
    pending: int | None = None
    """The round whose questions are out and whose answers are not in; None: no round is in flight."""

    @classmethod
    def read(cls, directory: RunDirectory, *, model: bool = True) -> "SourceRun":
        """`model`: whether its model is looked at, too. Raises CheckpointError for a damaged file, EncryptionError for
        a model that does not open."""
        record, metrics = directory.record(), tuple(directory.read_metrics())
        try:
            costs = tuple(RoundCosts.model_validate(line) for line in metrics)
        except ValidationError as error:
            raise CheckpointError(f"{directory.metrics_path} is damaged: {explain(error)}") from error
        pending = PendingRound.read(directory.root)
        return cls(record, metrics, files_of(directory, model=model), costs, None if pending is None else pending.round)


def files_of(directory: RunDirectory, *, model: bool = True) -> RunFiles:
    """The digests of a finished run's files, of what is encrypted in the clear. Without `model`, none of that."""
    there = model and directory.model_path.is_file()
    paths = (directory.metrics_path, directory.receipts_path)
    metrics, receipts = (sha256_file(path) if path.is_file() else None for path in paths)
    return RunFiles(
        record=sha256_file(directory.record_path),
        model=directory.sha256_of(directory.model_path) if there else None,
        metrics=metrics,
        receipts=receipts,
    )


@dataclass(frozen=True)
class Source:
    """One model of a run. `compression` is its compression.json; None for the model as trained."""

    record: RunRecord
    schema: Schema
    spec: ModelSpec
    model: "nn.Module"
    receipts: tuple[Receipts, ...]
    """Those of the training run, then those of the recovery at the sites, if there was one, and of the recoveries of
    candidates that a search chose among."""
    metrics: tuple[Mapping[str, Any], ...]
    compression: Compression | None
    runs: tuple[SourceRun, ...]
    """In the order of their receipts."""
    compressed: CompressionFiles | None = None
    """The files of the compression."""
    acceptance: Acceptance | None = None
    """What the model scored, where a floor was asked for."""
    report: bytes = b""
    """compression.json as it was read, so that the bundle's has the digest that `compressed` tells."""

    @property
    def variant(self) -> Literal["final", "compressed"]:
        """Which of the run's models this is."""
        return "final" if self.compression is None else "compressed"

    def signed_by(self, federation: str) -> "Source":
        """The same, for a federation to sign that `signing_home` allows."""
        return replace(self, record=self.record.model_copy(update={"federation": federation}))

    @property
    def parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def training(self) -> TrainingRecord:
        """What the bundle says of how the model came about."""
        return TrainingRecord(
            runs=tuple(_told(run, receipts) for run, receipts in zip(self.runs, self.receipts, strict=True)),
            compression=self.compressed,
            acceptance=self.acceptance,
            exported_with=software(),
        )


def _told(run: SourceRun, receipts: Receipts) -> RunTraining:
    record = run.record
    return RunTraining(
        run=record.run,
        federation=record.federation,
        purpose=receipts.purpose,
        started=record.created,
        simulated=record.simulated,
        software=record.software,
        configuration=configuration_of(record),
        files=run.files,
        rounds=rounds_of(record, run.metrics),
        ledger_heads=heads_of(record, receipts.by_site),
    )


def load_source(directory: RunDirectory, wanted: Literal["auto", "final", "compressed"] = "auto") -> Source:
    """The model that `wanted` names; `auto` takes the compressed one where there is one.

    Raises UsageError when there is no compressed model, or no complete one (some parameters stay at the sites),
    BundleError when parameters do not fit their spec or the compressed model was made from another one, and
    CheckpointError when a file of the run is damaged or the run has not finished.
    """
    record = directory.record()
    directory.require_whole()
    arrays: Mapping[str, NDArray[Any]] = directory.read_model()
    spec, compression, compressed, report = record.model, None, None, b""
    if wanted == "compressed" or (wanted == "auto" and (directory.compressed / RECORD).is_file()):
        compression, arrays = read_compressed(directory)
        spec = compression.model
        report = (directory.compressed / RECORD).read_bytes()
        compressed = CompressionFiles(
            record=hashlib.sha256(report).hexdigest(),
            model=directory.sha256_of(directory.compressed_model),
            teacher=compression.teacher_sha256,
        )
        if compression.teacher_sha256 != directory.sha256_of(directory.model_path):
            raise BundleError(
                f"{directory.compressed} was not made from {directory.model_path}; compress the run again"
            )
    workload = directory.workload()
    model = _fill(workload.build(spec), arrays, f"the model of {directory.root}")
    runs = [SourceRun.read(directory)]
    receipts = [Receipts(record.run, "training", _receipts(directory))]
    for at_sites in compression.runs_at_sites if compression is not None else ():
        recovery = RunDirectory.open(directory.root / at_sites.directory, directory.keys)
        runs.append(SourceRun.read(recovery))
        receipts.append(Receipts(at_sites.run, "recovery after pruning", _receipts(recovery)))
    return Source(
        record=record,
        schema=workload.schema,
        spec=spec,
        model=model,
        receipts=tuple(receipts),
        metrics=runs[0].metrics,
        compression=compression,
        runs=tuple(runs),
        compressed=compressed,
        report=report,
    )


def _receipts(directory: RunDirectory) -> Mapping[str, SiteReceipt]:
    """The run's receipts. Raises BundleError naming the site of one that cannot be."""
    try:
        return directory.read_receipts()
    except CheckpointError as error:
        raise BundleError(
            f"{error}; nothing can be stated of a receipt that cannot be: restore the file from a backup, or train "
            "again without that site"
        ) from error


def _fill(model: "nn.Module", arrays: Mapping[str, NDArray[Any]], what: str) -> "nn.Module":
    """`model` with `arrays` as its parameters, on the CPU and in evaluation mode."""
    try:
        load_parameters(model, arrays)
    except ValueError as error:
        raise BundleError(f"{what} does not fit its spec: {error}") from error
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise BundleError(f"{what} holds NaN or infinite values in {name}")
    return model.cpu().eval()


def signing_home(record: RunRecord, federation: Path) -> FederationHome:
    """The coordinator's directory whose release key signs a model of this run.

    A run of sites is signed by its own federation; a simulation belongs to none, and whoever signs stands behind it.
    Raises ProvisionError for a directory that is no coordinator's, BundleError for that of another federation.
    """
    home = FederationHome.open(federation)
    if record.simulated is None and home.name != record.federation:
        raise BundleError(
            f"{record.run} is a run of the federation {record.federation!r}, but {federation} holds the keys of "
            f"{home.name!r}"
        )
    return home
