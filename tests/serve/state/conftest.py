"""A state store in each of the two databases."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedclaw.serve.state.store import StateStore
from tests.postgresql import PostgresServer


@pytest.fixture(scope="session")
def server() -> Iterator[PostgresServer]:
    """One PostgreSQL for the session."""
    made = PostgresServer()
    yield made
    made.remove()


def postgresql_place(server: PostgresServer, directory: Path) -> str:
    """A new store's place, named as an operator names one: by a file with a URL."""
    name = f"test_{uuid.uuid4().hex}"
    server.create(name)
    file = directory / f"{name}.url"
    file.touch(0o600)
    file.write_text(server.url(name))
    return f"file:{file}"


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a new store is to be, in either database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'state' / 'state.db'}"
    return postgresql_place(request.getfixturevalue("server"), tmp_path)


@pytest.fixture
def opened(where: str) -> Iterator[Callable[[], StateStore]]:
    """Opens the one store as another process would."""
    stores: list[StateStore] = []

    def another() -> StateStore:
        stores.append(StateStore.open(where))
        return stores[-1]

    yield another
    for store in stores:
        store.close()


@pytest.fixture
def store(opened: Callable[[], StateStore]) -> StateStore:
    return opened()
