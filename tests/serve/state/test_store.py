"""The state store: the same promises from SQLite and from PostgreSQL, whoever else is at work on it."""

import os
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from fedclaw.errors import UsageError
from fedclaw.serve.state.store import SCHEMA, StateStore, StateStoreError, StateUnavailable
from tests.disks import full_after
from tests.postgresql import PASSWORD, PostgresServer
from tests.serve.state.conftest import postgresql_place
from tests.serve.state.race import NAMES, Results, assigned, race

Opened = Callable[[], StateStore]


def test_a_document_is_replaced_only_by_who_read_its_last_revision(store: StateStore, opened: Opened):
    other = opened()
    assert store.read("plan/m") is None
    assert store.swap("plan/m", None, {"stable": "a"})
    assert not other.swap("plan/m", None, {"stable": "b"})
    assert other.read("plan/m") == (1, {"stable": "a"})
    assert other.swap("plan/m", 1, {"stable": "b", "share": 0.05, "arms": ["é", "\u0000", None]})
    assert not store.swap("plan/m", 1, {"stable": "c"})
    assert not store.swap("plan/m", 3, {"stable": "c"})
    assert not store.swap("plan/none", 1, {"stable": "c"})
    assert store.read("plan/m") == (2, {"stable": "b", "share": 0.05, "arms": ["é", "\u0000", None]})


def test_documents_are_removed_together_and_a_revision_of_theirs_never_comes_back(store: StateStore, opened: Opened):
    for name in ("plan/m", "versions/m", "plan/other"):
        assert store.swap(name, None, {"name": name})
    assert store.swap("plan/m", 1, {"name": "later"})
    gone = ("gone", "m", {"by": "ann"})
    assert not store.remove({"plan/m": 1, "versions/m": 1}, gone)
    assert not store.remove({"plan/m": 2, "versions/m": 1, "none": 1}, gone)
    assert (store.names(), store.events()) == (["plan/m", "plan/other", "versions/m"], [])
    assert store.remove({"plan/m": 2, "versions/m": 1}, gone)
    assert not store.remove({"plan/m": 2, "versions/m": 1}, gone)
    assert not store.remove({"plan/m": 3})
    other = opened()
    assert (other.names(), other.names("plan/m")) == (["plan/other"], [])
    assert (other.read("plan/m"), other.read("versions/m")) == (None, None)
    assert [event.kind for event in other.events("m")] == ["gone"]
    # Who read it before it was removed does not take the new one for it.
    assert not store.swap("plan/m", 2, {"name": "late"})
    assert not store.swap("plan/m", 3, {"name": "late"})
    assert other.swap("plan/m", None, {"name": "new"})
    assert not store.swap("plan/m", None, {"name": "newer"})
    assert store.read("plan/m") == (4, {"name": "new"})


def test_what_is_forgotten_of_a_model_is_of_no_other(store: StateStore):
    models = ("heart", "heart@1", "heart@salt", "heart2", "Heart", "Heart@1", "a_heart@1")
    for model in models:
        store.add_counts(model, "v", 100, {"calls": 1})
        assigned(store, model, "key", "v")
    assert store.credit("receipt", "heart", "v", {})
    store.forget("heart")
    assert [model for model in models if store.counts(model, 0)] == ["heart2", "Heart", "Heart@1", "a_heart@1"]
    assert [assigned(store, model, "key", "new") for model in models] == ["new"] * 3 + ["v"] * 4
    assert not store.credit("receipt", "heart", "v", {})


def test_names_are_found_by_their_beginning_and_nothing_in_it_is_a_wildcard(store: StateStore):
    for name in ("plan/b", "plan/a", "Plan/c", "plan%x", "plan_y", "keys"):
        assert store.swap(name, None, {})
    assert store.names("plan/") == ["plan/a", "plan/b"]
    assert store.names("plan%") == ["plan%x"]
    assert store.names("plan_") == ["plan_y"]
    assert store.names() == sorted(["plan/b", "plan/a", "Plan/c", "plan%x", "plan_y", "keys"])


def test_counts_add_up_by_version_and_second(store: StateStore, opened: Opened):
    store.add_counts("m", "a", 100, {"calls": 3, "errors": 1})
    opened().add_counts("m", "a", 100, {"calls": 4})
    store.add_counts("m", "a", 101, {"calls": 10})
    store.add_counts("m", "b", 101, {"calls": 2**40})
    store.add_counts("other", "a", 101, {"calls": 1})
    store.add_counts("m", "a", 101, {})
    assert store.counts("m", 100) == {"a": {"calls": 17, "errors": 1}, "b": {"calls": 2**40}}
    assert store.counts("m", 101) == {"a": {"calls": 10}, "b": {"calls": 2**40}}
    assert store.counts("m", 100, 101) == {"a": {"calls": 7, "errors": 1}}
    assert store.counts("m", 102) == {}


def test_a_swap_and_its_event_happen_together_or_not_at_all(store: StateStore, opened: Opened):
    assert store.swap("plan/m", None, {"stable": "a"}, ("first", "m", {"n": 1}))
    assert store.swap("plan/m", 1, {"stable": "b"}, ("second", "m", {"n": 2}))
    assert not opened().swap("plan/m", 1, {"stable": "c"}, ("lost", "m", {}))
    with pytest.raises(ValueError):
        store.swap("plan/m", 2, {"stable": "c"}, ("bad", "m", {"n": float("nan")}))
    assert store.read("plan/m") == (2, {"stable": "b"})
    assert [(event.kind, event.body) for event in store.events("m")] == [("first", {"n": 1}), ("second", {"n": 2})]


def test_many_keys_are_assigned_or_claimed_at_once_and_the_first_one_stays(store: StateStore, opened: Opened):
    assert assigned(store, "m", "b", "v1") == "v1"
    assert opened().assign_all("m", {"a": "v2", "b": "v2"}) == {"a": "v2", "b": "v1"}
    assert assigned(store, "m", "a", "v3") == "v2"
    assert store.assign_all("m", {}) == {}
    assert store.claim("m@1", ["a", "b", "a"]) == {"a", "b"}
    assert opened().claim("m@1", ["b", "c"]) == {"c"}
    assert store.claim("m@2", ["b"]) == {"b"}
    assert store.claim("m@2", []) == set()
    assert assigned(store, "m@2", "z", "v1") == "v1"


def test_events_are_numbered_and_kept_in_order(store: StateStore):
    begun = store.now()
    numbers = [store.append_event("canary", model, {"p": 0.01 * step}) for step, model in enumerate("aba")]
    assert numbers == sorted(set(numbers))
    events = store.events()
    assert [(event.number, event.kind, event.model) for event in events] == [
        (number, "canary", model) for number, model in zip(numbers, "aba", strict=True)
    ]
    assert [event.body for event in store.events("a")] == [{"p": 0.0}, {"p": 0.02}]
    assert [event.number for event in store.events(limit=2)] == numbers[1:]
    assert [event.number for event in store.events(after=numbers[1])] == numbers[2:]
    assert all(begun - 1 <= event.time <= store.now() + 1 for event in events)


def test_the_first_assignment_of_a_key_stays_and_the_key_is_not_kept(store: StateStore, opened: Opened, where: str):
    assert assigned(store, "m", "patient 4711", "a") == "a"
    assert assigned(opened(), "m", "patient 4711", "b") == "a"
    assert assigned(store, "other", "patient 4711", "b") == "b"
    assert assigned(store, "m", "\ud800 \u0000" * 1000, "b") == "b"
    with store._database.reading() as connection:
        kept = connection.execute(text("SELECT key FROM fedclaw_assignments")).scalars().all()
    assert not any("4711" in key for key in kept)


def test_thousands_of_keys_are_assigned_and_claimed_at_once(store: StateStore):
    keys = [f"key {number}" for number in range(3000)]
    assert store.assign_all("m", dict.fromkeys(keys[:1500], "a")) == dict.fromkeys(keys[:1500], "a")
    assert store.assign_all("m", dict.fromkeys(keys, "b")) == {
        key: "a" if number < 1500 else "b" for number, key in enumerate(keys)
    }
    assert store.claim("epoch", keys[:2000]) == set(keys[:2000])
    assert store.claim("epoch", keys) == set(keys[2000:])
    assert store.claim("epoch", []) == set()
    assert store.assign_all("m", {}) == {}


def test_old_seconds_are_merged_into_hours_and_no_sum_changes(store: StateStore):
    now = int(store.now())
    begun = (now // 3600 - 5) * 3600
    for second in (0, 1, 2, 3599, 3600, 3700):
        store.add_counts("m", "a", begun + second, {"calls": 1, "errors": 2})
    store.add_counts("m", "b", begun + 5, {"calls": 10})
    store.add_counts("m", "a", now, {"calls": 100})
    before, hour = store.counts("m", 0), store.counts("m", begun + 3600)
    assert store.compact_counts() == 8
    assert store.counts("m", 0) == before
    assert store.counts("m", begun + 3600) == hour
    assert store.counts("m", begun, begun + 1) == {"a": {"calls": 4, "errors": 8}, "b": {"calls": 10}}
    store.add_counts("m", "a", begun + 7, {"calls": 1})  # One that comes late.
    assert store.compact_counts() == 1
    assert store.counts("m", begun, begun + 1)["a"] == {"calls": 5, "errors": 8}
    assert store.compact_counts() == 0


def test_nothing_is_lost_that_is_counted_while_seconds_are_merged(store: StateStore, opened: Opened):
    others = [opened() for _ in range(3)]
    begun = (int(store.now()) // 3600 - 5) * 3600

    def count(other: StateStore) -> None:
        for turn in range(20):
            other.add_counts("m", "a", begun + turn % 3, {"calls": 1})

    threads = [threading.Thread(target=count, args=(other,)) for other in others]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        store.compact_counts()
    assert store.counts("m", 0) == {"a": {"calls": 60}}


def test_a_worker_is_known_as_it_last_told(store: StateStore, opened: Opened):
    store.beat("node-b", "0", ["d1"])
    opened().beat("node-a", "1", [])
    store.beat("node-b", "0", ["d1", "d2"])
    assert [(beat.node, beat.worker, beat.ready) for beat in store.workers()] == [
        ("node-a", "1", ()),
        ("node-b", "0", ("d1", "d2")),
    ]
    assert all(0 <= beat.age < 60 for beat in store.workers())


def test_feedback_is_credited_once_and_what_was_said_first_stays(store: StateStore, opened: Opened):
    assert store.credit("r1", "m", "a", {"reward": 1.0})
    assert not opened().credit("r1", "m", "b", {"reward": 0.0})
    assert store.credit("r2", "m", "b", {"reward": 0.5})
    said = store.feedback("m")
    assert [(one.receipt, one.version, one.body) for one in said] == [
        ("r1", "a", {"reward": 1.0}),
        ("r2", "b", {"reward": 0.5}),
    ]
    assert store.credited("r1") == said[0]
    assert store.credited("r3") is None
    assert [one.receipt for one in store.feedback("m", limit=1)] == ["r2"]
    assert store.feedback("m", since=store.now() + 60) == []
    assert store.feedback("other") == []


def test_what_is_old_goes_and_what_is_not_stays(store: StateStore):
    now = int(store.now())
    store.add_counts("m", "a", now - 100, {"calls": 1})
    store.add_counts("m", "a", now, {"calls": 2})
    store.credit("r", "m", "a", {})
    assigned(store, "m", "k", "a")
    store.beat("node", "0", [])
    assert store.prune(counts=50, workers=50, feedback=50) == 1
    assert store.counts("m", 0) == {"a": {"calls": 2}}
    assert (len(store.feedback("m")), len(store.workers()), assigned(store, "m", "k", "b")) == (1, 1, "a")
    assert store.prune(workers=-10, feedback=-10, assignments=-10) == 3
    assert (len(store.feedback("m")), len(store.workers()), assigned(store, "m", "k", "b")) == (0, 0, "b")


def test_a_name_that_one_database_would_keep_otherwise_is_refused(store: StateStore):
    calls: list[Callable[[str], object]] = [
        lambda name: store.swap(name, None, {}),
        lambda name: store.add_counts("m", name, 1, {"calls": 1}),
        lambda name: store.add_counts("m", "v", 1, {name: 1}),
        lambda name: store.credit(name, "m", "v", {}),
        lambda name: assigned(store, "m", "k", name),
    ]
    for wrong in ("", "a\u0000b", "a\nb", "\ud800", "x" * 201):
        for call in calls:
            with pytest.raises(ValueError, match="printable"):
                call(wrong)


def test_what_is_no_json_is_refused(store: StateStore):
    with pytest.raises(ValueError, match="JSON"):
        store.swap("plan/m", None, {"share": float("nan")})
    assert store.read("plan/m") is None


PROCESSES, TIMES = 8, 3


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def raced(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[StateStore, Results]]:
    """A store that eight processes made, filled and fought for, and what each of them was told."""
    directory = tmp_path_factory.mktemp("raced")
    if request.param == "sqlite":
        where = f"sqlite:///{directory / 'state.db'}"
    else:
        where = postgresql_place(request.getfixturevalue("server"), directory)
    told = race(where, PROCESSES, TIMES)
    with StateStore.open(where) as store:
        yield store, told


def test_no_swap_of_eight_processes_is_lost(raced: tuple[StateStore, Results]):
    store, told = raced
    assert store.read("number") == (PROCESSES * TIMES, {"value": PROCESSES * TIMES})
    assert sum(told["increment"]) > 0  # They did meet.


def test_counts_of_eight_processes_add_up_exactly(raced: tuple[StateStore, Results]):
    store, _ = raced
    assert store.counts("m", 0) == {"v": dict.fromkeys(NAMES, TIMES * 36)}


def test_eight_processes_get_one_answer_for_each_key(raced: tuple[StateStore, Results]):
    _, told = raced
    assert len(told["assign"][0]) == TIMES
    assert all(answers == told["assign"][0] for answers in told["assign"])


def test_of_eight_processes_one_is_credited_for_each_receipt(raced: tuple[StateStore, Results]):
    store, told = raced
    assert sum(told["credit"]) == TIMES == len(store.feedback("m"))


def test_events_of_eight_processes_have_numbers_of_their_own(raced: tuple[StateStore, Results]):
    store, told = raced
    numbers = [number for own in told["append"] for number in own]
    assert len(set(numbers)) == PROCESSES * TIMES
    assert sorted(numbers) == [event.number for event in store.events(limit=1000)]


def test_threads_share_a_store(store: StateStore):
    threads = [
        threading.Thread(target=lambda: [store.add_counts("m", "a", 1, {"calls": 1}) for _ in range(10)])
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.counts("m", 0) == {"a": {"calls": 60}}


def test_a_store_of_a_newer_fedclaw_is_refused_and_left_as_it_is(store: StateStore, where: str):
    with store._database.writing() as connection:
        connection.execute(text(f"UPDATE fedclaw_schema SET version = {SCHEMA + 1}"))
        connection.execute(text("DROP TABLE fedclaw_counts"))
    with pytest.raises(StateStoreError, match=f"version {SCHEMA + 1}.*update FedClaw"):
        StateStore.open(where)
    with store._database.reading() as connection, pytest.raises(Exception, match="fedclaw_counts"):
        connection.execute(text("SELECT * FROM fedclaw_counts"))


def test_a_killed_writer_leaves_no_half_of_a_transaction(store: StateStore, opened: Opened, where: str):
    process = os.fork()
    if process == 0:  # Its own connections only, and no way back into pytest.
        other = StateStore.open(where)
        with other._database.writing() as connection:
            connection.execute(text("INSERT INTO fedclaw_documents VALUES ('half', 1, '{}')"))
            os.kill(os.getpid(), 9)
    assert os.waitpid(process, 0)[1] == 9
    assert store.read("half") is None
    assert store.swap("half", None, {})


# What only SQLite can do wrong.


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "state" / "state.db"


def test_all_files_of_sqlite_are_private(place: Path):
    old = os.umask(0)
    try:
        with StateStore.open(f"sqlite:///{place}") as store:
            store.swap("a", None, {})
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in place.parent.iterdir()}
    finally:
        os.umask(old)
    assert modes == {"state.db": 0o600, "state.db-wal": 0o600, "state.db-shm": 0o600}
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700


def test_a_file_that_others_can_read_is_refused(place: Path):
    StateStore.open(f"sqlite:///{place}").close()
    place.chmod(0o640)
    with pytest.raises(StateStoreError, match="chmod 600"):
        StateStore.open(f"sqlite:///{place}")


def test_acknowledged_writes_reach_the_disk_in_sqlite(place: Path):
    with StateStore.open(f"sqlite:///{place}") as store:
        with store._database.writing() as connection:
            assert connection.execute(text("PRAGMA synchronous")).scalar_one() == 2
            assert connection.execute(text("PRAGMA journal_mode")).scalar_one() == "wal"
        with store._database.writing(durable=False) as connection:
            assert connection.execute(text("PRAGMA synchronous")).scalar_one() == 1
        with store._database.writing() as connection:
            assert connection.execute(text("PRAGMA synchronous")).scalar_one() == 2


def test_nothing_is_acknowledged_into_a_file_that_was_removed(place: Path):
    with StateStore.open(f"sqlite:///{place}") as store:
        place.unlink()
        with pytest.raises(StateUnavailable) as told:
            store.credit("r", "m", "v", {})
        assert "removed" in told.value.detail
        assert str(place) not in str(told.value)
        place.touch(0o600)
        with pytest.raises(StateUnavailable):
            store.credit("r", "m", "v", {})


def test_nothing_is_acknowledged_on_a_full_disk(place: Path):
    with StateStore.open(f"sqlite:///{place}") as store:
        assert store.credit("before", "m", "v", {})
        with full_after(max(path.stat().st_size for path in place.parent.iterdir())), pytest.raises(StateUnavailable):
            store.credit("r", "m", "v", {"text": "x" * 100_000})
        assert store.credited("r") is None
        assert store.credited("before") is not None
        assert store.credit("r", "m", "v", {})


def test_who_waits_too_long_for_a_writer_is_told(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fedclaw.serve.state.database.PATIENCE", 0.05)
    with StateStore.open(f"sqlite:///{place}") as store:
        holder = sqlite3.connect(place, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(StateUnavailable) as told:
            store.credit("r", "m", "v", {})
        assert "locked" in told.value.detail
        assert store.read("x") is None  # Readers do not wait.
        holder.execute("ROLLBACK")
        holder.close()
        assert store.credit("r", "m", "v", {})


def test_a_file_that_is_no_database_is_refused(place: Path):
    place.parent.mkdir()
    place.touch(0o600)
    place.write_bytes(b"not a database, but long enough to be looked at as one " * 100)
    with pytest.raises(StateStoreError, match="no SQLite database"):
        StateStore.open(f"sqlite:///{place}")


@pytest.mark.parametrize(
    "where",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///x.db?mode=ro",
        "sqlite:///file:x.db",
        "mysql://host/name",
        "state.db",
        "env:FEDCLAW_NO_SUCH_VARIABLE",
        "file:/no/such/file",
        "postgresql://user:hunter2@127.0.0.1/name",
        "postgresql://user:hunter2@127.0.0.1:port/name",
    ],
)
def test_a_place_that_is_none_is_wrong_use_and_no_password_is_repeated(where: str):
    with pytest.raises(UsageError, match=r"^database: ") as told:
        StateStore.open(where)
    assert "hunter2" not in str(told.value)


# What only PostgreSQL can do wrong.


def test_a_file_with_a_password_that_everybody_can_read_is_refused(tmp_path: Path):
    file = tmp_path / "url"
    file.write_text("postgresql://user:hunter2@127.0.0.1/name")
    file.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600") as told:
        StateStore.open(f"file:{file}")
    assert "hunter2" not in str(told.value)


def test_postgresql_that_is_away_is_unavailable_and_no_password_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FEDCLAW_STATE", "postgresql://user:hunter2@127.0.0.1:9/name")
    with pytest.raises(StateUnavailable) as told:
        StateStore.open("env:FEDCLAW_STATE")
    error: BaseException | None = told.value
    assert "refused" in told.value.detail
    while error is not None:
        assert "hunter2" not in repr(vars(error)) + str(error)
        error = error.__cause__


def test_a_server_elsewhere_has_to_prove_who_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from fedclaw.serve.state.database import Database

    def mode(url: str) -> object:
        monkeypatch.setenv("FEDCLAW_STATE", url)
        return Database("env:FEDCLAW_STATE")._engine.url.query.get("sslmode")

    assert mode("postgresql://user@db.clinic/name") == "verify-full"
    assert mode("postgresql://user@db.clinic/name?sslmode=require") == "require"
    assert mode("postgresql://user@127.0.0.1/name") is None
    assert mode("postgresql://user@/name?host=/run/postgresql") is None


def test_a_wrong_password_is_not_said(server: PostgresServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FEDCLAW_STATE", server.url().replace(PASSWORD, "hunter2"))
    with pytest.raises(StateUnavailable) as told:
        StateStore.open("env:FEDCLAW_STATE")
    assert "password authentication failed" in told.value.detail
    assert "hunter2" not in told.value.detail


def test_acknowledged_writes_reach_the_disk_in_postgresql(server: PostgresServer, tmp_path: Path):
    where = postgresql_place(server, tmp_path)
    with StateStore.open(where) as store, store._database.writing() as connection:
        connection.execute(text("ALTER ROLE CURRENT_USER SET synchronous_commit = off"))
    try:
        with StateStore.open(where) as store:
            with store._database.writing() as connection:
                assert connection.execute(text("SHOW synchronous_commit")).scalar_one() == "on"
            with store._database.writing(durable=False) as connection:
                assert connection.execute(text("SHOW synchronous_commit")).scalar_one() == "off"
    finally:
        with StateStore.open(where) as store, store._database.writing() as connection:
            connection.execute(text("ALTER ROLE CURRENT_USER RESET synchronous_commit"))


def test_a_store_goes_on_when_its_server_comes_back(server: PostgresServer, tmp_path: Path):
    with StateStore.open(postgresql_place(server, tmp_path)) as store:
        assert store.credit("before", "m", "v", {})
        server.stop("fast")
        try:
            with pytest.raises(StateUnavailable):
                store.credit("r", "m", "v", {})
            with pytest.raises(StateUnavailable):
                store.read("plan/m")
        finally:
            server.start()
        assert store.credited("before") is not None
        assert store.credit("r", "m", "v", {})
        server.stop("fast")
        server.start()
        assert store.credit("r2", "m", "v", {})  # Nobody asked meanwhile, and the broken connection is not met.
