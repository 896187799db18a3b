"""Contents to bytes and back; bytes that are not exactly right are refused."""

from contextlib import suppress

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedclaw.errors import TransportError
from fedclaw.transport.grpc.message_codec import decode, encode
from fedclaw.transport.grpc.protocol import link_pb2 as pb

DTYPES = ["bool", "int8", "uint16", "int64", "uint64", "float16", "float32", "float64", "complex64"]
scalars = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False),
    st.text(max_size=20),
    st.binary(max_size=20),
)
lists = st.one_of(
    *(st.lists(kind, max_size=4) for kind in (st.booleans(), st.integers(0, 9), st.floats(allow_nan=False), st.text()))
)
arrays = st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0)))


def raw(content: RecordDict | Error) -> bytes:
    return b"".join(encode(content).parts)


@given(
    st.dictionaries(st.text(max_size=8), arrays, max_size=3),
    st.dictionaries(st.text(max_size=8), st.one_of(scalars, lists), max_size=5),
    st.dictionaries(st.text(max_size=8), st.one_of(st.integers(-5, 5), st.floats(allow_nan=False)), max_size=3),
)
def test_what_goes_in_comes_out(named, config, metrics):
    content = RecordDict(
        {
            "a": ArrayRecord({name: Array(array) for name, array in named.items()}),
            "c": ConfigRecord(dict(config)),
            "m": MetricRecord(dict(metrics)),
        }
    )
    found = decode(raw(content))
    assert isinstance(found, RecordDict)
    assert dict(found["c"]) == config
    assert [type(value) for value in found["c"].values()] == [type(value) for value in config.values()]
    assert dict(found["m"]) == metrics
    assert list(found["a"]) == list(named)
    for name, array in named.items():
        np.testing.assert_array_equal(found["a"][name].numpy(), array)
        assert found["a"][name].data == content["a"][name].data
        assert found["a"][name].numpy().dtype == array.dtype


@pytest.mark.parametrize("error", [Error(2007, "too much"), Error(1, None), Error(-3, "")])
def test_errors_travel_too(error):
    assert decode(raw(error)) == error


def test_fortran_order_survives():
    array = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    found = decode(raw(RecordDict({"a": ArrayRecord({"w": Array(array)})})))
    np.testing.assert_array_equal(found["a"]["w"].numpy(), array)


def test_every_way_to_read_the_bytes_in_pieces_gives_the_same():
    encoded = encode(RecordDict({"a": ArrayRecord({n: Array(np.arange(50.0)) for n in "xyz"})}))
    whole = b"".join(encoded.parts)
    assert len(whole) == encoded.size
    for step in (1, 7, 400, 5000):
        pieces = [b"".join(encoded.read(offset, step)) for offset in range(0, encoded.size, step)]
        assert b"".join(pieces) == whole


def test_arrays_are_encoded_without_a_copy():
    array = Array(np.zeros(1000))
    assert any(part.obj is array.data for part in encode(RecordDict({"a": ArrayRecord({"w": array})})).parts)


def test_received_arrays_are_aligned_for_computing():
    content = RecordDict({"a": ArrayRecord({f"w{n}": Array(np.zeros(n, dtype=np.float32)) for n in range(1, 9)})})
    buffer = np.empty(encode(content).size, dtype=np.uint8)
    buffer[:] = np.frombuffer(raw(content), dtype=np.uint8)
    found = decode(buffer.data)
    assert all(np.frombuffer(array.views[0], np.float32, offset=128).flags.aligned for array in found["a"].values())


def test_without_arrays_keeps_the_rest():
    content = RecordDict({"a": ArrayRecord({"w": Array(np.zeros(3))}), "m": MetricRecord({"n": 1})})
    assert list(decode(b"".join(encode(content, arrays=False).parts))) == ["m"]
    assert decode(b"".join(encode(Error(1), arrays=False).parts)) == Error(1)


@given(st.data())
def test_damaged_bytes_are_refused_or_decode_to_something_else_never_crash(data):
    content = RecordDict({"a": ArrayRecord({"w": Array(np.zeros(3))}), "m": MetricRecord({"n": [1, 2]})})
    damaged = bytearray(raw(content))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    with suppress(TransportError):
        decode(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))


def with_header(header: pb.Content, body: bytes = b"") -> bytes:
    serialised = header.SerializeToString()
    return b"FCM1" + len(serialised).to_bytes(4, "big") + serialised + bytes(-(8 + len(serialised)) % 64) + body


def one_array(**changed: object) -> bytes:
    array = Array(np.zeros(3, dtype=np.float32))
    data = changed.pop("data", array.data)
    assert isinstance(data, bytes)
    fields = {"name": "w", "dtype": "float32", "shape": [3], "stype": "numpy.ndarray", "length": len(data), **changed}
    record = pb.Record(name="a", arrays=pb.ArrayItems(items=[pb.ArrayItem(**fields)]))  # type: ignore[arg-type]
    return with_header(pb.Content(records=pb.Records(items=[record])), data + bytes(-len(data) % 64))


@pytest.mark.parametrize(
    ("bytes_", "problem"),
    [
        (b"", "not a FedClaw message"),
        (b"XXXX\0\0\0\0", "not a FedClaw message"),
        (b"FCM1\xff\xff\xff\xff", "claims"),
        (b"FCM1\0\0\0\2\xff\xff", "header is malformed"),
        (b"FCM1" + bytes(60), "no content"),
        (b"FCM1" + bytes(59), "padding"),
        (one_array(dtype="object"), "dtype 'object'"),
        (one_array(dtype="float64"), "declared float64"),
        (one_array(shape=[4]), r"declared float32\[4\]"),
        (one_array(shape=[2**60, 2**60]), "declared"),
        (one_array(length=2**40), "claims 1099511627776 bytes"),
        (one_array(length=10), "not a .npy file"),
        (one_array(stype="pickle"), "only 'numpy.ndarray' travels"),
        (one_array(data=b"\x80\x04K\x01."), "not a .npy file"),
        (one_array() + b"more", "4 bytes follow the last array"),
        (one_array()[:-1], "padding"),
        (one_array()[:-1] + b"x", "padding"),
        (with_header(pb.Content(failure=pb.Failure(code=1)), b"x"), "carries array data"),
        (
            with_header(pb.Content(records=pb.Records(items=[pb.Record(name="m")]))),
            "has no kind",
        ),
    ],
)
def test_malformed_messages_are_refused(bytes_, problem):
    with pytest.raises(TransportError, match=problem):
        decode(bytes_)


def test_an_array_of_objects_is_refused_on_both_ends():
    array = Array(dtype="object", shape=(1,), stype="numpy.ndarray", data=b"")
    with pytest.raises(TransportError, match="does not travel"):
        encode(RecordDict({"a": ArrayRecord({"w": array})}))


def test_an_integer_beyond_64_bits_is_refused():
    with pytest.raises(TransportError, match="does not fit 64 bits"):
        encode(RecordDict({"c": ConfigRecord({"n": 2**64})}))
