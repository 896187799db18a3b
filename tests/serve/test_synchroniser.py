"""How a worker follows the catalogue: what it takes up and lets go of."""

import asyncio
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

from fedclaw.serve.settings import BatchSettings
from fedclaw.serve.synchroniser import Synchroniser
from fedclaw.serve.version_catalogue import ModelEntry, VersionEntry


def entry(**digests: str) -> ModelEntry:
    """A model of versions with these bundles, each digest one digit long."""
    made = {"added": datetime.now(UTC), "added_by": "ann", "run": "run"}
    return ModelEntry(versions={name: VersionEntry(digest=digit * 64, **made) for name, digit in digests.items()})


def test_a_name_that_is_another_bundle_now_is_let_go_of_and_taken_up_anew(monkeypatch):
    done = list[tuple[str, ...]]()

    class Pool:
        def register(self, version: Any) -> None:
            done.append(("take", version.model, version.version, version.digest[:1]))

        async def forget(self, model: str, version: str) -> None:
            done.append(("leave", model, version))

    settings = SimpleNamespace(batching=BatchSettings())
    parts: Any = SimpleNamespace(store=None, inputs=None, pool=Pool(), launch=SimpleNamespace(settings=settings))
    synchroniser = Synchroniser(parts)
    monkeypatch.setattr(synchroniser, "_describe", lambda *_: object())

    def look(**entries: ModelEntry) -> list[tuple[str, ...]]:
        done.clear()
        asyncio.run(synchroniser._take(entries))
        return list(done)

    assert look(heart=entry(v1="a", v2="b")) == [("take", "heart", "v1", "a"), ("take", "heart", "v2", "b")]
    assert look(heart=entry(v1="a", v2="b")) == []
    assert look(heart=entry(v1="c", v2="b")) == [("leave", "heart", "v1"), ("take", "heart", "v1", "c")]
    assert sorted(look()) == [("leave", "heart", "v1"), ("leave", "heart", "v2")]
    assert look(heart=entry(v2="d")) == [("take", "heart", "v2", "d")]
