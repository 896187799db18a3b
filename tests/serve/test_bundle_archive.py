"""A bundle on its way: what is sent comes out as it was, and nothing else comes out."""

import io
import tarfile
from pathlib import Path

import pytest

from fedclaw.serve.bundle_archive import MOST_FILES, pack, unpack
from fedclaw.serve.refusals import ServeRefusal

MOST = 1 << 22


def sent(bundle: Path) -> bytes:
    return b"".join(pack(bundle))


def archive(*entries: tuple[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as opened:
        for name, content in entries:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "model.onnx"
            entry.size = len(content) if kind == tarfile.REGTYPE else 0
            opened.addfile(entry, io.BytesIO(content))
    return made.getvalue()


def test_files_come_out_as_they_were_whatever_their_size(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    files = {"empty.json": b"", "block.bin": bytes(512), "odd.bin": b"x" * 513, "large.bin": bytes(range(256)) * 8193}
    for name, content in files.items():
        (source / name).write_bytes(content)
    (source / ".hidden").write_bytes(b"no")
    (source / "link.json").symlink_to(source / "odd.bin")
    unpack(io.BytesIO(sent(source)), target, MOST)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == files
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in target.iterdir())


def test_no_piece_is_a_whole_large_file(tmp_path):
    (tmp_path / "model.onnx").write_bytes(bytes(5 << 20))
    assert max(map(len, pack(tmp_path))) <= 1 << 20


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (archive(("../out", b"x")), "bad_request"),
        (archive(("/etc/out", b"x")), "bad_request"),
        (archive(("inner/out", b"x")), "bad_request"),
        (archive(("a.json", b"x"), ("A.JSON", b"y")), "bad_request"),
        (archive(("a.json", b""), kind=tarfile.SYMTYPE), "bad_request"),
        (archive(("a.json", b""), kind=tarfile.LNKTYPE), "bad_request"),
        (archive(("a.json", b""), kind=tarfile.FIFOTYPE), "bad_request"),
        (archive(("a.json", b""), kind=tarfile.DIRTYPE), "bad_request"),
        (archive(("a.json", b"x" * 5000))[:2048], "bad_request"),
        (b"no archive at all" * 100, "bad_request"),
        (archive(("a.json", bytes(MOST + 1))), "too_large"),
        (archive(*((f"f{number}", b"") for number in range(MOST_FILES + 1))), "too_large"),
    ],
)
def test_what_no_bundle_holds_is_refused(tmp_path, content, code):
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(ServeRefusal) as refused:
        unpack(io.BytesIO(content), target, MOST)
    assert refused.value.code == code
    assert {path.name for path in tmp_path.iterdir()} == {"target"}
