"""The way of a request through a worker, whichever protocol carried it.

    who asks, how often -> which version -> the queue and the model -> counts -> the audit line -> the answer

The audit line is written before the answer leaves. Nothing here knows of HTTP or gRPC.
"""

import asyncio
import logging
import random
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from itertools import count
from time import monotonic
from typing import Any, Literal, Protocol

from fedclaw.learning.preprocessing import LABEL
from fedclaw.serve.admission import STRANGERS, Admission, Authentication
from fedclaw.serve.inference.node import Headers
from fedclaw.serve.inference.rest import RequestReader
from fedclaw.serve.models.batching import BatchMoments
from fedclaw.serve.monitoring.drift_watch import InputWatch
from fedclaw.serve.monitoring.metrics import WorkerMetrics
from fedclaw.serve.monitoring.tracing import RequestTimes, RequestTracer
from fedclaw.serve.names import LONGEST_NAME
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.requests import Caller, InferenceRequest, InferenceResponse, Principal, VersionChoice
from fedclaw.serve.routing.router import Router
from fedclaw.serve.routing.shadow import Mirror, compare
from fedclaw.serve.security.rate_limits import Allowance
from fedclaw.serve.security.scopes import require, visible
from fedclaw.serve.state.audit_log import AuditLog
from fedclaw.serve.state.feedback import Acknowledgement
from fedclaw.serve.state.receipts import ReceiptKeys

log = logging.getLogger("fedclaw.serve")

VALUES = "values"
MOST_MIRRORS = 64
"""Mirrored requests that a worker has in flight; more are not mirrored."""
_NOT_SEEN = {"overloaded", "too_many_requests", "deadline_exceeded", "unavailable", "not_found"}
"""Refusals of a mirrored request that say nothing of how the version would answer."""


class Models(Protocol):
    """Versions that are in memory, or can be got there."""

    def loaded(self, model: str, version: str) -> Any: ...  # noqa: D102

    async def model(self, model: str, version: str, deadline: float | None = None) -> Any: ...  # noqa: D102


_OK = int(HTTPStatus.OK)

TRACED: Mapping[str, tuple[Literal["http", "grpc"], str, str]] = {
    "rest": ("http", "POST", "/v2/models/{model}/infer"),
    "predict": ("http", "POST", "/predict/{model}"),
    "grpc": ("grpc", "ModelInfer", "inference.GRPCInferenceService"),
}
"""By protocol: the convention of its spans, the method, and the route or service."""

Credit = Callable[[Principal, bytes], Acknowledgement]
"""Takes the body of a feedback, and waits until it is on disk. Raises ServeRefusal."""


@dataclass(frozen=True)
class NodeParts:
    """What a worker's node is made of."""

    authentication: Authentication
    admission: Admission
    router: Router
    models: Models
    metrics: WorkerMetrics
    audit: AuditLog
    receipts: ReceiptKeys
    inputs: InputWatch | None = None
    """Counts what is asked; None: drift is not looked for."""
    tracer: RequestTracer | None = None


class ServingNode:
    """One worker's."""

    def __init__(self, parts: NodeParts) -> None:
        self.parts = parts
        self.live, self.open = True, False
        self.missing: frozenset[str] = frozenset()
        """Pinned models that are to be here and are not loaded."""
        self.credit: Credit = _no_feedback
        self._readers: Mapping[str, Mapping[str, RequestReader]] = {}
        self._mirror = Mirror(MOST_MIRRORS)
        self._own, self._numbers = secrets.token_hex(6), count()
        self._strangers = Allowance(*STRANGERS)

    def serve(self, readers: Mapping[str, Mapping[str, RequestReader]]) -> None:
        """From now on there are these models and versions."""
        self._readers = readers

    def new_identity(self) -> str:
        """A request's id that no other request has."""
        return f"{self._own}-{next(self._numbers):x}"

    async def admit(
        self, authorization: bytes | None, peer: str, protocol: str, certificate: str | None = None
    ) -> Caller:
        """Who asks; not more often than it may. Raises ServeRefusal."""
        principal = await self.parts.authentication.admit(authorization, certificate, peer)
        self.parts.admission.admit(principal.name)
        return Caller(principal, peer, protocol)

    def models(self, principal: Principal) -> Sequence[str]:
        """Names of the models that `principal` may ask."""
        return visible(principal, sorted(self._readers))

    def reader(self, principal: Principal, model: str, version: str | None = None) -> RequestReader:
        """A version's; None: that of the version that most are answered by. Raises ServeRefusal, the same for a model
        that is not there and one that `principal` may not ask."""
        require(principal, "predict", model)
        versions = self._readers.get(model)
        plan = self.parts.router.plan(model)
        if not versions or plan is None:
            raise ServeRefusal("not_found", f"there is no model {model[:100]!r}")
        found = versions.get(version or plan.stable)
        if found is None:
            raise ServeRefusal("not_found", f"there is no such version of {model}")
        return found

    @property
    def ready(self) -> bool:
        """Whether it answers, from every model that it should have in memory."""
        return self.open and not self.missing

    def labels(self, model: str, version: str) -> Sequence[str] | None:
        """Names of a version's classes; None: it is not here any more, or has none."""
        found = self._readers.get(model, {}).get(version)
        return None if found is None else found.model.labels or None

    def is_ready(self, principal: Principal, model: str, version: str | None = None) -> bool:
        """Whether that version answers now; False for what `principal` may not ask."""
        try:
            found = self.reader(principal, model, version)
        except ServeRefusal:
            return False
        return self.open and self.parts.models.loaded(model, found.model.version) is not None

    async def infer(
        self, caller: Caller, request: InferenceRequest, body: bytes | None = None
    ) -> tuple[InferenceResponse, Headers]:
        """Route and answer; `body` is what the audit log may keep of the inputs. Raises ServeRefusal."""
        self.parts.admission.admit_rows(caller.principal.name, request.rows)
        began = monotonic()
        tracer = self.parts.tracer
        moments = None if tracer is None or not tracer.wants(caller.traceparent) else BatchMoments()
        principal, model = caller.principal, request.model
        choice: VersionChoice | None = None
        refusal: ServeRefusal | None = None
        try:
            require(principal, "predict", model)
            choice = self.parts.router.choose(model, request.key, request.version, principal.name)
            if choice is None:
                choice = await self.parts.router.assign(model, request.key, principal.name)
            # Of every output, whatever the client wants: receipts and comparisons are of what was predicted.
            whole = request if request.outputs is None else replace(request, outputs=None)
            response = await self._answer(choice.version, whole, moments)
            if self.parts.inputs is not None:
                self.parts.inputs.saw(model, choice.version, request.columns, request.rows)
            headers = self._done(caller, whole, choice, response)
            return _wanted(response, request.outputs), headers
        except ServeRefusal as error:
            refusal = error
            raise
        except asyncio.CancelledError:
            # The client went away: no version is to blame.
            refusal = ServeRefusal("deadline_exceeded", "the client did not wait")
            raise
        except Exception as error:
            log.error("a request failed: %s", type(error).__name__, exc_info=error)
            refusal = ServeRefusal("internal", "the node failed on this request; its log says more")
            raise refusal from error
        finally:
            seconds = monotonic() - began
            version = "" if choice is None else choice.version
            status = _OK if refusal is None else int(refusal.status)
            if choice is not None:
                self.parts.router.record(
                    choice,
                    model=model,
                    key=request.key,
                    principal=principal.name,
                    seconds=seconds,
                    code=None if refusal is None else refusal.code,
                )
            self.parts.metrics.request(model, version, caller.protocol, status, seconds)
            if refusal is not None:
                self.parts.metrics.refused(model, refusal.code)
                refusal.noted = True
            if moments is not None:
                self._trace(caller, request, version, refusal, began, moments)
            self._note(caller, request, version, refusal, body)

    def _trace(
        self,
        caller: Caller,
        request: InferenceRequest,
        version: str,
        refusal: ServeRefusal | None,
        began: float,
        moments: BatchMoments,
    ) -> None:
        assert self.parts.tracer is not None
        self.parts.tracer.record(
            *TRACED[caller.protocol],
            request.model if version else "",
            version,
            request.rows,
            RequestTimes.until_now(began, moments),
            caller.traceparent,
            None if refusal is None else refusal.code,
        )

    def _note(
        self,
        caller: Caller,
        request: InferenceRequest,
        version: str,
        refusal: ServeRefusal | None,
        body: bytes | None,
    ) -> None:
        written = self.parts.audit.append(
            principal=caller.principal.name,
            peer=caller.peer,
            model=request.model,
            version=version,
            request=request.identity,
            rows=request.rows,
            status=_OK if refusal is None else int(refusal.status),
            code="" if refusal is None else refusal.code,
            received=0 if body is None else len(body),
            body=body,
        )
        self.parts.metrics.audit_line(written)

    def refused(self, refusal: ServeRefusal, peer: str, principal: str = "", model: str = "") -> None:
        """Count and note a request that was refused before it came to a model; `model` as the client gave it.

        Whoever floods the node must not fill its disk: there is no line for who asks too often, and for requests of
        nobody known only so many a second.
        """
        if refusal.noted:
            return
        refusal.noted = True
        self.parts.metrics.request("", "", "other", refusal.status, None)
        self.parts.metrics.refused(None, refusal.code)
        if refusal.code == "too_many_requests":
            self.parts.metrics.rate_limited()
            return
        if not principal and not self._strangers.take():
            return
        written = self.parts.audit.append(
            principal=principal,
            peer=peer,
            model=model[:LONGEST_NAME],
            version="",
            request="",
            rows=0,
            status=refusal.status,
            code=refusal.code,
        )
        self.parts.metrics.audit_line(written)

    async def feedback(self, caller: Caller, body: bytes) -> Mapping[str, Any]:
        """Take what became of an answer. Raises ServeRefusal."""
        found = await asyncio.to_thread(self.credit, caller.principal, body)
        self.parts.metrics.feedback(found.model, "repeated" if found.repeated else "credited")
        return found.body()

    async def close(self) -> None:
        """End what is still compared."""
        await self._mirror.close()

    async def _answer(
        self, version: str, request: InferenceRequest, moments: BatchMoments | None = None
    ) -> InferenceResponse:
        models = self.parts.models
        served = models.loaded(request.model, version)
        try:
            if served is None:
                served = await models.model(request.model, version, request.deadline)
            response: InferenceResponse = await served.answer(request, moments)
        except (ServeRefusal, asyncio.CancelledError):
            raise
        except Exception as error:
            log.warning(
                "%s of %s failed on a request: %s", version, request.model, type(error).__name__, exc_info=error
            )
            raise ServeRefusal("internal", "the model failed on this request") from error
        return response

    def _done(
        self, caller: Caller, request: InferenceRequest, choice: VersionChoice, response: InferenceResponse
    ) -> Headers:
        for mirror in choice.mirrors:
            self._mirror.send(partial(self._compare, mirror, caller, request, response))
        receipt = self.parts.receipts.issue(
            model=request.model,
            version=choice.version,
            request=request.identity,
            principal=caller.principal.name,
            key=request.key,
            propensity=choice.propensity,
            rows=request.rows,
            **_predicted(response),
        )
        return {"fedclaw-version": choice.version, "fedclaw-prediction": receipt}

    async def _compare(
        self, version: str, caller: Caller, request: InferenceRequest, response: InferenceResponse
    ) -> None:
        """Let another version see the request too. Whatever comes of it, nobody waits for it."""
        try:
            agrees = compare(response, await self._answer(version, request), random.random()).agrees  # noqa: S311
        except ServeRefusal as refusal:
            if refusal.code in _NOT_SEEN:
                return
            agrees = False
        self.parts.metrics.mirrored(request.model, version)
        self.parts.router.record_comparison(
            request.model, version, key=request.key, principal=caller.principal.name, agrees=agrees
        )


def _no_feedback(_principal: Principal, _body: bytes) -> Acknowledgement:
    raise ServeRefusal("unavailable", "the node is not ready", 1.0)


def _wanted(response: InferenceResponse, outputs: tuple[str, ...] | None) -> InferenceResponse:
    if outputs is None:
        return response
    if odd := [name for name in outputs if name not in response.outputs]:
        raise ServeRefusal("bad_request", f"the model has no output {odd[0][:100]!r}")
    return replace(response, outputs={name: response.outputs[name] for name in outputs})


def _predicted(response: InferenceResponse) -> dict[str, Any]:
    """What was predicted for each row, for a receipt."""
    labels, values = response.outputs.get(LABEL), response.outputs.get(VALUES)
    if labels is not None:
        return {"labels": [label or None for label in labels.ravel().tolist()]}
    if values is not None and values.size == len(values):
        return {"values": values.ravel().tolist()}
    return {}
