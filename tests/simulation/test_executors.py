"""Worker processes on systems that cannot fork, or not safely."""

import multiprocessing
import sys

import pytest

from fedclaw.errors import UsageError
from fedclaw.simulation.executors import ProcessPoolExecutor


def test_a_system_without_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(UsageError, match=r"by a fork, which this system lacks; say runtime\.workers=1"):
        ProcessPoolExecutor(None, 2, 8)


def test_macos_has_a_fork_that_its_libraries_do_not_survive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UsageError, match=r"by a fork, which is not safe on macOS; say runtime\.workers=1"):
        ProcessPoolExecutor(None, 2, 8)
