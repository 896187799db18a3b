"""python -m fedclaw.audit: a table, a file, an exit code; on made-up data and on sites' own."""

import json
import stat
from io import StringIO

import pytest
from rich.console import Console

from experiments.datasets import DatasetSettings, SitePolicy, write_sites
from fedclaw.audit.__main__ import main
from fedclaw.errors import PrivacyError, UsageError
from fedclaw.privacy.noise import GaussianSource
from tests.audit.conftest import SCHEMA
from tests.conftest import run_module

QUICK = (
    "workload.model.name=logistic",
    "trials=40",
    "canaries=20",
    "examples=20",
    "attacked_rounds=1",
    "tracking=none",
)


@pytest.fixture
def schema(tmp_path):
    path = tmp_path / "schema.yaml"
    path.write_text(SCHEMA)
    return f"workload.schema_file={path}"


def audit(*arguments):
    console = Console(file=StringIO(), width=160)
    main((*QUICK, *arguments), console)
    return console.file.getvalue()


def test_an_honest_configuration_exits_with_0_and_says_what_that_means(tmp_path, schema):
    done = run_module(
        "fedclaw.audit", *QUICK, schema, "synthetic=[150,50]", "examples=150", f"json={tmp_path / 'audit.json'}"
    )
    assert done.code == 0, done.errors
    for words in ("noise scale", "canary guesses", "one run, loss", "membership inference", "below", "proves nothing"):
        assert words in done.output
    assert "EXCEEDS" not in done.output
    report = json.loads((tmp_path / "audit.json").read_text())
    assert report["epsilon_claimed"] == 8.0
    assert report["epsilon_lower"] < 8.0
    assert report["confidence"] == 0.95
    assert not any(check["flagged"] for check in report["checks"])
    claims = sum(check["epsilon_claimed"] is not None for check in report["checks"])
    assert f"None of {claims} claims refuted" in done.output
    assert stat.S_IMODE((tmp_path / "audit.json").stat().st_mode) == 0o600


def test_a_fault_ends_with_one_line_that_names_it(tmp_path, schema, monkeypatch):
    monkeypatch.setattr(GaussianSource, "perturb_", lambda _self, values, _std: values)
    file = tmp_path / "audit.json"
    with pytest.raises(
        PrivacyError, match=r"^the claim is refuted by .*noise scale, local noise, synthetic-1"
    ) as error:
        audit(schema, "synthetic=[30,10]", f"json={file}")
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 1
    assert any(check["flagged"] for check in json.loads(file.read_text())["checks"])


def test_sites_of_ones_own_are_audited_and_left_alone(tmp_path):
    """Their policies, which would refuse most of what an audit asks, do not matter; nothing is written there."""
    policy = SitePolicy(epsilon=0.1, delta=1e-6, minimum_cohort=9)
    directories = write_sites(tmp_path, DatasetSettings(name="breast_cancer", sites=2), policy)
    before = sorted(path for path in tmp_path.rglob("*"))
    shown = audit(f"sites=[{','.join(map(str, directories))}]", "privacy=none", "central=site", "central.epsilon=2")
    assert "unit one site" in shown
    assert "keep it where the data is" in shown
    assert "whole runs were not attacked" in " ".join(shown.split())
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_wrong_use_is_told(tmp_path, schema):
    with pytest.raises(UsageError, match=r"schema_file"):
        audit()
    with pytest.raises(UsageError, match="unknown command 'now'"):
        audit("now")
    with pytest.raises(UsageError, match="sites= is empty"):
        audit("sites=[]")
    with pytest.raises(UsageError, match="confidence"):
        audit(schema, "confidence=1.5")
    with pytest.raises(UsageError, match="no such file or directory"):
        audit(f"sites=[{tmp_path / 'nowhere'}]")
    with pytest.raises(UsageError, match="cannot be read"):
        audit("workload.schema_file=nowhere.yaml")
