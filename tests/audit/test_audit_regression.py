"""A run that predicts a number, audited from its settings to its report: canaries, probes, attacks and verdict."""

import json
from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console

from fedclaw.audit.__main__ import main
from fedclaw.audit.subject import LOUD, gradient, make_canary
from fedclaw.errors import PrivacyError
from fedclaw.learning.registry import schema_class, workload_class
from fedclaw.learning.workload import load_parameters
from fedclaw.privacy.noise import GaussianSource

SCHEMA = """
columns:
  - {name: age, kind: numeric, center: 50, scale: 20, range: [0, 120]}
  - {name: smoker, kind: boolean}
target: {name: days, kind: numeric, range: [0, 60], loss: LOSS}
"""
SITES = "synthetic=[60,10,6]"
QUICK = ("workload.model.name=linear", "trials=20", "canaries=8", "examples=20", "attacked_rounds=1", "tracking=none")
NOISES = {
    "local": ("privacy.epsilon=3", "privacy.delta=1e-3"),
    "example": ("privacy=none", "central=example", "training=one_step", "central.epsilon=3", "central.delta=1e-3"),
    "site": ("privacy=none", "central=site", "central.epsilon=3", "central.delta=1e-3"),
}
"""By whose noise it is, and for what unit: the settings that ask for it."""


@pytest.fixture
def audited(tmp_path):
    """Runs the command; the report that it wrote."""

    def audit(noise: str, loss: str = "squared", *more: str):
        schema, file = tmp_path / "schema.yaml", tmp_path / "audit.json"
        schema.write_text(SCHEMA.replace("LOSS", loss))
        arguments = (*QUICK, *NOISES[noise], SITES, f"workload.schema_file={schema}", f"json={file}", *more)
        main(arguments, Console(file=StringIO(), width=160))
        return json.loads(file.read_text())

    return audit


@pytest.mark.parametrize("noise", NOISES)
def test_an_honest_run_keeps_its_claim(audited, noise):
    report = audited(noise)
    assert report["epsilon_claimed"] == 3
    assert not any(check["flagged"] for check in report["checks"])
    names = {check["name"] for check in report["checks"]}
    assert {"canary guesses", "canary size", "noise scale", "shared noise"} <= names
    assert ("one run, loss" in names) == (noise != "site"), "whole runs are attacked where the unit is an example"


@pytest.mark.parametrize("noise", NOISES)
def test_a_run_without_its_noise_is_found_out(audited, monkeypatch, noise):
    monkeypatch.setattr(GaussianSource, "perturb_", lambda _self, values, _std: values)
    with pytest.raises(PrivacyError, match=r"the claim is refuted by .*noise scale"):
        audited(noise)


@pytest.mark.parametrize("model", ["linear", "mlp"])
@pytest.mark.parametrize("loss", ["squared", "huber", "poisson"])
def test_a_canary_is_loud_with_one_target_and_silent_with_another(model, loss):
    workload = workload_class("tabular")(schema_class("tabular").parse(SCHEMA.replace("LOSS", loss), "schema.yaml"))
    spec = workload.default_model().model_copy(update={"name": model, **({"args": {}} if model == "linear" else {})})
    network = workload.build(spec)
    start = {name: array.detach().numpy().copy() for name, array in network.named_parameters()}
    canary = make_canary(workload, spec, start, 2.0, np.random.default_rng(0))
    load_parameters(network, canary.parameters)
    assert np.linalg.norm(gradient(workload, network, canary.inputs, canary.loud)) >= 2.0 * LOUD
    assert np.linalg.norm(gradient(workload, network, canary.inputs, canary.silent)) <= 1e-4
    with torch.no_grad():
        values = workload.task.link(network(torch.from_numpy(canary.inputs)))
    assert values.item() == pytest.approx(canary.silent.item())
    assert canary.loud.item() in (0.0, 60.0)
