"""The configuration group `workload` names what is installed."""

from pathlib import Path

import pytest
import yaml

from fedclaw.learning.registry import schema_class, workload_class
from fedclaw.protocol.terms import ModelSpec

CONF = Path(__file__).resolve().parents[2] / "conf" / "workload"
SCHEMAS = {
    "tabular": "{columns: [{name: a, kind: numeric}], target: {name: t, labels: [x, y]}}",
    "vision": "{shape: [1, 8, 8], labels: [x, y]}",
}


def test_there_is_a_conf_file_for_each_workload() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == set(SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_conf_file_names_the_default_model(name: str) -> None:
    conf = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert conf["schema_file"] is None  # which file it is, only the federation knows
    workload = workload_class(conf["name"])(schema_class(conf["name"]).parse(SCHEMAS[name], "schema.yaml"))
    assert workload.name == workload.schema.name == name
    built = workload.build(ModelSpec(name=conf["model"]["name"], args=conf["model"]["args"] or {}))
    assert workload.spec_of(built) == workload.default_model()
