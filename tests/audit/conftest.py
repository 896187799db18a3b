"""Configurations to audit, on made-up data of sites of very different size."""

import pytest

from fedclaw.audit.subject import Subject, synthetic_sites
from fedclaw.protocol.frozen import check_settings
from fedclaw.server.settings import RunSettings

SCHEMA = """
columns:
  - {name: age, kind: numeric, center: 50, scale: 20, range: [0, 120]}
  - {name: pressure, kind: numeric, center: 0, scale: 1, range: [-3, 3]}
  - {name: smoker, kind: boolean}
  - {name: ward, kind: categorical, levels: [surgery, medicine]}
target: {name: outcome, labels: [benign, malignant]}
"""
SIZES = (60, 10, 6, 4)
MODES = {
    "local": {},
    "central-site": {
        "privacy": None,
        "central": {"unit": "site", "noise_by": "server", "epsilon": 3, "delta": 1e-3, "clip": 0.5},
    },
    "central-example": {
        "privacy": None,
        "training": {"steps": 1, "batch_size": 1, "learning_rate": 0.3},
        "central": {
            "unit": "example",
            "noise_by": "server",
            "epsilon": 3,
            "delta": 1e-3,
            "clip": 0.5,
            "sample_rate": 0.3,
        },
    },
}
SECURE = {"dropouts": 0.25, "corrupt": 0.25}
for _unit, _changes in {"site": {"weighting": "uniform"}, "example": {}}.items():
    _central = MODES[f"central-{_unit}"]
    MODES[f"distributed-{_unit}"] = {
        **_central,
        **_changes,
        "central": {**_central["central"], "noise_by": "sites"},
        "secure": SECURE,
    }


@pytest.fixture
def schema(tmp_path):
    path = tmp_path / "schema.yaml"
    path.write_text(SCHEMA)
    return path


@pytest.fixture
def configured(schema):
    """A run's settings by mode, with changes."""

    def configure(mode: str = "local", **changes) -> RunSettings:
        fields = {
            "workload": {"name": "tabular", "schema_file": schema, "model": {"name": "mlp", "args": {"hidden": [8]}}},
            "strategy": {"name": "fedavg"},
            "training": {"epochs": 1, "batch_size": 8, "learning_rate": 0.3},
            "privacy": {"epsilon": 3, "delta": 1e-3, "max_grad_norm": 1.0},
            "rounds": 3,
            "seed": 0,
        }
        return check_settings({**fields, **MODES[mode], **changes}, RunSettings)

    return configure


@pytest.fixture
def subject(configured):
    """Settings and made-up sites by mode."""

    def make(mode: str = "local", **changes) -> Subject:
        settings = configured(mode, **changes)
        return Subject(settings, synthetic_sites(settings, SIZES))

    return make
