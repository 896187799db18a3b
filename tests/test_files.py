"""Files on a full disk: all of what was to be written is there, or none of it and an error."""

import os
from pathlib import Path

import pytest

from fedclaw.files import append_all, write_all, write_atomic
from tests.disks import full_after


def append(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    try:
        append_all(descriptor, data)
    finally:
        os.close(descriptor)


def test_the_disk_of_these_tests_takes_a_part(tmp_path: Path) -> None:
    with full_after(16), (tmp_path / "file").open("wb", buffering=0) as file:
        assert os.write(file.fileno(), bytes(40)) == 16


@pytest.mark.parametrize("room", [0, 1, 16, 39])
def test_a_line_is_added_whole_or_not_at_all(tmp_path: Path, room: int) -> None:
    path = tmp_path / "file"
    append(path, b"first\n")
    with full_after(6 + room), pytest.raises(OSError, match="File too large"):
        append(path, bytes(40))
    assert path.read_bytes() == b"first\n"
    append(path, b"second\n")
    assert path.read_bytes() == b"first\nsecond\n"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with full_after(1000), pytest.raises(OSError, match="File too large"):
        write_atomic(path, bytes(5000))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_takes_nothing_is_an_error() -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="No space left"):
            write_all(descriptor, b"line")
    finally:
        os.close(descriptor)
