"""Received records behave as Flower's, cost no copy and leave no cycles."""

import gc
import pickle
import weakref

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedclaw.protocol.arrays import Form, pack_leaving, pack_wire, unpack_wire
from fedclaw.protocol.records import MessageRecords, ViewedArray, array_record, hash_of, serialised
from fedclaw.transport.grpc.message_codec import encode


def viewed(values: np.ndarray) -> ViewedArray:
    array = Array(values)
    return ViewedArray(array.dtype, array.shape, array.stype, memoryview(array.data))


def test_using_the_views_leaves_nothing_for_the_cycle_collector():
    gc.collect()
    gc.disable()
    try:
        records = MessageRecords({"a": ArrayRecord({"w": viewed(np.zeros(3))}), "m": MetricRecord({"n": 1})})
        assert records.array_records["a"]["w"].shape == (3,)
        assert records.metric_records["m"]["n"] == 1
        assert len(records.config_records) == 0
        gone = weakref.ref(records)
        del records
        assert gone() is None
    finally:
        gc.enable()


def test_views_by_kind_write_through_and_check():
    records = MessageRecords({"m": MetricRecord({"n": 1})})
    records.config_records["c"] = ConfigRecord({"x": "y"})
    assert records["c"]["x"] == "y"
    assert list(records.metric_records) == ["m"]
    with pytest.raises(TypeError, match="expected `MetricRecord`"):
        records.metric_records["c"] = ConfigRecord()
    with pytest.raises(KeyError):
        records.array_records["m"]
    with pytest.raises(KeyError):
        del records.array_records["m"]
    del records.metric_records["m"]
    assert list(records) == ["c"]


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_viewed_array_is_an_array(order):
    values = np.arange(6, dtype=np.float32).reshape(2, 3, order=order)
    array = viewed(values)
    copy = array.numpy()
    np.testing.assert_array_equal(copy, values)
    copy += 1
    np.testing.assert_array_equal(array.numpy(), values)
    assert array == Array(values)
    assert array != Array(values + 1)
    assert isinstance(array.data, bytes)
    assert serialised(array) is array.views
    again = ArrayRecord({"w": array})
    np.testing.assert_array_equal(again["w"].numpy(), values)


@pytest.mark.parametrize("values", [np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros((0, 2)), np.array(7.0)])
def test_what_leaves_is_packed_without_a_copy_and_is_the_same_to_everybody(values):
    left, copied = pack_leaving({"w": values}), pack_wire({"w": values})
    assert left["w"] == copied["w"]
    assert hash_of({"sum": left}).digest() == hash_of({"sum": copied}).digest()
    assert encode(RecordDict({"sum": left})).size == encode(RecordDict({"sum": copied})).size
    assert b"".join(encode(RecordDict({"sum": left})).parts) == b"".join(encode(RecordDict({"sum": copied})).parts)
    (read,) = unpack_wire(left, {"w": Form(values.dtype, values.shape)}).values()
    assert np.shares_memory(read, values) == bool(values.size)
    assert not read.flags.writeable
    np.testing.assert_array_equal(left["w"].numpy(), values)
    assert pickle.loads(pickle.dumps(left["w"])) == copied["w"]


def test_an_array_record_made_at_once_is_the_one_that_flower_would_make():
    arrays = {"w": Array(np.ones(3, np.float32)), "b": Array(np.zeros(1))}
    made = array_record(dict(arrays))
    assert made == ArrayRecord(arrays)
    assert list(made.items()) == list(arrays.items())
    made["more"] = arrays["w"]
    with pytest.raises(TypeError):
        made["wrong"] = 3
