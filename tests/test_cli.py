"""What a person sees who makes a mistake: one clear line, the right exit code, no traceback."""

import base64
import os
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from fedclaw.cli import compose_settings, config_directory, split
from fedclaw.encryption import EncryptionCommand
from fedclaw.errors import UsageError
from fedclaw.server.__main__ import ServerSettings
from fedclaw.server.run_directory import RunDirectory, SiteReceipt
from tests import warm
from tests.conftest import environment, run_module
from tests.ports import free_port
from tests.samples import receipt, run_record

ENTRY_POINTS = [
    "server",
    "client",
    "provision",
    "compress",
    "export",
    "verify",
    "lineage",
    "layouts",
    "predict",
    "serve",
    "ledger",
    "audit",
]


@pytest.mark.parametrize("module", ENTRY_POINTS)
def test_help_is_short_and_succeeds(module):
    done = run_module(f"fedclaw.{module}", "--help")
    assert done.code == 0
    assert f"python -m fedclaw.{module}" in done.output
    assert len(done.output.splitlines()) < 60
    assert not done.errors


def one_line(done, code, *words):
    assert done.code == code, done.errors
    assert "Traceback" not in done.errors
    errors = [line for line in done.lines if not line.startswith("see python -m")]
    assert len(errors) == 1, done.errors
    for word in words:
        assert word in errors[0]


def test_mistakes_at_the_server(tmp_path):
    one_line(run_module("fedclaw.server"), 2, "federation")
    one_line(run_module("fedclaw.server", f"federation={tmp_path / 'nowhere'}"), 2, "nowhere")
    one_line(run_module("fedclaw.server", "federation=x", "strategy=fedbest"), 2, "fedbest")
    one_line(run_module("fedclaw.server", "federation=x", "rounds=many"), 2, "rounds", "'many'")
    one_line(run_module("fedclaw.server", "federation=x", "training.bath_size=3"), 2, "bath_size")
    one_line(run_module("fedclaw.server", "federation=x", "address=127.0.0.1:99999"), 2, "address", "99999")
    one_line(run_module("fedclaw.server", "--rounds=3"), 2, "--rounds=3", "key=value")
    one_line(run_module("fedclaw.server", "start", "federation=x"), 2, "start")
    one_line(run_module("fedclaw.server", "fedration=x"), 2, "there is no setting fedration")
    one_line(run_module("fedclaw.server", "federation=x", "run=two words!"), 2, "two words!", "quoted")


def test_mistakes_at_the_client(tmp_path):
    one_line(run_module("fedclaw.client", f"site={tmp_path / 'nowhere'}"), 2, "nowhere")
    one_line(run_module("fedclaw.client", f"site={tmp_path}"), 2, "site.yaml")
    (tmp_path / "site.yaml").write_text("name: [")
    one_line(run_module("fedclaw.client", f"site={tmp_path}"), 2, "site.yaml", "not YAML")
    (tmp_path / "site.yaml").write_text("name: a\nworkload: tabular\ncolour: red\n")
    one_line(run_module("fedclaw.client", f"site={tmp_path}"), 2, "site.yaml", "colour", "policy")


def test_settings_are_checked_against_each_other():
    with pytest.raises(UsageError, match="exactly one of epochs and steps"):
        compose_settings("server", ["federation=x", "training.steps=3"], ServerSettings)
    with pytest.raises(UsageError, match=r"privacy\.epsilon"):
        compose_settings("server", ["federation=x", "privacy.epsilon=0"], ServerSettings)
    with pytest.raises(UsageError, match=r"privacy\.delta"):
        compose_settings("server", ["federation=x", "privacy.delta=null"], ServerSettings)
    assert compose_settings("server", ["federation=x", "privacy=none"], ServerSettings).privacy is None
    anywhere = compose_settings("server", ["federation=x", "address=0.0.0.0:9443"], ServerSettings)
    assert anywhere.address == "0.0.0.0:9443"


def test_words_and_overrides_are_told_apart():
    line = split(["check", "site=a=b", "~privacy"])
    assert line.words == ("check",)
    assert line.overrides == ("site=a=b", "~privacy")


def test_only_what_cannot_change_a_run_is_taken_on_resume(deployment):
    federation, begun = f"federation={deployment.federation}", deployment.runs / "begun"
    RunDirectory.create(begun, run_record())
    one_line(run_module("fedclaw.server", federation, f"resume={begun}", "privacy.epsilon=9"), 2, "privacy.epsilon")
    new = run_module("fedclaw.server", federation, "sites.new_cohort=true")
    one_line(new, 2, "sites.new_cohort=true goes with resume=")
    # That there is no such run comes first.
    one_line(run_module("fedclaw.server", federation, "resume=runs/x", "privacy.epsilon=9"), 2, "runs/x", "run.json")


def test_check_explains_the_policy_and_connects_to_nobody(deployment):
    done = run_module("fedclaw.client", f"site={deployment.sites[0]}", "check")
    assert done.code == 0, done.errors
    assert "epsilon 8" in done.output
    assert "Training without differential privacy is refused" in done.output


def test_a_server_that_cannot_start_leaves_no_run(deployment):
    arguments = [f"federation={deployment.federation}", f"workload.schema_file={deployment.schema}", "tracking=none"]
    arguments += [f"runs={deployment.runs}", "run=test"]
    one_line(run_module("fedclaw.server", *arguments, "workload.model.name=resnet"), 2, "resnet", "logistic")
    nothing = f"workload.schema_file={deployment.root / 'none.yaml'}"
    one_line(run_module("fedclaw.server", *arguments, nothing), 2, f"{nothing} cannot be read: No such file")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"address=127.0.0.1:{taken.getsockname()[1]}"
        one_line(run_module("fedclaw.server", *arguments, address), 1, "cannot listen")
    nobody = f"tracking.uri=http://127.0.0.1:{free_port()}"
    one_line(run_module("fedclaw.server", *arguments, nobody), 1, nobody, "cannot be reached: Connection refused")
    one_line(run_module("fedclaw.server", *arguments, "tracking.uri=nonsense://x"), 1, "nonsense://x")
    assert not deployment.runs.exists()


def test_a_finished_run_says_so_and_waits_for_nobody(deployment):
    directory = RunDirectory.create(deployment.runs / "done", run_record(federation="clinic"))
    directory.write_model({"w": np.zeros(2, np.float32)})
    directory.write_receipts({"north": SiteReceipt(examples=9, receipt=receipt())})
    directory.append_metrics(2, {"metrics": {}, "answered": ["north"], "silent": ["south"]})
    done = run_module("fedclaw.server", f"federation={deployment.federation}", f"resume={directory.root}")
    assert done.code == 0, done.errors
    assert "is finished" in done.output
    assert "north" in done.output
    assert "south was asked in round 2" in done.output


def test_a_second_server_for_one_run_is_told_so(deployment):
    directory = RunDirectory.create(deployment.runs / "begun", run_record(federation="clinic"))
    with directory.held():
        done = run_module("fedclaw.server", f"federation={deployment.federation}", f"resume={directory.root}")
    one_line(done, 1, str(directory.root), f"process {os.getpid()}", "wait until it has ended")


def test_check_warns_of_a_name_that_nothing_has(deployment):
    path = deployment.sites[0] / "site.yaml"
    path.write_text(path.read_text().replace("fedprox", "fedprx"))
    done = run_module("fedclaw.client", f"site={deployment.sites[0]}", "check")
    assert done.code == 0
    assert "'fedprx'" in done.output
    assert "typing error" in done.output


def test_a_second_client_on_the_same_site_is_refused(deployment):
    first = deployment.client(0)
    first.wait_for_text("serves federation")
    one_line(run_module("fedclaw.client", f"site={deployment.sites[0]}"), 2, "already running")


def test_a_path_that_cannot_be_used_is_one_line(deployment, tmp_path):
    afile = tmp_path / "afile"
    afile.touch()
    new = (f"federation={deployment.federation}", f"workload.schema_file={deployment.schema}")
    one_line(run_module("fedclaw.server", *new, f"runs={afile}", "run=x"), 1, f"{afile}: File exists")
    one_line(
        run_module("fedclaw.server", *new, f"runs={afile}", "run=x", "tracking=none"),
        *(1, f"{afile / 'x'}: Not a directory"),
    )
    one_line(run_module("experiments.datasets", "output=/proc/x"), 1, "/proc/x: No such file or directory")
    site = tmp_path / "other"
    (site / "site.yaml").mkdir(parents=True)
    one_line(run_module("fedclaw.client", f"site={site}"), 1, f"{site / 'site.yaml'}: Is a directory")


def begin(deployment, cwd):
    """A run that finds no site and stops."""
    new = (f"workload.schema_file={deployment.schema}", f"runs={deployment.runs}", "run=x", "sites.deadline=0.1")
    done = run_module("fedclaw.server", f"federation={deployment.federation}", "sites.wait=0.1", *new, cwd=cwd)
    assert done.code == 1


def test_a_resumed_run_keeps_to_the_store_beside_it(deployment, tmp_path):
    """Resumed from another directory and without runs=, it makes no second store."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    begin(deployment, tmp_path)
    store = deployment.runs / "mlflow.db"
    store.unlink()
    resume = (f"federation={deployment.federation}", f"resume={deployment.runs / 'x'}", "sites.wait=0.1")
    assert run_module("fedclaw.server", *resume, cwd=elsewhere).code == 1
    assert store.is_file()
    assert not list(elsewhere.iterdir())


def test_a_damaged_run_is_refused_before_a_site_is_asked(deployment, tmp_path):
    begin(deployment, tmp_path)
    (deployment.runs / "x" / "metrics.jsonl").write_text("[]\n")
    done = run_module("fedclaw.server", f"federation={deployment.federation}", f"resume={deployment.runs / 'x'}")
    one_line(done, 1, "metrics.jsonl", "is damaged")


def run_main_raising(expression, level="INFO"):
    program = f"from fedclaw.cli import run_main\ndef body(arguments):\n    raise {expression}\nrun_main('m', '', body)"
    return warm.run(["-c", program], env=environment() | {"FEDCLAW_LOG": level}, timeout=60)


def test_what_nobody_foresaw_is_one_line_without_its_text():
    done = run_main_raising("ValueError('the key is hunter2')")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line == "m: internal error: ValueError at <string>:3; set FEDCLAW_LOG=DEBUG for the traceback"
    traced = run_main_raising("ValueError('the key is hunter2')", "DEBUG")
    assert traced.returncode == 1
    assert "Traceback" in traced.stderr
    assert traced.stderr.splitlines()[-1] == line


def test_an_error_of_the_system_names_the_file_and_the_reason():
    done = run_main_raising("OSError(28, 'No space left on device', 'runs/x')")
    assert (done.returncode, done.stderr) == (1, "m: runs/x: No space left on device\n")
    done = run_main_raising("OSError(98, 'Address already in use')")
    assert (done.returncode, done.stderr) == (1, "m: Address already in use\n")
    done = run_main_raising("OSError('hunter2')")
    assert done.returncode == 1
    assert "hunter2" not in done.stderr


def test_the_configuration_is_found_and_goes_into_the_wheel():
    root = Path(__file__).parent.parent
    assert config_directory() == root / "conf"
    assert (config_directory() / "server.yaml").is_file()
    wheel = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"conf": "fedclaw/conf"}
    assert wheel["packages"] == ["fedclaw"], "generic names at the top would hide, or overwrite, somebody else's"


def test_nothing_below_the_entry_points_needs_hydra():
    """A server loop in somebody else's program brings no command line with it."""
    program = """
import importlib, sys
for name in ("server.session", "report.terminal", "report.tracking", "site.directory", "transport.grpc.grid"):
    importlib.import_module(f"fedclaw.{name}")
from fedclaw.server.session import make_strategy
from types import SimpleNamespace as Record
make_strategy(Record(strategy=Record(name="fedavg", settings={})))
assert not {"hydra", "omegaconf", "fedclaw.cli"} & set(sys.modules), sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "word",
    [
        "key={key}",
        "new_key=[{key},file:other]",
        "kye={key}",
        "{key}",
        "{bare}",
        "{bare}=1",
        "encryption.key=env:{key}",
        "key={half}=",
        "output=x=http://me:{half}@host",
    ],
)
def test_a_key_in_the_place_of_its_source_is_not_repeated(word: str) -> None:
    """32 bytes as base64 end in '=', which Hydra cannot read: it would be told of in an error."""
    key = base64.b64encode(bytes(range(100, 132))).decode()
    bare, half = key.rstrip("="), key[:20]
    with pytest.raises(UsageError) as caught:
        compose_settings("encryption", [word.format(key=key, bare=bare, half=half)], EncryptionCommand)
    assert half not in str(caught.value)
    assert "\n" not in str(caught.value)
