from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REASON_UNSPECIFIED: _ClassVar[Reason]
    REASON_VERSION: _ClassVar[Reason]
    REASON_IDENTITY: _ClassVar[Reason]
    REASON_REVOKED: _ClassVar[Reason]
    REASON_EXPIRED: _ClassVar[Reason]
    REASON_REPLACED: _ClassVar[Reason]
    REASON_UNAVAILABLE: _ClassVar[Reason]
    REASON_SILENT: _ClassVar[Reason]
    REASON_PROTOCOL: _ClassVar[Reason]
    REASON_FINISHED: _ClassVar[Reason]
    REASON_NOT_ASKED: _ClassVar[Reason]
    REASON_OVERSIZED: _ClassVar[Reason]
    REASON_MALFORMED: _ClassVar[Reason]
    REASON_SEAL: _ClassVar[Reason]
    REASON_STALLED: _ClassVar[Reason]
    REASON_BUSY: _ClassVar[Reason]
    REASON_RECALLED: _ClassVar[Reason]
    REASON_UNANSWERED: _ClassVar[Reason]
REASON_UNSPECIFIED: Reason
REASON_VERSION: Reason
REASON_IDENTITY: Reason
REASON_REVOKED: Reason
REASON_EXPIRED: Reason
REASON_REPLACED: Reason
REASON_UNAVAILABLE: Reason
REASON_SILENT: Reason
REASON_PROTOCOL: Reason
REASON_FINISHED: Reason
REASON_NOT_ASKED: Reason
REASON_OVERSIZED: Reason
REASON_MALFORMED: Reason
REASON_SEAL: Reason
REASON_STALLED: Reason
REASON_BUSY: Reason
REASON_RECALLED: Reason
REASON_UNANSWERED: Reason

class Frame(_message.Message):
    __slots__ = ("hello", "welcome", "refuse", "heartbeat", "offer", "accept", "chunk", "done", "also_done")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REFUSE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    ALSO_DONE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    welcome: Welcome
    refuse: Refuse
    heartbeat: Heartbeat
    offer: Offer
    accept: Accept
    chunk: Chunk
    done: Done
    also_done: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., refuse: _Optional[_Union[Refuse, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ..., accept: _Optional[_Union[Accept, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., also_done: _Optional[_Iterable[str]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "software", "clock")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    software: str
    clock: float
    def __init__(self, protocol: _Optional[int] = ..., software: _Optional[str] = ..., clock: _Optional[float] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol", "federation", "site", "node_id", "run_id", "max_message_bytes", "heartbeat", "clock")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    federation: str
    site: str
    node_id: int
    run_id: int
    max_message_bytes: int
    heartbeat: float
    clock: float
    def __init__(self, protocol: _Optional[int] = ..., federation: _Optional[str] = ..., site: _Optional[str] = ..., node_id: _Optional[int] = ..., run_id: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., heartbeat: _Optional[float] = ..., clock: _Optional[float] = ...) -> None: ...

class Refuse(_message.Message):
    __slots__ = ("reason", "text", "transfer_id")
    REASON_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    reason: Reason
    text: str
    transfer_id: str
    def __init__(self, reason: _Optional[_Union[Reason, str]] = ..., text: _Optional[str] = ..., transfer_id: _Optional[str] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    def __init__(self, sequence: _Optional[int] = ...) -> None: ...

class Envelope(_message.Message):
    __slots__ = ("run_id", "message_id", "reply_to_message_id", "src_node_id", "dst_node_id", "group_id", "message_type", "created_at", "ttl")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    REPLY_TO_MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    SRC_NODE_ID_FIELD_NUMBER: _ClassVar[int]
    DST_NODE_ID_FIELD_NUMBER: _ClassVar[int]
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_TYPE_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    run_id: int
    message_id: str
    reply_to_message_id: str
    src_node_id: int
    dst_node_id: int
    group_id: str
    message_type: str
    created_at: float
    ttl: float
    def __init__(self, run_id: _Optional[int] = ..., message_id: _Optional[str] = ..., reply_to_message_id: _Optional[str] = ..., src_node_id: _Optional[int] = ..., dst_node_id: _Optional[int] = ..., group_id: _Optional[str] = ..., message_type: _Optional[str] = ..., created_at: _Optional[float] = ..., ttl: _Optional[float] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("transfer_id", "envelope", "size", "stamp", "seal_header", "plain_size", "inline", "seconds_left")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    STAMP_FIELD_NUMBER: _ClassVar[int]
    SEAL_HEADER_FIELD_NUMBER: _ClassVar[int]
    PLAIN_SIZE_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    SECONDS_LEFT_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    envelope: Envelope
    size: int
    stamp: bytes
    seal_header: bytes
    plain_size: int
    inline: bytes
    seconds_left: float
    def __init__(self, transfer_id: _Optional[str] = ..., envelope: _Optional[_Union[Envelope, _Mapping]] = ..., size: _Optional[int] = ..., stamp: _Optional[bytes] = ..., seal_header: _Optional[bytes] = ..., plain_size: _Optional[int] = ..., inline: _Optional[bytes] = ..., seconds_left: _Optional[float] = ...) -> None: ...

class Accept(_message.Message):
    __slots__ = ("transfer_id", "offset")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    offset: int
    def __init__(self, transfer_id: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("transfer_id", "offset", "data")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    offset: int
    data: bytes
    def __init__(self, transfer_id: _Optional[str] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("transfer_id",)
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    def __init__(self, transfer_id: _Optional[str] = ...) -> None: ...

class Content(_message.Message):
    __slots__ = ("records", "failure")
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    records: Records
    failure: Failure
    def __init__(self, records: _Optional[_Union[Records, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "has_reason", "reason")
    CODE_FIELD_NUMBER: _ClassVar[int]
    HAS_REASON_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    code: int
    has_reason: bool
    reason: str
    def __init__(self, code: _Optional[int] = ..., has_reason: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...

class Records(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[Record]
    def __init__(self, items: _Optional[_Iterable[_Union[Record, _Mapping]]] = ...) -> None: ...

class Record(_message.Message):
    __slots__ = ("name", "arrays", "metrics", "configs")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARRAYS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    CONFIGS_FIELD_NUMBER: _ClassVar[int]
    name: str
    arrays: ArrayItems
    metrics: ValueItems
    configs: ValueItems
    def __init__(self, name: _Optional[str] = ..., arrays: _Optional[_Union[ArrayItems, _Mapping]] = ..., metrics: _Optional[_Union[ValueItems, _Mapping]] = ..., configs: _Optional[_Union[ValueItems, _Mapping]] = ...) -> None: ...

class ArrayItems(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[ArrayItem]
    def __init__(self, items: _Optional[_Iterable[_Union[ArrayItem, _Mapping]]] = ...) -> None: ...

class ArrayItem(_message.Message):
    __slots__ = ("name", "dtype", "shape", "stype", "length")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    STYPE_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    stype: str
    length: int
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., stype: _Optional[str] = ..., length: _Optional[int] = ...) -> None: ...

class ValueItems(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[ValueItem]
    def __init__(self, items: _Optional[_Iterable[_Union[ValueItem, _Mapping]]] = ...) -> None: ...

class ValueItem(_message.Message):
    __slots__ = ("name", "scalar", "list")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SCALAR_FIELD_NUMBER: _ClassVar[int]
    LIST_FIELD_NUMBER: _ClassVar[int]
    name: str
    scalar: Scalar
    list: ScalarList
    def __init__(self, name: _Optional[str] = ..., scalar: _Optional[_Union[Scalar, _Mapping]] = ..., list: _Optional[_Union[ScalarList, _Mapping]] = ...) -> None: ...

class Scalar(_message.Message):
    __slots__ = ("flag", "integer", "large", "number", "text", "data")
    FLAG_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    LARGE_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    flag: bool
    integer: int
    large: int
    number: float
    text: str
    data: bytes
    def __init__(self, flag: _Optional[bool] = ..., integer: _Optional[int] = ..., large: _Optional[int] = ..., number: _Optional[float] = ..., text: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class ScalarList(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[Scalar]
    def __init__(self, items: _Optional[_Iterable[_Union[Scalar, _Mapping]]] = ...) -> None: ...

class Spooled(_message.Message):
    __slots__ = ("task", "reply", "seal_header", "size", "plain_size", "digest", "summary")
    TASK_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    SEAL_HEADER_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    PLAIN_SIZE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    task: Envelope
    reply: Envelope
    seal_header: bytes
    size: int
    plain_size: int
    digest: str
    summary: bytes
    def __init__(self, task: _Optional[_Union[Envelope, _Mapping]] = ..., reply: _Optional[_Union[Envelope, _Mapping]] = ..., seal_header: _Optional[bytes] = ..., size: _Optional[int] = ..., plain_size: _Optional[int] = ..., digest: _Optional[str] = ..., summary: _Optional[bytes] = ...) -> None: ...
