"""On a machine without a card the suite and the benchmark say so in one line, and that is no failure."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import warm
from tests.conftest import environment

ROOT = Path(__file__).parents[2]
HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize(
    ("module", "said"), [("tests.cuda", "nothing to test"), ("experiments.benchmarks.cuda", "nothing to measure")]
)
def test_without_a_card_there_is_one_line(module, said):
    done = warm.run(["-m", module], env=environment() | HIDDEN, cwd=ROOT, timeout=200)
    assert done.returncode == 0
    (line,) = (done.stdout + done.stderr).splitlines()
    assert line == f"No CUDA device that torch {torch.__version__} can use here: {said}."


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_says_it_in_one_line(tmp_path):
    """With an environment that has all that is needed, as from the second time on."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    for stamp in (".dev", ".demo"):
        (tmp_path / stamp).touch()
    done = subprocess.run(
        ["make", "--no-print-directory", f"VENV={tmp_path}", "test-cuda"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")} | HIDDEN,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    (line,) = (done.stdout + done.stderr).splitlines()
    assert line.endswith("nothing to test.")
