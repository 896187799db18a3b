"""Encrypting files that are there already, giving them other keys, and decrypting them.

A `Change` makes one file, or a part of one, anew; `change_file` puts the result in the file's place by a rename. So at
any moment a file is the old one or the new one, and what was stopped half way is taken up by doing it again. Nothing
but `Decrypt` writes what is encrypted to disk in the clear.
"""

import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from fedclaw.files import remove_leftovers, replacing
from fedclaw.identity.at_rest import FileStore, Header, begins_with_magic
from fedclaw.identity.data_keys import Keyring

_BLOCK = 1 << 20


class Change(Protocol):
    """What is done to a file. `name` is the file's in its store's scope, `origin` what errors call it."""

    def needed(self, source: BinaryIO, name: str, origin: str) -> bool:
        """Whether the file is not yet what it is to become. Raises EncryptionError if it only seems to be."""

    def make(self, source: BinaryIO, target: BinaryIO, name: str, origin: str) -> None:
        """Write the new file. Raises EncryptionError."""


@dataclass(frozen=True)
class Encrypt:
    """Encrypt what is plain; what is encrypted stays as it is, and has to open with the same keys."""

    store: FileStore

    def needed(self, source: BinaryIO, name: str, origin: str) -> bool:
        """Whether it is plain. Raises EncryptionError for a file that is encrypted under another key."""
        return not begins_with_magic(source) or not _opens(self.store, source, name, origin)

    def make(self, source: BinaryIO, target: BinaryIO, name: str, origin: str) -> None:
        """Encrypt it, a chunk at a time."""
        with self.store.writing(target, name) as encrypted:
            shutil.copyfileobj(source, encrypted, _BLOCK)


@dataclass(frozen=True)
class Rewrap:
    """Wrap the data key anew, by the first key of `new`; the chunks stay as they are."""

    store: FileStore
    """With the keys that open the file now."""
    new: Keyring

    def needed(self, source: BinaryIO, name: str, origin: str) -> bool:
        """Whether it is not yet under the new key. Raises EncryptionError for a file that says so and does not open."""
        if not begins_with_magic(source) or _key_id(source) != self.new.id:
            return True
        return not _opens(FileStore(self.new, self.store.scope), source, name, origin)

    def make(self, source: BinaryIO, target: BinaryIO, name: str, origin: str) -> None:
        """Copy it under a new key part. Raises EncryptionError before anything is written if it does not open."""
        header = self.store.header_of(source, name, origin)
        key = self.new.rewrapped(self.store.data_key_of(header, origin))
        target.write(header.core + Header.key_part(key))
        source.seek(len(header.to_bytes()))
        shutil.copyfileobj(source, target, _BLOCK)


@dataclass(frozen=True)
class Reencrypt:
    """Encrypt the content anew, under a new data key and the first key of `new`."""

    store: FileStore
    new: Keyring

    def needed(self, source: BinaryIO, name: str, origin: str) -> bool:
        """Always: that a file is under the new key does not show when its data key was made."""
        return True

    def make(self, source: BinaryIO, target: BinaryIO, name: str, origin: str) -> None:
        """Decrypt and encrypt it, a chunk at a time."""
        known = FileStore(self.store.keys, self.store.scope)
        with (
            known.reading(source, name, origin) as content,
            FileStore(self.new, self.store.scope).writing(target, name) as encrypted,
        ):
            shutil.copyfileobj(content, encrypted, _BLOCK)


@dataclass(frozen=True)
class Decrypt:
    """Write it in the clear."""

    store: FileStore

    def needed(self, source: BinaryIO, name: str, origin: str) -> bool:
        """Whether it is encrypted."""
        return begins_with_magic(source)

    def make(self, source: BinaryIO, target: BinaryIO, name: str, origin: str) -> None:
        """Decrypt it, a chunk at a time."""
        with self.store.reading(source, name, origin) as content:
            shutil.copyfileobj(content, target, _BLOCK)


def change_file(path: Path, name: str, change: Change) -> bool:
    """Make the file at `path` anew, with its mode and its times; whether there was anything to do.

    What a change that was killed left beside it goes: a bundle with one more file is none, and of `Decrypt` it is in
    the clear. Raises EncryptionError or OSError; the file is then as it was.
    """
    remove_leftovers(path)
    with path.open("rb") as source:
        status = os.fstat(source.fileno())
        if not change.needed(source, name, str(path)):
            return False
        with replacing(path, stat.S_IMODE(status.st_mode)) as target:
            change.make(source, target, name, str(path))
            target.flush()
            os.utime(target.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))
    return True


def _opens(store: FileStore, source: BinaryIO, name: str, origin: str) -> bool:
    """True. Raises EncryptionError unless the header is of `name`, and whole, and `store` has its key."""
    store.data_key_of(store.header_of(source, name, origin), origin)
    source.seek(0)
    return True


def _key_id(source: BinaryIO) -> bytes:
    found = Header.read(source, "").key_id
    source.seek(0)
    return found
