"""Several buffers read as one sequence of bytes, without joining them."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

Buffer = bytes | bytearray | memoryview


class JoinedBuffers:
    """The concatenation of `parts`, which must not change meanwhile. Safe to read from several threads."""

    def __init__(self, parts: Sequence[Buffer]) -> None:
        self.parts = [view for part in parts if len(view := memoryview(part).cast("B"))]
        """The buffers that hold anything, as bytes."""
        self._ends = list(accumulate(map(len, self.parts)))

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return self._ends[-1] if self._ends else 0

    def read(self, offset: int, length: int) -> list[memoryview]:
        """Up to `length` bytes from `offset`, as views of the parts."""
        found: list[memoryview] = []
        for index in range(bisect_right(self._ends, offset), len(self.parts)):
            if length <= 0:
                break
            part = self.parts[index]
            start = max(0, offset - self._ends[index] + len(part))
            found.append(part[start : start + length])
            length -= len(found[-1])
        return found
