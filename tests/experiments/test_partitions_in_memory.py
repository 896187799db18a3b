"""The same deal on disk and in memory, and the images that are made for it."""

import numpy as np
import pytest

from experiments.datasets import SitePolicy, write_sites
from experiments.partitions.in_memory import in_memory
from experiments.sources import DatasetSettings
from experiments.synthetic_images import SyntheticImages, make_images
from fedclaw.learning.registry import schema_class
from fedclaw.simulation.partitions.features import FeatureShift
from fedclaw.simulation.partitions.labels import Dirichlet, Shards
from fedclaw.simulation.partitions.natural import Natural
from fedclaw.simulation.partitions.sizes import Iid

SMALL = SyntheticImages(examples=1500, writers=3)
CASES = [
    (DatasetSettings(name="breast_cancer", sites=3), Dirichlet()),
    (DatasetSettings(name="breast_cancer", sites=3, test=0), FeatureShift()),
    (DatasetSettings(name="digits", sites=5), Shards(shards=2)),
    (DatasetSettings(name="digits", sites=2), FeatureShift(kind="rotation")),
    (DatasetSettings(name="synthetic_images", sites=3, synthetic=SMALL), Natural()),
    (DatasetSettings(name="synthetic_images", sites=2, synthetic=SMALL), FeatureShift(kind="brightness")),
]


@pytest.mark.parametrize(("dataset", "method"), CASES, ids=lambda item: getattr(item, "label", item.name))
def test_memory_holds_what_sites_read_from_disk(tmp_path, dataset, method):
    """Row for row: each site's training and test examples, as its own code reads and standardises them."""
    directories = write_sites(tmp_path, dataset, SitePolicy(1.0, 1e-3), method)
    found = in_memory(dataset, method, dataset.sites)
    schema = schema_class(found.workload).parse((tmp_path / "schema.yaml").read_text(), "schema.yaml")
    assert found.schema.to_json() == schema.to_json()
    for client, directory in enumerate(directories):
        for part, rows in (("train", found.shares[client]), ("test", found.tests[client])):
            files = list((directory / "data").glob(f"{part}.*"))
            assert bool(files) == bool(len(rows))
            if files:
                read = schema.read_examples(files[0])
                assert np.array_equal(read.targets, found.table.targets[rows])
                assert np.allclose(read.inputs, found.table.inputs[rows], atol=1e-6)
    labelled = schema.read_examples(next((tmp_path / "public").glob("labelled.*")))
    assert np.array_equal(labelled.targets, found.public.targets[-len(labelled) :])
    assert np.allclose(labelled.inputs, found.public.inputs[-len(labelled) :], atol=1e-6)


def test_data_is_held_once_and_clients_are_consecutive():
    found = in_memory(DatasetSettings(name="digits", public=0.2, test=0), Dirichlet(alpha=0.5, minimum=4), 100)
    assert len(found.shares) == 100
    assert np.array_equal(np.concatenate(found.shares), np.arange(len(found.table)))
    assert min(len(share) for share in found.shares) >= 4
    assert all(len(rows) == 0 for rows in found.tests)
    assert len(found.public) == round(0.2 * 1797)
    assert found.table.inputs.dtype == np.float32
    assert found.table.inputs.shape == (1797 - len(found.public), 1, 8, 8)
    assert found.description.clients == 100
    counts = [np.bincount(found.table.targets[share], minlength=10).tolist() for share in found.shares]
    assert [list(row) for row in found.description.label_counts] == counts


def test_a_client_with_two_rows_has_one_to_train_on():
    found = in_memory(DatasetSettings(name="digits", test=0.8), Iid(), 700)
    assert {len(share) for share in found.shares} == {1}
    assert {len(rows) for rows in found.tests} <= {1, 2}


def test_ten_thousand_clients_are_dealt_images():
    dataset = DatasetSettings(name="synthetic_images", synthetic=SyntheticImages(examples=60_000), test=0)
    found = in_memory(dataset, Dirichlet(alpha=0.3, minimum=2), 10_000)
    assert min(len(share) for share in found.shares) >= 2
    assert sum(len(share) for share in found.shares) == len(found.table) == 51_000


@pytest.mark.parametrize("side", [8, 28])
def test_made_images_are_those_of_their_settings(side):
    wanted = SyntheticImages(examples=1003, side=side, labels=7, writers=5)
    first, again = make_images(wanted), make_images(wanted)
    other = make_images(wanted.model_copy(update={"seed": 1}))
    assert first.images.shape == (1003, side, side)
    assert first.images.dtype == np.uint8
    assert np.array_equal(first.images, again.images)
    assert not np.array_equal(first.images, other.images)
    counts = np.bincount(first.targets, minlength=7)
    assert counts.max() - counts.min() <= 1
    assert set(first.writers.tolist()) == set(range(5))


def test_made_images_can_be_learnt():
    """Nearest neighbours, of 4,000 images, tell ten labels apart; with the labels shuffled, they cannot."""
    from sklearn.neighbors import KNeighborsClassifier

    made = make_images(SyntheticImages(examples=5000))
    flat, shuffled = made.images.reshape(5000, -1) / 255, np.random.default_rng(0).permutation(made.targets)
    scores = [
        KNeighborsClassifier(3).fit(flat[:4000], targets[:4000]).score(flat[4000:], targets[4000:])
        for targets in (made.targets, shuffled)
    ]
    assert scores[0] > 0.85
    assert scores[1] < 0.2


def test_more_noise_is_harder():
    clean, noisy = (make_images(SyntheticImages(examples=500, noise=noise)).images for noise in (0.0, 0.5))
    assert len(np.unique(clean.reshape(500, -1), axis=0)) < len(np.unique(noisy.reshape(500, -1), axis=0))
    assert np.abs(noisy.astype(float) - clean).std() > 20
