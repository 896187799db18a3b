"""Records that cost no copy, received or about to leave, and are freed when the last user lets go of them.

Flower's `RecordDict.array_records` (and its two sisters) returns a dictionary that refers to itself and to the
whole content. Each use of it therefore keeps the content, 40 MB or more of it, until Python's cycle collector happens
to run: measured here, a server held the updates of all 16 sites at once. The views made here refer to their
owner only. Flower's `Array` wants its data as `bytes` of its own; the one made here looks into the received
message, or at an array that is about to leave, until somebody asks for that.
"""

import hashlib
import io
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, Generic, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.lib import format as npy
from numpy.typing import NDArray

R = TypeVar("R", bound=ArrayRecord | MetricRecord | ConfigRecord)


class ViewedArray(Array):
    """An Array whose serialised bytes are `views`, one after the other, read-only and part of something larger."""

    views: tuple[memoryview, ...]

    def __init__(self, dtype: str, shape: tuple[int, ...], stype: str, *views: memoryview) -> None:
        # Not by assignment, which Flower's class watches for changes of an array that it has sent: four times as long.
        self.__dict__.update(dtype=dtype, shape=shape, stype=stype, views=tuple(view.toreadonly() for view in views))

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The serialised bytes, copied."""
        return b"".join(self.views)

    def numpy(self) -> NDArray[Any]:
        """The array, writable and the caller's own. The views must hold a .npy file of version 1."""
        return read_npy(self)[1].copy(order="K")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        mine = (self.dtype, self.shape, self.stype, self.data)
        return mine == (other.dtype, tuple(other.shape), other.stype, other.data)

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, self.data)

    __hash__ = None  # type: ignore[assignment]


_LONGEST_HEADER = 4096


def array_record(arrays: dict[str, Array]) -> ArrayRecord:
    """An ArrayRecord of `arrays`. Flower's own check of each builds types anew: half the time of a small decoding."""
    record = ArrayRecord()
    record.__dict__["_data"].update(arrays)
    return record


def serialised(array: Array) -> tuple[bytes | memoryview, ...]:
    """The bytes of `array` as they are, one part after the other, without a copy."""
    return array.views if isinstance(array, ViewedArray) else (array.data,)


def read_npy(array: Array) -> tuple[bool, NDArray[Any]]:
    """Whether the .npy file in `array` is in Fortran's order, and a read-only view of what it holds.

    Raises ValueError for anything but a file of version 1, whole or its header and its numbers apart.
    """
    *apart, numbers = serialised(array)
    head = io.BytesIO(b"".join(apart) or numbers[:_LONGEST_HEADER])
    if (version := npy.read_magic(head)) != (1, 0):
        raise ValueError(f"unsupported .npy version {version}")
    shape, fortran, dtype = npy.read_array_header_1_0(head)
    values = np.frombuffer(numbers, dtype=dtype, offset=0 if apart else head.tell())
    return fortran, values.reshape(shape, order="F" if fortran else "C")


def hash_of(records: Mapping[str, ArrayRecord]) -> "hashlib._Hash":
    """SHA-256 of arrays by their records' names and their own: of what a question asks, and of a secure sum's start.

    Not of what stands in ledgers and outbound logs (`fedclaw.site.privacy_budget`, `fedclaw.transport.base`), whose
    digests have to stay what earlier versions wrote.
    """
    digest = hashlib.sha256()
    for key, record in sorted(records.items()):
        for name, array in sorted(record.items()):
            parts = serialised(array)
            digest.update(f"{key}/{name}/{array.shape}/{sum(map(len, parts))}|".encode())
            for data in parts:
                digest.update(data)
    return digest


class MessageRecords(RecordDict):
    """A RecordDict in everything but how its views by kind are made.

    `reply_bytes`, of a question, is what its answer has at most, header and all; None: not known. It never leaves.
    """

    reply_bytes: int | None = None

    @property
    def array_records(self) -> "View[ArrayRecord]":  # type: ignore[override]
        """The array records; changes go through to the whole."""
        return View(self, ArrayRecord)

    @property
    def metric_records(self) -> "View[MetricRecord]":  # type: ignore[override]
        """The metric records; changes go through to the whole."""
        return View(self, MetricRecord)

    @property
    def config_records(self) -> "View[ConfigRecord]":  # type: ignore[override]
        """The configuration records; changes go through to the whole."""
        return View(self, ConfigRecord)


class View(MutableMapping[str, R], Generic[R]):
    """The records of one kind in a RecordDict, by name."""

    def __init__(self, owner: RecordDict, kind: type[R]) -> None:
        self._owner = owner
        self._kind: type[R] = kind

    def __getitem__(self, key: str) -> R:
        record = self._owner[key]
        if not isinstance(record, self._kind):
            raise KeyError(key)
        return record

    def __setitem__(self, key: str, value: R) -> None:
        if not isinstance(value, self._kind):
            raise TypeError(f"expected `{self._kind.__name__}`, but received `{type(value).__name__}`")
        self._owner[key] = value

    def __delitem__(self, key: str) -> None:
        del self._owner[self._checked(key)]

    def __iter__(self) -> Iterator[str]:
        return (key for key, record in self._owner.items() if isinstance(record, self._kind))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))

    def copy(self) -> dict[str, R]:
        """A shallow copy, apart from the whole."""
        return dict(self)

    def _checked(self, key: str) -> str:
        self[key]
        return key
