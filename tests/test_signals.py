"""Ctrl-C and SIGTERM, at any moment: at once, in one line that says what to do next, and nothing is left running."""

import importlib.util
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedclaw.startup import descendants
from tests.commands import COMMANDS
from tests.conftest import Background, environment

LIMIT = 60.0

_SLOW_IMPORT = """
import os, pathlib, signal, sys, time
if os.environ.get("STOP_AT"):
    class Stop:
        def find_spec(self, name, path=None, target=None):
            if name == os.environ["STOP_AT"]:
                sys.meta_path.remove(self)
                os.kill(os.getpid(), int(os.environ["STOP_BY"]))
                time.sleep(0.01)
            return None
    sys.meta_path.insert(0, Stop())
"""
"""A sitecustomize that sends its own process a signal when it begins to import STOP_AT."""


def stop_while_importing(name: str, number: int, module: str, *arguments: str, directory: Path):
    """Run `python -m MODULE`, which is stopped in the midst of its imports."""
    (directory / "sitecustomize.py").write_text(_SLOW_IMPORT)
    values = environment() | {"STOP_AT": name, "STOP_BY": str(number)}
    values["PYTHONPATH"] = os.pathsep.join([str(directory), values["PYTHONPATH"]])
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env=values,
        cwd=directory,
        check=False,
    )


def assert_stopped(code: int, errors: str, number: int, module: str) -> None:
    assert code == 128 + number, errors
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith(f"{module}: ")]
    assert line.startswith(f"{module}: stopped; ")


@pytest.fixture
def start(tmp_path):
    """Start `python -m MODULE` in the background; what is left of it at the end is killed with all below it."""
    started = []

    def begin(module, *arguments):
        process = Background(tmp_path / f"{len(started)}.log", module, *arguments, fresh=True)
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.process.poll() is None:
            for child in [process.process.pid, *children_of(process.process.pid)]:
                os.kill(child, signal.SIGKILL)
            process.process.wait()


STARTING = [(module, (signal.SIGINT, signal.SIGTERM)[at % 2]) for at, module in enumerate(COMMANDS)]


@pytest.mark.parametrize(("module", "number"), STARTING)
def test_a_command_that_is_still_importing_stops_in_one_line(module, number, tmp_path):
    # The first library that every command imports; what is before it takes no time.
    done = stop_while_importing("pydantic", number, module, directory=tmp_path)
    assert_stopped(done.returncode, done.stderr, number, module)
    assert done.stderr.splitlines() == [f"{module}: stopped; nothing had begun: give the same command again"]
    assert not done.stdout


def test_a_signal_in_the_midst_of_torch_stops_at_once(tmp_path):
    done = stop_while_importing("torch", signal.SIGTERM, "experiments.run", "tracking=none", directory=tmp_path)
    assert_stopped(done.returncode, done.stderr, signal.SIGTERM, "experiments.run")
    assert not list(tmp_path.glob("runs/[!.]*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "library", ["typing_extensions", "hydra", "omegaconf", "pydantic_core", "yaml", "rich.console"]
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_stops_in_the_midst_of_every_import(module, number, library, tmp_path):
    done = stop_while_importing(library, number, module, "nonsense=1", directory=tmp_path)
    if done.returncode == 2:
        pytest.skip(f"{module} does not import {library} before it looks at its settings")
    assert_stopped(done.returncode, done.stderr, number, module)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_stops_whenever_the_signal_comes(module, number, tmp_path):
    """Right at its start, and every 50 ms after that, from outside."""
    for after in (0.06, 0.12, 0.2, 0.3, 0.45):
        words = [sys.executable, "-m", module]
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment(), cwd=tmp_path)
        time.sleep(after)
        process.send_signal(number)
        _, errors = process.communicate(timeout=LIMIT)
        if "Traceback" in errors:
            assert is_from_before_the_first_line(errors, module), errors
            continue
        # Before its first line Python itself may still be starting; after its last one, it has ended by itself.
        assert process.returncode in (128 + number, -number, 0, 2), errors


def is_from_before_the_first_line(errors: str, module: str) -> bool:
    """Whether a traceback is of Python's own start, or of what the module imports to be able to stop in one line.

    How soon that line is reached is the machine's affair.
    """
    found = importlib.util.find_spec(module)
    origin = Path(found.origin).with_name("__main__.py") if found.submodule_search_locations else Path(found.origin)
    lines = [line.strip() for line in origin.read_text(encoding="utf-8").splitlines()]
    begins = next(number for number, line in enumerate(lines, 1) if line.startswith(("begin(", "startup.begin(")))
    reached = re.findall(rf'File "{re.escape(str(origin))}", line ([0-9]+)', errors)
    return all(int(number) < begins for number in reached)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_server_in_mid_round_says_how_to_continue_and_mlflow_knows(deployment, number, start, tmp_path):
    clients = [deployment.client(0), deployment.client(1)]
    server = start(
        "fedclaw.server",
        f"federation={deployment.federation}",
        f"workload.schema_file={deployment.schema}",
        *(f"runs={tmp_path / 'runs'}", "run=test", "rounds=500", "workload.model.name=logistic"),
        *("privacy.epsilon=4", "privacy.delta=1e-3"),
    )
    server.wait_for_text("round   1/500")
    server.process.send_signal(number)
    assert_stopped(server.finish(), server.text(), number, "fedclaw.server")
    last = server.text().splitlines()[-1]
    assert last == f"fedclaw.server: stopped; continue with resume={tmp_path / 'runs' / 'test'}"
    assert statuses(tmp_path / "runs" / "mlflow.db") == ["KILLED"]
    for client in clients:
        client.process.send_signal(number)
    for client in clients:
        assert_stopped(client.finish(), client.text(), number, "fedclaw.client")


UNBROKEN = """
import os, signal
from fedclaw import startup
startup.begin("made"); startup.under_way()
try:
    with startup.unbroken():
        os.kill(os.getpid(), signal.SIGTERM)
        print("whole")
        {then}
    print("never")
except startup.Stopped as error:
    with startup.unbroken():
        print("and put away", error.code)
"""


@pytest.mark.parametrize("then", ["pass", "raise ValueError"])
def test_what_is_not_to_be_broken_off_ends_before_the_signal_is_raised(then):
    """A transaction with the store of metrics, which may keep its lock if it is left in the middle."""
    done = subprocess.run(
        [sys.executable, "-c", UNBROKEN.format(then=then)], capture_output=True, text=True, timeout=LIMIT
    )
    assert done.stdout.splitlines() == ["whole", "and put away 143"], done.stderr


SMALL = ("rounds=400", "training.steps=2", "training.epochs=null", "privacy=none", "workload.model.name=logistic")


@pytest.mark.parametrize(
    ("more", "runs"),
    [
        (("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), 3),
        pytest.param((), 2, marks=pytest.mark.slow),
        pytest.param(("hydra/launcher=submitit", "hydra.launcher.cluster=local"), 2, marks=pytest.mark.slow),
    ],
)
def test_a_sweep_that_is_stopped_is_killed_with_all_its_runs(more, runs, start, tmp_path):
    sweep = start("experiments.run", "-m", "strategy=fedavg,fedprox", *SMALL, *more, f"runs={tmp_path / 'runs'}")
    database = tmp_path / "runs" / "mlflow.db"
    sweep.wait_for(lambda: statuses(database).count("RUNNING") == runs, "had its runs at work")
    below = children_of(sweep.process.pid)
    sweep.process.send_signal(signal.SIGTERM)
    assert sweep.finish() == 143, sweep.text()
    assert "Traceback" not in sweep.text()
    last = sweep.text().splitlines()[-1]
    assert last == "experiments.run: stopped; give the same command again: a sweep goes on where it was"
    assert set(statuses(database)) == {"KILLED"}
    assert not [child for child in below if is_alive(child)]


def test_a_simulation_leaves_no_worker_behind(start, tmp_path):
    words = ("dataset.sites=8", "runtime=simulation", "runtime.workers=2", *SMALL, "tracking=none")
    run = start("experiments.run", *words, f"runs={tmp_path / 'runs'}", "run=x")
    run.wait_for_text("round   1/400")
    below = children_of(run.process.pid)
    assert len(below) == 2
    run.process.send_signal(signal.SIGINT)
    assert_stopped(run.finish(), run.text(), signal.SIGINT, "experiments.run")
    assert run.text().splitlines()[-1].endswith(f"continue with resume={tmp_path / 'runs' / 'x'}")
    assert not [child for child in below if is_alive(child)]


def test_only_what_is_below_is_found():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert child.pid in descendants()
        assert os.getppid() not in descendants()
    finally:
        child.kill()
        child.wait()


def statuses(database: Path) -> list[str]:
    """Of all runs in an MLflow store."""
    if not database.is_file():
        return []
    try:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as store:
            return [row[0] for row in store.execute("select status from runs")]
    except sqlite3.OperationalError:  # being made
        return []


def children_of(process: int) -> list[int]:
    """Process ids below `process`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == process and state != "Z":
            found += [int(path.parent.name), *children_of(int(path.parent.name))]
    return found


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
