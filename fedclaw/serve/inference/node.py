"""What the protocols of a node need from the rest of it: who asks, what models there are, and the answer to a request.

The protocols know nothing of bundles, routing or limits; a node knows nothing of JSON or protobuf.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from fedclaw.serve.inference.rest import RequestReader
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.requests import Caller, InferenceRequest, InferenceResponse, Principal

Headers = Mapping[str, str]
"""Of an answer: `fedclaw-version`, `fedclaw-prediction`."""


class Node(Protocol):
    """A node as the protocols see it. What it refuses is a ServeRefusal."""

    @property
    def live(self) -> bool:
        """Whether it works at all."""

    @property
    def ready(self) -> bool:
        """Whether all models that are to be served are loaded and warm."""

    async def admit(
        self, authorization: bytes | None, peer: str, protocol: str, certificate: str | None = None
    ) -> Caller:
        """Who asks, by the `authorization` header; not more often than it may. Raises ServeRefusal."""

    def models(self, principal: Principal) -> Sequence[str]:
        """Names of the models that `principal` may ask, sorted."""

    def reader(self, principal: Principal, model: str, version: str | None = None) -> RequestReader:
        """Reads requests for a model, and describes it: the same object until the model changes.

        Without a `version`, the one that most are answered by. Raises ServeRefusal `not_found` for what is not there,
        and for what `principal` may not ask: a stranger learns no names.
        """

    def is_ready(self, principal: Principal, model: str, version: str | None = None) -> bool:
        """Whether that version answers now; False for what `principal` may not ask."""

    async def infer(
        self, caller: Caller, request: InferenceRequest, body: bytes | None = None
    ) -> tuple[InferenceResponse, Headers]:
        """Route and answer; `body` is what the audit log may keep of the inputs. Raises ServeRefusal."""

    def refused(self, refusal: ServeRefusal, peer: str, principal: str = "", model: str = "") -> None:
        """Count and note a request that did not come to a model. Raises ServeRefusal where it cannot be noted."""
