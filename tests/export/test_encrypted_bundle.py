"""A bundle that is encrypted at rest: signed, then encrypted; verified and used out of memory alone."""

import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from fedclaw import encryption, layouts
from fedclaw.errors import BundleError, EncryptionError, UsageError
from fedclaw.export import layout, staging
from fedclaw.export.bundle import Request, export_bundle
from fedclaw.export.check import Trust, verify_bundle
from fedclaw.export.predictor import Predictor
from fedclaw.export.source import load_source
from fedclaw.identity.at_rest import CHUNK, is_encrypted
from fedclaw.identity.data_keys import load_keyring, new_key_file
from fedclaw.identity.federation_home import FederationHome
from fedclaw.server.run_directory import RunDirectory
from tests.export.test_predict import ROWS

RUN = """
import os, resource, runpy, signal, sys
import onnxruntime
onnxruntime.disable_telemetry_events()
sys.dont_write_bytecode = True
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as ended:
    sys.stdout.flush()
    os._exit(ended.code)
"""
"""Runs a command that the kernel kills as soon as anything in it writes a byte to a file.

ONNX Runtime keeps a file of its own, to which it writes as it is imported, before it has seen a model, and as the
process ends.
"""


@pytest.fixture
def key(tmp_path: Path) -> str:
    new_key_file(tmp_path / "bundle.key")
    return f"file:{tmp_path / 'bundle.key'}"


@pytest.fixture
def sealed(bundle: Path, key: str) -> Path:
    encryption.main(["seal", str(bundle), f"key={key}"])
    return bundle


def trust_of(home: FederationHome, key: str | None) -> Trust:
    return Trust((home.root / "ca.crt").read_bytes(), keys=None if key is None else load_keyring(key))


def refused(
    bundle: Path, key: str | None, words: str, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    result = command("fedclaw.verify", str(bundle), *([] if key is None else [f"key={key}"]))
    assert result.returncode == 1
    assert re.match(rf"fedclaw\.verify: .*{words}", result.stderr), result.stderr
    assert result.stderr.count("\n") == 1


def test_verified_and_used_with_the_key_alone(command, sealed, table_bundle, key, home, tmp_path) -> None:
    assert all(is_encrypted(path) for path in sealed.iterdir())
    result = command("fedclaw.verify", str(sealed), f"ca={home.root / 'ca.crt'}", f"key={key}")
    assert result.returncode == 0, result.stderr
    assert "this is the CA that you gave" in result.stdout
    plain = Predictor.open(table_bundle, trust_of(home, None))
    opened = Predictor.open(sealed, trust_of(home, key))
    inputs = plain.schema.synthetic_inputs(9, np.random.default_rng(0))
    assert np.array_equal(plain.predict(inputs), opened.predict(inputs))
    refused(sealed, None, "is encrypted, and no key was given", command)
    new_key_file(tmp_path / "other.key")
    refused(sealed, f"file:{tmp_path / 'other.key'}", "is encrypted under the key", command)
    refused(table_bundle, key, "is not encrypted, and a key was given", command)


def test_nothing_at_all_is_written_while_it_predicts(
    sealed: Path, key: str, home: FederationHome, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text(ROWS)
    given = [f"bundle={sealed}", f"input={rows}", f"key={key}", f"ca={home.root / 'ca.crt'}"]
    line = [sys.executable, "-c", RUN, "fedclaw.predict", *given]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "benign" in done.stdout
    caught = subprocess.run([*line, f"output={tmp_path / 'out.csv'}"], capture_output=True, check=False)
    assert caught.returncode == -signal.SIGXFSZ, "a file that is written to is noticed"


@pytest.mark.parametrize("name", [layout.ONNX, layout.DIGESTS, layout.SIGNATURE, layout.CA_CERTIFICATE, layout.CARD])
def test_damage_is_told_by_the_files_name(name: str, sealed: Path, key: str, command) -> None:
    path = sealed / name
    whole = path.read_bytes()
    for spoilt in (whole[:-1], whole[: len(whole) // 2], whole[:-20] + bytes(20), whole[:40] + bytes(8) + whole[48:]):
        path.write_bytes(spoilt)
        refused(sealed, key, re.escape(name), command)
    other = sealed / (layout.PROGRAM if name != layout.PROGRAM else layout.ONNX)
    path.write_bytes(other.read_bytes())
    refused(sealed, key, f".*{re.escape(name)} was encrypted as 'bundle/{re.escape(other.name)}'", command)
    path.unlink()
    refused(sealed, key, re.escape(name), command)


def test_swapped_chunks_are_refused(sealed: Path, key: str, command) -> None:
    path = max(sealed.iterdir(), key=lambda path: path.stat().st_size)
    whole = path.read_bytes()
    assert len(whole) < 3 * CHUNK, "else exchange whole chunks here"
    path.write_bytes(whole + whole[-64:])
    refused(sealed, key, re.escape(path.name), command)


def test_files_of_two_bundles_under_one_key_are_told_apart_by_the_signature(
    sealed: Path, key: str, image_bundle: Path, tmp_path: Path, command
) -> None:
    other = shutil.copytree(image_bundle, tmp_path / "images")
    encryption.main(["seal", str(other), f"key={key}"])
    shutil.copy(other / layout.ONNX, sealed / layout.ONNX)
    refused(sealed, key, r"model\.onnx .* was changed", command)


def test_rekeyed_while_its_signature_holds(sealed: Path, key: str, home: FederationHome, tmp_path: Path) -> None:
    new_key_file(tmp_path / "new.key")
    new = f"file:{tmp_path / 'new.key'}"
    encryption.main(["rekey", str(sealed), f"key={key}", f"new_key={new}"])
    verify_bundle(sealed, trust_of(home, new))
    with pytest.raises(EncryptionError):
        verify_bundle(sealed, trust_of(home, key))
    encryption.main(["rekey", str(sealed), f"key={new}", f"new_key={key}", "full=true"])
    verify_bundle(sealed, trust_of(home, key))
    encryption.main(["decrypt-to-disk", str(sealed), f"key={key}"])
    verify_bundle(sealed, trust_of(home, None))


@contextmanager
def watched(root: Path, needle: bytes) -> Iterator[list[Path]]:
    """Files below `root` in which `needle` was seen meanwhile; a look at all of them, again and again."""
    seen: list[Path] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            # A directory that goes while it is walked ends the walk, not the watch.
            with suppress(FileNotFoundError):
                for path in root.rglob("*"):
                    try:
                        seen.extend([path] if path.is_file() and needle in path.read_bytes() else [])
                    except OSError:
                        continue

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
        while not seen and (root / "control").exists():
            continue
    finally:
        stop.set()
        thread.join()


def test_export_of_an_encrypted_run_is_encrypted_and_never_in_the_clear(
    table_run: RunDirectory, key: str, home: FederationHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(table_run.root, tmp_path / "run", ignore=shutil.ignore_patterns("bundle")))
    encryption.main(["seal", str(root), f"key={key}"])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    directory = RunDirectory.open(root, load_keyring(key))
    source = load_source(directory)
    # The largest of the weights as they stand in a file.
    needle = max((array.tobytes() for array in directory.read_model().values()), key=len)[:64]
    made: list[Path] = []
    real = staging.encrypt_bundle
    monkeypatch.setattr("fedclaw.export.bundle.encrypt_bundle", lambda *given: made.append(given[0]) or real(*given))
    with watched(tmp_path, needle) as seen:
        export_bundle(source, home.signer(), root / "bundle", Request(quantised=True, keys=load_keyring(key)))
    assert not seen
    assert not made[0].exists(), "gone from memory"
    assert str(made[0]).startswith("/dev/shm/")
    assert all(is_encrypted(path) for path in (root / "bundle").iterdir())
    assert not [path for path in root.iterdir() if path.name.startswith(".")]
    assert verify_bundle(root / "bundle", trust_of(home, key)).pinned
    with watched(tmp_path, needle) as seen:
        encryption.main(["decrypt-to-disk", str(root / "bundle"), f"key={key}"])
        (tmp_path / "control").touch()
    assert layout.ONNX in {path.name for path in seen}, "the watch sees it where it is"


def test_an_encrypted_run_is_not_exported_in_the_clear_by_accident(
    table_run: RunDirectory, key: str, home: FederationHome, tmp_path: Path, command
) -> None:
    root = shutil.copytree(table_run.root, tmp_path / "run", ignore=shutil.ignore_patterns("bundle"))
    encryption.main(["seal", str(root), f"key={key}"])
    given = [f"run={root}", f"federation={home.root}"]
    keyless = command("fedclaw.export", *given)
    assert (keyless.returncode, "is encrypted, and no key was given" in keyless.stderr) == (1, True)
    refusal = command("fedclaw.export", *given, f"encryption.key={key}")
    assert refusal.returncode == 2
    assert "plaintext=true" in refusal.stderr


def test_a_servers_layout_of_an_encrypted_bundle_takes_a_word(sealed: Path, key: str, tmp_path: Path) -> None:
    given = ["triton", str(sealed), f"output={tmp_path / 'triton'}"]
    with pytest.raises(EncryptionError, match="no key was given"):
        layouts.main(given)
    with pytest.raises(UsageError, match="plaintext=true"):
        layouts.main([*given, f"key={key}"])
    assert not (tmp_path / "triton").exists()
    layouts.main([*given, f"key={key}", "plaintext=true"])
    assert list((tmp_path / "triton").rglob("*.onnx"))


def test_without_a_file_system_in_memory_nothing_is_exported(
    table_source, key: str, home: FederationHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(staging.MEMORY_VARIABLE, str(tmp_path))
    if staging._file_system(tmp_path) in {"tmpfs", "ramfs"}:
        pytest.skip("the tests' own directory is held in memory")
    with pytest.raises(BundleError, match="is no directory of a tmpfs"):
        export_bundle(table_source, home.signer(), tmp_path / "bundle", Request(keys=load_keyring(key)))
    assert not (tmp_path / "bundle").exists()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 0


def test_a_sites_own_constants_are_read_with_its_key(bundle, key: str, tmp_path: Path, home: FederationHome) -> None:
    from fedclaw.identity.at_rest import FileStore

    predictor, taken = Predictor.open(bundle, trust_of(home, None)), []

    class Schema:
        def with_constants(self, text: str, _: str) -> "Schema":
            taken.append(text)
            return self

    predictor.schema = Schema()  # type: ignore[assignment]
    path, keys = tmp_path / "constants.json", load_keyring(key)
    FileStore(keys, "site/north").write(path, b"{}", name="state/preprocessing.json")
    predictor.use_constants(path, keys)
    assert taken == ["{}"]
    with pytest.raises(EncryptionError, match="no key was given"):
        predictor.use_constants(path)
    FileStore(keys, "site/north").write(path, b"{}", name="state/strategy/a.npz")
    with pytest.raises(EncryptionError, match="in the place of another"):
        predictor.use_constants(path, keys)
