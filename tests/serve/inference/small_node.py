"""A node of real bundles without workers, routing or limits: what the protocols talk to in tests."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from fedclaw.export.check import Verified, verify_bundle
from fedclaw.export.layout import PIPELINE, SCHEMA
from fedclaw.export.runtime import open_session, run_columns
from fedclaw.learning.registry import schema_class
from fedclaw.serve.inference.description import ModelDescription
from fedclaw.serve.inference.node import Headers
from fedclaw.serve.inference.rest import RequestReader
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.requests import Caller, InferenceRequest, InferenceResponse, Principal

VERSION = "0123456789ab"
TOKEN = "Bearer right"
PEOPLE = {b"Bearer right": Principal("alice", frozenset({"predict:*"})), b"Bearer none": Principal("bob", frozenset())}


def describe_bundle(name: str, bundle: Path) -> tuple[ModelDescription, Verified]:
    verified = verify_bundle(bundle, keep=(PIPELINE, SCHEMA))
    manifest = verified.manifest
    schema = schema_class(manifest.workload).parse(verified.contents[SCHEMA].decode(), "bundle")
    assert manifest.pipeline is not None
    threshold = None if manifest.decision is None else manifest.decision.threshold
    pipeline = manifest.pipeline
    return ModelDescription(name, VERSION, (VERSION,), pipeline.columns, pipeline.outputs, schema, threshold), verified


class SmallNode:
    """A Node."""

    live = ready = True

    def __init__(self, bundles: Mapping[str, Path]) -> None:
        self._readers, self._sessions = dict[str, RequestReader](), dict[str, Any]()
        self.seen = list[InferenceRequest]()
        for name, bundle in bundles.items():
            description, verified = describe_bundle(name, bundle)
            self._readers[name] = RequestReader(description)
            self._sessions[name] = open_session(verified.contents[PIPELINE], PIPELINE, "serve", threads=1)

    async def admit(
        self, authorization: bytes | None, peer: str, protocol: str, certificate: str | None = None
    ) -> Caller:
        if authorization not in PEOPLE:
            raise ServeRefusal("unauthenticated", "no valid token")
        return Caller(PEOPLE[authorization], peer, protocol)

    def models(self, principal: Principal) -> Sequence[str]:
        return sorted(name for name in self._readers if principal.may("predict", name))

    def reader(self, principal: Principal, model: str, version: str | None = None) -> RequestReader:
        if model not in self.models(principal) or version not in {None, VERSION}:
            raise ServeRefusal("not_found", "there is no such model")
        return self._readers[model]

    def is_ready(self, principal: Principal, model: str, version: str | None = None) -> bool:
        return model in self.models(principal) and version in {None, VERSION}

    async def infer(
        self, caller: Caller, request: InferenceRequest, body: bytes | None = None
    ) -> tuple[InferenceResponse, Headers]:
        self.seen.append(request)
        if request.identity == "break":
            raise RuntimeError("a secret of the node")
        if request.identity == "shed":
            raise ServeRefusal("overloaded", "the queue is full", retry_after=0.25)
        if request.deadline is not None and request.deadline < monotonic():
            raise ServeRefusal("deadline_exceeded", "too late")
        outputs = run_columns(self._sessions[request.model], request.columns)
        wanted = request.outputs or tuple(outputs)
        response = InferenceResponse(request.model, VERSION, request.identity, {name: outputs[name] for name in wanted})
        return response, {"fedclaw-version": VERSION, "fedclaw-prediction": "receipt"}

    def refused(self, refusal: ServeRefusal, peer: str, principal: str = "", model: str = "") -> None:
        refusal.noted = True
