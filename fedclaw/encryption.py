"""Encrypt the files of a run, a site or a bundle at rest, give them another key, or look at them.

    python -m fedclaw.encryption new-key key=file:run.key
    python -m fedclaw.encryption seal DIRECTORY key=file:run.key
    python -m fedclaw.encryption show DIRECTORY [key=file:run.key]
    python -m fedclaw.encryption rekey DIRECTORY key=file:run.key new_key=env:FEDCLAW_KEY [full=true]
    python -m fedclaw.encryption decrypt-to-disk DIRECTORY key=file:run.key

    DIRECTORY  a run's (runs/NAME), a site's, or a bundle
    key        where the key is: file:PATH (32 bytes as base64, mode 0600), env:NAME (an environment variable), or the
               URI of an AES-256 key in a PKCS#11 token, pkcs11:token=…;object=…; [a,b]: each opens, the first encrypts.
               For a site null is the key that its site.yaml names
    new_key    the key that files are to have
    full       rekey wraps data keys anew and leaves the content as it is: whoever has the old key and an old copy still
               reads the copy, and whoever has taken a data key reads on. full=true encrypts all anew

  new-key          makes a key: a file, or a key in the token that never leaves it
  seal             encrypts what is there in the clear
  show             says how each file is encrypted; with a key, whether all of it opens
  decrypt-to-disk  writes the files in the clear

Each file is the old one or the new one at any moment: what was stopped is gone on with by the same command. See
docs/encryption.md.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("fedclaw.encryption", __doc__)

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedclaw import startup
from fedclaw.cli import compose_settings, expanded, make_console, run_main, split, visible
from fedclaw.errors import EncryptionError, UsageError
from fedclaw.export.staging import SCOPE as BUNDLE_SCOPE
from fedclaw.identity.at_rest import MAGIC, FileStore, Header, is_encrypted, read_header
from fedclaw.identity.data_keys import Keyring, KeySetting, load_keyring, new_key_file
from fedclaw.identity.rekey import Change, Decrypt, Encrypt, Reencrypt, Rewrap, change_file
from fedclaw.protocol.frozen import Frozen


class EncryptionCommand(Frozen):
    """conf/encryption.yaml, checked."""

    directory: Path | None
    key: KeySetting | None
    new_key: KeySetting | None
    full: bool


@dataclass(frozen=True)
class EncryptedDirectory:
    """A directory whose files are encrypted under one scope."""

    root: Path
    scope: str
    files: Callable[[], Sequence[tuple[Path, str]]]
    """Those that there are now, each with its name in the scope."""
    hold: Callable[[], AbstractContextManager[None]] = nullcontext
    """Keeps others from writing there meanwhile."""
    outbox: Path | None = None
    """Where files are of which the trailer alone is encrypted."""
    key: KeySetting | None = None
    """The key that the directory's own settings name."""

    def change(self, change: Callable[[FileStore], Change], keys: Keyring) -> Iterator[tuple[Path, bool]]:
        """Make each file anew; its path, and whether there was anything to do. Raises EncryptionError."""
        made = change(FileStore(keys, self.scope))
        for path, name in self.files():
            yield path, change_file(path, name, made)
        if self.outbox is not None:
            from fedclaw.transport.grpc.outbox import change_trailers

            yield from change_trailers(self.outbox, made)

    def headers(self, store: FileStore | None) -> Iterator[tuple[Path, Header | None, str | None]]:
        """Each file, its header if it is encrypted, and why it does not open with `store`, if one is given."""
        for path, name in self.files():
            encrypted = is_encrypted(path)
            yield path, read_header(path) if encrypted else None, _failure(store, path, name) if store else None
        if self.outbox is not None:
            from fedclaw.transport.grpc.outbox import TRAILER, stored_trailers

            for path, trailer in stored_trailers(self.outbox):
                header = Header.read(io.BytesIO(trailer), str(path)) if trailer.startswith(MAGIC) else None
                yield path, header, _failure(store, path, TRAILER, trailer) if store else None


def main(arguments: Sequence[str]) -> None:
    """Do what the command line says. Raises FedClawError."""
    line = split(arguments)
    settings = compose_settings("encryption", line.overrides, EncryptionCommand)
    words, console = list(line.words), make_console()
    if settings.directory is not None:
        words.insert(1, str(settings.directory))
    if not words or words[0] not in _COMMANDS:
        raise UsageError(f"give one command of {', '.join(_COMMANDS)} (given: {' '.join(words[:1]) or 'none'})")
    if words[0] != "rekey" and (settings.new_key is not None or settings.full):
        raise UsageError("new_key= and full= are for rekey")
    if words[0] == "new-key":
        _require_words(words, 1, "new-key takes no directory")
        _new_key(settings, console)
        return
    _require_words(words, 2, f"{words[0]} needs one directory: a run's, a site's, or a bundle")
    startup.next_step("each file is whole, old or new: give the same command again")
    _COMMANDS[words[0]](places(expanded(Path(words[1]))), settings, console)


def _require_words(words: Sequence[str], count: int, otherwise: str) -> None:
    if len(words) != count:
        raise UsageError(otherwise)


def places(root: Path) -> list[EncryptedDirectory]:
    """The directory at `root`, and those of the runs inside it. Raises UsageError for what is none of ours."""
    if (root / "run.json").is_file():
        return [_run(path.parent) for path in sorted(root.rglob("run.json"))]
    if (root / "site.yaml").is_file():
        return [_site(root)]
    if (root / "SHA256SUMS").is_file():
        return [EncryptedDirectory(root, BUNDLE_SCOPE, lambda: _bundle_files(root))]
    raise UsageError(f"{root} is no run's directory (run.json), no site's (site.yaml), and no bundle (SHA256SUMS)")


def _bundle_files(root: Path) -> list[tuple[Path, str]]:
    found = sorted(path for path in root.iterdir() if path.is_file() and not path.is_symlink())
    return [(path, path.name) for path in found if not path.name.startswith(".")]


def _run(root: Path) -> EncryptedDirectory:
    from fedclaw.server.run_directory import RunDirectory

    directory = RunDirectory.open(root)
    return EncryptedDirectory(root, f"run/{directory.record().run}", directory.parameter_files, directory.held)


def _site(root: Path) -> EncryptedDirectory:
    from fedclaw.site.settings import load_site_settings

    settings = load_site_settings(root)
    with startup.loading("torch"):
        from fedclaw.site.directory import only_client, personal_files
        from fedclaw.site.journal.reconciliation import outbox_directory
    return EncryptedDirectory(
        root,
        f"site/{settings.name}",
        lambda: personal_files(root),
        lambda: only_client(root),
        outbox_directory(root),
        settings.encryption.key,
    )


def _new_key(settings: EncryptionCommand, console: Console) -> None:
    if not isinstance(settings.key, str):
        raise UsageError("new-key needs key=file:PATH, or the URI of the key that is to be made in a token")
    scheme, _, rest = settings.key.partition(":")
    if scheme == "file" and rest:
        made = new_key_file(expanded(Path(rest)))
        advice = "Back it up in another place than what it encrypts: without it nobody opens that."
    elif scheme == "pkcs11":
        from fedclaw.identity.token_keys import TokenUri, WrappingKey

        made = WrappingKey.create(TokenUri.parse(settings.key)).id
        advice = "It is in the token alone: make it part of the token's backup."
    else:
        raise UsageError("new-key makes key=file:PATH, or a key in a token, key=pkcs11:token=…;object=…")
    console.print(f"key       {made.hex()}\n{advice}", markup=False, soft_wrap=True)


def _keys(place: EncryptedDirectory, settings: EncryptionCommand) -> Keyring:
    if settings.key is not None:
        return load_keyring(settings.key)
    if place.key is not None:
        return load_keyring(place.key, place.root)
    raise UsageError("key=… is missing: file:PATH, env:NAME or pkcs11:token=…;object=…")


def _seal(found: Sequence[EncryptedDirectory], settings: EncryptionCommand, console: Console) -> None:
    _change(found, settings, Encrypt, "encrypted", "were before", console)
    for place in found:
        if place.scope.startswith("site/") and place.key is None:
            console.print(
                "next      name the key in site.yaml, or the client will not start: encryption: {key: …}", markup=False
            )


def _rekey(found: Sequence[EncryptedDirectory], settings: EncryptionCommand, console: Console) -> None:
    if settings.new_key is None:
        raise UsageError("rekey needs new_key=…: the key that the files are to have")
    new = load_keyring(settings.new_key)
    kind = Reencrypt if settings.full else Rewrap

    def change(store: FileStore) -> Change:
        assert store.keys is not None
        # What an earlier, stopped command has changed opens with the new key.
        return kind(FileStore(store.keys.joined(new), store.scope), new)

    done = "encrypted anew" if settings.full else "given the new key"
    _change(found, settings, change, f"{done}, {new.id.hex()}", "had it before", console)


def _decrypt(found: Sequence[EncryptedDirectory], settings: EncryptionCommand, console: Console) -> None:
    _change(found, settings, Decrypt, "written in the clear", "were before", console)


def _change(
    found: Sequence[EncryptedDirectory],
    settings: EncryptionCommand,
    change: Callable[[FileStore], Change],
    done: str,
    before: str,
    console: Console,
) -> None:
    """Change every file of all places, and say how many there were."""
    changed = same = 0
    for place in found:
        keys = _keys(place, settings)
        with place.hold():
            for _, made in place.change(change, keys):
                changed, same = changed + made, same + (not made)
    console.print(f"{changed} files {done}; {same} {before}", markup=False)


def _show(found: Sequence[EncryptedDirectory], settings: EncryptionCommand, console: Console) -> None:
    """List the files; with a key, open each to its end. Raises EncryptionError if one does not open."""
    table, failures = Table("file", "encrypted as", "key"), []
    for place in found:
        named = settings.key is not None or place.key is not None
        store = FileStore(_keys(place, settings), place.scope) if named else None
        for path, header, failure in place.headers(store):
            words = ("in the clear", "") if header is None else (escape(visible(header.label)), header.key_id.hex())
            table.add_row(escape(visible(str(path.relative_to(place.root)))), *words)
            failures += [] if failure is None else [failure]
    console.print(table)
    if failures:
        raise EncryptionError(failures[0] + (f"; and {len(failures) - 1} more files" if failures[1:] else ""))


def _failure(store: FileStore, path: Path, name: str, content: bytes | None = None) -> str | None:
    """Why a file, or the part of one that `content` is, does not open to its end."""
    try:
        with store.open(path, name) if content is None else store.opened(io.BytesIO(content), name, str(path)) as file:
            while file.read(1 << 20):
                continue
    except EncryptionError as error:
        return str(error)
    return None


_COMMANDS: dict[str, Callable[[Sequence[EncryptedDirectory], EncryptionCommand, Console], None]] = {
    "new-key": lambda *_: None,
    "seal": _seal,
    "show": _show,
    "rekey": _rekey,
    "decrypt-to-disk": _decrypt,
}

if __name__ == "__main__":
    run_main("fedclaw.encryption", __doc__ or "", main)
