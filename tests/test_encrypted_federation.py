"""A federation whose server and sites encrypt what they keep: real processes, killed, resumed, exported, served."""

from pathlib import Path

import pytest
import yaml

from fedclaw import encryption
from fedclaw.identity.at_rest import is_encrypted
from fedclaw.identity.data_keys import load_keyring
from fedclaw.server.run_directory import RunDirectory
from tests.conftest import Deployment, run_module


@pytest.mark.slow
def test_a_run_under_keys_is_killed_resumed_exported_and_served(deployment: Deployment, tmp_path: Path) -> None:
    keys = {name: f"file:{tmp_path / name}.key" for name in ("run", "bundle")}
    for key in keys.values():
        encryption.main(["new-key", f"key={key}"])
    for site in deployment.sites:
        encryption.main(["new-key", f"key=file:{site / 'keys' / 'rest.key'}"])
        written = yaml.safe_load((site / "site.yaml").read_text())
        written["encryption"] = {"key": "file:keys/rest.key"}
        (site / "site.yaml").write_text(yaml.safe_dump(written))
    clients = [deployment.client(index) for index in range(2)]
    run = deployment.runs / "test"
    server = deployment.new_run("workload.model.name=mlp", f"encryption.key={keys['run']}")
    server.wait_for(lambda: (run / "checkpoint-0001.ckpt").is_file(), "wrote a checkpoint")
    server.kill()

    keyless = deployment.server(f"resume={run}")
    assert keyless.finish() == 1
    assert "is encrypted, and no key was given" in keyless.text()
    server = deployment.server(f"resume={run}", f"encryption.key={keys['run']}")
    assert server.finish() == 0, server.text()
    for client in clients:
        assert client.stop() == 143

    opened = RunDirectory.open(run, load_keyring(keys["run"]))
    assert {path.name for path, _ in opened.parameter_files()} >= {"model.npz"}
    assert all(is_encrypted(path) for path, _ in opened.parameter_files())
    weights = max((array.tobytes() for array in opened.read_model().values()), key=len)[:40]
    for site in deployment.sites:
        stored = list((site / "state" / "outbox").glob("*.sealed"))
        assert stored
        assert not [path for path in stored if b"ledger_head" in path.read_bytes()], "a receipt in the clear"
        assert run_module("fedclaw.encryption", "show", site).code == 0
        assert run_module("fedclaw.ledger", "verify", f"site={site}").code == 0

    given = (f"run={run}", f"federation={deployment.federation}", f"encryption.key={keys['run']}")
    assert run_module("fedclaw.compress", *given[::2], "recovery.steps=20", "synthetic=64").code == 0
    done = run_module("fedclaw.export", *given, f"key={keys['bundle']}")
    assert done.code == 0, done.errors
    found = [path for path in deployment.runs.rglob("*") if path.is_file() and weights in path.read_bytes()]
    assert not found, "the weights are nowhere in the clear"
    trusted = (f"ca={deployment.federation / 'ca.crt'}", f"key={keys['bundle']}")
    assert run_module("fedclaw.verify", run / "bundle", *trusted).code == 0
    rows = deployment.sites[0] / yaml.safe_load((deployment.sites[0] / "site.yaml").read_text())["data"]["train"]
    predicted = run_module("fedclaw.predict", f"bundle={run / 'bundle'}", f"input={rows}", *trusted)
    assert predicted.code == 0, predicted.errors
    assert run_module("fedclaw.lineage", run / "bundle", *trusted, f"encryption.key={keys['run']}").code == 0
    assert not list(Path("/dev/shm").glob("fedclaw-bundle.*"))
