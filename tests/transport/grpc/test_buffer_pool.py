"""A reply's memory is used again once nobody looks into it, and never before."""

import gc
import threading

import numpy as np
import pytest

from fedclaw.transport.grpc.reply_buffers import BufferPool

MIB = 1 << 20


def address(view: memoryview) -> int:
    return np.frombuffer(view, dtype=np.uint8).ctypes.data


def test_a_buffer_that_nobody_looks_into_is_used_again():
    pool = BufferPool(8 * MIB)
    first = pool.take(4 * MIB)
    first[:] = b"x" * (4 * MIB)
    was = address(first)
    del first
    again = pool.take(3 * MIB)
    assert (address(again), len(again)) == (was, 3 * MIB)
    assert bytes(again[:4]) == b"xxxx", "no fresh memory at the same address"


@pytest.mark.parametrize(
    "look",
    [
        lambda view: view[8:16],
        lambda view: view.toreadonly()[5:],
        lambda view: np.frombuffer(view, dtype=np.float32, offset=16),
        lambda view: np.frombuffer(view.toreadonly()[64:128], dtype=np.float32).reshape(4, 4)[1:, ::2],
    ],
    ids=["slice", "read-only slice", "array", "array of a slice of a slice"],
)
def test_a_buffer_is_not_used_again_while_any_view_of_it_lives(look):
    pool = BufferPool(8 * MIB)
    view = pool.take(4 * MIB)
    view[:] = b"\x01" * (4 * MIB)
    was, part = address(view), look(view)
    kept = bytes(part)
    del view
    gc.collect()
    other = pool.take(4 * MIB)
    other[:] = b"\x02" * (4 * MIB)
    assert address(other) != was
    assert bytes(part) == kept
    del part
    again = pool.take(4 * MIB)
    assert address(again) == was
    assert bytes(again[:4]) == b"\x01" * 4, "no fresh memory at the same address"


@pytest.mark.parametrize("size", [100, 9 * MIB])
def test_small_and_huge_ones_are_not_kept(size):
    pool = BufferPool(8 * MIB)
    pool.take(size)
    assert not pool._idle


@pytest.mark.parametrize("size", [MIB, 5 * MIB], ids=["too small to waste it", "too large"])
def test_one_that_does_not_fit_is_let_go(size):
    pool = BufferPool(8 * MIB)
    pool.take(4 * MIB)
    assert len(pool._idle) == 1
    assert len(pool.take(size)) == size
    assert [block.size for block in pool._idle] == [size]


def test_one_is_kept_however_many_come_back_and_from_whatever_thread():
    pool = BufferPool(8 * MIB)
    held = [pool.take(2 * MIB) for _ in range(4)]
    threads = [threading.Thread(target=held.pop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pool._idle) == 1
