"""`standardise: federated`: a schema that reads no data before it has constants, and is then like any other."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedclaw.clients.tabular_schema import TabularSchema
from fedclaw.clients.vision_schema import VisionSchema
from fedclaw.errors import DataError

SCHEMA = """
columns:
  - {name: age, kind: numeric, range: [0, 120]}
  - {name: smoker, kind: boolean}
  - {name: ward, kind: categorical, levels: [surgery, medicine]}
target: {name: outcome, labels: [benign, malignant]}
standardise: federated
"""
ROWS = "age,smoker,ward,outcome\n70,yes,medicine,malignant\n?,NA,,benign\n40,F,surgery,benign\n"


def schema_of(text: str = SCHEMA) -> TabularSchema:
    return TabularSchema.parse(text, "schema.yaml")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text(ROWS)
    return path


def test_constants_of_the_federation_make_a_schema_like_any_other(rows: Path) -> None:
    agreed = schema_of()
    assert agreed.needs_constants
    assert not agreed.data_dependent
    fitted = agreed.with_constants(agreed.shared_constants({"age": (55.0, 225.0)}), "a release")
    assert fitted.read_examples(rows).inputs[:, 0].tolist() == [1.0, 0.0, -1.0]
    assert not fitted.needs_constants
    assert not fitted.data_dependent
    again = TabularSchema.parse(fitted.to_json(), "a bundle's schema")
    assert again.read_inputs(rows).tolist() == fitted.read_inputs(rows).tolist()
    assert again.describe_inputs() == fitted.describe_inputs()
    (age, *_) = fitted.describe_inputs()["columns"]
    assert (age["center"], age["scale"]) == (55.0, 15.0)
    assert agreed.needs_constants, "the agreed schema is as it was"


def test_without_constants_nothing_is_read_but_a_provisional_schema_reads(rows: Path) -> None:
    agreed = schema_of()
    for read in (agreed.read_examples, agreed.read_inputs):
        with pytest.raises(DataError, match="standardises by statistics of the federation"):
            read(rows)
    assert agreed.provisional().read_examples(rows).inputs[:, 0] == pytest.approx([1 / 6, 0, -1 / 3])
    assert agreed.fit(rows) is agreed
    other = schema_of(SCHEMA.replace("federated", "schema"))
    assert other.provisional() is other


def test_a_column_without_figures_goes_by_its_range() -> None:
    agreed = schema_of()
    (constants,) = json.loads(agreed.shared_constants({}))["columns"].values()
    assert constants == {"mean": 60.0, "deviation": pytest.approx(60 / math.sqrt(3))}


@given(mean=st.floats(0, 120), variance=st.floats(-1, 3600))
def test_every_number_in_range_can_be_standardised_by_what_statistics_can_give(mean: float, variance: float) -> None:
    agreed = schema_of()
    fitted = agreed.with_constants(agreed.shared_constants({"age": (mean, variance)}), "a release")
    (age, *_) = fitted.describe_inputs()["columns"]
    assert np.all(np.isfinite(np.float32((np.array([0, 120]) - age["center"]) / age["scale"])))


@pytest.mark.parametrize(("mean", "deviation"), [(-1.0, 10.0), (121.0, 10.0), (60.0, 1e-30), (60.0, 1e30), (1e30, 1.0)])
def test_constants_that_no_statistics_can_give_are_refused_whatever_the_data(mean: float, deviation: float) -> None:
    """Otherwise a server could learn from a site's failure how large its numbers are."""
    agreed = schema_of()
    constants = json.loads(agreed.shared_constants({}))
    constants["columns"]["age"] = {"mean": mean, "deviation": deviation}
    with pytest.raises(DataError, match="constants of column 'age' leave its range"):
        agreed.with_constants(json.dumps(constants), "the plan")


def test_constants_of_another_schema_are_refused() -> None:
    agreed = schema_of()
    other = schema_of(SCHEMA.replace("120", "130"))
    with pytest.raises(DataError, match="another schema"):
        agreed.with_constants(other.shared_constants({}), "the plan")
    with pytest.raises(DataError, match="the plan"):
        agreed.with_constants("no json", "the plan")


def test_what_the_schema_file_has_to_say() -> None:
    with pytest.raises(DataError, match=r"'age' has no range.*add range: \[smallest, largest\]"):
        schema_of(SCHEMA.replace(", range: [0, 120]", ""))
    with pytest.raises(DataError, match="standardise: federated has none"):
        schema_of(SCHEMA.replace("range:", "center: 1, range:"))


def test_schemas_that_take_no_constants_say_so() -> None:
    fixed = schema_of(SCHEMA.replace("federated", "schema"))
    images = VisionSchema.parse("{shape: [1, 8, 8], labels: [a, b], mean: [0.5], std: [0.5]}", "schema.yaml")
    with pytest.raises(DataError, match="takes no statistics"):
        fixed.shared_constants({})
    with pytest.raises(DataError, match="no constants of the federation"):
        images.shared_constants({})
    assert not images.needs_constants
    assert images.provisional() is images


def test_records_are_the_cells_as_they_are(rows: Path) -> None:
    agreed = schema_of()
    (part,) = agreed.records(rows)
    assert part.columns["age"][[0, 2]].tolist() == [70.0, 40.0]
    assert np.isnan(part.columns["age"][1])
    assert part.columns["smoker"][[0, 2]].tolist() == [1.0, 0.0]
    assert np.isnan(part.columns["smoker"][1])
    assert part.columns["ward"][[0, 2]].tolist() == [1.0, 0.0]
    assert np.isnan(part.columns["ward"][1])
    assert part.labels.tolist() == [1, 0, 0]
    age, smoker, ward = agreed.statistic_columns()
    assert (age.bounds, age.levels) == ((0.0, 120.0), ())
    assert smoker.levels == ("false", "true")
    assert ward.levels == ("surgery", "medicine")


def test_images_have_labels_alone(tmp_path: Path) -> None:
    images = VisionSchema.parse("{shape: [1, 2, 2], labels: [a, b], mean: [0.5], std: [0.5]}", "schema.yaml")
    path = tmp_path / "train.npz"
    np.savez(path, images=np.zeros((3, 2, 2), np.uint8), labels=np.array([1, 0, 1]))
    (part,) = images.records(path)
    assert images.statistic_columns() == ()
    assert part.labels.tolist() == [1, 0, 1]
