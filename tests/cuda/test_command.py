"""On a machine without a card the suite and the benchmark say so in one line, and that is no failure."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.benchmarks.cuda import FIGURES
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


@pytest.mark.slow
def test_the_benchmark_prints_a_figure_for_each_way(wanted):
    done = warm.run(["-m", "experiments.benchmarks.cuda", "quick", f"device={wanted}"], env=environment(), timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {*FIGURES, "reference", "device"}
    assert found["private"].keys() == {f"cnn_6k_{mode}" for mode in ("auto", "bookkeeping", "opacus", "vmap")}
    assert found["by_opacus"]["cnn_6k_opacus"] == 1.0
    assert found["simulation"].keys() == {"mlp_many", "mlp_one"}
    ratios = [ratio for name in FIGURES for ratio in found[name].values()]
    assert min(ratios) > 0
