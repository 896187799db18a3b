"""What a node is asked and what it answers, whichever protocol carried it.

Legend: N rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from fedclaw.learning.preprocessing import Columns


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks, as a verified token says."""

    name: str
    """The token's subject."""
    scopes: frozenset[str]
    """As `predict:MODEL`, `feedback:MODEL`, `admin:publish`; `predict:*` is for every model."""

    def may(self, action: str, what: str) -> bool:
        """Whether a scope covers `action` on `what`."""
        return f"{action}:{what}" in self.scopes or f"{action}:*" in self.scopes


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, from where, and how."""

    principal: Principal
    peer: str
    """The address that the connection comes from; behind a proxy, the proxy's."""
    protocol: str
    """rest, predict, grpc, feedback or admin."""
    traceparent: str | None = None
    """As the client sent it."""


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """Rows to be answered. All columns have the N rows, and the types and shapes that the model's columns say."""

    model: str
    columns: Columns
    """By the name of the graph's input, (N, ...); of a bundle without pipeline.onnx, the prepared `inputs` alone."""
    rows: int
    identity: str
    """The request's id: the client's, or one that the node made."""
    key: str
    """What decides on the version: the same key gets the same one."""
    version: str | None = None
    """The version that the client insists on."""
    outputs: tuple[str, ...] | None = None
    """The outputs that are wanted; None: all."""
    deadline: float | None = None
    """Until when the answer is of use, by `time.monotonic`."""


@dataclass(frozen=True, slots=True)
class InferenceResponse:
    """The answer to each row, in order; of a row that is refused, `refused` is true and the others say nothing."""

    model: str
    version: str
    identity: str
    outputs: Mapping[str, NDArray[Any]]
    """By the name of the graph's output, (N, ...)."""


@dataclass(frozen=True, slots=True)
class VersionChoice:
    """Which version answers a request, and which others see it too."""

    version: str
    propensity: float = 1.0
    """The probability with which this version was chosen for the request's key."""
    mirrors: tuple[str, ...] = ()
    """Versions that get the request as well, to be compared; nobody is answered from them."""
