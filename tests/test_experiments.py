"""Experiments in process: the defaults learn; the sites are dealt out as promised."""

import numpy as np
import pytest
import yaml
from sklearn.datasets import load_breast_cancer, load_digits

from experiments.datasets import SitePolicy, write_sites
from experiments.sources import DatasetSettings
from fedclaw.learning.registry import schema_class
from fedclaw.server.run_directory import RunDirectory
from tests.conftest import run_module


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
@pytest.mark.parametrize("epsilon", [2, 8])
def test_the_defaults_learn(tmp_path, strategy, epsilon):
    """The sweep of the README, at its full ten rounds."""
    arguments = (f"strategy={strategy}", f"privacy.epsilon={epsilon}", "run=x", "tracking=none")
    done = run_module("experiments.run", *arguments, cwd=tmp_path)
    assert done.code == 0, done.errors
    assert RunDirectory.open(tmp_path / "runs" / "x").read_metrics()[-1]["metrics"]["accuracy"] > 0.85


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("no_such=1",), "configuration: there is no setting no_such; see conf/ for those that there are"),
        (("-m", "strategy=no_such,fedavg"), "strategy=no_such: there is none of that name; there are: bulyan"),
        (("workload=vision",), "workload=vision: dataset=breast_cancer is for workload=tabular"),
    ],
)
def test_a_wrong_setting_of_an_experiment_is_one_line(tmp_path, arguments, words):
    done = run_module("experiments.run", *arguments, cwd=tmp_path)
    assert done.code == 2
    line, hint = done.errors.splitlines()
    assert line.startswith("experiments.run: ")
    assert words in line
    assert hint == "see python -m experiments.run --help"


@pytest.mark.parametrize(("name", "workload"), [("breast_cancer", "tabular"), ("digits", "vision")])
def test_sites_get_their_own_files_and_no_example_twice(tmp_path, name, workload):
    directories = write_sites(tmp_path, DatasetSettings(name=name, sites=4), SitePolicy(epsilon=1.0, delta=1e-3))
    schema = schema_class(workload).parse((tmp_path / "schema.yaml").read_text(), "schema.yaml")
    tables = [schema.read_examples(next((tmp_path / "public").glob("labelled.*")))]
    for directory in directories:
        assert yaml.safe_load((directory / "site.yaml").read_text())["name"] == directory.name
        tables += [schema.read_examples(next((directory / "data").glob(f"{part}.*"))) for part in ("train", "test")]
    public = schema.read_inputs(next((tmp_path / "public").glob("inputs.*")))
    rows = np.concatenate(
        [table.inputs.reshape(len(table), -1) for table in tables] + [public.reshape(len(public), -1)]
    )
    total = {"breast_cancer": 569, "digits": 1797}[name]
    assert len(rows) == total
    source = {"breast_cancer": load_breast_cancer, "digits": load_digits}[name]().data
    assert len(np.unique(rows, axis=0)) == len(np.unique(source, axis=0))
    label_shares = [np.bincount(table.targets, minlength=len(schema.labels)) / len(table) for table in tables[1::2]]
    assert np.abs(label_shares[0] - label_shares[1]).max() > 0.02, "the sites are alike"


def test_the_same_seed_deals_the_same_hand(tmp_path):
    files = []
    for number, seed in enumerate((1, 1, 2)):
        write_sites(tmp_path / str(number), DatasetSettings(name="digits", seed=seed), SitePolicy(1.0, 1e-3))
        with np.load(tmp_path / str(number) / "sites" / "hospital-east" / "data" / "train.npz") as archive:
            files.append(archive["labels"].tolist())
    assert files[0] == files[1] != files[2]
