"""The suite on a second device that computes as the CPU does: nothing is left behind on the CPU."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import environment

ROOT = Path(__file__).parents[2]
NEEDED = shutil.which("ninja"), shutil.which("c++") or shutil.which("g++")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(None in NEEDED, reason="no C++ compiler, or no ninja")
def test_the_suite_passes_on_a_second_device(tmp_path):
    """Slow, for it is compiled first."""
    words = ["-p", "tests.cuda.second_device", "--device", "second:0", "-p", "no:cacheprovider", "-q", "-x"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "-m", "not slow", "tests/cuda"],
        cwd=ROOT,
        env=environment() | {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
