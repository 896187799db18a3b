"""python -m fedclaw.transport.ray: what it needs, and a run from the command line, gone on with."""

import os
import socket
import time
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import numpy as np
import pytest

from experiments.datasets import DatasetSettings, SitePolicy, write_sites
from fedclaw.errors import UsageError
from fedclaw.learning.tasks.regression import Regression
from fedclaw.protocol.frozen import check_settings
from fedclaw.protocol.terms import RoundRules
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.session import initial_parameters, make_record
from fedclaw.server.settings import RunSettings
from fedclaw.site.journal.ledger import Ledger
from fedclaw.site.journal.reconciliation import ledger_file
from fedclaw.site.settings import load_site_settings
from fedclaw.transport.in_process import open_sites, simulate
from fedclaw.transport.ray import RaySettings, simulate_on_ray
from fedclaw.transport.ray.__main__ import main
from fedclaw.transport.ray.simulate import own_directory
from tests.conftest import Background, run_module


@pytest.fixture
def sites(tmp_path):
    policy = SitePolicy(epsilon=8.0, delta=1e-3)
    return write_sites(tmp_path, DatasetSettings(name="breast_cancer", sites=2), policy)


def test_a_run_has_books_of_its_own_and_the_sites_are_only_read(tmp_path, sites):
    before = load_site_settings(sites[0])
    root = own_directory(tmp_path / "run" / "sites", sites[0])
    assert root == tmp_path / "run" / "sites" / before.name
    mine = load_site_settings(root)
    assert mine.policy == before.policy
    assert mine.data.train.samefile(before.data.train)
    assert mine.schema_file.samefile(before.schema_file)
    assert own_directory(tmp_path / "run" / "sites", sites[0]) == root
    assert not (sites[0] / "state").exists()


def test_what_ray_is_asked_for():
    own = RaySettings(cpus=2, cpus_per_site=0.5).backend()
    assert own["init_args"]["num_cpus"] == 2
    assert own["client_resources"] == {"num_cpus": 0.5, "num_gpus": 0.0}
    given = RaySettings(address="head:6379").backend()
    assert given["init_args"]["address"] == "head:6379"
    assert "_node_ip_address" not in given["init_args"]


def test_a_directory_without_sites_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"holds a site\.yaml"):
        main(["federation=clinic", f"site_directories={tmp_path}"])


LOOPBACK = "127.0.0.1"


def listeners(root: int) -> set[str]:
    """The addresses that a process and its descendants listen on, as the kernel says."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    family = {root}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    sockets = set()
    for process in family:
        with suppress(OSError):
            for link in Path(f"/proc/{process}/fd").iterdir():
                with suppress(OSError):
                    sockets.add(str(link.readlink()))
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    listening = [line for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in sockets]
    return {address(line[1].partition(":")[0]) for line in listening}


def address(text: str) -> str:
    """An address of /proc/net/tcp or tcp6, which writes its words in the machine's byte order."""
    words = b"".join(bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8))
    found = ip_address(words)
    return str(getattr(found, "ipv4_mapped", None) or found)


def test_listeners_are_found():
    with socket.create_server((LOOPBACK, 0)), socket.create_server(("::", 0), family=socket.AF_INET6):
        assert {LOOPBACK, "::"} <= listeners(os.getpid())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_number_is_predicted_on_ray_as_in_this_process(tmp_path):
    """Every example in each step, so that nothing is drawn: the same parameters and the same errors, in days."""
    policy = SitePolicy(epsilon=None, delta=1e-3, allow_training_without_privacy=True, metrics=Regression.METRICS)
    sites = write_sites(tmp_path, DatasetSettings(name="diabetes", sites=2), policy)
    settings = check_settings(
        {
            "workload": {"name": "tabular", "schema_file": tmp_path / "schema.yaml", "model": {"name": "linear"}},
            "strategy": {"name": "fedavg"},
            "training": {"steps": 3, "batch_size": 1000, "learning_rate": 0.1},
            "privacy": None,
            "rounds": 2,
            "seed": 0,
            "metrics": ["rmse", "mae", "r2"],
        },
        RunSettings,
    )

    def begin(run: str) -> RunDirectory:
        record = make_record(settings, "clinic", run, RoundRules(minimum=2))
        return RunDirectory.create(tmp_path / "runs" / run, record)

    here = simulate(begin("here"), open_sites(sites, "clinic"))
    there = simulate_on_ray(begin("there"), sites, RaySettings(cpus=2, object_store=100 << 20))
    start = initial_parameters(there.directory.record())
    for name, array in here.parameters.items():
        np.testing.assert_allclose(there.parameters[name], array, atol=1e-5)
        assert np.abs(array - start[name]).max() > 0.01, "the run has gone somewhere"
    assert there.metrics == pytest.approx(here.metrics, rel=1e-5)
    assert set(there.metrics) == {"rmse", "mae", "r2"}
    assert there.metrics["rmse"] > 1, "in the target's own unit"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_from_the_command_line_is_gone_on_with_at_no_further_cost(tmp_path, sites):
    common = ("federation=clinic", f"site_directories={tmp_path / 'sites'}", "tracking=none", "ray.cpus=1")
    settings = (f"workload.schema_file={tmp_path / 'schema.yaml'}", "workload.model.name=logistic", "rounds=2")
    privacy = ("privacy.epsilon=4", "privacy.delta=1e-3")
    arguments = (*common, *settings, *privacy, f"runs={tmp_path / 'runs'}", "run=test")
    first = Background(tmp_path / "ray.log", "fedclaw.transport.ray", *arguments)
    heard: set[str] = set()
    while first.process.poll() is None:
        heard |= listeners(first.process.pid)
        time.sleep(0.3)
    assert first.process.returncode == 0, first.text()
    assert heard == {LOOPBACK}, "Ray knows no password, so nobody else may reach it"
    directory = RunDirectory.open(tmp_path / "runs" / "test")
    assert set(directory.read_receipts()) == {site.name for site in sites}
    finished = directory.read_model()
    # As after a crash in the second round, whose answers have been given.
    (directory.root / "model.npz").unlink()
    (directory.root / "checkpoint-0002.ckpt").unlink()
    resumed = run_module("fedclaw.transport.ray", *common, f"resume={directory.root}", timeout=400)
    assert resumed.code == 0, resumed.errors
    for name, array in directory.read_model().items():
        assert (array == finished[name]).all(), "the sites gave the very same answers"
    for site in sites:
        with Ledger.open(ledger_file(directory.root / "sites" / site.name), site.name) as ledger:
            assert ledger.rounds("test") == 2
