"""The store holds verified copies by digest, serves no byte that was not verified, and survives a crash."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedclaw import encryption
from fedclaw.errors import BundleError, EncryptionError, UsageError
from fedclaw.export import layout
from fedclaw.export.check import Trust, verify_bundle
from fedclaw.identity.at_rest import is_encrypted
from fedclaw.identity.data_keys import load_keyring, new_key_file
from fedclaw.identity.federation_home import FederationHome
from fedclaw.serve.models import bundle_store
from fedclaw.serve.models.bundle_store import BundleStore


@pytest.fixture
def trust(home: FederationHome) -> Trust:
    return Trust((home.root / "ca.crt").read_bytes())


@pytest.fixture
def store(tmp_path: Path) -> BundleStore:
    return BundleStore(tmp_path / "store")


@pytest.fixture
def bundle(table_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(table_bundle, tmp_path / "bundle"))


def left_in(root: Path) -> set[str]:
    """Everything in the store but its lock."""
    return {path.name for path in root.iterdir()} - {".lock"}


def test_a_bundle_lies_under_the_digest_of_its_digests_readable_by_the_service_alone(
    store: BundleStore, bundle: Path, trust: Trust, tmp_path: Path
) -> None:
    before = os.umask(0)
    try:
        digest = store.put(bundle, trust)
    finally:
        os.umask(before)
    assert digest == hashlib.sha256((bundle / layout.DIGESTS).read_bytes()).hexdigest()
    assert store.digests() == (digest,)
    kept = tmp_path / "store" / digest
    assert kept.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in kept.iterdir()} == {0o600}
    shutil.rmtree(bundle)
    opened = store.open(digest, trust, keep=(layout.PIPELINE,))
    assert opened.contents[layout.PIPELINE] == (kept / layout.PIPELINE).read_bytes()
    assert opened.manifest.run == "table"


def test_putting_it_again_changes_nothing(store: BundleStore, bundle: Path, trust: Trust, tmp_path: Path) -> None:
    digest = store.put(bundle, trust)
    inode = (tmp_path / "store" / digest).stat().st_ino
    assert store.put(bundle, trust) == digest
    assert (tmp_path / "store" / digest).stat().st_ino == inode
    assert left_in(tmp_path / "store") == {digest}


@pytest.mark.parametrize("name", [layout.PIPELINE, layout.ONNX, layout.SCHEMA, layout.MANIFEST, layout.DIGESTS])
def test_a_file_changed_after_verification_is_not_served_and_a_fresh_copy_takes_its_place(
    name: str, store: BundleStore, bundle: Path, trust: Trust, tmp_path: Path
) -> None:
    digest = store.put(bundle, trust)
    path = tmp_path / "store" / digest / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(BundleError):
        store.open(digest, trust, keep=(name,))
    assert store.put(bundle, trust) == digest
    assert store.open(digest, trust, keep=(name,)).contents[name] == whole
    assert left_in(tmp_path / "store") == {digest}


def test_bytes_that_were_opened_do_not_change_with_the_file(
    store: BundleStore, bundle: Path, trust: Trust, tmp_path: Path
) -> None:
    digest = store.put(bundle, trust)
    opened = store.open(digest, trust, keep=(layout.PIPELINE,))
    whole = (bundle / layout.PIPELINE).read_bytes()
    (tmp_path / "store" / digest / layout.PIPELINE).write_bytes(bytes(len(whole)))
    assert opened.contents[layout.PIPELINE] == whole


def test_another_good_bundle_in_its_place_is_noticed(
    store: BundleStore, bundle: Path, image_bundle: Path, trust: Trust, tmp_path: Path
) -> None:
    digest, other = store.put(bundle, trust), store.put(image_bundle, trust)
    shutil.rmtree(tmp_path / "store" / digest)
    (tmp_path / "store" / other).rename(tmp_path / "store" / digest)
    verify_bundle(tmp_path / "store" / digest, trust)
    with pytest.raises(BundleError, match="it was exchanged"):
        store.open(digest, trust)


def test_what_changes_while_it_is_copied_is_verified_as_copied(
    store: BundleStore, bundle: Path, trust: Trust, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = bundle_store._copy_file

    def exchanging(directory: int, name: str, target: Path, most_bytes: int) -> int:
        """The source is exchanged just before the copy of one file, and put right again after it."""
        if name != layout.PIPELINE:
            return genuine(directory, name, target, most_bytes)
        whole = (bundle / name).read_bytes()
        (bundle / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        size = genuine(directory, name, target, most_bytes)
        (bundle / name).write_bytes(whole)
        return size

    verify_bundle(bundle, trust)
    monkeypatch.setattr(bundle_store, "_copy_file", exchanging)
    with pytest.raises(BundleError, match=r"pipeline\.onnx .* was changed"):
        store.put(bundle, trust)
    verify_bundle(bundle, trust)
    assert not left_in(tmp_path / "store")


def test_what_does_not_verify_is_refused_and_the_store_stays_as_it_was(
    store: BundleStore, bundle: Path, image_bundle: Path, trust: Trust, stranger: FederationHome, tmp_path: Path
) -> None:
    digest = store.put(image_bundle, trust)
    with pytest.raises(BundleError, match="not the CA that you trust"):
        store.put(bundle, Trust((stranger.root / "ca.crt").read_bytes()))
    (bundle / layout.ONNX).unlink()
    with pytest.raises(BundleError, match=r"model\.onnx") as told:
        store.put(bundle, trust)
    assert ".incoming" not in str(told.value)
    assert left_in(tmp_path / "store") == {digest}
    store.open(digest, trust)


def test_links_pipes_folders_and_odd_names_are_refused(
    store: BundleStore, bundle: Path, trust: Trust, tmp_path: Path
) -> None:
    for make in (
        lambda path: path.symlink_to(bundle / layout.CARD),
        lambda path: path.symlink_to("/dev/zero"),
        os.mkfifo,
        Path.mkdir,
    ):
        odd = bundle / "extra"
        make(odd)
        with pytest.raises(BundleError, match="extra"):
            store.put(bundle, trust)
        odd.rmdir() if odd.is_dir() and not odd.is_symlink() else odd.unlink()
    odd = bundle / "a\nb"
    odd.touch()
    with pytest.raises(BundleError, match="not the name of a file"):
        store.put(bundle, trust)
    odd.unlink()
    whole = bundle / layout.PIPELINE
    whole.rename(tmp_path / "elsewhere")
    whole.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=r"pipeline\.onnx"):
        store.put(bundle, trust)
    assert not left_in(tmp_path / "store")


def test_no_more_is_copied_than_the_store_takes(bundle: Path, trust: Trust, tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in bundle.iterdir())
    with pytest.raises(BundleError, match="larger than the store takes"):
        BundleStore(tmp_path / "store", most_bytes=size - 1).put(bundle, trust)
    assert not left_in(tmp_path / "store")
    BundleStore(tmp_path / "store", most_bytes=size).put(bundle, trust)
    for number in range(bundle_store.MOST_FILES):
        (bundle / f"file{number}").touch()
    with pytest.raises(BundleError, match="1000 is the most"):
        BundleStore(tmp_path / "store").put(bundle, trust)


def test_names_that_lead_elsewhere_open_nothing(store: BundleStore, bundle: Path, trust: Trust, tmp_path: Path) -> None:
    digest = store.put(bundle, trust)
    for name in ("..", f"../store/{digest}", digest[:12], digest.upper(), "", "0" * 64, f"{digest}\n"):
        with pytest.raises(BundleError, match="has no bundle"):
            store.open(name, trust)
        store.remove(name)
    store.open(digest, trust)
    assert verify_bundle(bundle, trust)
    store.remove(digest)
    assert not left_in(tmp_path / "store")
    with pytest.raises(BundleError, match="has no bundle"):
        store.open(digest, trust)


def test_a_directory_that_others_can_read_or_that_is_a_link_is_refused(tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir(mode=0o755)
    with pytest.raises(UsageError, match="chmod 700"):
        BundleStore(open_to_all)
    open_to_all.chmod(0o700)
    BundleStore(open_to_all)
    link = tmp_path / "link"
    link.symlink_to(open_to_all)
    with pytest.raises(UsageError, match="a link to one"):
        BundleStore(link)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be made"):
        BundleStore(tmp_path / "file")


def test_an_encrypted_bundle_stays_encrypted_on_disk_and_opens_in_memory(
    store: BundleStore, bundle: Path, table_bundle: Path, trust: Trust, tmp_path: Path
) -> None:
    new_key_file(tmp_path / "bundle.key")
    key = f"file:{tmp_path / 'bundle.key'}"
    encryption.main(["seal", str(bundle), f"key={key}"])
    with pytest.raises(EncryptionError, match="no key was given") as told:
        store.put(bundle, trust)
    assert ".incoming" not in str(told.value)
    sealed = Trust(trust.authority, keys=load_keyring(key))
    digest = store.put(bundle, sealed)
    assert digest == hashlib.sha256((table_bundle / layout.DIGESTS).read_bytes()).hexdigest()
    assert all(is_encrypted(path) for path in (tmp_path / "store" / digest).iterdir())
    opened = store.open(digest, sealed, keep=(layout.PIPELINE,))
    assert opened.contents[layout.PIPELINE] == (table_bundle / layout.PIPELINE).read_bytes()
    with pytest.raises(EncryptionError, match="no key was given"):
        store.open(digest, trust)
    with pytest.raises(EncryptionError, match="is not encrypted, and a key was given"):
        store.put(table_bundle, sealed)


PUTTING = """
import sys, time
from pathlib import Path
from fedclaw.export.check import Trust
from fedclaw.serve.models import bundle_store
verify = bundle_store.verify_bundle
def slowly(*arguments, **named):
    print("copied", flush=True)
    time.sleep(600)
    return verify(*arguments, **named)
bundle_store.verify_bundle = slowly
store, bundle, ca = map(Path, sys.argv[1:])
bundle_store.BundleStore(store).put(bundle, Trust(ca.read_bytes()))
"""


def test_killed_in_the_middle_it_leaves_nothing_that_is_served_and_the_next_change_sweeps_it(
    bundle: Path, trust: Trust, home: FederationHome, tmp_path: Path
) -> None:
    root = tmp_path / "store"
    line = [sys.executable, "-c", PUTTING, str(root), str(bundle), str(home.root / "ca.crt")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "copied\n"
        process.send_signal(signal.SIGKILL)
    store = BundleStore(root)
    assert len(left_in(root)) == 1, "the copy that was being made"
    assert store.digests() == ()
    digest = store.put(bundle, trust)
    assert left_in(root) == {digest}
    store.open(digest, trust)


def test_a_copy_that_another_process_is_making_is_not_swept(
    bundle: Path, trust: Trust, home: FederationHome, tmp_path: Path
) -> None:
    root = tmp_path / "store"
    line = [sys.executable, "-c", PUTTING, str(root), str(bundle), str(home.root / "ca.crt")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "copied\n"
            copy = left_in(root)
            sweeper = threading.Thread(target=BundleStore(root).sweep)
            sweeper.start()
            sweeper.join(0.2)
            assert sweeper.is_alive(), "it waits for the lock"
            assert left_in(root) == copy
        finally:
            process.kill()
        sweeper.join()
    assert not left_in(root)
