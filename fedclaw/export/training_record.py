"""training.json: how a bundle's model came about, and the digest of each file that says so.

Written at export from the run's directory: configuration, code and environment, rounds, and the heads of the sites'
ledgers. With it `python -m fedclaw.lineage` connects a bundle to a run, and the run to each site's ledger.

**Data sets.** No fingerprint of a data set ever leaves a site, and so none is here. A ledger notes the SHA-256 of what
was charged in each entry, and its head, which a receipt carries, is a hash over all of its entries, the random identity
of the ledger first: a salted digest of those fingerprints, which nobody can guess and only that ledger opens.

**What is left out.** Names of hosts, users and directories; a site's reasons; who took part in a round, where a
guarantee counts on nobody knowing it; the seed, where noise was made from it.
"""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from fedclaw.learning.workload import schema_digest
from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.limits import Digest, Name, ParameterName
from fedclaw.protocol.receipt import Head
from fedclaw.protocol.terms import (
    CentralNoise,
    Compression,
    Distillation,
    LocalTraining,
    ModelSpec,
    PrivacyRequest,
    RoundRules,
    SecureRequest,
    StrategyRecord,
    Weighting,
)
from fedclaw.server.run_directory import ReleaseUse, RunRecord, Simulated, SiteReceipt
from fedclaw.server.software import Software

Purpose = Literal["training", "recovery after pruning"]


class Configuration(Frozen):
    """What a run was asked for, from its record."""

    workload: Name
    task: Name
    schema_sha256: Digest
    """Of the schema that all sites agreed on, its canonical JSON: that of the bundle's schema.json before the
    federation's constants are put in."""
    preprocessing_sha256: Digest | None
    """Of the constants that all sites prepared their inputs with; None: the schema takes none of the federation's."""
    model: ModelSpec
    strategy: StrategyRecord
    rounds: int = Field(ge=1)
    rules: RoundRules
    training: LocalTraining
    privacy: PrivacyRequest | None
    central: CentralNoise | None
    secure: SecureRequest | None
    compression: Compression | None
    """Of the updates on their way to the server."""
    distillation: Distillation | None
    weighting: Weighting
    weight_cap: int | None
    personal: tuple[ParameterName, ...]
    metrics: tuple[Name, ...]
    score_bins: int | None
    statistics: ReleaseUse | None
    seed: int | None
    """None: it is not told, because noise was made from it."""


class RunFiles(Frozen):
    """SHA-256 of the files of a run's directory as they were read at export; None: there was none."""

    record: Digest
    """run.json."""
    model: Digest | None
    """model.npz."""
    metrics: Digest | None
    """metrics.jsonl."""
    receipts: Digest | None
    """receipts.json."""


class RoundRecord(Frozen):
    """One round that counted."""

    round: int = Field(ge=1)
    sites: tuple[str, ...] | None
    """Who answered; None: it was not noted, a guarantee counts on nobody knowing it, or they are simulated clients, who
    have nothing to be asked about."""
    metrics: dict[str, float | None]
    """Over the test data of all sites, after the round; None: no finite number."""
    test_examples: int | None = Field(default=None, ge=0)


class LedgerHead(Frozen):
    """Where in its ledger a site was when it sent its last receipt of the run."""

    site: str
    head: Head
    charges: int = Field(ge=0)
    """Of this run, by then: one a round, and one more for each round that was charged again."""


class RunTraining(Frozen):
    """One of the runs that a model went through: its training, or the recovery of what was pruned."""

    run: Name
    federation: Name
    """The one that it ran in."""
    purpose: Purpose
    started: datetime
    """By the coordinator's clock."""
    simulated: Simulated | None
    software: Software | None
    """What the coordinator began it with; None: it began before that was noted. The sites' own is not known."""
    configuration: Configuration
    files: RunFiles
    rounds: tuple[RoundRecord, ...]
    """Those that counted, in order."""
    ledger_heads: tuple[LedgerHead, ...]
    """By the sites' names; none in a simulation, whose clients keep no ledgers."""


class CompressionFiles(Frozen):
    """SHA-256 of the files of a compression."""

    record: Digest
    """compression.json."""
    model: Digest
    """Its model.npz."""
    teacher: Digest
    """The model.npz that was compressed."""


class Acceptance(Frozen):
    """The score that the coordinator asked the model to reach, and what it reached."""

    metric: Name
    floor: float
    value: float
    measured: str
    """On what."""
    examples: int = Field(ge=0)


class TrainingRecord(Frozen):
    """training.json."""

    format_version: Literal[1] = 1
    runs: tuple[RunTraining, ...] = Field(min_length=1)
    """The training, then the recovery at the sites, if there was one."""
    compression: CompressionFiles | None
    """None: the model is as it was trained."""
    acceptance: Acceptance | None
    """None: no floor was asked for."""
    exported_with: Software


def configuration_of(record: RunRecord) -> Configuration:
    """What `record` says that the run was asked for."""
    told = {name: getattr(record, name) for name in Configuration.model_fields if name in RunRecord.model_fields}
    noise_of_seed = record.simulated is not None and record.simulated.repeatable_noise
    return Configuration(
        **{
            **told,
            "schema_sha256": record.schema_digest,
            "preprocessing_sha256": None if record.preprocessing is None else schema_digest(record.preprocessing),
            "seed": None if noise_of_seed else record.seed,
        }
    )


def rounds_of(record: RunRecord, lines: Sequence[Mapping[str, Any]]) -> tuple[RoundRecord, ...]:
    """The rounds in a run's metrics. Who took part is left out where that is a secret (`samples_sites`),
    and in a simulation: thousands of clients would make most of the file."""
    hidden = samples_sites(record) or record.simulated is not None
    return tuple(
        RoundRecord(
            round=line["round"],
            sites=None if hidden or "answered" not in line else tuple(sorted(line["answered"])),
            metrics={name: value if _is_finite(value) else None for name, value in line["metrics"].items()},
            test_examples=line.get("test_examples"),
        )
        for line in lines
    )


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def samples_sites(record: RunRecord) -> bool:
    """Whether the guarantee counts on nobody knowing which sites were asked in a round."""
    return record.central is not None and record.central.unit == "site" and record.central.sample_rate < 1


def heads_of(record: RunRecord, receipts: Mapping[str, SiteReceipt]) -> tuple[LedgerHead, ...]:
    """Where the sites' ledgers were."""
    if record.simulated is not None:
        return ()
    return tuple(
        LedgerHead(site=name, head=entry.receipt.ledger_head, charges=entry.receipt.rounds)
        for name, entry in sorted(receipts.items())
    )
