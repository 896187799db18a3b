"""A partition's description and plot, and the command that shows both."""

import json

import numpy as np
import pytest

from experiments.datasets import DealSettings
from experiments.experiment import run_experiment
from experiments.partitions.dealing import deal_out
from experiments.partitions.description import describe, label_distances
from experiments.partitions.record import write_record
from experiments.settings import ExperimentSettings
from experiments.sources import DatasetSettings
from experiments.synthetic_images import SyntheticImages
from fedclaw.cli import compose_settings
from fedclaw.errors import UsageError
from fedclaw.simulation.partitions.base import Partition
from fedclaw.simulation.partitions.features import FeatureShift
from fedclaw.simulation.partitions.labels import Dirichlet, Shards
from fedclaw.simulation.partitions.sizes import Iid
from tests.conftest import run_module


def test_a_description_by_hand():
    """Three rows of label 0 to the first client, one of each label to the second: pooled 4 to 1."""
    hand = Partition(Iid(), np.array([0, 1, 2, 3, 4]), np.array([0, 3, 5]))
    found = describe(hand, np.array([0, 0, 0, 0, 1]), seed=7, dataset="made", labels=("no", "yes"))
    assert found.label_counts == ((3, 0), (1, 1))
    assert (found.clients, found.examples, found.seed, found.labels) == (2, 5, 7, ("no", "yes"))
    assert found.sizes["0"] == 2
    assert found.sizes["1"] == 3
    assert found.sizes["0.5"] == found.sizes["mean"] == 2.5
    assert found.labels_per_client["mean"] == 1.5
    # (|1 - 0.8| + |0 - 0.2|) / 2 and (|0.5 - 0.8| + |0.5 - 0.2|) / 2.
    assert label_distances(found).tolist() == pytest.approx([0.2, 0.3])
    assert found.total_variation["mean"] == 0.25
    assert found.total_variation["largest"] == 0.3
    assert found.settings == {"minimum": None, "name": "iid"}
    assert found.inputs is None


def test_an_iid_deal_is_as_unlike_as_chance_has_it():
    """A thousand clients of twenty rows are unlike; no more than by chance, which a Dirichlet deal is."""
    targets = np.arange(20_000) % 10
    found = [
        describe(method.deal(targets, np.zeros((20_000, 1)), 1000, np.random.default_rng(1)), targets).total_variation
        for method in (Iid(), Dirichlet(alpha=0.5))
    ]
    assert found[0]["mean"] > 0.2
    assert abs(found[0]["mean"] - found[0]["if_iid"]) < 0.01
    assert found[1]["mean"] > found[1]["if_iid"] + 0.1


def test_the_description_is_json_and_tells_the_settings(tmp_path):
    dataset = DatasetSettings(name="digits", seed=3)
    description = deal_out(dataset, FeatureShift(kind="rotation"), 5).describe()
    text, picture = write_record(description, tmp_path)
    content = json.loads(text.read_text())
    assert content["settings"]["kind"] == "rotation"
    assert (content["seed"], content["dataset"], content["clients"]) == (3, "digits", 5)
    assert content["inputs"]["levels"] == [-45, -22.5, 0, 22.5, 45]
    assert np.array(content["label_counts"]).sum() == content["examples"] == 1797 - 270
    assert len(text.read_text().splitlines()) < 100, "a line for each client, not for each number"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("labels", "clients", "method"),
    [
        (2, 1, Iid()),
        (10, 50, Dirichlet(alpha=0.1)),
        (10, 20, Dirichlet(alpha=0.001)),
        (12, 50, Shards()),
        (100, 51, Shards(shards=3)),
        (3, 300, FeatureShift()),
    ],
)
def test_partitions_of_any_shape_are_drawn(tmp_path, labels, clients, method):
    """One by one or as a map, with colours or with a scale; and the same plot again is the same file."""
    dataset = DatasetSettings(name="synthetic_images", synthetic=SyntheticImages(examples=2000, labels=labels))
    description = deal_out(dataset, method, clients).describe()
    _, first = write_record(description, tmp_path / "first")
    _, again = write_record(description, tmp_path / "again")
    assert first.read_bytes() == again.read_bytes()


def test_the_command_describes_and_plots(tmp_path):
    done = run_module(
        "experiments.partitions",
        "dataset=digits",
        "partition=dirichlet",
        "partition.alpha=0.1",
        "clients=23",
        f"output={tmp_path / 'out'}",
        cwd=tmp_path,
    )
    assert done.code == 0, done.errors
    assert "digits, dealt by dirichlet, alpha 0.1, seed 0" in done.output
    assert "and 3 more clients" in done.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["partition.json", "partition.png"]
    content = json.loads((tmp_path / "out" / "partition.json").read_text())
    assert content["clients"] == 23
    assert content["settings"] == {"minimum": None, "name": "dirichlet", "alpha": 0.1}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("partition=nobody",), "partition=nobody"),
        (("partition.alpha=0",), "partition.alpha"),
        (("partition=shards", "partition.shards=0"), "partition.shards"),
        (("partition=quantity", "partition.law=linear"), "partition.law"),
        (("partition=quantity", "partition.spread=-1"), "partition.spread"),
        (("partition=feature_shift", "partition.kind=brightness", "partition.strength=2"), "strength 2 is too large"),
        (("partition=natural", "partition.column=-1"), "partition.column"),
        (("partition=iid", "partition.minimum=0"), "partition.minimum"),
        (("dataset.alpha=1",), "dataset.alpha"),
        (("dataset.sites=101",), "dataset.sites"),
        (("dataset=synthetic_images", "dataset.synthetic.side=4"), "dataset.synthetic.side"),
        (("dataset=digits", "+dataset.synthetic.side=8"), "synthetic is for dataset=synthetic_images"),
    ],
)
def test_a_wrong_setting_is_named(overrides, words):
    with pytest.raises(UsageError) as caught:
        compose_settings("datasets", ("output=x", *overrides), DealSettings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["iid", "dirichlet", "shards", "quantity", "feature_shift", "natural"])
def test_each_choice_has_its_file_with_the_usual_settings(name):
    """conf/partition/NAME.yaml says what is used when nothing is said."""
    chosen = compose_settings("datasets", ("output=x", f"partition={name}"), DealSettings).partition
    assert chosen == type(chosen)()
    assert chosen.name == name


def test_a_run_keeps_what_was_dealt_to_whom(tmp_path):
    """In its directory and in its MLflow run; the sites by their names."""
    asked = ("partition=shards", "partition.shards=1", "dataset.sites=2", "workload.model.name=logistic")
    overrides = (*asked, "privacy=none", "rounds=1", "run=x", f"runs={tmp_path / 'runs'}")
    run_experiment(compose_settings("run", overrides, ExperimentSettings), quiet=True)
    content = json.loads((tmp_path / "runs" / "x" / "partition.json").read_text())
    assert content["settings"] == {"minimum": None, "name": "shards", "shards": 1}
    assert content["names"] == ["hospital-north", "hospital-east"]
    assert content["labels_per_client"]["1"] == 1
    logged = {path.name: path for path in (tmp_path / "runs" / "mlartifacts").rglob("partition.*")}
    for name in ("partition.json", "partition.png"):
        assert logged[name].read_bytes() == (tmp_path / "runs" / "x" / name).read_bytes()
