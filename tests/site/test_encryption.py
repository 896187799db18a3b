"""What a site keeps of its data is encrypted where its operator says so, and what was planted is not taken for it."""

import base64
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from fedclaw import encryption
from fedclaw.errors import EncryptionError, UsageError
from fedclaw.identity import seal
from fedclaw.identity.at_rest import PLAIN, is_encrypted
from fedclaw.site.directory import only_client, open_service, personal_files, site_store
from fedclaw.site.preflight.check import examine
from fedclaw.site.service import SiteService
from fedclaw.site.settings import load_site_settings
from fedclaw.transport.flower.site import AnswerStore
from fedclaw.transport.grpc.limits import Limits
from fedclaw.transport.grpc.outbox import Outbox
from tests.site.conftest import Asker
from tests.states import keep, newest
from tests.transport.grpc.test_outbox import KEYS, task
from tests.transport.grpc.test_outbox import store as store_reply

STATE = {"control": {"head.weight": np.arange(6, dtype=np.float32)}}


def change_site(root: Path, **changes: object) -> None:
    path = root / "site.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


@pytest.fixture
def keyed(root: Path) -> Path:
    """The site, with a key that its site.yaml names relative to itself, and constants of its own."""
    encryption.main(["new-key", f"key=file:{root / 'keys' / 'rest.key'}"])
    change_site(root, encryption={"key": "file:keys/rest.key"})
    schema = yaml.safe_load((root / "schema.yaml").read_text())
    columns = [{"name": column["name"], "kind": "numeric"} for column in schema["columns"]]
    (root / "schema.yaml").write_text(yaml.safe_dump(schema | {"columns": columns, "standardise": "site"}))
    return root


def open_site(root: Path) -> SiteService:
    return open_service(root, load_site_settings(root), "clinic")


def outbox_of(root: Path) -> Outbox:
    return Outbox(root / "state" / "outbox", Limits(), site_store(root, load_site_settings(root)))


def fill(root: Path) -> None:
    """State, an answer on Flower's runtimes, and a reply in the outbox."""
    asker = Asker(root)
    asker.site.policy = asker.site.policy.model_copy(update={"allow_data_dependent_preprocessing": True})
    reply = asker.ask()
    keep(asker.site.states, "clinic", "run-1", 1, STATE)
    asker.site.states.stage("clinic", "run-2", 1, STATE, "c" * 64, None, {})
    AnswerStore(root / "state" / "answers", asker.site.states.store).store("question", reply.content)
    store_reply(outbox_of(root), 1, content=reply.content)
    asker.site.ledger.close()


def test_all_that_is_made_of_the_data_is_encrypted_and_found_again(keyed: Path) -> None:
    fill(keyed)
    files = [path for path, _ in personal_files(keyed)]
    assert len(files) == 4
    assert all(map(is_encrypted, files))
    kept = [path for path in (keyed / "state").rglob("*") if path.is_file() and path.suffix != ".sealed"]
    clear = {path.name for path in kept if not is_encrypted(path)}
    assert clear == {"ledger.sqlite", "outbound.jsonl"}, "what others have to read"
    opened = open_site(keyed)
    assert np.array_equal(newest(opened.states, "clinic", "run-1")["control"]["head.weight"], np.arange(6))
    opened.states.commit("clinic", "run-2", "c" * 64)
    assert newest(opened.states, "clinic", "run-2")
    assert AnswerStore(keyed / "state" / "answers", opened.states.store).find("question") is not None
    assert outbox_of(keyed).find(task(1)) is not None


def test_a_reply_that_waits_tells_nothing_but_to_the_aggregator(keyed: Path) -> None:
    fill(keyed)
    (path,) = (keyed / "state" / "outbox").glob("*.sealed")
    secrets = [b"run1-task1", b"ledger_head"]
    assert not [secret for secret in secrets if secret in path.read_bytes()]
    encryption.main(["decrypt-to-disk", str(keyed)])
    assert all(secret in path.read_bytes() for secret in secrets), "so they would be seen"


@pytest.mark.parametrize("place", ["strategy", "answers", "preprocessing.json", "outbox"])
def test_a_plain_file_that_was_planted_stops_the_client(keyed: Path, place: str, tmp_path: Path) -> None:
    fill(keyed)
    plain = shutil.copytree(keyed, tmp_path / "planted")
    encryption.main(["decrypt-to-disk", str(plain)])
    here = keyed / "state" / place
    shutil.rmtree(here, ignore_errors=True) if here.is_dir() else here.unlink()
    source = plain / "state" / place
    shutil.copytree(source, here) if source.is_dir() else shutil.copy(source, here)
    with pytest.raises(EncryptionError, match=f"{place}.* is not encrypted"):
        outbox_of(keyed) if place == "outbox" else open_site(keyed)
    # What the operator knows to be right is taken over by a word of its own.
    encryption.main(["seal", str(keyed)])
    open_site(keyed)
    assert outbox_of(keyed).find(task(1)) is not None


def test_a_site_without_its_key_does_not_start(keyed: Path) -> None:
    fill(keyed)
    change_site(keyed, encryption={"key": None})
    with pytest.raises(EncryptionError, match="is encrypted, and no key was given"):
        open_site(keyed)
    with pytest.raises(EncryptionError, match="is encrypted, and no key was given"):
        outbox_of(keyed)
    change_site(keyed, encryption={"key": "file:keys/none.key"})
    with pytest.raises(EncryptionError, match=r"none\.key is missing"):
        open_site(keyed)
    assert "none.key is missing" in str(examine(keyed, load_site_settings(keyed)).findings.failure)
    change_site(keyed, encryption={"keys": "file:keys/rest.key"})
    with pytest.raises(UsageError, match=r"encryption\.keys"):
        load_site_settings(keyed)


def test_a_site_that_was_plain_is_sealed_rekeyed_and_goes_on(keyed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_site(keyed, encryption={"key": None})
    fill(keyed)
    monkeypatch.setenv("FEDCLAW_KEY", base64.b64encode(bytes(32)).decode())
    stored = next((keyed / "state" / "outbox").glob("*.sealed"))
    time = stored.stat().st_mtime_ns
    with only_client(keyed), pytest.raises(UsageError, match="already running"):
        encryption.main(["seal", str(keyed), f"key=file:{keyed}/keys/rest.key"])
    encryption.main(["seal", str(keyed), f"key=file:{keyed}/keys/rest.key"])
    change_site(keyed, encryption={"key": "file:keys/rest.key"})
    encryption.main(["rekey", str(keyed), "new_key=env:FEDCLAW_KEY", "full=true"])
    with pytest.raises(EncryptionError, match="under the key"):
        open_site(keyed)
    assert "under the key" in str(examine(keyed, load_site_settings(keyed)).findings.failure)
    change_site(keyed, encryption={"key": ["env:FEDCLAW_KEY", "file:keys/rest.key"]})
    assert newest(open_site(keyed).states, "clinic", "run-1")
    encryption.main(["show", str(keyed)])
    reply = outbox_of(keyed).find(task(1))
    assert reply is not None
    assert stored.stat().st_mtime_ns == time
    binding = seal.Binding("f", 1, "1", task(1).message_id, "s")
    opened = seal.Opener("x25519", KEYS.private).open(reply.header, binding, reply.plain_size)
    opened.feed(b"".join(reply.read(0)))
    assert opened.finish() == bytes(1000), "what is sealed to the aggregator is as it was"


def test_a_state_of_another_run_is_not_taken_for_this_ones(keyed: Path) -> None:
    fill(keyed)
    opened = open_site(keyed)
    opened.states.commit("clinic", "run-2", "c" * 64)
    one, two = (keyed / "state" / "strategy").glob("*.npz")
    held = one.read_bytes()
    shutil.copy(two, one)
    two.write_bytes(held)
    for run in ("run-1", "run-2"):
        with pytest.raises(EncryptionError, match="in the place of another"):
            newest(opened.states, "clinic", run)


def test_a_reply_whose_trailer_was_made_by_another_is_refused(keyed: Path) -> None:
    """Whoever can write to the disk seals to the aggregator as the site does: its key is public."""
    store_reply(Outbox(keyed / "state" / "outbox", Limits(), PLAIN), 1)
    with pytest.raises(EncryptionError, match="not encrypted"):
        outbox_of(keyed)
