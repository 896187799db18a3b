"""Processes that are killed, or end, before they answer: real ones, that do nothing else."""

import os
import signal
import sys
import time

import pytest

from fedclaw.errors import FedClawError
from fedclaw.serve.settings import NodeSettings, TlsSettings, TokenSettings
from fedclaw.serve.supervisor import TUNABLES, Ports, Supervisor, read_processes

PORTS = Ports(1, None, 2)


def answers(launch, ready):
    ready.set()
    time.sleep(60)


def killed_at_first(launch, ready):
    begun = launch.settings.state / launch.name
    if launch.number == 1 and not begun.exists():
        begun.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    answers(launch, ready)


def killed(launch, ready):
    os.kill(os.getpid(), signal.SIGKILL)


def ends(launch, ready):
    sys.exit(1)


@pytest.fixture
def supervise(tmp_path):
    made = []

    def start(worker):
        settings = NodeSettings(
            state=tmp_path,
            workers=2,
            ca=None,
            federation=None,
            crl=None,
            expired="accept",
            tls=TlsSettings(disabled=True),
            tokens=TokenSettings(disabled=True),
        )
        made.append(Supervisor(settings, PORTS, worker, answers))
        made[0].start()
        return {process["name"]: process for process in read_processes(tmp_path)}

    yield start
    made[0].stop()


def test_a_worker_that_is_killed_before_it_answers_does_not_end_the_node(supervise):
    processes = supervise(killed_at_first)
    assert {name: process["restarts"] for name, process in processes.items()} == {
        "control": 0,
        "worker-1": 1,
        "worker-2": 0,
    }
    assert all(process["pid"] for process in processes.values())


def test_one_that_is_killed_each_time_is_told_with_its_signal(supervise):
    with pytest.raises(FedClawError, match=r"worker-1 could not start: it was killed by SIGKILL, 5 times in a row"):
        supervise(killed)


def test_one_that_ends_by_itself_is_not_tried_again(supervise):
    with pytest.raises(FedClawError, match="worker-1 could not start: its own line above says why"):
        supervise(ends)


def tells_its_tunables(launch, ready):
    (launch.settings.state / launch.name).write_text(os.environ.get(TUNABLES, ""))
    answers(launch, ready)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=1", "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
def test_workers_begin_with_huge_pages_unless_the_operator_says_otherwise(
    supervise, tmp_path, monkeypatch, given, expected
):
    if given is None:
        monkeypatch.delenv(TUNABLES, raising=False)
    else:
        monkeypatch.setenv(TUNABLES, given)
    supervise(tells_its_tunables)
    assert {(tmp_path / name).read_text() for name in ("worker-1", "worker-2")} == {expected}
    assert os.environ.get(TUNABLES) == given
