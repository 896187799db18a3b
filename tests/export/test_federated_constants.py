"""A bundle of a run with standardise: federated has the constants: it predicts what the run's own schema would."""

import json

import numpy as np
import pytest

from fedclaw.export.bundle import Request, export_bundle
from fedclaw.export.layout import MANIFEST, SCHEMA
from fedclaw.export.predictor import Predictor
from fedclaw.export.source import load_source
from fedclaw.learning.registry import schema_class
from fedclaw.protocol.terms import ModelSpec
from fedclaw.server.run_directory import RunDirectory

ROWS = "age,smoker,ward\n70,yes,medicine\n?,NA,\n40,F,surgery\n"


@pytest.fixture
def run(tmp_path, samples):
    table = samples.table | {"standardise": "federated"}
    age = {"name": "age", "kind": "numeric", "range": [0, 120]}
    table["columns"] = [age, *table["columns"][1:]]
    directory = samples.make_run(tmp_path / "run", "tabular", table, ModelSpec(name="logistic"))
    schema = schema_class("tabular").parse(json.dumps(table), "test schema")
    record = directory.record().model_copy(update={"preprocessing": schema.shared_constants({"age": (55.0, 225.0)})})
    (directory.root / "run.json").write_text(record.model_dump_json())
    return RunDirectory.open(directory.root)


def test_the_bundle_prepares_inputs_as_the_sites_did(run, home, tmp_path):
    source = load_source(run)
    assert not source.schema.data_dependent
    export_bundle(source, home.signer(), tmp_path / "bundle", Request())
    rows = tmp_path / "rows.csv"
    rows.write_text(ROWS)
    predictor = Predictor.open(tmp_path / "bundle")
    inputs = predictor.read(rows)
    assert inputs[:, 0].tolist() == [1.0, 0.0, -1.0]
    assert np.array_equal(inputs, source.schema.read_inputs(rows))
    assert predictor.predict(inputs).shape == (3, 2)
    (age, *_) = json.loads((tmp_path / "bundle" / MANIFEST).read_text())["preprocessing"]["columns"]
    assert (age["center"], age["scale"]) == (55.0, 15.0)
    schema = json.loads((tmp_path / "bundle" / SCHEMA).read_text())
    assert (schema["columns"][0]["center"], schema["standardise"]) == (55.0, "schema")
