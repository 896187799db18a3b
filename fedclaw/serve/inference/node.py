"""What the protocols of a node need from the rest of it: who asks, what models there are, and the answer to a request.

The protocols know nothing of bundles, routing or limits; a node knows nothing of JSON or protobuf.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedclaw.export.layout import TensorSpec
from fedclaw.learning.preprocessing import TypedColumn
from fedclaw.learning.workload import Schema
from fedclaw.serve.requests import InferenceRequest, InferenceResponse, Principal

Headers = Mapping[str, str]
"""Of an answer: `fedclaw-version`, `fedclaw-prediction`."""


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
    prepared: bool = False
    """Whether the graph takes prepared inputs: it then refuses no row by itself, so a request must be finite."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the probabilities; none where the task has no classes."""
        return self.schema.labels


class Node(Protocol):
    """A node as the protocols see it. What it refuses is a ServeRefusal."""

    @property
    def live(self) -> bool:
        """Whether it works at all."""

    @property
    def ready(self) -> bool:
        """Whether all models that are to be served are loaded and warm."""

    def authenticate(self, authorization: bytes | None) -> Principal:
        """Who asks, by the `authorization` header. Raises ServeRefusal."""

    def models(self, principal: Principal) -> Sequence[str]:
        """Names of the models that `principal` may ask, sorted."""

    def describe(self, principal: Principal, model: str, version: str | None = None) -> ModelDescription:
        """A model; None: the version that most are answered by. Raises ServeRefusal `not_found` for one that is not
        there, and for one that `principal` may not ask: a stranger learns no names."""

    def is_ready(self, principal: Principal, model: str, version: str | None = None) -> bool:
        """Whether that version answers now; False for what `principal` may not ask."""

    async def infer(self, principal: Principal, request: InferenceRequest) -> tuple[InferenceResponse, Headers]:
        """Route and answer. Raises ServeRefusal."""
