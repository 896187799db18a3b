"""Sites in process are given back what they had spent and kept when their run stopped."""

from types import SimpleNamespace

import pytest

from experiments.experiment import run_experiment
from experiments.settings import ExperimentSettings
from experiments.sweeps.resume import remember
from fedclaw.server.run_directory import RunDirectory
from fedclaw.transport.in_process import open_sites

PRIVATE = {"epsilon": 4.0, "delta": 1e-5, "max_grad_norm": 1.0}
IN_SHARES = {"unit": "example", "noise_by": "sites", "epsilon": 4.0, "delta": 1e-5, "clip": 1.0, "sample_rate": 0.5}


def settings(root, **changes):
    plain = {
        "workload": {"name": "tabular", "model": {"name": "logistic"}},
        "strategy": {"name": "fedavg"},
        "training": {"epochs": 1.0, "batch_size": 32, "learning_rate": 0.1},
        "privacy": PRIVATE,
        "rounds": 3,
        "seed": 1,
        "dataset": {"name": "breast_cancer", "sites": 3},
        "partition": {"name": "dirichlet", "alpha": 1.0},
        "runs": root,
        "run": "first",
        "tracking": {"uri": "none"},
    }
    return ExperimentSettings.model_validate(plain | changes)


@pytest.fixture(params=["its own noise", "noise in shares"])
def run(tmp_path, request):
    """A finished run, with noise at each site or in shares inside secure sums."""
    in_shares = {
        "privacy": None,
        "central": IN_SHARES,
        "secure": {"dropouts": 0.0, "corrupt": 0.0},
        "training": {"steps": 1, "batch_size": 32, "learning_rate": 0.1},
    }
    run_experiment(settings(tmp_path, **(in_shares if request.param == "noise in shares" else {})), quiet=True)
    directory = RunDirectory.open(tmp_path / "first")
    (data,) = (path for path in (tmp_path / "data").iterdir() if path.is_dir())
    return SimpleNamespace(directory=directory, sites=lambda: sites_of(data))


def sites_of(data):
    return open_sites(sorted((data / "sites").iterdir()), "experiments")


def spent(sites, directory):
    return {name: site.ledger.spent(1e-5, run="first") for name, site in sites.items()}


def receipts(directory):
    return {name: item.receipt.epsilon_run for name, item in directory.read_receipts().items()}


def test_ledgers_say_again_what_the_receipts_said(run):
    sites = run.sites()
    assert set(spent(sites, run.directory).values()) == {0.0}
    remember(sites, run.directory)
    assert spent(sites, run.directory) == pytest.approx(receipts(run.directory), rel=1e-9)
    assert {site.ledger.rounds("first") for site in sites.values()} == {3}
    assert max(receipts(run.directory).values()) <= 4


def test_a_round_of_which_nothing_is_known_is_charged_to_everybody(run):
    lines = run.directory.metrics_path.read_text().splitlines()
    run.directory.metrics_path.write_text("\n".join(lines[:2]) + "\n")
    unknown = {"metrics": {}, "answered": [], "declined": {}, "silent": [], "update_norm": 0.0}
    for change in (lambda: None, lambda: run.directory.append_metrics(3, unknown)):
        change()
        sites = run.sites()
        remember(sites, run.directory)
        assert {site.ledger.rounds("first") for site in sites.values()} == {3}
