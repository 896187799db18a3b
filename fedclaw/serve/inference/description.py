"""What is told of a model's version: its columns, its outputs, and the schema that they come from."""

from dataclasses import dataclass

from fedclaw.export.layout import TensorSpec
from fedclaw.learning.preprocessing import TypedColumn
from fedclaw.learning.workload import Schema


@dataclass(frozen=True)
class ModelDescription:
    """What is told of a model's version to whoever may ask it."""

    name: str
    version: str
    versions: tuple[str, ...]
    """All versions that can be asked for."""
    columns: tuple[TypedColumn, ...]
    """The graph's inputs; of a bundle without pipeline.onnx, `inputs` alone."""
    outputs: tuple[TensorSpec, ...]
    schema: Schema
    """The bundle's own; it reads tables and files."""
    threshold: float | None = None
    """The probability from which the second of two classes is the answer; None: the likeliest class is."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the probabilities; none where the task has no classes."""
        return self.schema.labels
