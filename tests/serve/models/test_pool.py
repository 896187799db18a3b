"""Versions in memory: loaded once, in a thread, within a budget; what does not load or leaves disturbs nothing."""

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import numpy as np
import pytest

from fedclaw.errors import BundleError
from fedclaw.export import layout
from fedclaw.export.check import Trust, Verified
from fedclaw.identity.federation_home import FederationHome
from fedclaw.serve.models import pool as pool_module
from fedclaw.serve.models.bundle_store import BundleStore
from fedclaw.serve.models.pool import BatchSeen, ModelPool, ModelVersion, PoolSettings
from fedclaw.serve.models.probe import ExecutionSettings
from fedclaw.serve.models.served_model import ServedModel, files_for
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.requests import InferenceRequest

pytestmark = pytest.mark.anyio
BY_HAND = ExecutionSettings(threads=1, max_batch=16, batching=True, inline=True)


class WatchedStore(BundleStore):
    """A store that counts what is opened, and waits while it is held."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.opened: list[str] = []
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def open(self, digest: str, trust: Trust, keep: Iterable[str] = ()) -> Verified:
        self.opened.append(digest)
        self.begun.set()
        assert self.go_on.wait(60)
        return super().open(digest, trust, keep)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="session")
def trust(home: FederationHome) -> Trust:
    return Trust((home.root / "ca.crt").read_bytes())


@pytest.fixture(scope="module")
def filled(table_bundle: Path, image_bundle: Path, trust: Trust, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with both bundles."""
    root = tmp_path_factory.mktemp("filled") / "store"
    for bundle in (table_bundle, image_bundle):
        BundleStore(root).put(bundle, trust)
    return root


@pytest.fixture
def store(filled: Path, tmp_path: Path) -> WatchedStore:
    return WatchedStore(Path(shutil.copytree(filled, tmp_path / "store")))


@pytest.fixture
def table(filled: Path, table_bundle: Path, trust: Trust) -> str:
    return BundleStore(filled).put(table_bundle, trust)


@pytest.fixture
def images(filled: Path, image_bundle: Path, trust: Trust) -> str:
    return BundleStore(filled).put(image_bundle, trust)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def pool(store: WatchedStore, trust: Trust, table: str, images: str, clock: Clock) -> AsyncIterator[ModelPool]:
    made = ModelPool(store, trust, clock=clock)
    made.register(ModelVersion("table", "one", table, execution=BY_HAND))
    made.register(ModelVersion("images", "one", images, execution=BY_HAND))
    yield made
    store.go_on.set()
    await made.close()


async def answered(served: ServedModel, rows: int = 1) -> bool:
    columns = served.schema.preprocessing().synthetic(rows, np.random.default_rng(0))
    answer = await served.answer(InferenceRequest(served.name, columns, rows, "me", "key"))
    return answer.version == served.version and len(answer.outputs["refused"]) == rows


async def test_a_version_is_loaded_when_it_is_first_wanted_and_once(
    pool: ModelPool, store: WatchedStore, table: str
) -> None:
    assert pool.ready() == []
    assert pool.loaded("table", "one") is None
    store.go_on.clear()
    wanted = [asyncio.create_task(pool.model("table", "one")) for _ in range(5)]
    assert await asyncio.to_thread(store.begun.wait, 60)
    assert pool.ready() == [], "it is seen when it is warm, not before"
    assert pool.loaded("table", "one") is None
    wanted[0].cancel()
    store.go_on.set()
    served = await wanted[1]
    assert {await task for task in wanted[1:]} == {served}
    assert store.opened == [table]
    assert pool.ready() == [("table", "one")]
    assert pool.loaded("table", "one") is served
    assert served.digest == table
    assert await answered(served)
    assert await pool.model("table", "one") is served


async def test_what_is_loaded_answers_while_another_one_is_loading(pool: ModelPool, store: WatchedStore) -> None:
    served = await pool.model("table", "one")
    store.go_on.clear()
    store.begun.clear()
    loading = asyncio.create_task(pool.model("images", "one"))
    assert await asyncio.to_thread(store.begun.wait, 60)
    for _ in range(3):
        assert await answered(served, 3)
    assert not loading.done()
    with pytest.raises(ServeRefusal) as told:
        await pool.model("images", "one", deadline=100.01)
    assert told.value.code == "deadline_exceeded"
    store.go_on.set()
    assert await answered(await loading)


async def test_unknown_models_and_versions_are_not_there(pool: ModelPool, table: str, images: str) -> None:
    for model, version in (("table", "two"), ("other", "one")):
        with pytest.raises(ServeRefusal) as told:
            await pool.model(model, version)
        assert (told.value.code, str(told.value)) == ("not_found", "there is no such model or version")
    with pytest.raises(BundleError, match="no version 'two'"):
        await pool.load("table", "two")
    with pytest.raises(BundleError, match="is another bundle"):
        pool.register(ModelVersion("table", "one", images))
    pool.register(ModelVersion("table", "one", table, pinned=True))


async def test_a_version_that_does_not_load_leaves_what_is_served_and_is_not_tried_again_at_once(
    pool: ModelPool, store: WatchedStore, image_bundle: Path, trust: Trust, images: str, clock: Clock, tmp_path: Path
) -> None:
    served = await pool.model("table", "one")
    pipeline = tmp_path / "store" / images / layout.PIPELINE
    pipeline.write_bytes(pipeline.read_bytes()[:-1] + b"?")
    with pytest.raises(ServeRefusal) as told:
        await pool.model("images", "one")
    assert told.value.code == "unavailable"
    assert "pipeline" not in str(told.value)
    opened = len(store.opened)
    clock.now += 4
    with pytest.raises(ServeRefusal) as told:
        await pool.model("images", "one")
    assert told.value.retry_after == pytest.approx(6)
    assert len(store.opened) == opened, "a client cannot make the node verify it again and again"
    with pytest.raises(BundleError, match=r"pipeline\.onnx .* was changed"):
        await pool.load("images", "one")
    assert pool.ready() == [("table", "one")]
    assert await answered(served)
    store.put(image_bundle, trust)
    clock.now += 10
    assert await answered(await pool.model("images", "one"))


async def test_a_file_changed_after_it_was_loaded_changes_no_answer_and_is_not_loaded_again(
    pool: ModelPool, table: str, tmp_path: Path
) -> None:
    served = await pool.model("table", "one")
    columns = served.schema.preprocessing().synthetic(8, np.random.default_rng(0))
    before = served.infer(columns)
    for path in (tmp_path / "store" / table).iterdir():
        path.write_bytes(b"other")
    after = served.infer(columns)
    assert all(np.array_equal(before[name], after[name], equal_nan=name == "probabilities") for name in before)
    await pool.unload("table", "one")
    with pytest.raises(ServeRefusal, match="cannot be loaded"):
        await pool.model("table", "one")


async def test_who_signed_is_checked_at_each_load(
    pool: ModelPool, stranger: FederationHome, trust: Trust, clock: Clock
) -> None:
    pool.trust = Trust((stranger.root / "ca.crt").read_bytes())
    with pytest.raises(BundleError, match="not the CA that you trust"):
        await pool.load("table", "one")
    pool.trust = trust
    await pool.load("table", "one")


def budget(store: BundleStore, *digests: str) -> PoolSettings:
    """A budget that holds just these."""
    return PoolSettings(memory_bytes=sum(store.size(digest, files_for("float32")) for digest in digests))


async def test_the_one_used_least_recently_makes_room_but_never_a_pinned_one(
    store: WatchedStore, trust: Trust, table: str, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "_resident", lambda: 0)
    pool = ModelPool(store, trust, budget(store, images, images, images))
    for version in ("one", "two", "three", "four"):
        pool.register(ModelVersion("images", version, images, version == "one", execution=BY_HAND))
    await pool.load("images", "one")
    assert pool.ready() == [("images", "one")]
    await pool.model("images", "two")
    await pool.model("images", "three")
    assert pool.used_bytes == 3 * store.size(images, files_for("float32"))
    assert pool.loaded("images", "two") is not None, "which counts as a use"
    assert await answered(await pool.model("images", "four"))
    assert sorted(version for _, version in pool.ready()) == ["four", "one", "two"]
    assert await answered(await pool.model("images", "three"))
    assert sorted(version for _, version in pool.ready()) == ["four", "one", "three"]
    pool.register(ModelVersion("images", "four", images, pinned=True, execution=BY_HAND))
    pool.register(ModelVersion("images", "three", images, pinned=True, execution=BY_HAND))
    pool.register(ModelVersion("table", "one", table, execution=BY_HAND))
    with pytest.raises(BundleError, match="the budget is"):
        await pool.load("table", "one")
    assert len(pool.ready()) == 3
    await pool.close()


async def test_what_the_process_grew_by_counts(
    store: WatchedStore, trust: Trust, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    grown = iter(range(0, 10**12, 10**9))
    monkeypatch.setattr(pool_module, "_resident", lambda: next(grown))
    pool = ModelPool(store, trust, PoolSettings(memory_bytes=10**9))
    pool.register(ModelVersion("images", "one", images, execution=BY_HAND))
    pool.register(ModelVersion("images", "two", images, execution=BY_HAND))
    await pool.load("images", "one")
    assert pool.used_bytes == 10**9
    await pool.load("images", "two")
    assert pool.ready() == [("images", "two")]
    await pool.close()


async def test_what_leaves_finishes_its_requests_and_takes_no_room_after(
    store: WatchedStore, trust: Trust, table: str
) -> None:
    pool = ModelPool(store, trust)
    elsewhere = ExecutionSettings(threads=1, max_batch=16, batching=True, inline=False)
    pool.register(ModelVersion("table", "one", table, execution=elsewhere))
    served = await pool.model("table", "one")
    asked = [asyncio.create_task(answered(served, 100)) for _ in range(20)]
    await asyncio.sleep(0)
    leaving = asyncio.create_task(pool.unload("table", "one"))
    await asyncio.sleep(0)
    assert pool.ready() == []
    assert served.in_flight == 20
    assert pool.used_bytes > 0
    await leaving
    assert all(task.done() for task in asked)
    assert all(await asyncio.gather(*asked))
    assert pool.used_bytes == 0
    assert await answered(served), "who has it in hand still gets an answer"
    await pool.close()


async def test_a_forgotten_version_is_not_there_even_if_it_was_just_being_loaded(
    pool: ModelPool, store: WatchedStore
) -> None:
    store.go_on.clear()
    loading = asyncio.create_task(pool.load("table", "one"))
    assert await asyncio.to_thread(store.begun.wait, 60)
    await pool.forget("table", "one")
    store.go_on.set()
    with pytest.raises(BundleError, match="was removed while it was loaded"):
        await loading
    assert pool.ready() == []
    with pytest.raises(ServeRefusal, match="no such model"):
        await pool.model("table", "one")


async def test_what_happens_is_told_by_model_and_version(store: WatchedStore, trust: Trust, table: str) -> None:
    seen: list[BatchSeen] = []
    told: list[tuple[object, ...]] = []
    pool = ModelPool(
        store,
        trust,
        observe=seen.append,
        on_loaded=lambda *what: told.append(what),
        on_unloaded=lambda *what: told.append(what),
    )
    pool.register(ModelVersion("table", "one", table, execution=BY_HAND))
    served = await pool.model("table", "one")
    assert served.batcher.queued_rows == 0
    asked = [asyncio.create_task(answered(served, 2)) for _ in range(3)]
    await asyncio.sleep(0)
    assert served.batcher.queued_rows == 6
    await asyncio.gather(*asked)
    assert [(own.model, own.version, own.rows) for own in seen] == [("table", "one", 6)]
    await pool.unload("table", "one")
    model, version, seconds, memory = told[0]
    assert (model, version, memory) == ("table", "one", pool_bytes(store, table, memory))
    assert isinstance(seconds, float)
    assert told[1:] == [("table", "one")]
    await pool.close()


def pool_bytes(store: BundleStore, digest: str, memory: object) -> int:
    """What was told, if it is as much as the files at least."""
    assert isinstance(memory, int)
    return max(memory, store.size(digest, files_for("float32")))
