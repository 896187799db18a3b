"""The admin port of a node: what operators, Prometheus and `publish` read and ask for.

Everything on it needs a token with an admin scope, but its health.
"""

import asyncio
import logging
import shutil
import tempfile
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from fedclaw.errors import FedClawError
from fedclaw.export.layout import SCHEMA
from fedclaw.export.predictor import schema_of
from fedclaw.serve import releases
from fedclaw.serve.admin_access import METRICS, AdminAccess, AdminCall
from fedclaw.serve.app import refused
from fedclaw.serve.bundle_archive import MEDIA_TYPE, unpack
from fedclaw.serve.home import INCOMING, NodeHome, trust_of
from fedclaw.serve.model_removal import remove_model
from fedclaw.serve.models.bundle_store import MOST_BYTES, BundleStore
from fedclaw.serve.models.served_model import ModelInterface
from fedclaw.serve.monitoring.metrics import NodeMetrics
from fedclaw.serve.observer import NodeObserver
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.routing.plan import read_plan
from fedclaw.serve.security.http_protocol import CERTIFICATE
from fedclaw.serve.state.store import StateStore
from fedclaw.serve.supervisor import Launch, read_processes
from fedclaw.serve.version_catalogue import ModelEntry, VersionCatalogue

log = logging.getLogger("fedclaw.serve")

MOST_BODY = 1 << 16
LEAST_FREE = 1 << 30
"""Bytes on the node's disk that uploads leave: the audit log, without which nothing is answered, is there too."""
UNNEEDED_SECONDS = 3600.0
"""How long a bundle stays in the store that no version has any more."""


PUBLISH, REMOVE = "publish", "remove"
_WITHOUT_JSON = frozenset({PUBLISH, REMOVE})
_Body = dict[str, Any]
_Read = Callable[[Request], Awaitable[Any]]
_Change = Callable[[Request, _Body, str], Awaitable[Any]]
"""Takes the request, its body and the principal that asks."""


class AdminPort:
    """The routes of the admin port."""

    def __init__(
        self,
        launch: Launch,
        store: StateStore,
        access: AdminAccess,
        metrics: NodeMetrics,
        observer: NodeObserver,
    ) -> None:
        self.settings = launch.settings
        self.home = NodeHome(launch.settings.state)
        self.store, self.catalogue = store, VersionCatalogue(store)
        self.bundles = BundleStore(self.home.bundles)
        self.trust = trust_of(launch.settings)
        self.metrics, self.observer = metrics, observer
        self._access = access
        self._beginning: dict[tuple[str, str, str], asyncio.Task[Any]] = {}
        self._keeping = threading.Lock()
        self._unneeded: dict[str, float] = {}
        model = "/admin/models/{model}"
        self.app = Starlette(
            routes=[
                Route("/admin/health", _health),
                Route("/metrics", self._read(METRICS, self._metrics)),
                Route("/admin/node", self._read("node", self._node)),
                Route("/admin/events", self._read("events", self._events)),
                Route("/admin/models", self._read("models", self._models)),
                Route(model, self._read("model", self._model)),
                Route(model, self._change("publish", REMOVE, self._remove_model), methods=["DELETE"]),
                Route(f"{model}/events", self._read("events", self._events)),
                Route(f"{model}/release", self._read("release", self._release)),
                Route(f"{model}/quality", self._read("quality", self._quality)),
                Route(f"{model}/versions", self._change("publish", PUBLISH, self._add_version), methods=["POST"]),
                Route(
                    f"{model}/versions/{{version}}",
                    self._change("publish", REMOVE, self._remove_version),
                    methods=["DELETE"],
                ),
                Route(f"{model}/release", self._change("publish", "release", self._begin_release), methods=["POST"]),
                Route(f"{model}/baseline", self._change("route", "baseline", self._begin_baseline), methods=["POST"]),
                Route(f"{model}/{{operation:str}}", self._change("route", "", self._operate), methods=["POST"]),
            ],
            exception_handlers={HTTPException: _no_route},
        )

    def _read(self, action: str, handler: _Read) -> Any:
        async def read(request: Request, _call: AdminCall) -> Any:
            return await handler(request)

        return self._route("read", action, read)

    def _change(self, scope: str, action: str, handler: _Change) -> Any:
        async def change(request: Request, call: AdminCall) -> Any:
            asked = {} if action in _WITHOUT_JSON else await _body(request)
            call.action = action or request.path_params["operation"]
            call.versions = _versions(asked) or _versions({**request.query_params, **request.path_params})
            self._access.begin(call)
            try:
                found = await handler(request, asked, call.principal)
            finally:
                self._access.ended()
            call.versions = call.versions or _versions(found)
            return found

        return self._route(scope, action or scope, change)

    def _route(self, scope: str, action: str, handler: Callable[[Request, AdminCall], Awaitable[Any]]) -> Any:
        async def answer(request: Request) -> Response:
            call = AdminCall(scope, action, _peer(request), request.path_params.get("model", ""))
            header = request.headers.get("authorization")
            try:
                given = None if header is None else header.encode("latin-1")
                await self._access.admit(call, given, request.scope.get(CERTIFICATE))
                found = await handler(request, call)
            except Exception as error:
                refusal = self._refusal(error)
                self._access.answered(call, refusal.status, refusal)
                return _refused(refusal)
            self._access.answered(call, HTTPStatus.OK)
            return found if isinstance(found, Response) else _json(found)

        return answer

    def _refusal(self, error: Exception) -> ServeRefusal:
        """What whoever asked is told of it."""
        if isinstance(error, ServeRefusal):
            return error
        if isinstance(error, FedClawError):
            return ServeRefusal("unprocessable", str(error).replace(f"{self.home.root}/", ""))
        if isinstance(error, ClientDisconnect):
            log.info("a client of the admin port went away before its request was whole")
            return ServeRefusal("bad_request", "the request is not whole")
        log.error("the admin port failed: %s", type(error).__name__, exc_info=error)
        return ServeRefusal("internal", "the node failed on this request; its log says more")

    async def _metrics(self, request: Request) -> Response:
        content, media_type = await asyncio.to_thread(self.metrics.render, request.headers.get("accept"))
        return Response(content, media_type=media_type)

    async def _node(self, _request: Request) -> Any:
        workers = await asyncio.to_thread(self.store.workers)
        return {
            "name": self.settings.name,
            "processes": list(read_processes(self.settings.state)),
            "workers": [
                {"node": beat.node, "worker": beat.worker, "ready": list(beat.ready), "age": round(beat.age, 2)}
                for beat in workers
            ],
        }

    async def _models(self, _request: Request) -> Any:
        names = await asyncio.to_thread(self.catalogue.models)
        return [await asyncio.to_thread(releases.describe, self.store, name) for name in names]

    async def _model(self, request: Request) -> Any:
        return await asyncio.to_thread(releases.describe, self.store, request.path_params["model"])

    async def _events(self, request: Request) -> Any:
        model = request.path_params.get("model")
        limit = request.query_params.get("limit", "100")
        if not limit.isdigit() or not 0 < int(limit) <= 10_000:
            raise ServeRefusal("bad_request", "limit is a whole number from 1 to 10000")
        events = await asyncio.to_thread(self.store.events, model, int(limit))
        return [
            {"number": event.number, "time": event.time, "kind": event.kind, "model": event.model, **event.body}
            for event in events
        ]

    async def _release(self, request: Request) -> Any:
        return await asyncio.to_thread(releases.progress, self.store, request.path_params["model"])

    async def _quality(self, request: Request) -> Any:
        """What feedback and inputs say of each version."""
        found = self.observer.quality(request.path_params["model"])
        if found is None:
            raise ServeRefusal("not_found", "nothing is known of such a model yet")
        return found

    async def _begin_release(self, request: Request, body: _Body, by: str) -> Any:
        version, mode = body.get("version"), body.get("mode") or self.settings.release.mode
        if not isinstance(version, str) or mode not in {"canary", "shadow", "at_once"}:
            raise ServeRefusal("bad_request", "give a version, and as mode canary, shadow or at_once")
        model = request.path_params["model"]
        # Whoever lost the first answer and asks again gets it, and changes nothing.
        asked = (model, version, mode)
        if (begun := self._beginning.get(asked)) is None:
            begun = self._beginning[asked] = asyncio.create_task(asyncio.to_thread(self._release_begun, *asked, by))
            begun.add_done_callback(lambda _: self._beginning.pop(asked, None))
        return await asyncio.shield(begun)

    def _release_begun(self, model: str, version: str, mode: str, by: str) -> Any:
        if not releases.is_under_way(self.store, model, version, mode):
            if mode != "at_once":
                self._require_alike(model, [version])
            own = self.settings
            return releases.begin(self.store, model, version, own.release, mode, by, own.breaker)
        return releases.progress(self.store, model)

    async def _begin_baseline(self, request: Request, _body: _Body, by: str) -> Any:
        model = request.path_params["model"]
        await asyncio.to_thread(self.observer.begin_baseline, model, by)
        return {"model": model, "baseline": "the next rows"}

    async def _operate(self, request: Request, body: _Body, by: str) -> Any:
        model, operation = request.path_params["model"], request.path_params["operation"]
        if operation == "ab" and isinstance(body.get("versions"), list):
            await asyncio.to_thread(self._require_alike, model, body["versions"])
        return await asyncio.to_thread(releases.operate, self.store, model, operation, body, by)

    def _require_alike(self, model: str, versions: list[Any]) -> None:
        """Raise ServeRefusal `conflict` for a version that takes or gives something else than the one that answers: a
        request for one of them could not be answered by the other."""
        entry, found = self.catalogue.read(model), read_plan(self.store, model)
        if entry is None or found is None:
            return
        answering = self._interface(entry, found.plan.stable)
        for version in versions:
            own = self._interface(entry, str(version))
            if own is not None and answering is not None and own != answering:
                raise ServeRefusal(
                    "conflict",
                    f"{version} takes other columns or gives other outputs than {found.plan.stable}, which answers: "
                    "it can only take its place at once",
                )

    def _interface(self, entry: ModelEntry, version: str) -> Any:
        if version not in entry.versions:
            return None
        verified = self.bundles.open(entry.versions[version].digest, self.trust, (SCHEMA,))
        found = ModelInterface.of(verified.manifest, schema_of(verified))
        return [(column.name, column.dtype, column.shape) for column in found.columns], found.outputs, found.labels

    async def _add_version(self, request: Request, _body: _Body, by: str) -> Any:
        """Take a bundle: nothing of it is believed before its copy in the store has verified."""
        model, version = request.path_params["model"], request.query_params.get("version")
        releases.require_names(model, version)
        if request.headers.get("content-type", "").partition(";")[0].strip() != MEDIA_TYPE:
            raise ServeRefusal("unsupported_media_type", f"a bundle is sent as {MEDIA_TYPE}")
        directory = Path(await asyncio.to_thread(tempfile.mkdtemp, dir=self.home.root, prefix=INCOMING))
        try:
            archive = directory / "archive"
            with archive.open("xb") as file:
                size = await _receive(request, file, directory)
            log.info("a bundle of %d bytes came in for %s", size, model)
            return await asyncio.to_thread(self._keep, directory, model, version, by)
        finally:
            await asyncio.to_thread(shutil.rmtree, directory, True)

    def _keep(self, directory: Path, model: str, version: str | None, by: str) -> Any:
        bundle = directory / "bundle"
        bundle.mkdir(mode=0o700)
        with (directory / "archive").open("rb") as archive:
            unpack(archive, bundle, MOST_BYTES)
        with self._keeping:
            try:
                digest = self.bundles.put(bundle, self.trust)
                run = self.bundles.open(digest, self.trust).manifest.run
            except FedClawError as error:
                # Where the node keeps things is nobody's business.
                raise ServeRefusal("unprocessable", str(error).replace(str(bundle), "the bundle")) from error
            before = self.catalogue.read(model)
            named = self.catalogue.add(model, version, digest, run, by)
        if before is None or named not in before.versions:
            self.store.append_event("published", model, {"version": named, "digest": digest, "by": by})
        return {"model": model, "version": named, "digest": digest}

    def tidy(self, now: float) -> None:
        """Remove bundles that no version has had for long. Raises FedClawError, OSError."""
        with self._keeping:
            needed = {own.digest for entry in self.catalogue.all().values() for own in entry.versions.values()}
            left = [digest for digest in self.bundles.digests() if digest not in needed]
            self._unneeded = {digest: self._unneeded.get(digest, now) for digest in left}
            for digest, since in self._unneeded.items():
                if now - since >= UNNEEDED_SECONDS:
                    log.info("the bundle %s is removed: no version has it", digest[:12])
                    self.bundles.remove(digest)

    async def _remove_model(self, request: Request, _body: _Body, by: str) -> Any:
        return await asyncio.to_thread(remove_model, self.store, request.path_params["model"], by)

    async def _remove_version(self, request: Request, _body: _Body, by: str) -> Any:
        model, version = request.path_params["model"], request.path_params["version"]
        return await asyncio.to_thread(releases.remove, self.store, model, version, by)


def _peer(request: Request) -> str:
    return "" if request.client is None else request.client.host


def _versions(told: Any) -> Sequence[str]:
    """The versions that are named, as far as they are texts."""
    if not isinstance(told, Mapping):
        return []
    several = told.get("versions")
    named = several if isinstance(several, list) else [told.get("version")]
    return [version for version in named if isinstance(version, str)]


async def _health(_request: Request) -> Response:
    return _json({"status": "ok"})


async def _receive(request: Request, file: BinaryIO, directory: Path) -> int:
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > MOST_BYTES:
            raise ServeRefusal("too_large", f"a bundle has at most {MOST_BYTES} bytes")
        # It is to be unpacked, and that is to be copied.
        await asyncio.to_thread(_write, file, piece, directory, 2 * size)
    return size


def _write(file: BinaryIO, piece: bytes, directory: Path, more: int) -> None:
    """Raises ServeRefusal where there would not be room for the piece and so many bytes more."""
    if shutil.disk_usage(directory).free < LEAST_FREE + len(piece) + more:
        raise ServeRefusal("unavailable", "the node has no room for the bundle")
    file.write(piece)


async def _body(request: Request) -> _Body:
    content = b""
    async for piece in request.stream():
        content += piece
        if len(content) > MOST_BODY:
            raise ServeRefusal("too_large", f"a body has at most {MOST_BODY} bytes")
    try:
        found = orjson.loads(content) if content else {}
    except orjson.JSONDecodeError as error:
        raise ServeRefusal("bad_request", "the body is no JSON") from error
    if not isinstance(found, dict):
        raise ServeRefusal("bad_request", "the body is no JSON object")
    return found


def _json(content: Any) -> Response:
    return Response(orjson.dumps(content), media_type="application/json", headers={"cache-control": "no-store"})


async def _no_route(_request: Request, error: Exception) -> Response:
    if getattr(error, "status_code", 404) == 405:
        return _refused(ServeRefusal("method_not_allowed", "this path takes another method"))
    return _refused(ServeRefusal("not_found", "there is nothing at this path of the admin port"))


def _refused(refusal: ServeRefusal) -> Response:
    answer = refused(refusal)
    return Response(answer.body, int(answer.status), dict(answer.headers), answer.media_type)
