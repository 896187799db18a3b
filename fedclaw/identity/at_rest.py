"""Files that are encrypted at rest, and the `FileStore` that a directory's files are read and written through.

An encrypted file is

    core   = "FEDCLAW-SEALED-1\\n" || chunk size (4) || salt (32) || check (32) || label's length (2) || label
    key    = key id (16) || length (2) || wrapped data key
    chunks = AES-256-GCM(file key, nonce = zeros(7) || index (4) || last (1), aad = SHA-256(core)), tag last, one after
             the other

    file key || check = HKDF-SHA256(data key, salt, "fedclaw at rest v1" || chunk size (4) || label), 32 and 32 bytes

Numbers are big-endian. Every chunk but the last holds `chunk size` bytes, and the last at least one, unless the file
is empty. The chunks are those of `fedclaw.identity.stream`. The salt is fresh for each file that is written, so no key
meets a nonce twice. `check` commits to the data key, which is wrapped as `fedclaw.identity.data_keys` says. The label
says what the file is (run/NAME/model.npz): a file in the place of another does not open. The key part can be replaced
without the chunks (`fedclaw.identity.rekey`).

What it promises: without the key nobody reads a file, or changes, cuts off, or exchanges one unnoticed. What it does
not: an older version of the same file under the same name opens, and a file that is gone is gone.
"""

import hashlib
import hmac
import io
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedclaw.errors import EncryptionError
from fedclaw.files import PUBLIC_MODE, replacing
from fedclaw.identity.data_keys import KEY, KEY_ID, DataKey, Keyring
from fedclaw.identity.stream import MAX_SEGMENTS, TAG, nonce, segments_of

MAGIC = b"FEDCLAW-SEALED-1\n"
CHUNK = 1 << 16
"""Plaintext bytes of a chunk. A reader takes what its file says, up to `_LARGEST_CHUNK`."""
_LARGEST_CHUNK = 1 << 20
_SIZE, _SALT, _CHECK, _LENGTH = 4, 32, 32, 2
_LONGEST_LABEL = 1024
_LONGEST_WRAPPED = 4096
_INFO = b"fedclaw at rest v1"
_SEE = "see docs/encryption.md"


@dataclass(frozen=True)
class Header:
    """What stands in front of the chunks of an encrypted file."""

    chunk: int
    salt: bytes
    check: bytes
    label: str
    key_id: bytes
    wrapped: bytes

    @property
    def core(self) -> bytes:
        """The part that the chunks are bound to."""
        label = self.label.encode()
        size, length = self.chunk.to_bytes(_SIZE, "big"), len(label).to_bytes(_LENGTH, "big")
        return MAGIC + size + self.salt + self.check + length + label

    def to_bytes(self) -> bytes:
        """The header as it stands in the file."""
        return self.core + self.key_part(DataKey(b"", self.key_id, self.wrapped))

    @staticmethod
    def key_part(key: DataKey) -> bytes:
        """What follows the core in a file whose data key is `key`."""
        return key.key_id + len(key.wrapped).to_bytes(_LENGTH, "big") + key.wrapped

    @classmethod
    def read(cls, file: IO[bytes], origin: str) -> "Header":
        """Read a header; `file` stands at the first chunk then. Raises EncryptionError for none, or a damaged one."""
        if file.read(len(MAGIC)) != MAGIC:
            raise EncryptionError(f"{origin} is not encrypted")
        chunk = int.from_bytes(_exactly(file, _SIZE, origin), "big")
        salt, check = _exactly(file, _SALT, origin), _exactly(file, _CHECK, origin)
        label = _prefixed(file, _LONGEST_LABEL, origin)
        key_id, wrapped = _exactly(file, KEY_ID, origin), _prefixed(file, _LONGEST_WRAPPED, origin)
        if not 0 < chunk <= _LARGEST_CHUNK:
            raise _damaged(origin, "its header says a chunk size that cannot be")
        try:
            return cls(chunk, salt, check, label.decode(), key_id, wrapped)
        except UnicodeDecodeError:
            raise _damaged(origin, "its label is not text") from None

    @classmethod
    def new(cls, label: str, key: DataKey, chunk: int = CHUNK) -> tuple["Header", AESGCM]:
        """A header for a file that is to be written, and the cipher of its chunks."""
        if len(label.encode()) > _LONGEST_LABEL:
            raise EncryptionError(f"{label[:60]}…: a file's name is too long to be encrypted")
        salt = secrets.token_bytes(_SALT)
        file_key, check = _file_key(key.secret, salt, chunk, label)
        return cls(chunk, salt, check, label, key.key_id, key.wrapped), AESGCM(file_key)

    def cipher(self, data_key: bytes, origin: str) -> AESGCM:
        """The cipher of the chunks. Raises EncryptionError unless the core was written with `data_key`."""
        file_key, check = _file_key(data_key, self.salt, self.chunk, self.label)
        if not hmac.compare_digest(check, self.check):
            raise _damaged(origin, "its header was changed, or is another file's")
        return AESGCM(file_key)


def _file_key(data_key: bytes, salt: bytes, chunk: int, label: str) -> tuple[bytes, bytes]:
    info = _INFO + chunk.to_bytes(_SIZE, "big") + label.encode()
    both = HKDF(SHA256(), KEY + _CHECK, salt, info).derive(data_key)
    return both[:KEY], both[KEY:]


def _exactly(file: IO[bytes], size: int, origin: str) -> bytes:
    content = file.read(size)
    if len(content) != size:
        raise _damaged(origin, "it is cut off in its header")
    return content


def _prefixed(file: IO[bytes], longest: int, origin: str) -> bytes:
    size = int.from_bytes(_exactly(file, _LENGTH, origin), "big")
    if size > longest:
        raise _damaged(origin, "a length in its header cannot be")
    return _exactly(file, size, origin)


def _damaged(origin: str, how: str) -> EncryptionError:
    return EncryptionError(f"{origin} does not open: {how}; restore it from a backup")


class _Encrypting(io.RawIOBase):
    """A file to write from its beginning to its end: what is written is encrypted into `file`, a chunk at a time."""

    def __init__(self, file: IO[bytes], label: str, key: DataKey) -> None:
        header, self._cipher = Header.new(label, key)
        self._file, self._chunk = file, header.chunk
        self._aad = hashlib.sha256(header.core).digest()
        self._waiting = bytearray()
        self._index = 0
        file.write(header.to_bytes())

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._index * self._chunk + len(self._waiting)

    def write(self, data: Any) -> int:
        given = memoryview(data).cast("B")
        rest = given
        while rest:
            # The newest chunk waits until more comes: whether it is the last shows then.
            if len(self._waiting) == self._chunk:
                self._encrypt(last=False)
            taken = rest[: self._chunk - len(self._waiting)]
            self._waiting += taken
            rest = rest[len(taken) :]
        return len(given)

    def finish(self) -> None:
        """Write the last chunk."""
        self._encrypt(last=True)

    def _encrypt(self, *, last: bool) -> None:
        if self._index >= MAX_SEGMENTS:
            raise EncryptionError("a file is too large to be encrypted in one")
        self._file.write(self._cipher.encrypt(nonce(self._index, last), self._waiting, self._aad))
        self._waiting.clear()
        self._index += 1


class _Decrypting(io.RawIOBase):
    """The content of an encrypted file, at any place of it; a chunk in memory at a time.

    The last chunk opens first: it shows that nothing is cut off. Nothing is handed out of a chunk that did not open.
    """

    def __init__(self, file: IO[bytes], header: Header, cipher: AESGCM, origin: str) -> None:
        """`file` stands at its first chunk, and is closed with this one. Raises EncryptionError naming `origin`."""
        self._file, self._cipher, self._origin = file, cipher, origin
        self._chunk, self._start = header.chunk, file.tell()
        self._aad = hashlib.sha256(header.core).digest()
        body = file.seek(0, io.SEEK_END) - self._start
        self._count = -(-body // (self._chunk + TAG))
        self._size = body - self._count * TAG
        # A last chunk that is no whole tag, or holds nothing beside others, is no chunk of ours.
        if self._size < 0 or self._count != segments_of(self._size, self._chunk):
            raise self._cut_off()
        self._at = 0
        self._index, self._plain = self._count - 1, self._decrypted(self._count - 1)

    def _cut_off(self) -> EncryptionError:
        return _damaged(self._origin, "it is cut off, or its end was changed")

    def _decrypted(self, index: int) -> bytes:
        last = index + 1 == self._count
        self._file.seek(self._start + index * (self._chunk + TAG))
        try:
            return self._cipher.decrypt(nonce(index, last), self._file.read(self._chunk + TAG), self._aad)
        except InvalidTag:
            if last:
                raise self._cut_off() from None
            where = f"chunk {index + 1} of {self._count} was changed, or is not in its place"
            raise _damaged(self._origin, where) from None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"negative seek position {start + offset}")
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        if self._at >= self._size:
            return 0
        index, offset = divmod(self._at, self._chunk)
        if index != self._index:
            self._index, self._plain = index, self._decrypted(index)
        part = self._plain[offset : offset + len(target)]
        target[: len(part)] = part
        self._at += len(part)
        return len(part)

    def close(self) -> None:
        self._file.close()
        super().close()


class FileStore:
    """How files of one directory are read and written: as they are, or with `keys` encrypted, all of them.

    `scope` says which directory it is (run/NAME): a file's label is scope/name, its name that of its path unless
    another is given. None: the scope is not looked at. A store with keys refuses a file that is not encrypted: whoever
    can write to the disk could have put it there.
    """

    def __init__(self, keys: Keyring | None = None, scope: str | None = None) -> None:
        self.keys = keys
        self.scope = scope

    def scoped(self, scope: str) -> "FileStore":
        """The same for the directory that `scope` says."""
        return FileStore(self.keys, scope)

    def write(self, path: Path, content: bytes, mode: int = PUBLIC_MODE, name: str | None = None) -> None:
        """Write a file, whole or not at all, durable on return."""
        with self.replacing(path, mode, name) as file:
            file.write(content)

    @contextmanager
    def replacing(self, path: Path, mode: int = PUBLIC_MODE, name: str | None = None) -> Iterator[BinaryIO]:
        """A file to write from its beginning to its end; it takes the place of `path` as the block ends."""
        with replacing(path, mode) as file, self.writing(file, name or path.name) as inner:
            yield inner

    @contextmanager
    def writing(self, file: BinaryIO, name: str) -> Iterator[BinaryIO]:
        """The same into a file that is open; it is complete as the block ends."""
        if self.keys is None:
            yield file
            return
        sealed = _Encrypting(file, self._label(name), self.keys.data_key())
        yield cast(BinaryIO, sealed)
        sealed.finish()

    def read(self, path: Path, name: str | None = None) -> bytes:
        """A file's content. Raises EncryptionError naming the file, or OSError."""
        with self.open(path, name) as file:
            return file.read()

    def open(self, path: Path, name: str | None = None) -> BinaryIO:
        """A file to read from, at any place. Raises EncryptionError naming it, or OSError."""
        return self.opened(path.open("rb"), name or path.name, str(path))

    def opened(self, file: BinaryIO, name: str, origin: str) -> BinaryIO:
        """The content of a file that is open, and is closed with it. Raises EncryptionError naming `origin`."""
        try:
            return self.reading(file, name, origin)
        except BaseException:
            file.close()
            raise

    def reading(self, file: BinaryIO, name: str, origin: str) -> BinaryIO:
        """The same; where it raises, the file stays open."""
        self._check_form(begins_with_magic(file), origin)
        if self.keys is None:
            return file
        header = self.header_of(file, name, origin)
        cipher = header.cipher(self.data_key_of(header, origin), origin)
        plain = _Decrypting(file, header, cipher, origin)
        return cast(BinaryIO, io.BufferedReader(plain, header.chunk))

    def header_of(self, file: BinaryIO, name: str, origin: str) -> Header:
        """The header of an encrypted file that is open; it stands at the first chunk then.

        Raises EncryptionError, for a file that was encrypted as another one too.
        """
        header = Header.read(file, origin)
        self._check_label(header.label, name, origin)
        return header

    def data_key_of(self, header: Header, origin: str) -> bytes:
        """The data key that a header was written with. Raises EncryptionError unless it is this store's, and whole."""
        if self.keys is None:
            raise EncryptionError(f"{origin} is encrypted, and no key was given ({_SEE})")
        data_key = self.keys.unwrap(header.key_id, header.wrapped, origin)
        header.cipher(data_key, origin)
        return data_key

    def pack(self, content: bytes, name: str) -> bytes:
        """`content` as a file would hold it, for what is a part of a file."""
        packed = io.BytesIO()
        with self.writing(packed, name) as file:
            file.write(content)
        return packed.getvalue()

    def unpack(self, packed: bytes, name: str, origin: str) -> bytes:
        """Back from `pack`. Raises EncryptionError naming `origin`."""
        with self.opened(io.BytesIO(packed), name, origin) as file:
            return file.read()

    def check(self, paths: Sequence[Path]) -> None:
        """Raise EncryptionError for the first file whose form or key is not this store's. Reads headers alone."""
        for path in paths:
            with path.open("rb") as file:
                self._check_form(begins_with_magic(file), str(path))
                if self.keys is not None:
                    header = Header.read(file, str(path))
                    self.keys.unwrap(header.key_id, header.wrapped, str(path))

    def _label(self, name: str) -> str:
        if self.scope is None:
            raise ValueError("a store without a scope only reads")
        return f"{self.scope}/{name}"

    def _check_form(self, encrypted: bool, origin: str) -> None:
        if encrypted and self.keys is None:
            raise EncryptionError(f"{origin} is encrypted, and no key was given ({_SEE})")
        if not encrypted and self.keys is not None:
            raise EncryptionError(
                f"{origin} is not encrypted, and a key was given: it is from before, or somebody has put it there. If "
                "it is yours, encrypt it with: python -m fedclaw.encryption seal DIRECTORY key=…"
            )

    def _check_label(self, label: str, name: str, origin: str) -> None:
        right = label.endswith(f"/{name}") if self.scope is None else label == self._label(name)
        if not right:
            raise EncryptionError(f"{origin} was encrypted as {label!r}: a file was put in the place of another")


PLAIN = FileStore()
"""Files as they are."""


def begins_with_magic(file: BinaryIO) -> bool:
    """Whether an open file begins as an encrypted one; it stands at its beginning then."""
    file.seek(0)
    found = file.read(len(MAGIC)) == MAGIC
    file.seek(0)
    return found


def is_encrypted(path: Path) -> bool:
    """Whether a file begins as an encrypted one."""
    with path.open("rb") as file:
        return begins_with_magic(file)


def read_header(path: Path) -> Header:
    """The header of an encrypted file, which needs no key. Raises EncryptionError, OSError."""
    with path.open("rb") as file:
        return Header.read(file, str(path))
