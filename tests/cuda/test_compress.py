"""Distillation: of a student on public inputs at the coordinator, and at the sites."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedclaw.compress.federated import recover_by_rounds
from fedclaw.compress.inputs import Inputs
from fedclaw.compress.models import load_teacher, make_student
from fedclaw.compress.record import CompressSettings, RecoverySettings, SiteRecovery
from fedclaw.compress.stage import controls_of, read_given, recover
from fedclaw.learning.registry import schema_class, workload_class
from fedclaw.learning.workload import Table, schema_digest
from fedclaw.protocol.terms import ModelSpec
from fedclaw.server.run_directory import RunDirectory
from fedclaw.site.journal.ledger import Ledger
from fedclaw.site.policy.policy import Policy
from fedclaw.site.service import SiteService
from fedclaw.site.site import SiteData
from fedclaw.transport.in_process import LocalGrid
from tests.samples import run_record

NAMES = ("north", "south", "west")


@pytest.fixture
def run(tmp_path):
    """A finished run of a small MLP, and labelled examples of what it was not trained on."""
    columns = [{"name": f"x{i}", "kind": "numeric", "center": 0, "scale": 1, "range": [-3, 3]} for i in range(6)]
    definition = {"columns": columns, "target": {"name": "y", "labels": ["a", "b", "c"]}}
    schema = schema_class("tabular").parse(json.dumps(definition), "test schema")
    spec = ModelSpec(name="mlp", args={"hidden": [24, 16]})
    record = run_record(run="hospital", federation="test", schema_text=schema.to_json(), model=spec)
    directory = RunDirectory.create(tmp_path / "hospital", record)
    torch.manual_seed(1)
    workload = workload_class("tabular")(schema)
    model = workload.build(spec)
    directory.write_model({name: value.detach().numpy() for name, value in model.named_parameters()})
    inputs = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
    with torch.no_grad():
        targets = model(torch.from_numpy(inputs)).argmax(1).numpy()
    return directory, workload, Table(inputs, targets)


def test_a_student_learns_on_public_inputs(run, device, wanted):
    directory, _, table = run
    recovery = RecoverySettings(steps=150, learning_rate=0.02, mix=True)
    settings = CompressSettings(run=directory.root, fraction=0.6, device=wanted, recovery=recovery)
    teacher = load_teacher(directory.root)
    student = make_student(teacher, settings.fraction)
    given = read_given(settings, teacher)
    public = Inputs(torch.from_numpy(table.inputs), "public", "made inputs")
    made = recover(settings, teacher, student, replace(given, proxy=public))
    assert made.reports[0].agreement_after > max(0.8, made.reports[0].agreement_pruned)
    controls = controls_of(settings, teacher, student, given, made)
    assert len(controls) == 3
    for model in (made.model, teacher.model, student.model, *(control.model for control in controls)):
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_a_student_learns_at_the_sites(run, device):
    directory, workload, table = run
    sites = {}
    for index, name in enumerate(NAMES):
        rows = slice(100 * index, 100 * index + 80), slice(100 * index + 80, 100 * (index + 1))
        train, test = (Table(table.inputs[part], table.targets[part]) for part in rows)
        data = SiteData(train, test, f"data of {name}")
        sites[name] = SiteService(
            name=name,
            federation="test",
            workload=workload,
            schema_digest=schema_digest(workload.schema.to_json()),
            data=data,
            policy=Policy(workloads=("tabular",), strategies=("fedavg",), epsilon=100.0, delta=1e-3),
            ledger=Ledger.open(":memory:", data.fingerprint),
            outbound=None,
            device=device,
        )
    asked = SiteRecovery(rounds=2, epsilon=30.0)
    settings = CompressSettings(
        run=directory.root, mode="federated", fraction=0.6, federation=directory.root, sites=asked
    )
    teacher = load_teacher(directory.root)
    student = make_student(teacher, settings.fraction)
    recovered = recover_by_rounds(LocalGrid(sites, 1), settings, teacher, student, student.model)
    assert recovered.figures.after.metrics["accuracy"] > 0.4
    for site in sites.values():
        teachers = [model for key, model in site._models.items() if key.startswith("teacher")]
        assert {parameter.device.type for model in teachers for parameter in model.parameters()} == {device.type}
