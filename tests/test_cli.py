"""What a person sees who makes a mistake: one clear line, the right exit code, no traceback."""

import subprocess
import sys

import pytest

from fedclaw.cli import compose_settings, split
from fedclaw.errors import UsageError
from fedclaw.server import ServerSettings
from tests.conftest import environment, run_module

ENTRY_POINTS = ["server", "client", "provision", "compress", "export", "verify", "predict"]


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
    one_line(run_module("fedclaw.server", f"federation={tmp_path / 'nowhere'}"), 1, "nowhere")
    one_line(run_module("fedclaw.server", "federation=x", "strategy=fedbest"), 2, "fedbest")
    one_line(run_module("fedclaw.server", "federation=x", "rounds=many"), 2, "rounds", "'many'")
    one_line(run_module("fedclaw.server", "federation=x", "training.bath_size=3"), 2, "bath_size")
    one_line(run_module("fedclaw.server", "--rounds=3"), 2, "--rounds=3", "key=value")
    one_line(run_module("fedclaw.server", "start", "federation=x"), 2, "start")


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


def test_words_and_overrides_are_told_apart():
    line = split(["check", "site=a=b", "~privacy"])
    assert line.words == ("check",)
    assert line.overrides == ("site=a=b", "~privacy")


def test_only_what_cannot_change_a_run_is_taken_on_resume(deployment):
    one_line(
        run_module("fedclaw.server", f"federation={deployment.federation}", "resume=runs/x", "privacy.epsilon=9"),
        2,
        "privacy.epsilon",
        "resume",
    )
    one_line(
        run_module("fedclaw.server", f"federation={deployment.federation}", "resume=runs/x"), 2, "runs/x", "run.json"
    )


def test_check_explains_the_policy_and_connects_to_nobody(deployment):
    done = run_module("fedclaw.client", f"site={deployment.sites[0]}", "check")
    assert done.code == 0, done.errors
    assert "epsilon 8" in done.output
    assert "Training without differential privacy is refused" in done.output


def test_a_second_client_on_the_same_site_is_refused(deployment):
    first = deployment.client(0)
    first.wait_for_text("serves federation")
    one_line(run_module("fedclaw.client", f"site={deployment.sites[0]}"), 2, "already running")


def test_nothing_below_the_entry_points_needs_hydra():
    """A server loop in somebody else's program brings no command line with it."""
    program = """
import importlib, sys
for name in ("federation.session", "report.terminal", "report.tracking", "site.directory", "runtime.grpc"):
    importlib.import_module(f"fedclaw.{name}")
from fedclaw.federation.coordinator import make_strategy
from types import SimpleNamespace as Record
make_strategy(Record(strategy=Record(name="fedavg", settings={})))
assert not {"hydra", "omegaconf", "fedclaw.cli"} & set(sys.modules), sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
