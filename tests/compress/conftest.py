"""A real finished run: the tabular workload on scikit-learn's digits as a table of pixels, trained here and now."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from sklearn.datasets import load_digits

from fedclaw.clients.tabular import TabularWorkload
from fedclaw.clients.tabular_schema import TabularSchema
from fedclaw.protocol.terms import LocalTraining, ModelSpec, PrivacyRequest, StrategyRecord
from fedclaw.server.run_directory import RunDirectory, RunRecord


@dataclass(frozen=True)
class Files:
    """The table as files: a schema, labelled rows to train and test on, and public ones without the target column."""

    schema: Path
    train: Path
    public: Path
    test: Path


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    data = load_digits()
    names = [f"p{index}" for index in range(data.data.shape[1])]
    columns = [{"name": name, "kind": "numeric", "center": 5, "scale": 6, "range": [0, 16]} for name in names]
    schema = root / "schema.yaml"
    schema.write_text(
        yaml.safe_dump({"columns": columns, "target": {"name": "digit", "labels": [str(digit) for digit in range(10)]}})
    )
    order = np.random.default_rng(0).permutation(len(data.target))

    def write(name, rows, labelled=True):
        with (root / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*names, "digit"] if labelled else names)
            writer.writerows([*data.data[row], *([data.target[row]] if labelled else [])] for row in rows)
        return root / name

    return Files(
        schema,
        write("train.csv", order[:600]),
        write("public.csv", order[600:1400], labelled=False),
        write("test.csv", order[1400:]),
    )


@pytest.fixture(scope="session")
def trained(digits):
    """Workload and a trained MLP (64-48-24-10)."""
    schema = TabularSchema.parse(digits.schema.read_text(), str(digits.schema))
    workload = TabularWorkload(schema)
    table = schema.read_examples(digits.train)
    torch.manual_seed(1)
    model = workload.build(ModelSpec(name="mlp", args={"hidden": [48, 24]}))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    inputs, targets = torch.from_numpy(table.inputs), torch.from_numpy(table.targets)
    for _ in range(60):
        optimizer.zero_grad()
        workload.loss(model(inputs), targets).backward()
        optimizer.step()
    return workload, model.eval()


@pytest.fixture
def make_run(tmp_path):
    """Write a finished run of a workload's model; each call a directory of its own."""

    def make(workload, model, name="hospital"):
        record = RunRecord(
            run=name,
            federation="test",
            workload=workload.name,
            schema_text=workload.schema.to_json(),
            task=workload.task.name,
            model=workload.spec_of(model),
            strategy=StrategyRecord(name="fedavg"),
            rounds=3,
            training=LocalTraining(epochs=1, batch_size=16, learning_rate=0.1),
            privacy=PrivacyRequest(epsilon=4.0, delta=1e-4, max_grad_norm=1.0),
        )
        directory = RunDirectory.create(tmp_path / name, record)
        directory.write_model({key: tensor.numpy() for key, tensor in model.state_dict().items()})
        return directory

    return make
