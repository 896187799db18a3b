"""Real processes, real directories: what the tests of the entry points share."""

import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from experiments.datasets import DatasetSettings, SitePolicy, write_sites
from fedclaw.identity import provisioning
from fedclaw.protocol.message_identity import assume_server_identity
from tests import warm
from tests.ports import free_port
from tests.tokens import Token, make_token

pytest_plugins = ["tests.bundles"]

FEDERATION = "clinic"
PATIENCE = 200.0
"""Seconds after which a process that should have ended, or a line that should have come, is given up: it hangs."""


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell's background job is deaf to Ctrl-C, and so would be all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, or (`--hypothesis-profile explore`) others in each. Neither looks at a clock.
_UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeatable", _UNHURRIED, derandomize=True, print_blob=True)
settings.register_profile("explore", _UNHURRIED, derandomize=False, print_blob=True)
settings.load_profile("repeatable")


def pytest_sessionstart() -> None:
    """Messages can be made in any test, whichever of them comes first in its worker."""
    assume_server_identity(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the suite in tests/cuda computes: cpu, or cuda")


def pytest_configure(config: pytest.Config) -> None:
    """A card is for the suite that asks for one: all other tests, and what they start, see none."""
    if config.getoption("--device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts processes, which lies at the top, comes first: two workers then end at about the same time."""
    items.sort(key=lambda item: len(item.path.parts))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A test that draws without a seed, or a fixture that it is first to use, draws the same in every run and order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def token(tmp_path_factory: pytest.TempPathFactory) -> Token:
    """A token of SoftHSM2. A process loads it once, so all tests share it, each with names of its own."""
    made = make_token(tmp_path_factory.mktemp("token"))
    os.environ.update(made.environment)
    return made


@dataclass
class Command:
    """A finished command: its exit code and all that it wrote."""

    code: int
    output: str
    errors: str

    @property
    def lines(self) -> list[str]:
        """What it wrote to stderr, without the line that says what it loads."""
        return [line for line in self.errors.strip().splitlines() if " INFO    loading " not in line]


def run_module(module: str, *arguments: str | Path, cwd: Path | None = None, timeout: float = PATIENCE) -> Command:
    """Run `python -m MODULE` to its end."""
    done = warm.run(["-m", module, *arguments], env=environment(), cwd=cwd, timeout=timeout)
    return Command(done.returncode, done.stdout, done.stderr)


def environment() -> dict[str, str]:
    """This process's environment, with the project's root importable and one thread a process."""
    root = str(Path(__file__).parent.parent)
    return os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


class Background:
    """A process in the background that writes to a file."""

    def __init__(self, log: Path, module: str, *arguments: str | Path, fresh: bool = False) -> None:
        """`fresh`: started by the system and not by `tests.warm`."""
        self.log = log
        words, env = ["-m", module, *map(str, arguments)], environment()
        self.process: warm.Warm | subprocess.Popen[bytes]
        with log.open("ab") as file:
            if fresh:
                self.process = subprocess.Popen([sys.executable, *words], stdout=file, stderr=file, env=env)
            else:
                self.process = warm.start(words, stdout=file, stderr=file, env=env)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until `condition` holds; fail with the log when it does not, or the process ends before."""
        end = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None and not condition():
                pytest.fail(f"ended with {self.process.returncode} before {what}:\n{self.text()}")
            if time.monotonic() > end:
                pytest.fail(f"never {what}:\n{self.text()}")
            time.sleep(0.02)

    def wait_for_text(self, text: str) -> None:
        self.wait_for(lambda: text in self.text(), f"wrote {text!r}")

    def finish(self) -> int:
        """Wait for the end and return the exit code."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            pytest.fail(f"did not end:\n{self.text()}")

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM."""
        self.process.terminate()
        return self.finish()


@dataclass
class Deployment:
    """A provisioned federation with sites' directories, and a way to start its processes."""

    root: Path
    federation: Path
    sites: tuple[Path, ...]
    background: list[Background]
    fresh: bool = False

    @property
    def schema(self) -> Path:
        return self.root / "schema.yaml"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    def client(self, index: int, *arguments: str) -> Background:
        site = self.sites[index]
        return self._start(site.name, "fedclaw.client", f"site={site}", *arguments)

    def server(self, *arguments: str) -> Background:
        common = (f"federation={self.federation}", f"runs={self.runs}", "tracking=none")
        return self._start("server", "fedclaw.server", *common, *arguments)

    def new_run(self, *arguments: str) -> Background:
        defaults = (f"workload.schema_file={self.schema}", "workload.model.name=logistic", "run=test", "rounds=3")
        privacy = ("privacy.epsilon=4", "privacy.delta=1e-3")
        return self.server(*defaults, *privacy, f"sites.minimum={len(self.sites)}", *arguments)

    def _start(self, name: str, module: str, *arguments: str) -> Background:
        log = self.root / f"{name}-{len(self.background)}.log"
        process = Background(log, module, *arguments, fresh=self.fresh)
        self.background.append(process)
        return process


@contextmanager
def deploy(
    root: Path, sites: int, policy: SitePolicy, dataset: Literal["breast_cancer", "diabetes"] = "breast_cancer"
) -> Iterator[Deployment]:
    """Provision a federation under `root` and stop all of its processes at the end."""
    directories = write_sites(root, DatasetSettings(name=dataset, sites=sites), policy)
    federation = root / "federation"
    provisioning.initialise(federation, FEDERATION, f"127.0.0.1:{free_port()}")
    for directory in directories:
        request = provisioning.request_site(directory, federation / "federation.json", directory.name)
        provisioning.accept(directory, provisioning.approve(federation, request))
    deployment = Deployment(root, federation, directories, [])
    try:
        yield deployment
    finally:
        for process in deployment.background:
            if process.process.poll() is None:
                process.kill()


@pytest.fixture(autouse=True)
def _plain_logging() -> None:
    """What ran in this process before, a command or a fixture, may have set logging up: each test finds it plain.

    Libraries that read a logging configuration also switch off all loggers that are there already.
    """
    known = logging.root.manager.loggerDict
    for name in [name for name in known if name.partition(".")[0] in ("fedclaw", "experiments")]:
        logger = logging.getLogger(name)
        logger.setLevel(logging.NOTSET)
        logger.disabled, logger.propagate, logger.handlers = False, True, []


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    """Two sites with a budget of epsilon 8."""
    with deploy(tmp_path, 2, SitePolicy(epsilon=8.0, delta=1e-3)) as made:
        yield made
