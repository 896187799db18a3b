"""One federation on each of FedClaw's runtimes, started for real: what is compared must differ in nothing else.

Each runtime gets site directories of its own with the same data, and runs the record that `record_of` makes of the
settings: the same strategy, seed, initial parameters and rules. A runtime is a context manager that yields a function
from settings to the finished run's directory.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from experiments.datasets import DatasetSettings, SitePolicy, write_sites
from fedclaw.identity import provisioning
from fedclaw.identity.site_home import SiteKeys
from fedclaw.protocol.message_identity import assume_server_identity, number_of
from fedclaw.protocol.terms import RoundRules
from fedclaw.server.coordinator import run_rounds
from fedclaw.server.run_directory import RunDirectory, RunRecord
from fedclaw.server.session import initial_parameters, make_record
from fedclaw.site.directory import open_service
from fedclaw.site.settings import load_site_settings
from fedclaw.transport.flower.server import read_settings
from fedclaw.transport.grpc.grid import GrpcGrid
from fedclaw.transport.grpc.site_connection import SiteConnection
from fedclaw.transport.in_process import open_sites, simulate
from fedclaw.transport.ray import RaySettings, simulate_on_ray
from tests.conftest import environment
from tests.ports import free_port

FEDERATION = "clinic"
SITES = 3
PATIENCE = 600.0
APP = Path(__file__).parent.parent.parent / "experiments" / "flower_app"

Config = Mapping[str, str | int | float]
Run = Callable[[Config], RunDirectory]


def deal(root: Path) -> tuple[Path, ...]:
    """The same three sites, whoever asks; they let a run in with noise of their own or without."""
    policy = SitePolicy(epsilon=None, delta=1e-3, allow_training_without_privacy=True)
    return write_sites(root, DatasetSettings(name="breast_cancer", sites=SITES), policy)


def config_of(root: Path, run: str, settings: str) -> Config:
    """A run's configuration, as `flwr run` would be given it. Everything else is a default."""
    common = "workload.model.name=logistic tracking=none sites.minimum=3 sites.deadline=300"
    return {
        "federation": FEDERATION,
        "runs": str(root / "runs"),
        "run": run,
        "rounds": 3,
        "workload.schema_file": str(root / "schema.yaml"),
        "settings": f"{common} {settings}",
    }


def record_of(config: Config) -> RunRecord:
    settings = read_settings(config)
    rules = RoundRules(**settings.sites.model_dump(include=set(RoundRules.model_fields)))
    return make_record(settings, settings.federation, settings.run, rules)


def begin(config: Config) -> RunDirectory:
    return RunDirectory.create(Path(str(config["runs"])) / str(config["run"]), record_of(config))


@contextmanager
def local(root: Path, sites: tuple[Path, ...]) -> Iterator[Run]:
    services = open_sites(sites, FEDERATION)

    def run(config: Config) -> RunDirectory:
        return simulate(begin(config), services).directory

    yield run


@contextmanager
def grpc(root: Path, sites: tuple[Path, ...]) -> Iterator[Run]:
    """Certificates, TLS, sealed updates and streams; server and sites in threads of this process."""
    home = provisioning.initialise(root / "federation", FEDERATION, "127.0.0.1:9443")
    for site in sites:
        request = provisioning.request_site(site, root / "federation" / "federation.json", site.name)
        provisioning.accept(site, provisioning.approve(root / "federation", request))

    def run(config: Config) -> RunDirectory:
        directory = begin(config)
        run_id = number_of(str(config["run"]))
        assume_server_identity(run_id)
        with GrpcGrid(home, address="127.0.0.1:0", run_id=run_id) as grid, ExitStack() as links:
            for site in sites:
                links.enter_context(_linked(site, grid.port))
            assert len(grid.wait_for_sites(SITES, 30)) == SITES
            return run_rounds(grid, directory, initial_parameters(directory.record())).directory

    yield run


@contextmanager
def _linked(site: Path, port: int) -> Iterator[None]:
    keys = SiteKeys.open(site)
    service = open_service(site, load_site_settings(site), FEDERATION, keys=keys)
    link, stop = SiteConnection(keys, service, site / "state", address=f"127.0.0.1:{port}"), threading.Event()
    thread = threading.Thread(target=link.run, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        service.ledger.close()


@contextmanager
def ray(root: Path, sites: tuple[Path, ...]) -> Iterator[Run]:
    def run(config: Config) -> RunDirectory:
        return simulate_on_ray(begin(config), sites, RaySettings(cpus=2, object_store=100 << 20)).directory

    yield run


@contextmanager
def flower(root: Path, sites: tuple[Path, ...]) -> Iterator[Run]:
    """A SuperLink, a SuperNode for each site, and `flwr run`: Flower's own commands as processes.

    --insecure: the wires are loopback, and what is tested is not Flower's TLS.
    """
    port = free_port()
    home = root / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    with ExitStack() as started:

        def start(name: str, *arguments: str) -> "subprocess.Popen[bytes]":
            return started.enter_context(_flower(home, root / f"{name}.log", *arguments))

        start("link", "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port), NO_INSTALL)
        _listening(port)
        for site in sites:
            node = f'site="{site}" federation="{FEDERATION}"'
            here = ("--insecure", "--superlink", f"127.0.0.1:{port}", "--port", str(free_port()))
            start(site.name, "flower-supernode", *here, "--node-config", node)

        def run(config: Config) -> RunDirectory:
            pairs = " ".join(
                f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}" for key, value in config.items()
            )
            submitted = start("run", "flwr", "run", str(APP), "here", "--stream", "--run-config", pairs)
            root_of = Path(str(config["runs"])) / str(config["run"])
            end = time.monotonic() + PATIENCE
            while not (root_of / "model.npz").exists():
                assert time.monotonic() < end, _logs(root)
                assert submitted.poll() in (None, 0), _logs(root)
                time.sleep(0.5)
            directory = RunDirectory.open(root_of)
            record = directory.record()
            made = {"created": record.created, "software": record.software}
            assert record.software is not None
            expected = record_of(config).model_copy(update=made)
            assert record == expected, "it ran what the others ran"
            return directory

        yield run


NO_INSTALL = "--disable-runtime-dependency-installation"


@contextmanager
def _flower(home: Path, log: Path, command: str, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    """One of Flower's commands, with the processes that it starts, until the end."""
    scripts = Path(sys.executable).parent
    variables = environment() | {"FLWR_HOME": str(home), "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    with log.open("ab") as file:
        process = subprocess.Popen(
            [str(scripts / command), *arguments], stdout=file, stderr=file, env=variables, start_new_session=True
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _listening(port: int) -> None:
    import socket

    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("the SuperLink does not listen")


def _logs(root: Path) -> str:
    return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in root.glob("*.log"))


RUNTIMES: dict[str, Callable[[Path, tuple[Path, ...]], AbstractContextManager[Run]]] = {
    "local": local,
    "grpc": grpc,
    "ray": ray,
    "flower": flower,
}
