"""An unmodified Flower app runs on this runtime, in real processes; a site survives kill -9."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedclaw.errors import UsageError
from fedclaw.protocol.message_identity import Envelope, rebuild
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.transport.grpc.apps import ClientAppHandler, load_app, run_server_app

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


@contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)])}
    command = [sys.executable, str(HERE / "app_process.py"), *arguments]
    started = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


def test_flowers_own_fedavg_over_three_processes(kit, tmp_path):
    directories = [kit.federation.site(name).root for name in ("site-a", "site-b")]
    out = tmp_path / "w.npy"
    with ExitStack() as stack:
        home = str(kit.federation.root / "federation")
        server = stack.enter_context(process("server", home, "127.0.0.1:0", str(out)))
        assert server.stdout is not None
        address = f"127.0.0.1:{int(server.stdout.readline())}"
        for directory, step, examples in zip(directories, ("1", "4"), ("300", "100"), strict=True):
            stack.enter_context(process("site", str(directory), address, step, examples))
        assert server.wait(90) == 0
    # Two rounds of (300 * 1 + 100 * 4) / 400 each.
    np.testing.assert_allclose(np.load(out), np.full(4, 3.5, dtype=np.float32))


def test_a_site_killed_in_mid_round_takes_part_after_its_restart(kit):
    grid = kit.grid()
    address = f"127.0.0.1:{grid.port}"
    directory = str(kit.federation.site("site-a").root)
    with process("site", directory, address, "1", "10") as doomed:
        assert grid.wait_for_sites(1, 60) == ("site-a",)
        doomed.send_signal(signal.SIGSTOP)
        replies = grid.send_and_receive([kit.message("site-a")], timeout=90)
        doomed.send_signal(signal.SIGKILL)
        doomed.wait(20)
    with process("site", directory, address, "1", "10"):
        assert len(list(replies)) == 1


def test_flowers_own_fedavg_with_sites_in_threads(kit, app, tmp_path):
    grid = kit.grid()
    for name, step, examples in (("site-a", 1.0, 1), ("site-b", 3.0, 1)):
        handler = ClientAppHandler(
            load_app("plain_flower_app:client_app", ClientApp), 1, {"step": step, "examples": examples}, {}
        )
        kit.link(name, grid.port, handler)
    assert len(grid.wait_for_sites(2, 20)) == 2
    out = tmp_path / "w.npy"
    run_server_app(load_app("plain_flower_app:server_app", ServerApp), grid, {"rounds": 3, "out": str(out)})
    np.testing.assert_allclose(np.load(out), np.full(4, 6.0, dtype=np.float32))


def test_state_lasts_within_a_run_and_errors_keep_their_text_at_home(app, kit, monkeypatch, caplog):
    handler = ClientAppHandler(load_app("plain_flower_app:client_app", ClientApp), 7, {"step": 1.0, "examples": 1}, {})

    def ask(kind: str, run_id: int = 1) -> Message:
        envelope = Envelope(run_id, "m", "", 1, 7, "1", kind, 0.0, 60.0)
        body = kit.content()
        body["arrays"]["w"] = body["arrays"]["w"]
        return handler.answer(rebuild(envelope, body))

    ask("train")
    ask("train")
    ask("train", run_id=2)
    done = {run: context.state["rounds"]["done"] for run, context in handler._contexts.items()}
    assert done == {1: 2, 2: 1}
    monkeypatch.setenv("FAIL_EVALUATION", "1")
    for kind in ("evaluate", "query"):
        reply = ask(kind)
        assert reply.error.code == RefusalCode.FAILED
        assert "secret" not in str(reply.error.reason)
    assert "secret of the site" in caplog.text


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("plain_flower_app", "not of the form module:attribute"),
        ("no_such_module_here:x", "cannot import no_such_module_here"),
        ("plain_flower_app:nothing", "nothing does not exist, expected a ClientApp"),
        ("plain_flower_app:not_an_app", "not_an_app is a int, expected a ClientApp"),
    ],
)
def test_an_app_that_cannot_be_loaded_gets_one_line(app, reference, problem):
    with pytest.raises(UsageError, match=problem) as failure:
        load_app(reference, ClientApp)
    assert "\n" not in str(failure.value)


def test_threads_of_a_stopped_grid_are_gone(kit):
    before = {thread.name for thread in threading.enumerate()}
    grid = kit.grid()
    kit.link("site-a", grid.port)
    grid.wait_for_sites(1, 20)
    kit.close()
    kit._closing.clear()
    kit.until(
        lambda: not [t for t in threading.enumerate() if t.name.startswith("fedclaw-") and t.name not in before],
        "all threads have ended",
    )
