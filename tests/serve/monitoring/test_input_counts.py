"""Counts of inputs: in the cells that a statistics question counts in, from typed columns as a client sends them."""

import json

import numpy as np
import pytest

from fedclaw.learning.preprocessing import TypedColumn
from fedclaw.learning.registry import schema_class
from fedclaw.privacy.statistics import Design, Records
from fedclaw.serve.monitoring.input_counts import (
    MISSING,
    REFUSED,
    ROWS_OF_A_REQUEST,
    InputCounts,
    InputFeatures,
    InputSample,
)

TABLE = {
    "columns": [
        {"name": "age", "kind": "numeric", "center": 50, "scale": 20, "range": [0, 120]},
        {"name": "dose", "kind": "numeric", "center": 10, "scale": 2},
        {"name": "smoker", "kind": "boolean"},
        {"name": "ward", "kind": "categorical", "levels": ["surgery", "medicine", "1"]},
    ],
    "target": {"name": "outcome", "labels": ["benign", "malignant"]},
    "missing": ["", "NA", "-9"],
}


@pytest.fixture
def schema():
    return schema_class("tabular").parse(json.dumps(TABLE), "test")


@pytest.fixture
def features(schema):
    return InputFeatures.of(schema, schema.preprocessing().columns)


def columns(**given):
    age = np.array(given["age"], np.float32)[:, None]
    rows = len(age)
    texts = {name: np.array(given.get(name, ["NA"] * rows), object)[:, None] for name in ("smoker", "ward")}
    return {"age": age, "dose": np.array(given.get("dose", [10.0] * rows), np.float32)[:, None], **texts}


def test_values_are_those_of_the_graph_row_for_row(schema):
    """Against the schema's own reader, which is slow and obvious."""
    preprocessing = schema.preprocessing()
    made = preprocessing.synthetic(400, np.random.default_rng(0))
    made["age"][7], made["age"][8], made["age"][9] = -1.0, 121.0, np.inf
    made["age"][10], made["dose"][11] = -9.0, -9.0
    values = preprocessing.column_values(made)
    inputs, refused = preprocessing.prepare(made)
    found = np.any([np.isinf(column) for column in values.values()], axis=0)
    assert refused.sum() > 20
    assert found.tolist() == refused.tolist()
    kept = ~refused
    age = np.where(np.isnan(values["age"]), 0.0, (values["age"] - 50) / 20)
    assert inputs[kept, 0] == pytest.approx(age[kept], abs=1e-6)
    smoker = np.where(np.isnan(values["smoker"]), 0.5, values["smoker"])
    assert inputs[kept, 2].tolist() == smoker[kept].tolist()
    ward = np.array([values["ward"] == level for level in range(3)]).T
    assert inputs[kept, 3:].tolist() == ward[kept].astype(float).tolist()
    assert np.isnan(values["age"][10])
    assert np.isnan(values["dose"][11])


def test_numbers_are_counted_in_the_cells_of_a_statistics_question(schema, features):
    ages = np.concatenate([np.random.default_rng(1).uniform(0, 120, 500), np.arange(0, 121, 1.875), [60.0] * 7])
    counts = features.count(columns(age=ages)).features["age"]
    (column,) = [one for one in schema.statistic_columns() if one.name == "age"]
    design = Design([column], (), 64)
    vector = design.vector(
        [Records({"age": ages.astype(np.float32).astype(np.float64)}, np.zeros(len(ages), np.int64))]
    )
    block = design.blocks["bins", "age"]
    assert counts[:64].tolist() == np.rint(vector[block.where] / block.weight).astype(int).tolist()
    assert counts[MISSING] == counts[REFUSED] == 0


def test_levels_missing_and_refused_have_cells_of_their_own(features):
    given = columns(
        age=[np.nan, 30.0, 130.0, 40.0],
        smoker=["yes", "F", "NA", "maybe"],
        ward=["surgery", "1.0", "", "1"],
    )
    counts = features.count(given)
    assert (counts.rows, counts.refused) == (4, 2)
    age, smoker, ward = (counts.features[name] for name in ("age", "smoker", "ward"))
    assert (age[MISSING], age[REFUSED], age.sum()) == (1, 1, 4)
    assert smoker.tolist() == [1, 1, 1, 1]
    assert ward.tolist() == [1, 0, 2, 1, 0]


def test_a_number_without_declared_bounds_is_counted_around_its_center(features):
    counts = features.count(columns(age=[1.0] * 4, dose=[10.0, 1e30, -1e30, 17.99])).features["dose"]
    assert np.flatnonzero(counts).tolist() == [0, 32, 63]
    assert counts[63] == 2


def test_counts_add_up_and_come_back_from_a_document(features):
    one, other = features.count(columns(age=[1.0, 2.0])), features.count(columns(age=[1.0, np.nan, 500.0]))
    total = InputCounts()
    total.add(one)
    total.add(other)
    again = InputCounts.from_document(json.loads(json.dumps(total.to_document())), features.features)
    assert (again.rows, again.refused) == (5, 1)
    for name, counts in total.features.items():
        assert again.features[name].tolist() == counts.tolist() == (one.features[name] + other.features[name]).tolist()


def test_a_sample_is_of_the_share_that_was_asked_for_and_of_few_rows_of_each_request(features):
    draws = iter([0.1, 0.5, 0.49, 0.9])
    sample = InputSample(features, 0.5, lambda: next(draws))
    sample.offer(columns(age=np.arange(100.0)), 100)
    sample.offer(columns(age=[1.0]), 1)
    sample.offer(columns(age=[1.0]), 1)
    sample.offer(columns(age=[1.0]), 1)
    taken = sample.take()
    assert taken.rows == ROWS_OF_A_REQUEST + 1
    ages = np.flatnonzero(taken.features["age"])
    assert (ages.min(), ages.max()) == (0, 52)  # from the first row to the last
    assert sample.take().rows == 0


def test_what_waits_is_bounded(schema, features, monkeypatch):
    monkeypatch.setattr("fedclaw.serve.monitoring.input_counts.MOST_BYTES", 1000)
    sample = InputSample(features, 1.0)
    for _ in range(1000):
        sample.offer(columns(age=[1.0]), 1)
    assert 10 < sample.take().rows < 100
    sample.offer(columns(age=[1.0]), 1)
    assert sample.take().rows == 1


def test_versions_of_one_schema_have_the_same_cells_and_of_another_others(schema, features):
    again = InputFeatures.of(schema, schema.preprocessing().columns)
    assert again.digest == features.digest
    assert InputFeatures.of(schema, schema.preprocessing().columns, {"age": 32}).digest != features.digest


def test_an_image_is_its_mean_and_its_deviation():
    images = schema_class("vision").parse(
        json.dumps({"shape": [1, 8, 8], "labels": ["zero", "one"], "mean": [0.5], "std": [0.25]}), "test"
    )
    (column, *_) = images.preprocessing().columns
    features = InputFeatures.of(images, [column])
    dark, bright = np.zeros((3, 8, 8, 1), np.uint8), np.full((2, 8, 8, 1), 255, np.uint8)
    counts = features.count({column.name: np.concatenate([dark, bright])})
    assert [one.name for one in features.features] == ["mean", "deviation"]
    assert (counts.features["mean"][0], counts.features["mean"][63], counts.features["deviation"][0]) == (3, 2, 5)


def test_prepared_inputs_are_features_one_by_one():
    numbers = [{"name": "age", "kind": "numeric"}, {"name": "dose", "kind": "numeric"}]
    definition = {**TABLE, "standardise": "site", "columns": [*numbers, *TABLE["columns"][2:]]}
    schema = schema_class("tabular").parse(json.dumps(definition), "test")
    prepared = TypedColumn(name="inputs", column="inputs", dtype="float32", shape=("batch", 6), meaning="prepared")
    features = InputFeatures.of(schema, [prepared])
    assert [one.name for one in features.features][:4] == ["age", "dose", "smoker", "ward=surgery"]
    counts = features.count({"inputs": np.zeros((5, 6), np.float32)})
    assert counts.features["age"][32] == 5
