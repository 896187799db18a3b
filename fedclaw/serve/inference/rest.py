"""The Open Inference Protocol v2 over REST: requests and answers as JSON, and as JSON with binary tensors behind it.

A request's body is one JSON object, or, where the header `Inference-Header-Content-Length` says how many bytes that
has, the object and then the raw bytes of each input with the parameter `binary_data_size`, in the order of the inputs.
The answer has binary outputs where the request asks for them: `binary_data` of one output, `binary_data_output` of all.

What the protocol lets a server choose:

    data         of an input nested by its shape or flat; of an output flat
    null         in an input what is not known (`fedclaw.serve.inference.tensors`); in an output NaN
    id           at most 128 characters without control characters; the node makes one where there is none
    key          a parameter of the request: what decides on the version that answers
    timeout      a parameter of the request: microseconds after which the answer is of no use
    other names  of fields and parameters are not looked at; sequences, shared memory, and classification are refused
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any
from uuid import uuid4

import orjson

from fedclaw.learning.preprocessing import Columns
from fedclaw.serve.inference.description import ModelDescription
from fedclaw.serve.inference.tensors import OF_OUTPUT, ColumnTensor, as_bytes
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.requests import InferenceRequest, InferenceResponse

HEADER_LENGTH = "inference-header-content-length"
"""The HTTP header of a body with binary tensors: how many bytes of JSON it begins with."""
JSON, BINARY = "application/json", "application/octet-stream"
MAX_IDENTITY, MAX_KEY = 128, 256
MAX_DIGITS = 12
MICROSECONDS = 1_000_000
NAMES_SHOWN = 20
NOT_SUPPORTED = {
    **dict.fromkeys(("sequence_id", "sequence_start", "sequence_end"), "sequences are not supported"),
    **dict.fromkeys(
        ("shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"), "shared memory is not supported"
    ),
    "classification": "the classification extension is not supported: ask for label and probabilities",
}
"""Parameters that a client would be misled by if they were not looked at."""


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """Which outputs the client wants as raw bytes; the others as JSON."""

    usual: bool = False
    by_name: Mapping[str, bool] | None = None

    def binary(self, name: str) -> bool:
        """Whether that output."""
        return self.usual if self.by_name is None else self.by_name.get(name, self.usual)


USUAL = AnswerForm()


@dataclass(frozen=True, slots=True)
class Asker:
    """Whose request it is, and what is said of it outside of its body."""

    name: str
    """The principal's."""
    key: str | None = None
    """By which the client wants to be routed, as a header says."""
    new_identity: Callable[[], str] = lambda: uuid4().hex
    """Makes the id of a request that has none."""


class RequestReader:
    """Reads the requests for one version of a model."""

    def __init__(self, model: ModelDescription) -> None:
        self.model = model
        self._columns = {column.name: ColumnTensor(column) for column in model.columns}
        self._outputs = frozenset(output.name for output in model.outputs)

    def read(
        self,
        body: bytes,
        header_length: str | None,
        asker: Asker,
        version: str | None = None,
        deadline: float | None = None,
    ) -> tuple[InferenceRequest, AnswerForm]:
        """A request's body; `header_length` is the HTTP header. Raises ServeRefusal, and nothing else."""
        if header_length is None:
            header, raw = _json(body), None
        else:
            size = _size(header_length, len(body))
            header, raw = _json(body[:size]), memoryview(body)[size:]
        parameters = parameters_of(header)
        columns, rows = self._read_inputs(header.get("inputs"), raw)
        outputs, form = self._read_outputs(header.get("outputs"), parameters)
        identity = identity_of(header.get("id"), asker)
        key = key_of(parameters, asker, identity)
        deadline = deadline_of(parameters, deadline)
        return InferenceRequest(self.model.name, columns, rows, identity, key, version, outputs, deadline), form

    def column(self, name: Any, known: Mapping[str, Any]) -> ColumnTensor:
        """What the input of that name has to be; `known` are those that were read. Raises ServeRefusal."""
        found = self._columns.get(name) if type(name) is str else None
        if found is None:
            raise ServeRefusal("bad_request", f"the model has no such input; it has {listed(self._columns)}")
        if name in known:
            raise found.refusal("it is there more than once")
        return found

    def rows(self, columns: Columns, rows: Sequence[int]) -> int:
        """N. Raises ServeRefusal unless all columns are there, with the same number of rows."""
        if len(columns) != len(self._columns):
            absent = [name for name in self._columns if name not in columns]
            raise ServeRefusal("bad_request", f"an input is missing: {listed(absent)}")
        if min(rows) != max(rows):
            raise ServeRefusal("bad_request", "the inputs have different numbers of rows")
        return rows[0]

    def require_output(self, name: Any, known: Mapping[str, Any] | Sequence[str]) -> str:
        """The name, if it is an output's and not yet in `known`. Raises ServeRefusal."""
        if type(name) is not str or name not in self._outputs:
            raise ServeRefusal("bad_request", f"the model has no such output; it has {listed(sorted(self._outputs))}")
        if name in known:
            raise ServeRefusal("bad_request", f"output {name!r} is asked for more than once")
        return name

    def _read_inputs(self, inputs: Any, raw: memoryview | None) -> tuple[dict[str, Any], int]:
        if type(inputs) is not list or not inputs:
            raise ServeRefusal("bad_request", "inputs: a list of tensors is needed")
        columns, rows, place = dict[str, Any](), list[int](), 0
        for tensor in inputs:
            if type(tensor) is not dict:
                raise ServeRefusal("bad_request", "inputs: a tensor is an object")
            own = self.column(tensor.get("name"), columns)
            datatype = tensor.get("datatype")
            rows.append(own.rows_of(tensor.get("shape")))
            parameters = parameters_of(tensor) if "parameters" in tensor else _NONE
            size = parameters.get("binary_data_size")
            if size is None:
                values = own.of_values(datatype, rows[-1], tensor.get("data"))
            elif "data" in tensor:
                raise own.refusal("it has data and binary_data_size, and can have but one of them")
            else:
                values = own.of_bytes(datatype, rows[-1], _part(own, raw, place, size))
                place += size
            columns[own.column.name] = values
        if raw is not None and place != len(raw):
            raise ServeRefusal("bad_request", "the sizes of the binary inputs do not add up to what is there")
        return columns, self.rows(columns, rows)

    def _read_outputs(self, outputs: Any, parameters: Mapping[str, Any]) -> tuple[tuple[str, ...] | None, AnswerForm]:
        usual = _flag(parameters, "binary_data_output", usual=False)
        if outputs is None:
            return None, AnswerForm(usual) if usual else USUAL
        if type(outputs) is not list:
            raise ServeRefusal("bad_request", "outputs: a list of names is needed")
        found = dict[str, bool]()
        for output in outputs:
            if type(output) is not dict:
                raise ServeRefusal("bad_request", "outputs: an output is an object")
            name = self.require_output(output.get("name"), found)
            found[name] = _flag(parameters_of(output), "binary_data", usual)
        return (tuple(found), AnswerForm(usual, found)) if found else (None, AnswerForm(usual))


def write_response(response: InferenceResponse, form: AnswerForm = USUAL) -> tuple[bytes, int | None]:
    """The body, and what `Inference-Header-Content-Length` says of it; None: it is JSON alone."""
    outputs, tail = list[dict[str, Any]](), list[bytes]()
    for name, values in response.outputs.items():
        dtype = values.dtype.char
        told: dict[str, Any] = {"name": name, "datatype": OF_OUTPUT[dtype], "shape": values.shape}
        if form is not USUAL and form.binary(name):
            tail.append(as_bytes(values))
            told["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            told["data"] = values.ravel().tolist() if dtype == "O" else values.ravel()
        outputs.append(told)
    answer = {
        "model_name": response.model,
        "model_version": response.version,
        "id": response.identity,
        "outputs": outputs,
    }
    header = orjson.dumps(answer, None, orjson.OPT_SERIALIZE_NUMPY)
    if not tail:
        return header, None
    return b"".join((header, *tail)), len(header)


def write_refusal(refusal: ServeRefusal) -> bytes:
    """The body of an error: `error` for people, as the protocol has it, and `code` for programs."""
    return orjson.dumps({"error": str(refusal), "code": refusal.code})


def parameters_of(holder: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `parameters` of a request or a tensor. Raises ServeRefusal for those that mean what is not supported."""
    parameters = holder.get("parameters")
    if parameters is None:
        return _NONE
    if type(parameters) is not dict:
        raise ServeRefusal("bad_request", "parameters: an object is needed")
    require_supported(parameters)
    return parameters


def require_supported(parameters: Iterable[str]) -> None:
    """Raise ServeRefusal if one of the names means what is not supported."""
    for name in parameters:
        if name in NOT_SUPPORTED:
            raise ServeRefusal("not_supported", NOT_SUPPORTED[name])


def identity_of(identity: Any, asker: Asker) -> str:
    """A request's id, a new one where there is none. Raises ServeRefusal."""
    if identity is None or identity == "":
        return asker.new_identity()
    if type(identity) is not str or len(identity) > MAX_IDENTITY or not identity.isprintable():
        raise ServeRefusal("bad_request", f"id: a text of at most {MAX_IDENTITY} printable characters is needed")
    return identity


def key_of(parameters: Mapping[str, Any], asker: Asker, identity: str) -> str:
    """What the request is routed by: what the header says, else the parameter, else each request by itself.

    Raises ServeRefusal.
    """
    key = parameters.get("key") if asker.key is None else asker.key
    if key is None:
        return f"{asker.name} {identity}"
    if type(key) is not str or not 0 < len(key) <= MAX_KEY or not key.isprintable():
        raise ServeRefusal("bad_request", f"key: a text of 1 to {MAX_KEY} printable characters is needed")
    return key


def deadline_of(parameters: Mapping[str, Any], deadline: float | None) -> float | None:
    """The earlier of `deadline` and the one by the parameter `timeout`, by `time.monotonic`. Raises ServeRefusal."""
    timeout = parameters.get("timeout")
    if timeout is None:
        return deadline
    if type(timeout) is not int or timeout < 0:
        raise ServeRefusal("bad_request", "timeout: a whole number of microseconds is needed")
    if not timeout:  # in the protocol's scheduling policy, 0 is no timeout
        return deadline
    own = monotonic() + timeout / MICROSECONDS
    return own if deadline is None else min(own, deadline)


def listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    """Names for a message, the first of them."""
    shown = ", ".join(map(repr, list(names)[:NAMES_SHOWN]))
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"


_NONE: Mapping[str, Any] = {}


def _json(text: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        # The error's own words are of the parser and the place alone, never of what is there.
        raise ServeRefusal("bad_request", f"the body is not JSON: {error.msg} at byte {error.pos}") from error
    if type(found) is not dict:
        raise ServeRefusal("bad_request", "the body is not a JSON object")
    return found


def _size(header: str, body: int) -> int:
    if not (header.isascii() and header.isdecimal() and len(header) <= MAX_DIGITS) or int(header) > body:
        raise ServeRefusal("bad_request", f"{HEADER_LENGTH} is no number of bytes that the body has")
    return int(header)


def _part(own: ColumnTensor, raw: memoryview | None, place: int, size: Any) -> memoryview:
    if raw is None:
        raise own.refusal(f"it has binary_data_size, and the request has no header {HEADER_LENGTH}")
    if type(size) is not int or not 0 <= size <= len(raw) - place:
        raise own.refusal("its binary_data_size is no number of bytes that are there")
    return raw[place : place + size]


def _flag(parameters: Mapping[str, Any], name: str, usual: bool) -> bool:
    value = parameters.get(name, usual)
    if type(value) is not bool:
        raise ServeRefusal("bad_request", f"{name}: true or false is needed")
    return value
