"""python -m fedclaw.runtime.ray: what it needs, and a run from the command line, gone on with."""

import pytest

from experiments.datasets import DatasetSettings, SitePolicy, write_sites
from fedclaw.errors import UsageError
from fedclaw.federation.run_directory import RunDirectory
from fedclaw.privacy.ledger import Ledger
from fedclaw.runtime.ray import RaySettings
from fedclaw.runtime.ray.__main__ import main
from fedclaw.runtime.ray.simulate import own_directory
from fedclaw.site.layout import ledger_file
from fedclaw.site.settings import load_site_settings
from tests.conftest import run_module


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


def test_a_cluster_of_this_machine_listens_on_loopback_only():
    own = RaySettings(cpus=2, cpus_per_site=0.5).backend()
    assert own["init_args"]["_node_ip_address"] == "127.0.0.1"
    assert own["init_args"]["num_cpus"] == 2
    assert own["client_resources"] == {"num_cpus": 0.5, "num_gpus": 0.0}
    given = RaySettings(address="head:6379").backend()
    assert given["init_args"]["address"] == "head:6379"
    assert "_node_ip_address" not in given["init_args"]


def test_a_directory_without_sites_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"holds a site\.yaml"):
        main(["federation=clinic", f"site_directories={tmp_path}"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_from_the_command_line_is_gone_on_with_at_no_further_cost(tmp_path, sites):
    common = ("federation=clinic", f"site_directories={tmp_path / 'sites'}", "tracking=none", "ray.cpus=1")
    settings = (f"workload.schema_file={tmp_path / 'schema.yaml'}", "workload.model.name=logistic", "rounds=2")
    privacy = ("privacy.epsilon=4", "privacy.delta=1e-3")
    arguments = (*common, *settings, *privacy, f"runs={tmp_path / 'runs'}", "run=test")
    done = run_module("fedclaw.runtime.ray", *arguments, timeout=400)
    assert done.code == 0, done.errors
    directory = RunDirectory.open(tmp_path / "runs" / "test")
    assert set(directory.read_receipts()) == {site.name for site in sites}
    finished = directory.read_model()
    # As after a crash in the second round, whose answers have been given.
    (directory.root / "model.npz").unlink()
    (directory.root / "checkpoint-0002.ckpt").unlink()
    resumed = run_module("fedclaw.runtime.ray", *common, f"resume={directory.root}", timeout=400)
    assert resumed.code == 0, resumed.errors
    for name, array in directory.read_model().items():
        assert (array == finished[name]).all(), "the sites gave the very same answers"
    for site in sites:
        with Ledger.open(ledger_file(directory.root / "sites" / site.name), site.name) as ledger:
            assert ledger.rounds("test") == 2
