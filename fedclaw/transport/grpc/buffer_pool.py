"""Keeps the memory of a reply that has been read for the next one, whose pages the kernel then need not clear again."""

import weakref
from collections import deque

import numpy as np
from numpy.typing import NDArray

from fedclaw.identity.seal import fresh_buffer

_SMALLEST = 1 << 20
"""Bytes: below, the allocator keeps the memory by itself."""


class BufferPool:
    """Hands out buffers, and keeps one that nobody looks into any more. Safe to use from several threads."""

    def __init__(self, largest: int) -> None:
        """No buffer of more than `largest` bytes is kept."""
        self._largest = largest
        # Appended to and popped from in one step each: buffers come back from whatever thread drops the last view.
        self._idle: deque[NDArray[np.uint8]] = deque(maxlen=1)

    def take(self, size: int) -> memoryview:
        """A buffer of `size` bytes, whose content is anything. It comes back by itself with the last view of it."""
        if not _SMALLEST <= size <= self._largest:
            return fresh_buffer(size)
        block = self._block(size)
        lease = block[:size]
        weakref.finalize(lease, self._idle.append, block).atexit = False
        return lease.data

    def _block(self, size: int) -> NDArray[np.uint8]:
        try:
            block = self._idle.pop()
        except IndexError:
            block = None
        return block if block is not None and size <= block.size <= 2 * size else np.empty(size, dtype=np.uint8)
