"""A federation, finished runs of both workloads, and bundles exported from them; made once for all tests."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedclaw.export.bundle import Request, export_bundle
from fedclaw.export.source import Source, load_source
from fedclaw.identity.federation_home import FederationHome
from fedclaw.identity.provisioning import initialise
from fedclaw.learning.registry import schema_class, workload_class
from fedclaw.privacy.statistics import Records
from fedclaw.protocol.terms import LocalTraining, ModelSpec
from fedclaw.server.run_directory import RunDirectory, SiteReceipt
from fedclaw.server.statistics_release import Release
from tests.samples import receipt, run_record, statistics_release

FEDERATION = "test-federation"

TABLE = {
    "columns": [
        {"name": "age", "kind": "numeric", "center": 50, "scale": 20, "range": [0, 120]},
        {"name": "smoker", "kind": "boolean"},
        {"name": "ward", "kind": "categorical", "levels": ["surgery", "medicine"]},
    ],
    "target": {"name": "outcome", "labels": ["benign", "malignant"]},
}
IMAGES = {"shape": [1, 8, 8], "labels": ["zero", "one", "two"], "mean": [0.5], "std": [0.25]}

RECEIPT = receipt()


PRIVATE = {
    "north": SiteReceipt(examples=120, receipt=RECEIPT),
    "south": SiteReceipt(examples=80, receipt=receipt(epsilon_run=1.5, delta=2e-5)),
}


def make_run(
    root: Path, workload: str, definition: Mapping[str, object], spec: ModelSpec, **changes: Any
) -> RunDirectory:
    """A finished run with a model of random parameters; `changes` are in its record."""
    schema = schema_class(workload).parse(json.dumps(definition), "test schema")
    record = run_record(
        run=root.name,
        federation=FEDERATION,
        workload=workload,
        schema_text=schema.to_json(),
        model=spec,
        rounds=3,
        training=LocalTraining(epochs=1, batch_size=16, learning_rate=0.1),
        **changes,
    )
    directory = RunDirectory.create(root, record)
    torch.manual_seed(0)
    model = workload_class(workload)(schema).build(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
    directory.write_model({name: tensor.numpy() for name, tensor in model.state_dict().items()})
    directory.append_metrics(3, {"metrics": {"accuracy": 0.875, "loss": 0.25}, "test_examples": 40})
    directory.write_receipts(PRIVATE)
    return directory


def training_rows() -> Records:
    """Rows of the table, as statistics see them: 3,000 ages around 50, a tenth of them not known."""
    random = np.random.default_rng(3)
    age = np.clip(random.normal(50, 20, 3000), 0, 120)
    age[:300] = np.nan
    smoker, ward = random.integers(0, 2, 3000), (random.random(3000) < 0.8)
    columns = {"age": age, "smoker": smoker.astype(np.float64), "ward": ward.astype(np.float64)}
    return Records(columns, random.integers(0, 2, 3000))


BARE = SiteReceipt(
    examples=10,
    receipt=receipt(
        mechanism="none",
        sampler="shuffle",
        accountant="none",
        noise_multiplier=0,
        max_grad_norm=0,
        delta=0,
        epsilon_run=None,
        epsilon_lifetime=None,
        epsilon_left=None,
    ),
)
"""Of a site that trained without privacy."""


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> FederationHome:
    """The coordinator's federation directory."""
    return initialise(tmp_path_factory.mktemp("federation") / "coordinator", FEDERATION, "127.0.0.1:9443")


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> FederationHome:
    """Another federation, of the same name, with keys of its own."""
    return initialise(tmp_path_factory.mktemp("stranger") / "coordinator", FEDERATION, "127.0.0.1:9443")


@pytest.fixture(scope="session")
def table_run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run of the tabular workload with an MLP."""
    spec = ModelSpec(name="mlp", args={"hidden": [8, 4]})
    return make_run(tmp_path_factory.mktemp("runs") / "table", "tabular", TABLE, spec)


@pytest.fixture(scope="session")
def image_run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run of the vision workload with a CNN."""
    spec = ModelSpec(name="cnn", args={"channels": [4, 8]})
    return make_run(tmp_path_factory.mktemp("runs") / "images", "vision", IMAGES, spec)


@pytest.fixture(scope="session")
def table_source(table_run: RunDirectory) -> Source:
    """What the tabular run exports."""
    return load_source(table_run)


@pytest.fixture(scope="session")
def table_bundle(table_source: Source, table_run: RunDirectory, home: FederationHome) -> Path:
    """The tabular run's bundle; do not change it, take `bundle` instead."""
    return export_table(table_source, home, table_run.root / "bundle")


def export_table(source: Source, home: FederationHome, target: Path) -> Path:
    """The tabular run as a bundle; each has a digest of its own, for it says when it was signed."""
    rows = source.schema.synthetic_inputs(70, np.random.default_rng(1))
    export_bundle(source, home.signer(), target, Request(inputs=rows, quantised=True))
    return target


@pytest.fixture(scope="session")
def image_bundle(image_run: RunDirectory, home: FederationHome) -> Path:
    """The vision run's bundle."""
    target = image_run.root / "bundle"
    export_bundle(load_source(image_run), home.signer(), target, Request())
    return target


@pytest.fixture(scope="session")
def table_release(table_source: Source) -> Release:
    """A charged release of statistics of the tabular run's training rows."""
    return statistics_release(table_source.record, table_source.schema, training_rows(), deviation=2.0)


@pytest.fixture(scope="session")
def marginals_bundle(
    table_source: Source, table_release: Release, home: FederationHome, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tabular run's bundle with marginals.json."""
    target = tmp_path_factory.mktemp("marginals") / "bundle"
    export_bundle(table_source, home.signer(), target, Request(marginals=table_release))
    return target
