"""Several processes that share one card: those of a table's cells, and Ray's actors."""

import numpy as np
import pytest
import torch

from experiments.datasets import DatasetSettings, SitePolicy, write_sites
from experiments.workers import in_workers
from fedclaw.protocol.frozen import check_settings
from fedclaw.protocol.terms import RoundRules
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.session import initial_parameters, make_record
from fedclaw.server.settings import RunSettings
from fedclaw.site.device import choose_device
from fedclaw.transport.in_process import open_sites, simulate
from fedclaw.transport.ray import RaySettings, simulate_on_ray
from tests.cuda.conftest import SAME_MODEL, apart
from tests.cuda.test_steps import clipped_sum, distance

pytestmark = pytest.mark.slow


def one_sum(mode, wanted):
    """A private step in a process of its own."""
    device = choose_device(wanted)
    sums = clipped_sum("convolution", mode, device)
    return device.type, [own.cpu().numpy() for own in sums]


def test_several_processes_train_on_one_card(wanted, device):
    """Each opens the card for itself, while this process has it open too."""
    mine = clipped_sum("convolution", "vmap", device)
    found = dict(in_workers(one_sum, ["vmap", "bookkeeping", "opacus"], 2, wanted))
    assert sorted(found) == [0, 1, 2]
    for kind, sums in found.values():
        assert kind == device.type
        assert distance([torch.from_numpy(own) for own in sums], mine) < 5e-5


@pytest.mark.timeout(900)
def test_sites_share_a_card_on_ray(tmp_path, wanted):
    """Two actors, each with half of it: the model that the sites come to in this process, one after the other."""
    policy = SitePolicy(epsilon=None, delta=1e-3, allow_training_without_privacy=True)
    sites = write_sites(tmp_path, DatasetSettings(name="breast_cancer", sites=2), policy)
    for site in sites:
        (site / "site.yaml").write_text((site / "site.yaml").read_text() + f"device: {wanted}\n")
    settings = check_settings(
        {
            "workload": {"name": "tabular", "schema_file": tmp_path / "schema.yaml", "model": {"name": "logistic"}},
            "strategy": {"name": "fedavg"},
            "training": {"steps": 3, "batch_size": 1000, "learning_rate": 0.1},
            "privacy": None,
            "rounds": 2,
            "seed": 0,
        },
        RunSettings,
    )
    record = make_record(settings, "clinic", "shared", RoundRules(minimum=2))
    alone = simulate(RunDirectory.create(tmp_path / "alone", record), open_sites(sites, "clinic"))
    share = 0.5 if wanted == "cuda" else 0.0
    directory = RunDirectory.create(tmp_path / "shared", record)
    together = simulate_on_ray(directory, sites, RaySettings(cpus=2, gpus_per_site=share, object_store=100 << 20))
    assert apart(together.parameters, alone.parameters) < SAME_MODEL
    assert apart(together.parameters, initial_parameters(record)) > 0.01
    assert all(np.isfinite(own).all() for own in together.parameters.values())
