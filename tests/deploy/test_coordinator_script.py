"""The coordinator's start script: the same command begins a run, goes on with it, and ends at once when it is done."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import PATIENCE, Deployment, environment

SCRIPT = Path(__file__).parents[2] / "deploy" / "coordinator.sh"
GIVEN = [
    "address=0.0.0.0:9443",
    "workload.schema_file=/a b/schema.yaml",
    "rounds=3",
    "sites.wait=60",
    "encryption.key=env:KEY",
]


def _words(directory: Path, arguments: Sequence[str], **variables: str) -> tuple[int, list[str]]:
    """Exit code, and the command that the script becomes."""
    said = directory / "bin"
    said.mkdir(exist_ok=True)
    (said / "python").write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    (said / "python").chmod(0o755)
    done = subprocess.run(
        [SCRIPT, *arguments],
        env={"PATH": f"{said}:/usr/bin:/bin", **variables},
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout.splitlines()


def test_a_run_is_begun_with_all_that_is_given(tmp_path: Path):
    code, words = _words(tmp_path, GIVEN, FEDCLAW_FEDERATION="/f", FEDCLAW_RUN="heart")
    assert (code, words) == (0, ["-m", "fedclaw.server", "federation=/f", "runs=runs", "run=heart", *GIVEN])


def test_one_that_is_there_is_gone_on_with_as_it_was_begun(tmp_path: Path):
    (tmp_path / "kept" / "heart").mkdir(parents=True)
    code, words = _words(tmp_path, GIVEN, FEDCLAW_FEDERATION="/f", FEDCLAW_RUN="heart", FEDCLAW_RUNS="kept")
    again = ["address=0.0.0.0:9443", "sites.wait=60", "encryption.key=env:KEY"]
    assert (code, words) == (0, ["-m", "fedclaw.server", "federation=/f", "resume=kept/heart", *again])


@pytest.mark.parametrize("missing", ["FEDCLAW_FEDERATION", "FEDCLAW_RUN"])
def test_what_is_missing_is_named(missing: str, tmp_path: Path):
    variables = {"FEDCLAW_FEDERATION": "/f", "FEDCLAW_RUN": "heart"}
    del variables[missing]
    assert _words(tmp_path, [], **variables) == (2, [])


@pytest.mark.slow
def test_a_coordinator_that_is_killed_goes_on_where_it_was(deployment: Deployment):
    """kill -9 after the first round, and the same command again; then once more when the run is done."""
    command = Path(sys.executable).parent
    variables = environment() | {
        "PATH": f"{command}{os.pathsep}{os.environ['PATH']}",
        "FEDCLAW_FEDERATION": str(deployment.federation),
        "FEDCLAW_RUNS": str(deployment.runs),
        "FEDCLAW_RUN": "heart",
    }
    given = [f"workload.schema_file={deployment.schema}", "workload.model.name=logistic", "rounds=4", "tracking=none"]
    words = [SCRIPT, *given, "privacy.epsilon=4", "privacy.delta=1e-3", "sites.minimum=2"]
    for index in range(2):
        deployment.client(index)
    with (deployment.root / "coordinator.log").open("w") as log:
        first = subprocess.Popen(words, env=variables, stdout=log, stderr=log)
        metrics, until = deployment.runs / "heart" / "metrics.jsonl", time.monotonic() + PATIENCE
        while not (metrics.exists() and metrics.read_text()) and time.monotonic() < until and first.poll() is None:
            time.sleep(0.02)
        first.kill()
        first.wait()
        assert metrics.exists(), (deployment.root / "coordinator.log").read_text()
        assert subprocess.run(words, env=variables, stdout=log, stderr=log, timeout=PATIENCE).returncode == 0
    assert (deployment.runs / "heart" / "model.npz").is_file()
    done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0
    assert "is finished" in done.stdout
