"""Arrays on the wire: exact, viewed instead of copied, and refused when they are not what they say."""

import io

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedclaw.errors import UpdateError
from fedclaw.protocol.arrays import pack, unpack

shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


@given(st.dictionaries(st.text(min_size=1, max_size=8), hnp.arrays(np.float32, shapes), max_size=4))
def test_round_trip_is_exact(arrays):
    back = unpack(pack(arrays))
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        assert back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes()


def test_transposed_array_keeps_its_values():
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert np.array_equal(unpack(pack({"w": array}))["w"], array)


def test_flower_reads_what_we_pack():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.array_equal(pack({"w": array})["w"].numpy(), array)


def test_we_read_what_flower_packs_without_a_copy():
    packed = Array(np.arange(6, dtype=np.float32))
    view = unpack(ArrayRecord({"w": packed}))["w"]
    assert np.array_equal(view, np.arange(6))
    assert np.shares_memory(view, np.frombuffer(packed.data, dtype=np.uint8))
    assert not view.flags.writeable


def saved(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        saved(np.zeros(3, dtype=np.float64)),
        saved(np.array([{}], dtype=object), allow_pickle=True),
        saved(np.zeros(3, dtype=np.float32))[:-1],
        saved(np.zeros(3, dtype=np.float32)) + b"\0\0\0\0",
        saved(np.asfortranarray(np.zeros((2, 3), dtype=np.float32))),
        b"",
        b"not an array",
    ],
    ids=["float64", "pickled", "cut", "too long", "fortran", "empty", "text"],
)
def test_anything_else_is_refused(data):
    record = ArrayRecord({"w": Array(dtype="float32", shape=(3,), stype="numpy.ndarray", data=data)})
    with pytest.raises(UpdateError, match="'w'"):
        unpack(record)


def test_another_serialisation_is_refused():
    record = ArrayRecord({"w": Array(dtype="float32", shape=(3,), stype="pickle", data=b"")})
    with pytest.raises(UpdateError, match="pickle"):
        unpack(record)
