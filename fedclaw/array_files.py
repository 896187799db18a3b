"""Named arrays as the bytes of a file, and back: .npz, read without pickle."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import CheckpointError


def write_npz(file: IO[bytes] | io.RawIOBase, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write `arrays` to `file` as an uncompressed .npz archive, a part of one array after the other."""
    np.savez(file, allow_pickle=False, **arrays)


def arrays_to_npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """`arrays` as the bytes of an uncompressed .npz file."""
    buffer = io.BytesIO()
    write_npz(buffer, arrays)
    return buffer.getvalue()


def npz_to_arrays(content: bytes, origin: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file. Raises CheckpointError naming `origin` when it is not one."""
    return read_npz(io.BytesIO(content), origin)


def read_npz(file: IO[bytes] | io.RawIOBase, origin: Path) -> dict[str, NDArray[Any]]:
    """The arrays of the .npz archive in `file`. Raises CheckpointError naming `origin` when it is none."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # zipfile, zlib and numpy each have their own
        raise CheckpointError(f"{origin} is damaged: {' '.join(str(error).split())}") from error
