"""The README's main command, with real processes: slow."""

import json

import pytest

from tests.conftest import run_module


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "budget"), [("tabular", 8.0), ("vision", 10.0)])
def test_the_demo(tmp_path, scenario, budget):
    output = tmp_path / "demo"
    done = run_module("experiments.demo", f"scenario={scenario}", f"output={output}", timeout=600)
    assert done.code == 0, done.output + done.errors
    summary = json.loads((output / "summary.json").read_text())
    assert set(summary) == {"sites", "rounds", "accuracy", "compression", "export", "answered", "seconds"}
    assert summary["answered"] == 1
    assert len(summary["sites"]) == 4
    for site in summary["sites"]:
        assert set(site) == {"name", "examples", "epsilon", "delta"}
        assert 0 < site["epsilon"] <= budget
    accuracy, compression = summary["accuracy"], summary["compression"]
    assert set(accuracy) == {"federated", "majority_class", "pooled", "local_mean"}
    assert accuracy["federated"] >= accuracy["local_mean"]
    assert accuracy["federated"] > accuracy["majority_class"] > 0
    assert set(compression) == {"parameters_before", "parameters_after", "accuracy_before", "accuracy_after"}
    assert compression["parameters_after"] < 0.4 * compression["parameters_before"]
    assert set(summary["export"]) == {"onnx_max_abs_diff", "bundle", "verified"}
    assert summary["export"]["verified"] is True
    assert summary["export"]["onnx_max_abs_diff"] < 1e-4
    for line in ("accuracy, pooled", "accuracy, majority class", "What to try next"):
        assert line in done.output
    assert (output / "predictions.csv").exists()


def test_the_demo_removes_nothing_that_is_not_its_own(tmp_path):
    (tmp_path / "thesis.txt").touch()
    done = run_module("experiments.demo", f"output={tmp_path}")
    assert done.code == 2
    assert "not an earlier demo" in done.errors
    assert (tmp_path / "thesis.txt").exists()
