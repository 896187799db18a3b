"""`python -m fedclaw.encryption`, and what it does to runs and sites."""

import base64
import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from fedclaw import encryption
from fedclaw.errors import EncryptionError, RunInUse, UsageError
from fedclaw.identity import rekey
from fedclaw.identity.at_rest import FileStore, is_encrypted, read_header
from fedclaw.identity.data_keys import Keyring, load_keyring
from fedclaw.server import checkpoint
from fedclaw.server.checkpoint import Checkpoint
from fedclaw.server.run_directory import RunDirectory
from tests.samples import run_record
from tests.tokens import Token

PARAMETERS = {"w": np.arange(60_000, dtype=np.float32).reshape(200, 300), "b": np.float32([1, -1])}


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Two keys: in a file and in the environment."""
    encryption.main(["new-key", f"key=file:{tmp_path / 'a.key'}"])
    monkeypatch.setenv("FEDCLAW_KEY", base64.b64encode(os.urandom(32)).decode())
    return {"a": f"file:{tmp_path / 'a.key'}", "b": "env:FEDCLAW_KEY"}


def make_run(root: Path, keys: Keyring | None = None) -> RunDirectory:
    run = RunDirectory.create(root, run_record(run=root.name), keys)
    for number in (1, 2):
        checkpoint.save(run.root, Checkpoint(number, PARAMETERS, {}), run.store)
    run.write_model(PARAMETERS)
    run.compressed.mkdir()
    run.store.write(run.compressed_model, b"compressed", name="compressed/model.npz")
    return run


def files_of(run: RunDirectory) -> list[Path]:
    return [path for path, _ in run.parameter_files()]


def reads(run: RunDirectory) -> bool:
    found = checkpoint.newest(run.root, run.store)
    compressed = run.store.read(run.compressed_model, "compressed/model.npz")
    models = [run.read_model(), found.parameters if found is not None else {}]
    same = all(np.array_equal(model[name], array) for model in models for name, array in PARAMETERS.items())
    return same and compressed == b"compressed"


def test_a_run_is_sealed_rekeyed_reencrypted_and_decrypted(
    tmp_path: Path, keys: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = make_run(tmp_path / "demo")
    before = {path: path.read_bytes() for path in files_of(plain)}
    assert len(before) == 4
    encryption.main(["seal", str(plain.root), f"key={keys['a']}"])
    assert "4 files encrypted; 0 were before" in capsys.readouterr().out
    assert all(map(is_encrypted, before))
    sealed = RunDirectory.open(plain.root, load_keyring(keys["a"]))
    assert reads(sealed)
    assert all(sealed.sha256_of(path) == hashlib.sha256(content).hexdigest() for path, content in before.items())
    with pytest.raises(EncryptionError, match=r"checkpoint-0001\.ckpt is encrypted, and no key was given"):
        RunDirectory.open(plain.root).check()
    with pytest.raises(EncryptionError, match="under the key"):
        RunDirectory.open(plain.root, load_keyring(keys["b"])).check()

    chunks = {path: path.read_bytes()[-26:] for path in before}
    encryption.main(["rekey", str(plain.root), f"key={keys['a']}", f"new_key={keys['b']}"])
    assert "4 files given the new key" in capsys.readouterr().out
    assert {path: path.read_bytes()[-26:] for path in before} == chunks
    assert reads(RunDirectory.open(plain.root, load_keyring(keys["b"])))
    with pytest.raises(EncryptionError):
        reads(sealed)

    encryption.main(["rekey", str(plain.root), f"key={keys['b']}", f"new_key={keys['a']}", "full=true"])
    assert not set(chunks.values()) & {path.read_bytes()[-26:] for path in before}
    assert reads(RunDirectory.open(plain.root, load_keyring((keys["b"], keys["a"]))))
    encryption.main(["show", str(plain.root), f"key={keys['a']}"])
    shown = capsys.readouterr().out
    assert "run/demo/compressed/model.npz" in shown
    assert load_keyring(keys["a"]).id.hex() in shown

    encryption.main(["decrypt-to-disk", str(plain.root), f"key={keys['a']}"])
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("full", [False, True])
def test_a_rekey_that_stops_half_way_is_gone_on_with(
    full: bool, tmp_path: Path, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "demo", load_keyring(keys["a"]))
    command = ["rekey", str(run.root), f"key={keys['a']}", f"new_key={keys['b']}", f"full={str(full).lower()}"]
    real, left = rekey.replacing, [2]

    def stops(*given, **named):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*given, **named)

    monkeypatch.setattr(rekey, "replacing", stops)
    with pytest.raises(KeyboardInterrupt):
        encryption.main(command)
    used = {read_header(path).key_id for path in files_of(run)}
    assert used == {load_keyring(keys["a"]).id, load_keyring(keys["b"]).id}
    assert reads(RunDirectory.open(run.root, load_keyring((keys["b"], keys["a"])))), "with both keys all is readable"
    left[0] = 100
    encryption.main(command)
    assert reads(RunDirectory.open(run.root, load_keyring(keys["b"])))
    assert not [path for path in run.root.rglob(".*") if path.is_file()]


def test_what_is_encrypted_already_is_left_only_if_it_opens(tmp_path: Path, keys: dict[str, str]) -> None:
    """Or seal would say of files under a lost key, and of a file that was put in another's place, that all is well."""
    run = make_run(tmp_path / "demo")
    encryption.main(["seal", str(run.root), f"key={keys['a']}"])
    with pytest.raises(EncryptionError, match="is encrypted under the key"):
        encryption.main(["seal", str(run.root), f"key={keys['b']}"])
    encryption.main(["seal", str(run.root), f"key=[{keys['b']},{keys['a']}]"])
    encryption.main(["rekey", str(run.root), f"key={keys['a']}", f"new_key={keys['b']}"])
    first, second, *_ = files_of(run)
    shutil.copy(first, second)
    for word in (["seal", f"key={keys['b']}"], ["rekey", f"key={keys['a']}", f"new_key={keys['b']}"]):
        with pytest.raises(EncryptionError, match="was encrypted as"):
            encryption.main([word[0], str(run.root), *word[1:]])


def test_show_speaks_to_nobodys_terminal(
    tmp_path: Path, keys: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A label and a name may be a stranger's."""
    bundle = tmp_path / "bundle"
    store = FileStore(load_keyring(keys["a"]), "bundle")
    store.write(bundle / "SHA256SUMS", b"", name="\x1b[31m[red]\x1b]0;title\x07")
    (bundle / "model\x1b[2J.onnx").touch()
    encryption.main(["show", str(bundle)])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "[red]" in shown


@pytest.mark.parametrize("word", ["rekey", "decrypt-to-disk"])
def test_what_a_killed_command_left_is_gone_after_the_next(word: str, tmp_path: Path, keys: dict[str, str]) -> None:
    """In a bundle a file more would be one that was added after signing; of decrypt-to-disk, it is in the clear."""
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    names = ["SHA256SUMS", "model.onnx", "schema.json"]
    for name in names:
        (bundle / name).write_bytes(name.encode() * 1000)
    encryption.main(["seal", str(bundle), f"key={keys['a']}"])
    (bundle / ".model.onnx.not-ours").touch()
    command = [word, str(bundle), f"key={keys['a']}", *([f"new_key={keys['b']}"] if word == "rekey" else [])]
    if not (child := os.fork()):
        rekey.os.utime = lambda *_, **__: os._exit(9)  # type: ignore[assignment] # the first file is written, not renamed
        encryption.main(command)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [path.name[:-8] for path in bundle.iterdir() if path.name.startswith(".S")] == [".SHA256SUMS."]
    encryption.main(command)
    assert sorted(path.name for path in bundle.iterdir()) == sorted([".model.onnx.not-ours", *names])


def test_with_a_key_a_plain_model_that_was_planted_is_refused(tmp_path: Path, keys: dict[str, str]) -> None:
    run = make_run(tmp_path / "demo", load_keyring(keys["a"]))
    planted = make_run(tmp_path / "other")
    for name in ("model.npz", "checkpoint-0002.ckpt"):
        shutil.copy(planted.root / name, run.root / name)
    with pytest.raises(EncryptionError, match=r"model\.npz is not encrypted.*fedclaw\.encryption seal"):
        run.read_model()
    with pytest.raises(EncryptionError, match=r"checkpoint-0002\.ckpt is not encrypted"):
        checkpoint.newest(run.root, run.store)
    with pytest.raises(EncryptionError, match="not encrypted"):
        run.check()


def test_files_of_two_runs_under_one_key_are_not_exchanged(tmp_path: Path, keys: dict[str, str]) -> None:
    ring = load_keyring(keys["a"])
    one, two = make_run(tmp_path / "one", ring), make_run(tmp_path / "two", ring)
    shutil.copy(two.model_path, one.model_path)
    with pytest.raises(EncryptionError, match=r"encrypted as 'run/two/model\.npz'"):
        one.read_model()
    shutil.copy(one.root / "checkpoint-0001.ckpt", one.root / "checkpoint-0002.ckpt")
    with pytest.raises(EncryptionError, match="in the place of another"):
        checkpoint.newest(one.root, one.store)
    with pytest.raises(EncryptionError):
        encryption.main(["show", str(one.root), f"key={keys['a']}"])
    moved = one.root.rename(tmp_path / "elsewhere")
    (moved / "model.npz").unlink()
    assert checkpoint.load(moved / "checkpoint-0001.ckpt", RunDirectory.open(moved, ring).store).round == 1


def test_a_run_that_is_at_work_is_left_alone(tmp_path: Path, keys: dict[str, str]) -> None:
    run = make_run(tmp_path / "demo")
    with run.held(), pytest.raises(RunInUse):
        encryption.main(["seal", str(run.root), f"key={keys['a']}"])
    assert not any(map(is_encrypted, files_of(run)))


def test_a_run_under_a_key_of_a_token(tmp_path: Path, keys: dict[str, str], token: Token) -> None:
    place = token.uri("run-key")
    encryption.main(["new-key", f"key={place}"])
    run = make_run(tmp_path / "demo", load_keyring(keys["a"]))
    encryption.main(["rekey", str(run.root), f"key={keys['a']}", f"new_key={place}"])
    assert reads(RunDirectory.open(run.root, load_keyring(place)))
    encryption.main(["rekey", str(run.root), f"key={place}", f"new_key={keys['b']}", "full=true"])
    assert reads(RunDirectory.open(run.root, load_keyring(keys["b"])))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give one command of new-key, seal, show, rekey, decrypt-to-disk"),
        (["lock"], "give one command of"),
        (["seal"], "needs one directory"),
        (["seal", "RUN"], "key=… is missing"),
        (["seal", "RUN", "key=not-a-source"], "named by where it is"),
        (["seal", "RUN", "key=env:FEDCLAW_KEY", "full=true"], "are for rekey"),
        (["rekey", "RUN", "key=env:FEDCLAW_KEY"], "needs new_key"),
        (["new-key", "key=env:FEDCLAW_KEY"], "new-key makes"),
        (["show", "NOTHING"], "no run's directory"),
    ],
)
def test_what_is_no_command(arguments: list[str], words: str, tmp_path: Path, keys: dict[str, str]) -> None:
    names = {"RUN": str(make_run(tmp_path / "demo").root), "NOTHING": str(tmp_path)}
    with pytest.raises(UsageError, match=words):
        encryption.main([names.get(word, word) for word in arguments])
