"""What a compression is told, and what it leaves in a run directory.

conf/compress.yaml holds the defaults; the result is compressed/model.npz and compressed/compression.json.
"""

import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, GetJsonSchemaHandler, ValidationError, field_validator, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from fedclaw.compress.intervals import Difference, Interval
from fedclaw.compress.pruning_record import PruningReport, PruningSettings
from fedclaw.errors import CheckpointError, UsageError
from fedclaw.files import PUBLIC_MODE, sync_directory, write_atomic
from fedclaw.identity.data_keys import EncryptionSettings
from fedclaw.protocol.arrays import Arrays, arrays_to_npz, npz_to_arrays
from fedclaw.protocol.frozen import Frozen, explain
from fedclaw.protocol.terms import ModelSpec
from fedclaw.server.run_directory import ReleaseUse, RunDirectory
from fedclaw.server.settings import ListenAddress
from fedclaw.server.waiting import CohortWaiting

Mode = Literal["proxy", "synthetic", "federated", "none"]
"""Where a pruned model is recovered, and on what."""


class RecoverySettings(Frozen):
    """How a pruned model is trained at the coordinator."""

    temperature: float = Field(default=2.0, gt=0)
    labels: float = Field(default=0.3, ge=0, le=1)
    """Of the loss on labels in the whole loss, where there is labelled public data; the rest is the teacher's."""
    features: float = Field(default=0.0, ge=0)
    """Weight of the teacher's hidden features, see `fedclaw.compress.features`; 0: they are not looked at."""
    steps: int = Field(default=2000, ge=1)
    """Optimiser steps, at most."""
    batch_size: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    mix: bool | None = None
    """Train on random mixtures of two inputs each, scored by the teacher as they are, not on the inputs alone.
    None: mixtures of public inputs, which are few (measured on digits, 180 inputs: 98.5 instead of 97.6%), and
    synthetic inputs as they are (mixing them took 91.4 down to 87.4%)."""
    held_out: float = Field(default=0.2, gt=0, lt=1)
    """Share of the inputs that is kept back to stop early by; where agreement with the teacher is what is reported, as
    many again to measure it on."""
    patience: int = Field(default=600, ge=1)
    """Steps without a better model after which training stops."""


class GeneratorSettings(Frozen):
    """A generator network that is trained against the teacher, see `fedclaw.compress.generator`."""

    share: float = Field(default=0.5, ge=0, le=1)
    """Of each batch of synthetic recovery that it makes; 0: there is none."""
    latent: int = Field(default=64, ge=1, le=4096)
    width: int = Field(default=32, ge=1, le=1024)
    learning_rate: float = Field(default=1e-3, gt=0)
    every: int = Field(default=5, ge=1)
    """Steps of the student between two of its own."""
    confidence: float = Field(default=1.0, ge=0)
    """Weight of the teacher being sure of one class."""
    balance: float = Field(default=5.0, ge=0)
    """Weight of all classes alike, within that of confidence."""
    adversarial: float = Field(default=1.0, ge=0)
    """Weight of the student answering otherwise than the teacher."""
    bank: int = Field(default=4096, ge=1)
    """Inputs that it made, the last ones, that the student goes on seeing."""


Precision = Literal["float32", "int8", "float16"]
"""What an exported model computes in."""


def require_consistent(mode: tuple[Mode, ...]) -> None:
    """Raise ValueError where these kinds of recovery, one after the other, mean nothing."""
    if not mode:
        raise ValueError("mode=[] names no recovery; to prune only is mode=none")
    if len(set(mode)) < len(mode):
        raise ValueError(f"mode=[{','.join(mode)}] names one kind of recovery twice")
    if "none" in mode and len(mode) > 1:
        raise ValueError("mode=none is no recovery at all, and stands alone")


class SearchSettings(Frozen):
    """Which compressions `search` tries, and by what it chooses among them."""

    fractions: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(default=(0.5, 0.3, 0.2, 0.1, 0.05), min_length=1)
    modes: tuple[tuple[Mode, ...], ...] | None = Field(default=None, min_length=1)
    """Ways of recovery, as in `mode`. None: all at the coordinator; those at the sites spend, and are to be named."""
    precisions: tuple[Precision, ...] = Field(default=("float32", "int8", "float16"), min_length=1)
    loss: float = Field(default=0.01, ge=0, lt=1)
    """How much of the score the chosen model may lose against the uncompressed one."""
    selection: Path | None = None
    """Labelled public data to choose by, which is neither learnt from nor reported; None: agreement with the teacher on
    inputs kept back."""
    examples: int = Field(default=2000, ge=100)
    """Number of synthetic inputs to choose by, where there are no public ones."""
    epsilon: float | None = Field(default=None, gt=0)
    """What all candidates that are recovered at the sites may cost each of them together, beyond the run."""

    @field_validator("modes", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        if isinstance(value, str):
            return ((value,),)
        if not isinstance(value, list | tuple):
            return value
        return tuple((item,) if isinstance(item, str) else item for item in value)

    @field_validator("modes")
    @classmethod
    def _each_consistent(cls, value: tuple[tuple[Mode, ...], ...] | None) -> tuple[tuple[Mode, ...], ...] | None:
        for mode in value or ():
            require_consistent(mode)
        return value


class SiteRecovery(CohortWaiting):
    """Recovery at the sites: more rounds of training under differential privacy, on their ledgers."""

    rounds: int = Field(default=5, ge=1)
    epsilon: float | None = Field(default=None, gt=0)
    """What all these rounds together may cost a site, beyond the run itself; by default as much as the run."""
    temperature: float = Field(default=2.0, gt=0)
    weight: float = Field(default=0.7, ge=0, le=1)
    """Of the teacher in the loss; the rest is the loss on the site's own targets."""


FRACTION = 0.3
"""Of the parameters, unless told otherwise."""


class CompressSettings(Frozen):
    """The whole configuration of one compression."""

    run: Path
    mode: tuple[Mode, ...] = ("proxy",)
    """The kinds of recovery, one after the other; a single word stands for itself."""
    fraction: float = Field(default=FRACTION, gt=0, lt=1)
    """Largest share of the parameters that may be left; `pruning` can name another target instead."""
    pruning: PruningSettings = PruningSettings()
    overwrite: bool = False
    """Replace an earlier result, once the new one is whole."""
    inputs: Path | None = None
    """Public unlabelled inputs, in the workload's own format."""
    labelled: Path | None = None
    """Labelled public training data: inputs too, whose labels recovery and the controls learn."""
    evaluation: Path | None = None
    """Labelled public data for accuracies, which no step but the measurement looks at."""
    overlap: Literal["refuse", "drop"] = "refuse"
    """What becomes of rows of `inputs` and `labelled` that are in `evaluation` too: an error, or they are left out."""
    synthetic: int = Field(default=4096, ge=10)
    """Number of synthetic inputs that are made from the schema or drawn from statistics."""
    statistics: Path | None = None
    """A charged release of python -m fedclaw.statistics that synthetic inputs are drawn from; None: from the schema."""
    generator: GeneratorSettings = GeneratorSettings()
    """Of mode=synthetic."""
    controls: bool = True
    """Also train the controls: without a teacher, and from scratch."""
    recovery: RecoverySettings = RecoverySettings()
    federation: Path | None = None
    """The coordinator's federation directory; needed in federated mode."""
    address: ListenAddress | None = None
    """host:port to listen on instead of the descriptor's."""
    sites: SiteRecovery = SiteRecovery()
    search: SearchSettings = SearchSettings()
    latency_repeats: int = Field(default=100, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the recovery at the coordinator computes; auto takes CUDA if there."""
    seed: int = Field(default=0, ge=0, lt=1 << 62)
    encryption: EncryptionSettings = EncryptionSettings()
    """How the run's files are encrypted at rest; what is written into its directory is encrypted alike."""

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        target = self.pruning.target(self.fraction)
        if target.kind != "parameters" and self.fraction != FRACTION:
            raise ValueError(f"fraction= and pruning.{target.kind}= are two targets; give one of them")
        return self

    @field_validator("mode", mode="before")
    @classmethod
    def _one_word(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        require_consistent(self.mode)
        if "federated" in self.mode and self.federation is None:
            raise ValueError("mode=federated needs federation=DIR, the coordinator's federation directory")
        modes = {*self.mode, *(word for mode in self.search.modes or () for word in mode)}
        if self.inputs is not None and "proxy" not in modes:
            raise ValueError(f"inputs= belongs to mode=proxy, and the mode is {','.join(self.mode)}")
        if self.statistics is not None and "synthetic" not in modes:
            raise ValueError(f"statistics= belongs to mode=synthetic, and the mode is {','.join(self.mode)}")
        return self


MODEL, RECORD = "model.npz", "compression.json"
_LEFTOVER, _REPLACED = ".compressed.", "old"

Measure = Literal["evaluation file", "federated evaluation", "agreement with the teacher"]
"""What the accuracies of a record measure: labelled public data, the sites' own test data, or, as no accuracy at all,
agreement with the teacher on inputs that no other step looked at: the share of equal classes, or R2 with the teacher's
values as the targets."""


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
    interval: Interval | None = None
    """Of the score among them."""


ControlName = Literal["fine-tuned without teacher", "trained from scratch", "distilled from scratch"]
"""The pruned net trained on labels; a net with random parameters, on labels; such a net, recovered from the teacher on
the inputs that the pruned one's last recovery at the coordinator saw."""


class Control(Frozen):
    """A baseline: the same pruned shapes, trained in another way."""

    name: ControlName
    data: str = ""
    """What it was trained on."""
    accuracy: float | None
    """Its score, measured as the record's are; None where it was not measured there."""
    agreement: float | None = None
    """With the teacher; in records of version 1 alone."""
    interval: Interval | None = None
    """Of its score."""
    difference: Difference | None = None
    """The recovered model's score less this one's, on the same examples."""


class CoordinatorReport(Frozen):
    """Recovery at the coordinator: of itself post-processing, which costs no privacy."""

    mode: Literal["proxy", "synthetic"] = "proxy"
    inputs: str
    """Where the inputs came from, and how many."""
    losses: tuple[str, ...] = ()
    """The parts of the loss, in words."""
    steps: int
    """Optimiser steps taken."""
    agreement_pruned: float
    agreement_after: float
    """The student's agreement with the teacher (`Task.agreement`) before and after, on the inputs that early stopping
    chose by."""


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


RecoveryReport = Annotated[CoordinatorReport | SitesReport, Field(discriminator="mode")]

Step = Literal["importance", "layer sensitivity", "search", "calibration", "recovery", "controls", "measurement"]
InputOrigin = Literal["none", "public", "synthetic", "charged question", "sites"]
"""`public`: the coordinator vouches that no site holds them. `synthetic`: made from the schema or by the teacher alone.
`charged question`: made from the answer to a question that the sites' ledgers were charged for. `sites`: the sites' own
data, in rounds that their ledgers were charged for, or in metrics that their policies let out."""


class StepInputs(Frozen):
    """What one step of a compression looked at."""

    step: Step
    origin: InputOrigin
    description: str
    """A clause for people, with the file's name or the question's."""
    examples: int = Field(default=0, ge=0)
    sha256: str | None = None
    """Of the file that they were read from."""
    release: ReleaseUse | None = None
    """The charged question's answer, and what it cost."""


class SearchChoice(Frozen):
    """That a search chose this compression, and by what. The figures of all candidates are in <run>/search."""

    precision: Precision
    """In which it was the smallest within the loss: what an export is to add."""
    loss: float
    candidates: int = Field(ge=1)
    """How many were compared; each precision of a model is one."""
    measure: str
    """What the score is of; never of the rows that the record's accuracies are of."""
    score: float
    difference: Difference
    """The score in that precision less that of the uncompressed model, on the same examples."""
    at_sites: tuple[SitesReport, ...] = ()
    """The recoveries at the sites of the candidates that were not chosen. What is chosen among several depends on all
    of them, so their cost is part of the model's."""


class Compression(Frozen):
    """compression.json. Accuracies are of the metric `score`, at most 1, measured as `accuracy_measure` says."""

    version: int = 2
    run: str
    model: ModelSpec
    teacher_sha256: str
    """Of the model.npz that was compressed."""
    fraction: float
    """Of the parameters, asked for; what came out is parameters_after / parameters_before. With a target of another
    kind, what came out; `pruning` has what was asked for."""
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
    recovery: tuple[RecoveryReport, ...]
    """One after the other; none where it was pruned only."""
    difference: Difference | None = None
    """The compressed model's score less the teacher's, on the same examples."""
    controls: tuple[Control, ...] = ()
    controls_note: str = ""
    """What the controls could not be, and why."""
    verdict: str = ""
    """Whether recovery gained anything over the better control, by the paired differences, in words."""
    pruning: PruningReport | None = None
    """What was decided; None in a record that was written before this was noted."""
    search: SearchChoice | None = None
    """None: its settings were chosen by a person."""
    looked_at: tuple[StepInputs, ...] = ()
    """What each step looked at, in their order; empty in a record that was written before this was noted."""
    seed: int
    created: datetime = Field(default_factory=lambda: datetime.now(UTC))

    @model_validator(mode="before")
    @classmethod
    def _written_before(cls, value: Any) -> Any:
        """A record of version 1 has one kind of recovery, not a list, and its controls are that recovery's."""
        if not isinstance(value, dict) or isinstance(value.get("recovery", ()), list | tuple):
            return value
        recovery = value["recovery"]
        if not isinstance(recovery, dict):
            return {**value, "recovery": (recovery,)}
        plain = {name: field for name, field in recovery.items() if name != "controls"}
        return {"version": 1, "controls": recovery.get("controls", ()), **value, "recovery": (plain,)}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Of both versions, as they are read."""
        described = handler.resolve_ref_schema(handler(core))
        listed = described["properties"]["recovery"]
        one = {"type": "object", "required": ["mode"], "description": "Version 1: one kind, with its controls."}
        described["properties"]["recovery"] = {"anyOf": [listed, one]}
        return described

    @property
    def at_sites(self) -> SitesReport | None:
        """The recovery at the sites, if there was one."""
        return next((report for report in self.recovery if isinstance(report, SitesReport)), None)

    @property
    def runs_at_sites(self) -> tuple[SitesReport, ...]:
        """All recoveries at the sites that the model depends on, its own first, each once."""
        own = () if self.at_sites is None else (self.at_sites,)
        others = () if self.search is None else self.search.at_sites
        return tuple({report.run: report for report in (*own, *others)}.values())

    @property
    def releases(self) -> tuple[ReleaseUse, ...]:
        """The charged questions whose answers some step looked at, each once."""
        return tuple(dict.fromkeys(item.release for item in self.looked_at if item.release is not None))


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
    run.store.write(temporary / MODEL, arrays_to_npz(parameters), PUBLIC_MODE, f"{run.compressed.name}/{MODEL}")
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
        content = run.store.read(run.compressed / MODEL, f"{run.compressed.name}/{MODEL}")
    except ValidationError as error:
        raise CheckpointError(f"{path} is damaged: {explain(error)}") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{run.compressed} lacks {MODEL}; compress the run again") from error
    return record, npz_to_arrays(content, run.compressed / MODEL)
