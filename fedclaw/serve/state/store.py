"""The state store: what all processes of a node, and both nodes of a pair, know together.

| what | how it changes |
| --- | --- |
| documents (routing plans, posteriors, keys, audit heads) | compare-and-swap on their revision |
| counts of each second | add up, exactly, whoever adds |
| events (decisions with their numbers) | are appended, and never changed |
| assignments of keys to versions | the first one stays |
| beats of workers | the last one counts |
| feedback | once for each receipt |
| anchors of audit chains | are added, and never changed |

Safe for many threads and processes. `StateUnavailable` means that the database does not answer: a worker goes on with
the last plan that it read, and feedback is refused. Times are Unix seconds by the database's clock.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from pydantic import JsonValue
from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Double,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TextClause,
    delete,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from fedclaw.serve.state.database import Database, StateStoreError, StateUnavailable

__all__ = ["Feedback", "StateEvent", "StateStore", "StateStoreError", "StateUnavailable", "WorkerBeat"]

OF_A_TRIAL = "@"
"""Stands between a model's name and what tells one of its trials from another, in the names of their counts."""
SCHEMA = 1
"""Version of the tables. A store with a newer one is refused."""
_LONGEST_NAME = 200
_REMOVED = "null"
"""In place of the content of a document that was removed. Its row stays, so that one that is made later under its name
does not get a revision again that somebody took for the old one's."""
Document = dict[str, JsonValue]

_tables = MetaData()
_number = BigInteger().with_variant(Integer, "sqlite")
_schema = Table("fedclaw_schema", _tables, Column("version", Integer, primary_key=True))
_documents = Table(
    "fedclaw_documents",
    _tables,
    Column("name", String, primary_key=True),
    Column("revision", BigInteger, nullable=False),
    Column("body", Text, nullable=False),
)
_counts = Table(
    "fedclaw_counts",
    _tables,
    Column("model", String, primary_key=True),
    Column("bucket", BigInteger, primary_key=True),
    Column("version", String, primary_key=True),
    Column("name", String, primary_key=True),
    Column("value", BigInteger, nullable=False),
)
_events = Table(
    "fedclaw_events",
    _tables,
    Column("number", _number, primary_key=True, autoincrement=True),
    Column("time", Double, nullable=False),
    Column("kind", String, nullable=False),
    Column("model", String, nullable=False),
    Column("body", Text, nullable=False),
    Index("fedclaw_events_by_model", "model", "number"),
    sqlite_autoincrement=True,
)
_assignments = Table(
    "fedclaw_assignments",
    _tables,
    Column("model", String, primary_key=True),
    Column("key", String, primary_key=True),
    Column("version", String, nullable=False),
    Column("time", Double, nullable=False, index=True),
)
_workers = Table(
    "fedclaw_workers",
    _tables,
    Column("node", String, primary_key=True),
    Column("worker", String, primary_key=True),
    Column("ready", Text, nullable=False),
    Column("time", Double, nullable=False),
)
_feedback = Table(
    "fedclaw_feedback",
    _tables,
    Column("receipt", String, primary_key=True),
    Column("model", String, nullable=False),
    Column("version", String, nullable=False),
    Column("time", Double, nullable=False),
    Column("body", Text, nullable=False),
    Index("fedclaw_feedback_by_time", "model", "time"),
)
_anchors = Table(
    "fedclaw_anchors",
    _tables,
    Column("chain", String, primary_key=True),
    Column("sequence", BigInteger, primary_key=True),
    Column("hash", String, nullable=False),
    Column("time", Double, nullable=False),
)
# The rows are the pairs of a JSON object, in order of their keys, so that two who write the same ones do not wait for
# each other for ever.
_ADD_COUNTS = """
    INSERT INTO fedclaw_counts (model, bucket, version, name, value)
    SELECT :model, CAST(:bucket AS bigint), :version, key, CAST(value AS bigint) FROM {each} WHERE true ORDER BY key
    ON CONFLICT (model, bucket, version, name) DO UPDATE SET value = fedclaw_counts.value + excluded.value
"""
_ASSIGN = """
    INSERT INTO fedclaw_assignments (model, key, version, time)
    SELECT :model, key, value, {now} FROM {each} WHERE true ORDER BY key
    ON CONFLICT DO NOTHING
"""
_ASSIGNED = """
    SELECT key, version FROM fedclaw_assignments WHERE model = :model AND key IN (SELECT key FROM {each})
"""


@dataclass(frozen=True, slots=True)
class StateEvent:
    """A decision, and the numbers that it was made from."""

    number: int
    """Rises with each event; not without gaps."""
    time: float
    kind: str
    model: str
    body: Document


@dataclass(frozen=True, slots=True)
class WorkerBeat:
    """A worker as it last told of itself."""

    node: str
    worker: str
    ready: tuple[str, ...]
    """The versions that it can answer from, as `version_catalogue.in_memory` has them."""
    age: float
    """Seconds since then."""


@dataclass(frozen=True, slots=True)
class Feedback:
    """What was said of one answer."""

    receipt: str
    model: str
    version: str
    time: float
    body: Document


class StateStore:
    """The store in one database. Every method raises StateUnavailable where the database does not answer."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._dialect: Any = sqlite if database.is_sqlite else postgresql

    @classmethod
    def open(cls, where: str) -> Self:
        """Connect, and make the tables where there are none.

        `where` is sqlite:///PATH, postgresql://USER@HOST/NAME, env:VARIABLE or file:PATH (see
        `fedclaw.serve.state.database`). Raises UsageError for another, StateStoreError if a newer FedClaw wrote it.
        """
        store = cls(Database(where))
        try:
            with store._database.creating() as connection:
                _schema.create(connection, checkfirst=True)
                _check_schema(connection)
                _tables.create_all(connection)
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Close all connections."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self, name: str) -> tuple[int, Document] | None:
        """Revision, from 1, and content of a document."""
        there = (_documents.c.name == _name(name)) & (_documents.c.body != _REMOVED)
        wanted = select(_documents.c.revision, _documents.c.body).where(there)
        with self._database.reading() as connection:
            found = connection.execute(wanted).one_or_none()
        return None if found is None else (found.revision, json.loads(found.body))

    def swap(
        self,
        name: str,
        revision: int | None,
        document: Mapping[str, JsonValue],
        event: tuple[str, str, Mapping[str, JsonValue]] | None = None,
    ) -> bool:
        """Replace the document if `revision` is still its own; None: make it if there is none.

        With it `event` (kind, model, body) is appended: both happen or neither. False: another was faster; read again.
        What is returned is durable.
        """
        body = _text(document)
        statement: Any
        if revision is None:
            statement = self._insert(_documents).values(name=_name(name), revision=1, body=body)
            again = {"revision": _documents.c.revision + 1, "body": body}
            gone = _documents.c.body == _REMOVED
            statement = statement.on_conflict_do_update(index_elements=["name"], set_=again, where=gone)
        else:
            mine = (_documents.c.name == _name(name)) & (_documents.c.revision == revision)
            statement = update(_documents).where(mine & (_documents.c.body != _REMOVED))
            statement = statement.values(revision=revision + 1, body=body)
        noted = None if event is None else self._event(*event)
        with self._database.writing() as connection:
            swapped = connection.execute(statement.returning(_documents.c.revision)).first() is not None
            if swapped and noted is not None:
                connection.execute(noted)
            return swapped

    def remove(
        self, documents: Mapping[str, int], event: tuple[str, str, Mapping[str, JsonValue]] | None = None
    ) -> bool:
        """Remove the documents, by name, if each still has that revision; with them `event` is appended.

        All of it happens or nothing. False: another changed one; read again.
        """
        noted = None if event is None else self._event(*event)
        with self._database.writing() as connection:
            for name, revision in sorted(documents.items()):
                mine = (_documents.c.name == _name(name)) & (_documents.c.revision == revision)
                removed = update(_documents).where(mine & (_documents.c.body != _REMOVED))
                if connection.execute(removed.values(revision=revision + 1, body=_REMOVED)).rowcount != 1:
                    connection.rollback()
                    return False
            if noted is not None:
                connection.execute(noted)
            return True

    def forget(self, model: str) -> None:
        """Drop what was counted and assigned of a model that was removed, and of its trials; feedback stays, so that
        nothing is credited twice."""
        prefix = f"{_name(model)}{OF_A_TRIAL}"
        with self._database.writing() as connection:
            for table in (_counts, _assignments):
                # SQLite's LIKE takes a for A.
                trials = func.substr(table.c.model, 1, len(prefix)) == prefix
                connection.execute(delete(table).where((table.c.model == model) | trials))

    def names(self, prefix: str = "") -> list[str]:
        """Names of the documents that begin with `prefix`, sorted."""
        there = _documents.c.name.startswith(prefix, autoescape=True) & (_documents.c.body != _REMOVED)
        with self._database.reading() as connection:
            found = connection.execute(select(_documents.c.name).where(there))
            # SQLite's LIKE takes a for A, and a server's order depends on its locale.
            return sorted(name for name in found.scalars() if name.startswith(prefix))

    def add_counts(self, model: str, version: str, bucket: int, counts: Mapping[str, int]) -> None:
        """Add to the counts of the Unix second `bucket`: all of them, or none if this raises. After StateUnavailable
        they may have been added. A power cut may take the last ones."""
        given = {"model": _name(model), "version": _name(version), "bucket": bucket}
        rows = {_name(name): int(value) for name, value in counts.items()}
        if rows:
            with self._database.writing(durable=False) as connection:
                connection.execute(self._statement(_ADD_COUNTS), {**given, "rows": json.dumps(rows)})

    def counts(self, model: str, since: int, until: int | None = None) -> dict[str, dict[str, int]]:
        """Sums by version and name, of the buckets from `since` on, and before `until`."""
        asked = (_counts.c.model == _name(model)) & (_counts.c.bucket >= since)
        if until is not None:
            asked &= _counts.c.bucket < until
        total = func.sum(_counts.c.value).label("total")
        grouped = select(_counts.c.version, _counts.c.name, total).where(asked)
        with self._database.reading() as connection:
            found = connection.execute(grouped.group_by(_counts.c.version, _counts.c.name)).all()
        sums: dict[str, dict[str, int]] = {}
        for row in found:
            sums.setdefault(row.version, {})[row.name] = int(row.total)
        return sums

    def compact_counts(self, age: float = 3600.0, width: int = 3600) -> int:
        """Merge the seconds that are older than `age` seconds into buckets of `width`, which begin at a multiple of
        it. Sums over all time stay as they are; sums since a time that long ago are to the bucket. Returns how many
        rows there are fewer. For a control process, now and then: a busy model counts millions of rows a day.
        """
        table = _counts.c
        end = int(self.now() - age) // width * width
        begin = table.bucket - table.bucket % width
        fine = (table.bucket < end) & (table.bucket % width != 0)
        summed = select(table.model, begin, table.version, table.name, func.sum(table.value)).where(fine)
        summed = summed.group_by(table.model, begin, table.version, table.name)
        merged = self._insert(_counts).from_select(["model", "bucket", "version", "name", "value"], summed)
        merged = merged.on_conflict_do_update(
            index_elements=list(_counts.primary_key.columns), set_={"value": table.value + merged.excluded.value}
        )
        with self._database.writing() as connection:
            self._database.lock(connection, _counts)
            rows = select(func.count()).select_from(_counts)
            before = connection.execute(rows).scalar_one()
            connection.execute(merged)
            connection.execute(delete(_counts).where(fine))
            return int(before - connection.execute(rows).scalar_one())

    def append_event(self, kind: str, model: str, body: Mapping[str, JsonValue]) -> int:
        """Note a decision and its numbers; durable. Returns its number."""
        noted = self._event(kind, model, body)
        with self._database.writing() as connection:
            return int(connection.execute(noted.returning(_events.c.number)).scalar_one())

    def _event(self, kind: str, model: str, body: Mapping[str, JsonValue]) -> Any:
        return insert(_events).values(kind=_name(kind), model=_name(model), body=_text(body), time=self._database.now)

    def events(self, model: str | None = None, limit: int = 100, after: int = 0) -> list[StateEvent]:
        """The newest `limit` events with a number above `after`, oldest first."""
        asked = select(_events).where(_events.c.number > after)
        if model is not None:
            asked = asked.where(_events.c.model == _name(model))
        with self._database.reading() as connection:
            found = connection.execute(asked.order_by(_events.c.number.desc()).limit(limit)).all()
        return [StateEvent(row.number, row.time, row.kind, row.model, json.loads(row.body)) for row in reversed(found)]

    def assign_all(self, model: str, versions: Mapping[str, str]) -> dict[str, str]:
        """The version that each key was assigned first, or that is given for it if it had none. Durable.

        The keys themselves, which may be patients' numbers, are not stored: their SHA-256 are.
        """
        hashes = {_hashed(key): key for key in versions}
        rows = {hashed: _name(versions[key]) for hashed, key in hashes.items()}
        given = {"model": _name(model), "rows": json.dumps(rows)}
        if not rows:
            return {}
        with self._database.writing() as connection:
            connection.execute(self._statement(_ASSIGN), given)
            found = connection.execute(self._statement(_ASSIGNED), given).all()
        return {hashes[row.key]: str(row.version) for row in found}

    def claim(self, scope: str, keys: Iterable[str]) -> set[str]:
        """Those of `keys` that nobody claimed in this scope before: they are claimed now. A power cut may undo it."""
        hashes = {_hashed(key): key for key in keys}
        given = {"model": _name(scope), "rows": json.dumps(dict.fromkeys(hashes, "claimed"))}
        if not hashes:
            return set()
        with self._database.writing(durable=False) as connection:
            new = connection.execute(self._statement(f"{_ASSIGN} RETURNING key"), given).scalars().all()
        return {hashes[hashed] for hashed in new}

    def beat(self, node: str, worker: str, ready: Sequence[str]) -> None:
        """Tell that a worker is alive, and from which versions it can answer."""
        told = {"ready": json.dumps(list(ready)), "time": self._database.now}
        statement = self._insert(_workers).values(node=_name(node), worker=_name(worker), **told)
        statement = statement.on_conflict_do_update(index_elements=list(_workers.primary_key.columns), set_=told)
        with self._database.writing(durable=False) as connection:
            connection.execute(statement)

    def workers(self) -> list[WorkerBeat]:
        """All workers that told of themselves, by node and name; those long silent too, until they are pruned."""
        age = (self._database.now - _workers.c.time).label("age")
        with self._database.reading() as connection:
            found = connection.execute(select(_workers.c.node, _workers.c.worker, _workers.c.ready, age)).all()
        beats = [WorkerBeat(row.node, row.worker, tuple(json.loads(row.ready)), max(0.0, row.age)) for row in found]
        return sorted(beats, key=lambda beat: (beat.node, beat.worker))

    def credit(self, receipt: str, model: str, version: str, body: Mapping[str, JsonValue]) -> bool:
        """Keep what was said of an answer; durable. False: something was said of it before, and that stays."""
        row = {"receipt": _name(receipt), "model": _name(model), "version": _name(version), "body": _text(body)}
        first = self._insert(_feedback).values(**row, time=self._database.now).on_conflict_do_nothing()
        with self._database.writing() as connection:
            return connection.execute(first.returning(_feedback.c.receipt)).first() is not None

    def credited(self, receipt: str) -> Feedback | None:
        """What was said of one answer."""
        with self._database.reading() as connection:
            found = connection.execute(select(_feedback).where(_feedback.c.receipt == _name(receipt))).one_or_none()
        return None if found is None else _as_feedback(found)

    def feedback(self, model: str, since: float = 0.0, limit: int | None = None) -> list[Feedback]:
        """What was said of a model's answers since then, oldest first; the newest `limit` of it."""
        asked = select(_feedback).where((_feedback.c.model == _name(model)) & (_feedback.c.time >= since))
        with self._database.reading() as connection:
            found = connection.execute(
                asked.order_by(_feedback.c.time.desc(), _feedback.c.receipt.desc()).limit(limit)
            ).all()
        return [_as_feedback(row) for row in reversed(found)]

    def anchor(self, chain: str, sequence: int, head: str) -> bool:
        """Keep that a chain's entry `sequence` has the hash `head`; durable, and never changed.

        False: it had another, or a later entry is anchored already; both stay known.
        """
        row = {"chain": _name(chain), "sequence": sequence, "hash": _name(head), "time": self._database.now}
        first = self._insert(_anchors).values(**row).on_conflict_do_nothing()
        later = (_anchors.c.chain == chain) & (_anchors.c.sequence >= sequence)
        with self._database.writing() as connection:
            connection.execute(first)
            known = connection.execute(select(_anchors.c.sequence, _anchors.c.hash).where(later)).all()
        return [tuple(row) for row in known] == [(sequence, head)]

    def anchors(self, prefix: str = "") -> dict[str, dict[int, str]]:
        """Hashes by chain and entry, of the chains whose names begin with `prefix`."""
        wanted = select(_anchors.c.chain, _anchors.c.sequence, _anchors.c.hash)
        with self._database.reading() as connection:
            found = connection.execute(wanted.where(_anchors.c.chain.startswith(prefix, autoescape=True))).all()
        chains: dict[str, dict[int, str]] = {}
        for row in found:
            if row.chain.startswith(prefix):
                chains.setdefault(row.chain, {})[row.sequence] = row.hash
        return chains

    def prune(
        self,
        *,
        counts: float | None = None,
        workers: float | None = None,
        assignments: float | None = None,
        feedback: float | None = None,
    ) -> int:
        """Drop what is older than so many seconds, of each kind (None: nothing). Returns how many rows went.

        Feedback must be kept for as long as receipts are good: one whose feedback was dropped could be credited again.
        A key whose assignment was dropped is assigned anew. Events, anchors and documents stay.
        """
        now = self._database.now
        columns = [
            (_counts, _counts.c.bucket, counts),
            (_workers, _workers.c.time, workers),
            (_assignments, _assignments.c.time, assignments),
            (_feedback, _feedback.c.time, feedback),
        ]
        dropped = 0
        for table, column, age in columns:
            if age is not None:
                with self._database.writing(durable=False) as connection:
                    dropped += connection.execute(delete(table).where(column < now - age)).rowcount
        return dropped

    def now(self) -> float:
        """The database's clock."""
        with self._database.reading() as connection:
            return float(connection.execute(select(self._database.now)).scalar_one())

    def _statement(self, words: str) -> TextClause:
        """One of the statements below, for many rows in one parameter: one after the other takes ten times as long."""
        each = "json_each(:rows)" if self._database.is_sqlite else "json_each_text(CAST(:rows AS json))"
        return text(words.format(each=each, now=self._database.now))

    def _insert(self, table: Table) -> Any:
        return self._dialect.insert(table)


def _check_schema(connection: Connection) -> None:
    found = connection.execute(select(func.max(_schema.c.version))).scalar_one()
    if found is None:
        connection.execute(insert(_schema).values(version=SCHEMA))
    elif found > SCHEMA:
        raise StateStoreError(
            f"the state store has version {found} and this FedClaw knows version {SCHEMA}: update FedClaw"
        )


def _as_feedback(row: Any) -> Feedback:
    return Feedback(row.receipt, row.model, row.version, row.time, json.loads(row.body))


def _name(name: str) -> str:
    """Refuses what one of the databases could not keep, or would keep otherwise than the other."""
    if not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
        raise ValueError(f"a name in the state store has 1 to {_LONGEST_NAME} printable characters")
    return name


def _text(document: Mapping[str, JsonValue]) -> str:
    """Raises ValueError for NaN and infinities, which are no JSON."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _hashed(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
