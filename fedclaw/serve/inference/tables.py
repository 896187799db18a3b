"""`POST /predict`: rows as they lie in somebody's table, and an answer to each, or why it has none.

    workload   what is sent                                                       content-type
    tables     {"rows": [{"age": 63, "ward": "surgery"}, ...]}, one such row, or  application/json
               {"columns": {"age": [63, ...], ...}}
               CSV, with a header                                                 text/csv
    images     one image file                                                     image/png, image/jpeg
               an .npz archive with `images`                                      application/x-npz
    arrays     an .npz archive with `x`                                           application/x-npz

The bundle's own schema reads it, by the rules by which sites read what they trained on: names of columns, levels
however they are written, missing values, ranges. A row that it cannot read comes back with the reason in its place and
costs no other row its answer. How a CSV is written is in the query, where it is not as the schema says: `delimiter`,
`decimal`, `encoding`, `title_lines`; so are `identifiers`, columns to hand through beside those that the schema names.

The answer is JSON, or CSV where the `accept` header has text/csv first: that of `python -m fedclaw.predict output=`.
Nothing is written to a disk on the way.

Legend: N rows.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import orjson
from pydantic import ValidationError

from fedclaw.errors import DataError, NotInGraph
from fedclaw.export.answers import Answers, as_csv
from fedclaw.learning.preprocessing import Columns, Preprocessing
from fedclaw.learning.sources import MAX_COLUMNS, MAX_ROWS, MemoryFile, MemoryTable, Source, Value
from fedclaw.learning.tasks.classification import decide
from fedclaw.learning.workload import FileFormat, Schema
from fedclaw.protocol.frozen import explain
from fedclaw.serve.inference.description import ModelDescription
from fedclaw.serve.inference.node import Headers, Node
from fedclaw.serve.inference.rest import JSON, Asker, identity_of, key_of, listed
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.requests import Caller, InferenceRequest

CSV, NPZ = "text/csv", "application/x-npz"
PNG, JPEG = "image/png", "image/jpeg"
NAMES = {CSV: "table.csv", NPZ: "archive.npz", PNG: "image.png", JPEG: "image.jpg"}
TAKEN: dict[str | None, tuple[str, ...]] = {"table": (JSON, CSV), "image": (PNG, JPEG, NPZ), None: (NPZ,)}
"""By a schema's modality: which types of content its reader takes."""
CHARSETS = {
    "utf-8": "utf-8",
    "utf-16": "utf-16",
    "iso-8859-1": "latin-1",
    "latin-1": "latin-1",
    "windows-1252": "windows-1252",
}
MAX_FIELDS = 16
SMALL = 2**14
"""Bytes that are read at once; a larger table is read in a thread, so that other requests do not wait for it."""
_FORMAT = tuple(FileFormat.model_fields)
_VALUES = {str, int, float, NoneType, bool}


@dataclass(frozen=True, slots=True)
class SentTable:
    """What a client sent to /predict."""

    body: bytes = field(repr=False)
    content_type: str
    accept: str = ""
    query: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TableAnswer:
    """What it is answered."""

    body: bytes = field(repr=False)
    content_type: str
    headers: Headers


def parse_query(query: bytes) -> dict[str, str]:
    """A URL's query. Raises ServeRefusal."""
    try:
        fields = parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS)
    except ValueError as error:
        raise ServeRefusal("bad_request", "the query cannot be read") from error
    if len(dict(fields)) != len(fields):
        raise ServeRefusal("bad_request", "a field of the query is there more than once")
    return dict(fields)


def only_model(names: Sequence[str]) -> str:
    """The model of a request that names none. Raises ServeRefusal unless there is exactly one."""
    if len(names) != 1:
        raise ServeRefusal("not_found", f"name a model, as /predict/MODEL: there are {listed(names) or 'none'}")
    return names[0]


async def predict_table(
    node: Node,
    caller: Caller,
    model: str,
    sent: SentTable,
    asker: Asker,
    version: str | None = None,
    deadline: float | None = None,
) -> TableAnswer:
    """Answer a table. Raises ServeRefusal: `unsupported_media_type`, `bad_request`, `unprocessable` with what is wrong
    with the whole of it, and what `node` raises."""
    description = node.reader(caller.principal, model, version).model
    as_sent = (description, sent)
    found = _read(*as_sent) if len(sent.body) <= SMALL else await asyncio.to_thread(_read, *as_sent)
    identity = identity_of(None, asker)
    answered, count = found.answered, found.count
    task, headers = description.schema.task, dict[str, str]()
    given, threshold = np.zeros((0, task.outputs), np.float32), description.threshold
    if len(answered):
        columns = {name: values[answered] for name, values in found.columns.items()}
        key = key_of({}, asker, identity)
        request = InferenceRequest(model, columns, len(answered), identity, key, version, None, deadline)
        response, answer_headers = await node.infer(caller, request, sent.body)
        headers |= answer_headers
        given = response.outputs[task.head[1]]
        if response.version != description.version:
            threshold = node.reader(caller.principal, model, response.version).model.threshold
        version = response.version
    answers = Answers.of(task, count, found, given, threshold)
    if _wants_csv(sent.accept):
        return TableAnswer(as_csv(answers), f"{CSV}; charset=utf-8; header=present", headers)
    return TableAnswer(_as_json(answers, model, version, identity), JSON, headers)


@dataclass(frozen=True, slots=True)
class _Found:
    """A table as its reader gave it."""

    columns: Columns
    refused: Mapping[int, str]
    identifiers: Mapping[str, Sequence[str]]

    @property
    def count(self) -> int:
        """N."""
        return len(next(iter(self.columns.values())))

    @property
    def answered(self) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """Numbers of the rows that were read well, from 0."""
        return np.array([row for row in range(self.count) if row not in self.refused], np.int64)


def _read(model: ModelDescription, sent: SentTable) -> _Found:
    """The rows as the columns that the model takes. Raises ServeRefusal."""
    source, written, identifiers = _source(model.schema, sent)
    try:
        schema = model.schema if written == FileFormat() else model.schema.written_as(written)
        preprocessing = _preprocessing(schema, model)
        if preprocessing is not None:
            typed = preprocessing.read(source, identifiers)
            return _Found(typed.columns, typed.refused, typed.identifiers)
        rows = schema.read_rows(source, identifiers)
        return _Found({model.columns[0].name: rows.inputs}, rows.refused, rows.identifiers)
    except (DataError, NotInGraph) as error:
        raise ServeRefusal("unprocessable", str(error)) from error


def _preprocessing(schema: Schema, model: ModelDescription) -> Preprocessing | None:
    """What makes the model's columns of rows; None: the model takes prepared inputs."""
    try:
        found = schema.preprocessing()
    except NotInGraph:
        return None
    return found if [own.name for own in found.columns] == [own.name for own in model.columns] else None


def _source(schema: Schema, sent: SentTable) -> tuple[Source, FileFormat, tuple[str, ...]]:
    """What is read, how it is written, and which columns are handed through. Raises ServeRefusal."""
    kind, _, parameters = sent.content_type.partition(";")
    kind, taken = kind.strip().lower(), TAKEN[schema.modality]
    if kind not in taken:
        raise ServeRefusal("unsupported_media_type", f"the model takes the content types {', '.join(taken)}")
    query = dict(sent.query)
    identifiers = tuple(name for name in query.pop("identifiers", "").split(",") if name)
    if not query.keys() <= set(_FORMAT):
        raise ServeRefusal("bad_request", f"the query may have {listed((*_FORMAT, 'identifiers'))}")
    if "encoding" not in query and (charset := _charset(parameters)) is not None:
        query["encoding"] = charset
    try:
        written = FileFormat.model_validate(query)
    except ValidationError as error:
        raise ServeRefusal("bad_request", f"query: {explain(error)}") from error
    if kind == JSON:
        return _json_table(sent.body), written, identifiers
    return MemoryFile(NAMES[kind], sent.body, max_rows=MAX_ROWS), written, identifiers


def _charset(parameters: str) -> str | None:
    """The encoding that a content type names, None for none. Raises ServeRefusal for one that is not read."""
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset":
            found = CHARSETS.get(value.strip().strip('"').lower())
            if found is None:
                raise ServeRefusal("unsupported_media_type", f"the charset is none of {', '.join(CHARSETS)}")
            return None if found == "utf-8" else found
    return None


def _json_table(body: bytes) -> MemoryTable:
    """JSON's rows or columns. Raises ServeRefusal."""
    try:
        sent = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ServeRefusal("bad_request", f"the body is not JSON: {error.msg} at byte {error.pos}") from error
    if type(sent) is dict and sent.keys() == {"rows"} and type(sent["rows"]) is list:
        return _of_rows(sent["rows"])
    if type(sent) is dict and sent.keys() == {"columns"} and type(sent["columns"]) is dict:
        return _of_columns(sent["columns"])
    if type(sent) is dict and sent and set(map(type, sent.values())) <= _VALUES:
        return _of_rows([sent])
    raise ServeRefusal(
        "bad_request", 'the body has to be {"rows": [{"COLUMN": value, …}, …]}, or {"columns": {"COLUMN": [values]}}'
    )


def _of_rows(rows: list[Any]) -> MemoryTable:
    """Rows that are all to have the columns of the first."""
    if not rows or type(rows[0]) is not dict or not rows[0]:
        raise ServeRefusal("bad_request", "rows: a list of objects is needed, with a value for each column")
    _require_size(len(rows), len(rows[0]))
    names, wrong = rows[0].keys(), dict[int, str]()
    for number, row in enumerate(rows):
        if type(row) is not dict:
            wrong[number] = "it is no object"
        elif row.keys() != names:
            wrong[number] = "its columns are not those of row 1; what is not known is null"
        elif not set(map(type, row.values())) <= _VALUES:
            wrong[number] = "a list or an object in it; expected single values"
    columns = {
        name: [None if number in wrong else _cell(row[name]) for number, row in enumerate(rows)] for name in names
    }
    return MemoryTable("table", columns, wrong)


def _of_columns(columns: dict[str, Any]) -> MemoryTable:
    if not columns or set(map(type, columns.values())) != {list} or len(set(map(len, columns.values()))) != 1:
        raise ServeRefusal("bad_request", "columns: a list of as many values as the others have is needed for each")
    _require_size(max(map(len, columns.values())), len(columns))
    if not all(set(map(type, values)) <= _VALUES for values in columns.values()):
        raise ServeRefusal("bad_request", "columns: a list or an object in a column; expected single values")
    return MemoryTable("table", {name: list(map(_cell, values)) for name, values in columns.items()})


def _require_size(rows: int, columns: int) -> None:
    if rows > MAX_ROWS or columns > MAX_COLUMNS:
        raise ServeRefusal("too_large", f"a table has at most {MAX_ROWS} rows and {MAX_COLUMNS} columns")


def _cell(value: Any) -> Value:
    """JSON's value as a table has it."""
    if type(value) is bool:
        return "true" if value else "false"
    cell: Value = value
    return cell


def _wants_csv(accept: str) -> bool:
    """Whether the first type in the header that there is an answer in is CSV."""
    for part in accept.split(","):
        kind = part.partition(";")[0].strip().lower()
        if kind in {CSV, "text/*"}:
            return True
        if kind in {JSON, "application/*", "*/*"}:
            return False
    return False


def _as_json(answers: Answers, model: str, version: str | None, identity: str) -> bytes:
    rows = list[dict[str, Any]]()
    labels = answers.task.labels
    chosen = decide(answers.given, answers.threshold) if labels else None
    for number, place in enumerate(answers.places.tolist()):
        row: dict[str, Any] = {"row": number + 1}
        if answers.identifiers:
            row["identifiers"] = {name: cells[number] for name, cells in answers.identifiers.items()}
        if place < 0:
            row["refused"] = answers.refused[number]
        elif chosen is not None:
            row["label"] = labels[chosen[place]]
            row["probabilities"] = dict(zip(labels, answers.given[place], strict=True))
        elif answers.given.shape[1] == 1:
            row["value"] = answers.given[place, 0]
        else:
            row["values"] = answers.given[place]
        rows.append(row)
    told = {"model_name": model, "model_version": version, "id": identity, "rows": rows}
    return orjson.dumps(told, option=orjson.OPT_SERIALIZE_NUMPY)
