"""The versions that a worker has in memory: loaded on demand or pinned, within a budget, and swapped without an outage.

A version is visible only when it is loaded, probed and warm. Loading runs in a thread, so the event loop never waits,
and each version is loaded once however many requests want it. One that does not load leaves everything as it was. Where
the budget does not hold a version more, the ones used least recently go, but those that are pinned; what goes finishes
the requests that it has.

All methods belong to the event loop's thread.
"""

import asyncio
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from fedclaw.errors import BundleError
from fedclaw.export.check import Trust
from fedclaw.export.runtime import Device
from fedclaw.serve.models.batching import BatchFigures, EagerBatcher, QueueLimits
from fedclaw.serve.models.bundle_store import BundleStore
from fedclaw.serve.models.features import SharedFeatures
from fedclaw.serve.models.graphs import SplitGraph
from fedclaw.serve.models.probe import ExecutionSettings, Probed, probe
from fedclaw.serve.models.served_model import ServedModel, ServedPrecision, files_for
from fedclaw.serve.refusals import ServeRefusal

log = logging.getLogger(__name__)
_RETRY_LATER = 1.0
_STATM = Path("/proc/self/statm")


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """A version that the pool may load."""

    model: str
    version: str
    digest: str
    """Of its bundle in the store."""
    pinned: bool = False
    """Whether it is loaded at the start and never unloaded to make room."""
    precision: ServedPrecision = "float32"
    execution: ExecutionSettings = field(default_factory=ExecutionSettings)


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """What a worker's pool may use."""

    memory_bytes: int | None = None
    """The most that loaded versions take together, as estimated; None: no limit."""
    device: Device = "cpu"
    cores: int = 1
    """Cores of this worker."""
    limits: QueueLimits = field(default_factory=QueueLimits)
    retry_seconds: float = 10.0
    """How long after a failure the next request tries to load the version again."""


@dataclass(frozen=True, slots=True)
class BatchSeen:
    """A batch that a version computed, for metrics."""

    model: str
    version: str
    rows: int
    waited: float
    """Seconds from the queue to the batch, of its oldest request."""
    seconds: float
    """Until it was computed."""
    refused: int
    """Rows that get no answer."""


OnLoaded = Callable[[str, str, float, int], None]
"""Told of a version that is warm and visible: its model and name, the seconds that it took, the bytes that it takes."""
OnUnloaded = Callable[[str, str], None]
"""Told of a version that is gone: its model and name."""
_Key = tuple[str, str]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Loaded:
    served: ServedModel
    bytes: int
    """What it takes: the size of its files, or by how much the process grew, whichever is more."""
    pinned: bool


class ModelPool:
    """The versions of all models of one worker."""

    def __init__(
        self,
        store: BundleStore,
        trust: Trust,
        settings: PoolSettings | None = None,
        observe: Callable[[BatchSeen], None] | None = None,
        on_loaded: OnLoaded | None = None,
        on_unloaded: OnUnloaded | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`trust` says who must have signed; it may be exchanged. `observe` is told of each batch.

        All three are called in the event loop's thread.
        """
        self.trust = trust
        self._store = store
        self._settings = settings or PoolSettings()
        self._observe, self._on_loaded, self._on_unloaded = observe, on_loaded, on_unloaded
        self._clock = clock
        self._known: dict[_Key, ModelVersion] = {}
        self._loaded: OrderedDict[_Key, _Loaded] = OrderedDict()
        self._loading: dict[_Key, asyncio.Task[ServedModel]] = {}
        self._leaving: dict[ServedModel, _Loaded] = {}
        self._failed: dict[_Key, float] = {}
        self._features: dict[str, SharedFeatures] = {}
        self._room = asyncio.Lock()
        self._loader = ThreadPoolExecutor(1, "load-model")
        self._executor = ThreadPoolExecutor(max(1, self._settings.cores), "compute")

    @property
    def used_bytes(self) -> int:
        """What the versions in memory take, those that are being drained too."""
        return sum(own.bytes for own in (*self._loaded.values(), *self._leaving.values()))

    def register(self, version: ModelVersion) -> None:
        """Make a version known. Raises BundleError where its name already stands for another bundle."""
        key = (version.model, version.version)
        known = self._known.get(key)
        if known is not None and known.digest != version.digest:
            raise BundleError(
                f"the version {version.version!r} of {version.model!r} is another bundle; give the new one another name"
            )
        self._known[key] = version
        if (loaded := self._loaded.get(key)) is not None:
            self._loaded[key] = _Loaded(loaded.served, loaded.bytes, version.pinned)

    def known(self) -> tuple[ModelVersion, ...]:
        """The versions that the pool may load."""
        return tuple(self._known.values())

    def ready(self) -> list[tuple[str, str]]:
        """Model and version of what is loaded and warm."""
        return list(self._loaded)

    def loaded(self, model: str, version: str) -> ServedModel | None:
        """A version that is in memory; None: it is not. Counts as a use of it."""
        found = self._loaded.get((model, version))
        if found is None:
            return None
        self._loaded.move_to_end((model, version))
        return found.served

    async def model(self, model: str, version: str, deadline: float | None = None) -> ServedModel:
        """A version, loaded first if need be; requests that want the same one wait for it together.

        Raises ServeRefusal: `not_found`, `unavailable` for one that does not load, `deadline_exceeded`.
        """
        if (found := self.loaded(model, version)) is not None:
            return found
        key = (model, version)
        if key not in self._known:
            raise ServeRefusal("not_found", "there is no such model or version")
        if (wait := self._failed.get(key, -1.0) - self._clock()) > 0:
            raise ServeRefusal("unavailable", "the version cannot be loaded", wait)
        try:
            async with asyncio.timeout(None if deadline is None else deadline - self._clock()):
                return await self.load(model, version)
        except TimeoutError as error:
            message = "the version was not loaded before the deadline"
            raise ServeRefusal("deadline_exceeded", message, _RETRY_LATER) from error
        except ServeRefusal:
            raise
        except Exception as error:  # whatever it was, the log has it, and it is none of the client's business
            raise ServeRefusal("unavailable", "the version cannot be loaded", self._settings.retry_seconds) from error

    async def load(self, model: str, version: str) -> ServedModel:
        """The same for whoever may know why it does not load: raises FedClawError, and tries again each time."""
        if (found := self.loaded(model, version)) is not None:
            return found
        key = (model, version)
        if key not in self._known:
            raise BundleError(f"there is no version {version!r} of a model {model!r}")
        task = self._loading.get(key)
        if task is None:
            task = self._loading[key] = asyncio.create_task(self._load(self._known[key]))
            task.add_done_callback(lambda done: self._load_ended(key, done))
        return await asyncio.shield(task)

    async def unload(self, model: str, version: str) -> None:
        """Take a version out of sight at once, and wait until its requests are answered."""
        if (leaving := self._loaded.pop((model, version), None)) is not None:
            await self._leave(leaving)

    async def forget(self, model: str, version: str) -> None:
        """Unload a version that is not to be loaded again."""
        self._known.pop((model, version), None)
        self._failed.pop((model, version), None)
        await self.unload(model, version)

    async def drain(self) -> None:
        """Wait until every request that was admitted is answered."""
        for own in (*self._loaded.values(), *self._leaving.values()):
            await own.served.drain()

    async def close(self) -> None:
        """Drain, then end the threads."""
        for task in list(self._loading.values()):
            task.cancel()
        await self.drain()
        self._loader.shutdown(wait=False, cancel_futures=True)
        self._executor.shutdown(wait=True)

    async def _load(self, version: ModelVersion) -> ServedModel:
        began = self._clock()
        async with self._room:
            size = await self._in_loader(self._size_of, version)
            await self._make_room(size, version)
            probed, grown = await self._in_loader(self._load_now, version)
            await self._make_room(own := max(size, grown), version)
        key = (version.model, version.version)
        if (known := self._known.get(key)) is None:
            raise BundleError(f"the version {version.version!r} of {version.model!r} was removed while it was loaded")
        limits, features = self._settings.limits, self._features_of(probed)
        served = probed.loaded.serve(
            *key, version.digest, probed.execution, limits, self._executor, self._observer(version), features
        )
        self._loaded[key] = _Loaded(served, own, known.pinned)
        if self._on_loaded is not None:
            self._on_loaded(*key, self._clock() - began, own)
        log.info("%s %s is loaded and takes %d MB", *key, own >> 20)
        return served

    def _features_of(self, probed: Probed) -> SharedFeatures | None:
        """The preprocessing of a graph in two, the same for all versions that have the same."""
        graph = probed.loaded.graph
        if probed.preparing is None or not isinstance(graph, SplitGraph):
            return None
        shared = self._features.get(graph.features.digest)
        if shared is None:
            batcher = EagerBatcher(graph.features.run, probed.preparing, self._settings.limits, self._executor)
            shared = self._features[graph.features.digest] = SharedFeatures(graph.features.digest, batcher)
        shared.versions += 1
        return shared

    def _observer(self, version: ModelVersion) -> Callable[[BatchFigures], None] | None:
        if (observe := self._observe) is None:
            return None
        model, name = version.model, version.version
        return lambda found: observe(BatchSeen(model, name, found.rows, found.waited, found.seconds, found.refused))

    def _load_ended(self, key: _Key, task: "asyncio.Task[ServedModel]") -> None:
        self._loading.pop(key, None)
        if task.cancelled():
            return
        if (error := task.exception()) is None:
            self._failed.pop(key, None)
            return
        self._failed[key] = self._clock() + self._settings.retry_seconds
        log.error("%s %s cannot be loaded: %s", *key, error)

    async def _in_loader(self, work: Callable[[ModelVersion], Result], version: ModelVersion) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._loader, work, version)

    def _size_of(self, version: ModelVersion) -> int:
        return self._store.size(version.digest, files_for(version.precision))

    def _load_now(self, version: ModelVersion) -> tuple[Probed, int]:
        with suppress(ImportError):  # not a part of what the version takes; what is missing is said below
            import onnxruntime  # noqa: F401
        before = _resident()
        verified = self._store.open(version.digest, self.trust, files_for(version.precision))
        probed = probe(verified, version.precision, self._settings.cores, version.execution, self._settings.device)
        del verified
        return probed, _resident() - before

    async def _make_room(self, size: int, version: ModelVersion) -> None:
        """Unload what was used least recently until `size` bytes more fit. Raises BundleError if they never do."""
        if (budget := self._settings.memory_bytes) is None:
            return
        kept = sum(own.bytes for own in self._loaded.values() if own.pinned)
        if kept + size > budget:
            raise BundleError(
                f"the version {version.version!r} of {version.model!r} takes {size >> 20} MB; the budget is "
                f"{budget >> 20} MB, of which pinned versions take {kept >> 20}"
            )
        while self.used_bytes + size > budget:
            key = next((key for key, own in self._loaded.items() if not own.pinned), None)
            if key is None:
                await asyncio.gather(*(served.drain() for served in self._leaving))
            else:
                log.info("%s %s makes room", *key)
                await self._leave(self._loaded.pop(key))

    async def _leave(self, leaving: _Loaded) -> None:
        self._leaving[leaving.served] = leaving
        try:
            await leaving.served.drain()
        finally:
            del self._leaving[leaving.served]
            if (features := leaving.served.features) is not None:
                features.versions -= 1
                if not features.versions:
                    self._features.pop(features.digest, None)
            if self._on_unloaded is not None and (leaving.served.name, leaving.served.version) not in self._loaded:
                self._on_unloaded(leaving.served.name, leaving.served.version)


def _resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
