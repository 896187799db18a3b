"""What a bundle holds: the names of its files and the content of bundle.json.

    model.onnx  model.pt2        the model, for ONNX Runtime and for torch.export; both take prepared inputs
    pipeline.onnx                the same with the preprocessing before it: typed columns in, labels out
    model-int8.onnx              the same with 8-bit weights and activations (only when asked for)
    model-fp16.onnx              the same computed in 16-bit floating point (only when asked for)
    bundle.json                  where the model comes from, its tensors, labels, preprocessing, parity figures
    schema.json                  the federation's schema, which turns raw rows into the model's input
    privacy.json                 what training cost each site, and what that does and does not promise
    training.json                how the model came about: configuration, code, rounds, ledger heads, digests
    compression.json             how the model was compressed, and what it lost (only of a compressed model)
    marginals.json               how the columns were distributed over the training rows, with noise (only if asked)
    sbom.cdx.json                bill of materials with a model card, for machines (CycloneDX)
    MODEL_CARD.md  VERIFY.md     for people
    release.crt  ca.crt          who signed
    SHA256SUMS                   digests of all the files above, for `sha256sum --check`
    model.sig                    the signature over all of these, in the form of OpenSSF Model Signing 1.0

The directory is flat: no folders, no links. Bundles of format 1 have SHA256SUMS.sig, the signature over SHA256SUMS,
instead of model.sig; they stay valid.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Literal, Self

from pydantic import Field, JsonValue, model_validator

from fedclaw.compress.record import Precision, StepInputs
from fedclaw.learning.preprocessing import TypedColumn
from fedclaw.learning.tasks.classification import Classification
from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.limits import Name
from fedclaw.protocol.terms import ModelSpec

ONNX = "model.onnx"
PIPELINE = "pipeline.onnx"
QUANTISED = "model-int8.onnx"
HALF = "model-fp16.onnx"
PROGRAM = "model.pt2"
MANIFEST = "bundle.json"
SCHEMA = "schema.json"
PRIVACY = "privacy.json"
TRAINING = "training.json"
COMPRESSION = "compression.json"
MARGINALS = "marginals.json"
SBOM = "sbom.cdx.json"
CARD = "MODEL_CARD.md"
HOW_TO_VERIFY = "VERIFY.md"
DIGESTS = "SHA256SUMS"
SIGNATURE = "model.sig"
SIGNATURE_IN_FORMAT_1 = "SHA256SUMS.sig"
RELEASE_CERTIFICATE = "release.crt"
CA_CERTIFICATE = "ca.crt"

FormatVersion = Literal[1, 2]
SIGNATURES: dict[FormatVersion, str] = {1: SIGNATURE_IN_FORMAT_1, 2: SIGNATURE}
UNSIGNED = frozenset({DIGESTS, SIGNATURE})
"""Files that SHA256SUMS does not list: itself and the signature."""
REQUIRED_IN_FORMAT_1 = frozenset(
    {ONNX, PROGRAM, MANIFEST, SCHEMA, PRIVACY, CARD, HOW_TO_VERIFY, RELEASE_CERTIFICATE, CA_CERTIFICATE}
)
REQUIRED = REQUIRED_IN_FORMAT_1 | {TRAINING, SBOM}
"""A bundle that lacks one of these is incomplete, even if its signature is valid."""

FILE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
"""The names that files may have: nothing that leads out of the directory, hides in it, or looks like another name."""

INPUT = "inputs"
BATCH = "batch"

FORMS: Mapping[Precision, str] = {"float32": ONNX, "int8": QUANTISED, "float16": HALF}
"""The ONNX file of each precision. All of them take and give float32."""


class TensorSpec(Frozen):
    """One tensor of the graph. In `shape` the dynamic dimension is a name instead of a size."""

    name: str
    dtype: Literal["float32", "string", "bool"] = "float32"
    shape: tuple[int | str, ...]


InputKind = Literal["real", "synthetic"]
Takes = Literal["prepared inputs", "typed columns"]
"""What a graph is given: the model's input tensor, which our reader makes, or the values of each column by itself."""


class PipelineSpec(Frozen):
    """pipeline.onnx: what it takes and gives, and what is not done in it."""

    columns: tuple[TypedColumn, ...] = Field(min_length=1)
    outputs: tuple[TensorSpec, ...]
    outside_the_graph: tuple[str, ...]
    """What whoever fills the columns has to do first, a sentence each; our reader does it."""
    compared_on: InputKind
    """What the parity figures of pipeline.onnx were measured on."""


class ParityFigures(Frozen):
    """The largest absolute difference between an exported model and the torch model, over all outputs."""

    max_abs_diff: float = Field(ge=0)
    examples: int = Field(ge=1)
    batch_sizes: tuple[int, ...]
    scale: float | None = Field(default=None, ge=0)
    """The largest absolute output of the torch model, if it is so large that the tolerance is relative to it."""


class Parity(Frozen):
    """What the models were compared on, the tolerance, and the figures by file name."""

    inputs: InputKind
    tolerance: float = Field(gt=0)
    files: dict[str, ParityFigures]


class QuantisedFigures(Frozen):
    """How the 8-bit model differs from the exact one, as bundles up to version 0.2 say it; now `Forms` does."""

    max_abs_diff_probability: float | None = Field(default=None, ge=0)
    same_label: float | None = Field(default=None, ge=0, le=1)
    """Share of examples that both give the same class. None, as the line above, for a task without classes."""
    max_abs_diff_value: float | None = Field(default=None, ge=0)
    """The largest difference of values, for a task without classes."""
    examples: int = Field(ge=1)


class FormFigures(Frozen):
    """One ONNX form of the model, measured beside the others. The parity tolerance applies to the exact one alone."""

    file_bytes: int = Field(ge=1)
    latency_ms: dict[str, float]
    """Median by batch size, in ONNX Runtime on one thread of the CPU that exported; the forms were timed in turns."""
    agreement: float | None = Field(default=None, le=1)
    """With the exact model: the share of inputs with the same label, or R2 with its values for targets. None: outputs
    that are not finite, or values inside that are beyond the form's range."""
    agreement_low: float | None = Field(default=None, le=1)
    """The lower end of its 95% interval."""
    max_abs_diff: float | None = Field(default=None, ge=0)
    """The largest difference of a probability or value. None: as above."""
    accuracy: float | None = Field(default=None, ge=0, le=1)
    """On the labelled public data that the threshold was chosen on; None without such."""


class Forms(Frozen):
    """Which ONNX file is recommended, by which rule, and what all of them came to. bundle.json, `forms`."""

    chosen: Literal["model.onnx", "model-int8.onnx", "model-fp16.onnx"]
    why: str
    loss: float = Field(gt=0, lt=1)
    """A form is recommended only if its agreement with the exact model is at least 1 less this, at the lower end."""
    calibration: StepInputs
    """What the ranges of the 8-bit form were taken from. Their smallest and largest activations stand in its file."""
    measurement: StepInputs
    """Other inputs, on which agreement was measured."""
    files: dict[str, FormFigures]

    @model_validator(mode="after")
    def _measured(self) -> Self:
        if self.chosen not in self.files:
            raise ValueError(f"{self.chosen} is recommended and was not measured")
        return self


class Decision(Frozen):
    """The probability from which a model of two classes answers with the second one, and how it was chosen."""

    threshold: float = Field(gt=0, lt=1)
    objective: Literal["f1"] = "f1"
    """The score that the threshold maximises."""
    value: float = Field(ge=0, le=1)
    """The objective at the threshold, on the data that it was chosen on."""
    value_at_half: float = Field(ge=0, le=1)
    """The objective at one half, where the answer is the likelier class."""
    chosen_on: Literal["public data", "training data, by statistics"]
    """Never the test data of the reported metrics. For public data, the coordinator vouches that no site holds it."""
    examples: int = Field(ge=1)
    content: str | None = None
    """SHA-256 of the public file."""
    release: str | None = None
    """The name under which sites charged the statistics."""


class Manifest(Frozen):
    """bundle.json."""

    format_version: FormatVersion = 2
    federation: Name
    run: Name
    workload: Name
    task: Name = Classification.name
    """The task's name; a manifest without it is of a classification."""
    variant: Literal["final", "compressed"]
    model: ModelSpec
    parameters: int = Field(ge=1)
    created: datetime
    """When the bundle was signed, by the signer's own clock."""
    versions: dict[str, str]
    inputs: tuple[TensorSpec, ...] = Field(min_length=1)
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    labels: tuple[str, ...]
    """None where the task has no classes."""
    target: dict[str, JsonValue] | None = None
    """The target of a task without labels: a number's name, range and loss (`Task.describe`)."""
    preprocessing: dict[str, JsonValue]
    graphs: dict[str, Takes] = Field(default_factory=dict)
    """What each of the bundle's graphs takes, by file name; not said in format 1, where all take prepared inputs."""
    pipeline: PipelineSpec | None = None
    no_pipeline: str | None = None
    """Why there is no pipeline.onnx."""
    parity: Parity
    quantised: QuantisedFigures | None = None
    """Of bundles up to version 0.2 only."""
    forms: Forms | None = None
    """None: there is model.onnx alone."""
    decision: Decision | None = None
    """None: the answer is the likeliest class."""

    def compared_on(self, name: str) -> InputKind:
        """What inputs the parity of that file was measured on."""
        return self.pipeline.compared_on if self.pipeline and name == PIPELINE else self.parity.inputs

    @model_validator(mode="after")
    def _of_one_task(self) -> Self:
        if (self.task == Classification.name) != bool(self.labels):
            raise ValueError(f"a {self.task} task and {len(self.labels)} labels contradict each other")
        if self.decision is not None and len(self.labels) != 2:
            raise ValueError(f"a threshold is for two classes, and there are {len(self.labels)} labels")
        return self

    @model_validator(mode="after")
    def _graphs_agree(self) -> Self:
        takes = self.graphs.get(PIPELINE)
        if (self.pipeline is not None) != (takes == "typed columns") or (takes and self.no_pipeline):
            raise ValueError(f"graphs, pipeline and no_pipeline contradict each other about {PIPELINE}")
        return self
