"""Keeps a worker's models in step with the state store: the catalogue says what there is, the plans what answers.

It looks each quarter of a second. What a plan routes to is loaded and warmed first, and then told to be ready; what is
no longer in the catalogue is forgotten once its requests are answered. A version that does not load leaves the others
as they are. While the store is away, what is served is served on.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from fedclaw.errors import FedClawError
from fedclaw.export.layout import MARGINALS, SCHEMA
from fedclaw.export.predictor import schema_of
from fedclaw.serve.inference.description import ModelDescription
from fedclaw.serve.inference.rest import RequestReader
from fedclaw.serve.models.bundle_store import BundleStore
from fedclaw.serve.models.pool import ModelPool, ModelVersion
from fedclaw.serve.models.probe import ExecutionSettings
from fedclaw.serve.models.served_model import ModelInterface
from fedclaw.serve.monitoring.drift_watch import InputWatch, VersionInputs
from fedclaw.serve.monitoring.metrics import WorkerMetrics
from fedclaw.serve.node import ServingNode
from fedclaw.serve.repeated_work import RepeatedWork
from fedclaw.serve.settings import NodeSettings
from fedclaw.serve.state.store import StateStore
from fedclaw.serve.supervisor import Launch
from fedclaw.serve.version_catalogue import ModelEntry, VersionCatalogue, in_memory

log = logging.getLogger("fedclaw.serve")

PERIOD = 0.25


@dataclass(frozen=True)
class SynchronisedParts:
    """What is kept in step."""

    launch: Launch
    store: StateStore
    bundles: BundleStore
    pool: ModelPool
    node: ServingNode
    metrics: WorkerMetrics
    inputs: InputWatch | None = None


class Synchroniser:
    """One worker's."""

    def __init__(self, parts: SynchronisedParts) -> None:
        self._parts = parts
        self._catalogue = VersionCatalogue(parts.store)
        self._readers: dict[str, dict[str, RequestReader]] = {}
        self._digests: dict[tuple[str, str], str] = {}
        self._failed: dict[tuple[str, str], str] = {}
        self._loading: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Load all that is to be ready from the start. Raises FedClawError for what does not load; but a process that
        takes another one's place serves the models that do, and is not ready until it has the others."""
        entries = await self._routed()
        await self._take(entries)
        self._tell()
        failures = dict[str, FedClawError]()
        pinned = [model for model, entry in entries.items() if entry.pinned and self._stable(model) is not None]
        for model in pinned:
            try:
                await self._parts.pool.load(model, str(self._stable(model)))
            except FedClawError as error:
                failures[model] = error
        if failures and (not self._parts.launch.again or len(failures) == len(pinned)):
            raise next(iter(failures.values()))
        for model in failures:
            log.error("%s is not answered by this process until it loads; the other models are", model)
        self._note_missing(entries)
        self._tell()
        await self._beat()

    async def run(self) -> None:
        """Keep in step until cancelled."""
        work = RepeatedWork(log, "models stay as they are for now")
        while True:
            await asyncio.sleep(PERIOD)
            with work.attempt():
                await self.once()

    async def once(self) -> None:
        """One look."""
        entries = await self._routed()
        await self._take(entries)
        self._tell()
        for model, entry in entries.items():
            for version in entry.versions:
                if entry.pinned or version in entry.staged or version != self._stable(model):
                    self._begin_loading(model, version)
        self._note_missing(entries)
        await self._beat()

    def _note_missing(self, entries: Mapping[str, ModelEntry]) -> None:
        loaded = set(self._parts.pool.ready())
        stable = {model: self._stable(model) for model, entry in entries.items() if entry.pinned}
        self._parts.node.missing = frozenset(
            model for model, version in stable.items() if version is not None and (model, version) not in loaded
        )

    async def _routed(self) -> dict[str, ModelEntry]:
        """The models, each with the versions that its plan may route to, or that are to be loaded first."""
        found = {}
        for model, entry in (await asyncio.to_thread(self._catalogue.all)).items():
            plan = self._parts.node.parts.router.plan(model)
            wanted = {*entry.staged} if plan is None else {*plan.versions, *plan.last_good, *entry.staged}
            kept = {name: own for name, own in entry.versions.items() if name in wanted}
            if kept or plan is not None:
                found[model] = entry.model_copy(update={"versions": kept})
        return found

    def _stable(self, model: str) -> str | None:
        """None: nothing answers for it yet."""
        plan = self._parts.node.parts.router.plan(model)
        return None if plan is None else plan.stable

    async def _take(self, entries: Mapping[str, ModelEntry]) -> None:
        """Register what is new and forget what is gone, and what is another bundle now."""
        await self._register_new(entries)
        for model, versions in list(self._readers.items()):
            kept = entries[model].versions if model in entries else {}
            same = {name for name, own in kept.items() if own.digest == self._digests.get((model, name))}
            for version in [name for name in versions if name not in same]:
                del versions[version], self._digests[model, version]
                if self._parts.inputs is not None:
                    self._parts.inputs.forget(model, version)
                await self._parts.pool.forget(model, version)
            if not versions:
                del self._readers[model]
        await self._register_new(entries)

    async def _register_new(self, entries: Mapping[str, ModelEntry]) -> None:
        for model, entry in entries.items():
            for version, found in entry.versions.items():
                if version not in self._readers.get(model, {}):
                    await self._register(model, version, found.digest, entry)

    async def _register(self, model: str, version: str, digest: str, entry: ModelEntry) -> None:
        try:
            reader = await asyncio.to_thread(self._describe, model, version, digest)
        except Exception as error:
            # Whatever it was, the others are served on.
            if self._failed.get((model, version)) != str(error):
                self._failed[model, version] = str(error)
                unknown = None if isinstance(error, FedClawError) else error
                log.warning("version %s of %s is not served here: %s", version, model, error, exc_info=unknown)
            return
        self._failed.pop((model, version), None)
        execution = _execution(self._parts.launch.settings)
        self._parts.pool.register(ModelVersion(model, version, digest, entry.pinned, entry.precision, execution))
        self._readers.setdefault(model, {})[version] = reader
        self._digests[model, version] = digest

    def _describe(self, model: str, version: str, digest: str) -> RequestReader:
        """What a bundle takes and gives. Raises BundleError for one that this node does not have, or that fails."""
        verified = self._parts.bundles.open(digest, self._parts.pool.trust, (SCHEMA, MARGINALS))
        schema = schema_of(verified)
        interface = ModelInterface.of(verified.manifest, schema)
        if self._parts.inputs is not None:
            inputs = VersionInputs.of(schema, interface.columns, verified.contents)
            self._parts.inputs.serves(model, version, inputs.features)
        return RequestReader(
            ModelDescription(
                name=model,
                version=version,
                versions=(version,),
                columns=interface.columns,
                outputs=interface.outputs,
                schema=schema,
                threshold=interface.threshold,
            )
        )

    def _tell(self) -> None:
        self._parts.node.serve({model: dict(versions) for model, versions in self._readers.items()})
        metrics, pool = self._parts.metrics, self._parts.pool
        metrics.serves({model: tuple(versions) for model, versions in self._readers.items()})
        for model, version in pool.ready():
            if (served := pool.loaded(model, version)) is not None:
                metrics.queue(model, version, served.batcher.queued_rows)

    def _begin_loading(self, model: str, version: str) -> None:
        if (model, version) in self._parts.pool.ready() or version not in self._readers.get(model, {}):
            return
        task = asyncio.ensure_future(self._load(model, version))
        self._loading.add(task)
        task.add_done_callback(self._loading.discard)

    async def _load(self, model: str, version: str) -> None:
        try:
            await self._parts.pool.model(model, version)
        except FedClawError:
            log.debug("the pool has said why %s of %s does not load", version, model)

    async def _beat(self) -> None:
        """Tell the store which versions this worker answers from."""
        loaded = set(self._parts.pool.ready())
        known = [own for own in self._parts.pool.known() if (own.model, own.version) in loaded]
        ready = [in_memory(own.model, own.version, own.digest) for own in known]
        launch = self._parts.launch
        await asyncio.to_thread(self._parts.store.beat, launch.settings.name, launch.name, ready)


def _execution(settings: NodeSettings) -> ExecutionSettings:
    batching = settings.batching
    return ExecutionSettings(
        threads=batching.threads,
        max_batch=batching.rows,
        batching=None if batching.mode == "auto" else batching.mode == "always",
    )
