"""A table whose target is a number: what a schema file may say of it, and what its cells may be."""

import json
from pathlib import Path

import numpy as np
import pytest

from fedclaw.clients.tabular import TabularWorkload
from fedclaw.clients.tabular_schema import TabularSchema
from fedclaw.errors import DataError, PluginError
from fedclaw.learning.statistics import design_of
from fedclaw.learning.tasks.regression import Regression
from fedclaw.protocol.terms import ModelSpec

HEAD = "columns: [{name: x, kind: numeric}]\ntarget: {name: y, kind: numeric, "


def schema(target: str = "range: [25, 346]}") -> TabularSchema:
    return TabularSchema.parse(HEAD + target, "schema.yaml")


def test_all_that_the_task_needs_is_in_the_schema() -> None:
    assert schema().task == Regression("y", 25, 346, "squared", center=185.5, scale=160.5)
    assert schema("range: [0, 50], loss: poisson}").task == Regression("y", 0, 50, "poisson", center=0, scale=1)
    huber = schema("range: [0, 2], loss: huber, huber_delta: 0.3, center: 0.5, scale: 2}").task
    assert huber == Regression("y", 0, 2, "huber", center=0.5, scale=2, huber_delta=0.3)
    assert schema().labels == ()
    again = TabularSchema.parse(schema().to_json(), "again")
    assert (again.task, again.to_json()) == (schema().task, schema().to_json())


def test_a_schema_of_classes_has_the_digest_that_it_had() -> None:
    """Sites compare it: fields that a number needs are in no schema that has none."""
    text = "columns: [{name: x, kind: numeric}]\ntarget: {name: y, labels: [a, b]}"
    plain = json.loads(TabularSchema.parse(text, "s").to_json())
    assert list(plain) == ["columns", "target", "missing", "standardise", "extra", "delimiter"]
    assert plain["target"] == {"name": "y", "labels": ["a", "b"]}


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("loss: squared}", "target.range: Field required"),
        ("range: [5, 1]}", "target: range must go from a smaller to a larger number"),
        ("range: [0, .inf]}", "target.range.1: Input should be a finite number"),
        ("range: [0, 1.0e+300]}", "target: range .*: float32 has no room for it"),
        ("range: [1000000000, 1000001000]}", "target: range .*: float32 has no room for it"),
        ("range: [-1, 5], loss: poisson}", "target: loss: poisson is of counts, and the range begins below 0, at -1"),
        ("range: [0, 5], loss: poisson, center: 2}", "target: loss: poisson takes no center"),
        ("range: [0, 5], loss: absolute}", "target.loss: Input should be 'squared', 'huber' or 'poisson'"),
        ("range: [0, 5], huber_delta: 1}", "target: huber_delta goes with loss: huber, and the loss is squared"),
        ("range: [0, 5], scale: 0}", "target.scale: Input should be greater than 0"),
        ("range: [0, 5], labels: [a, b]}", "target.labels: Extra inputs are not permitted"),
        ("range: [0, 5]}\nextra: what", "extra: Input should be 'refuse' or 'ignore'"),
    ],
)
def test_what_a_schema_may_not_say(target: str, says: str) -> None:
    with pytest.raises(DataError, match=f"^schema.yaml: {says}"):
        schema(target)


def test_bad_targets_are_told_by_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("x,y\n1,25\n1,NA\n1,nan\n1,inf\n1,24.9\n1,346.5\n1,\n1,many\n1,346\n")
    with pytest.raises(DataError) as caught:
        schema().read_examples(path)
    for line, cell in ((3, "'NA'"), (4, "'nan'"), (5, "'inf'"), (6, "'24.9'"), (7, "'346.5'"), (8, "an empty cell")):
        assert f"line {line}, column 'y': {cell}; expected a number from 25 to 346" in str(caught.value)
    assert "7 bad cells" in str(caught.value)


def test_targets_are_numbers_and_prediction_does_without_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("x,y\n1,25\n2,346\n3,100.5\n")
    table = schema().read_examples(path)
    assert table.targets.dtype == np.float32
    assert table.targets.tolist() == [25, 346, 100.5]
    assert schema().read_inputs(path).tolist() == [[1], [2], [3]]


def test_the_target_is_a_column_of_the_statistics(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("x,y\n1,25\n2,346\n3,100.5\n")
    (records,) = schema().records(path)
    assert records.columns["y"].tolist() == [25, 346, 100.5]
    assert len(records.labels) == 3
    design = design_of(schema(), ("y",), True, 4)
    assert [column.bounds for column in design.columns] == [(25, 346)]
    assert design.classes == ()


def test_models_are_of_the_task() -> None:
    workload = TabularWorkload(schema())
    linear = workload.build(ModelSpec(name="linear"))
    assert workload.spec_of(linear) == ModelSpec(name="linear")
    assert [tuple(p.shape) for p in linear.parameters()] == [(1, 1), (1,)]
    for name in ("logistic", "binary_logistic"):
        with pytest.raises(
            PluginError, match=f"model '{name}' tells classes apart, and the schema's task is regression"
        ):
            workload.build(ModelSpec(name=name))
    classes = TabularWorkload(
        TabularSchema.parse("columns: [{name: x, kind: numeric}]\ntarget: {name: y, labels: [a, b]}", "s")
    )
    with pytest.raises(PluginError, match="model 'linear' gives a number, and the schema's task is classification"):
        classes.build(ModelSpec(name="linear"))
