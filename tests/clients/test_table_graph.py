"""A table's columns as inputs of a graph: what they are called, what type they have, and which texts mean something."""

import json

import numpy as np
import pytest

from fedclaw.clients.columns import Numeric
from fedclaw.clients.table_graph import is_wide
from fedclaw.learning.preprocessing import free_names
from fedclaw.learning.registry import schema_class


def preprocessing(*columns, **fields):
    definition = {"columns": columns, "target": {"name": "y", "labels": ["a", "b"]}, **fields}
    return schema_class("tabular").parse(json.dumps(definition), "test").preprocessing()


def column_of(**fields):
    (column,) = preprocessing(fields).columns
    return column


def test_an_input_is_called_like_its_column_unless_an_output_is():
    found = preprocessing(
        *({"name": name, "kind": "numeric"} for name in ("label", "input_label", "refused", "e\u0301 x", "values"))
    )
    assert [column.name for column in found.columns] == ["input_input_label", "input_label", "input_refused", "é x",
                                                         "values"]  # fmt: skip
    assert [column.column for column in found.columns] == ["label", "input_label", "refused", "é x", "values"]
    assert free_names(["a", "a"], ()) == ("a", "input_a")


@pytest.mark.parametrize(
    ("fields", "wide"),
    [
        ({}, False),
        ({"center": 1e6, "scale": 1e6 / 128}, False),
        ({"center": -1e6, "scale": 1e6 / 129}, True),
        ({"scale": 1e-39}, True),
        ({"range": [0, 1e39]}, True),
        ({"center": 1e30, "scale": 1e30}, False),
    ],
)
def test_a_column_that_float32_is_too_narrow_for_is_float64(fields, wide):
    assert is_wide(Numeric(name="x", kind="numeric", **fields)) is wide
    assert column_of(name="x", kind="numeric", **fields).dtype == ("float64" if wide else "float32")


def test_says_what_a_value_is_and_what_is_missing():
    age = column_of(name="age", kind="numeric", center=50, scale=20, range=[0.5, 120], missing=["-9", "NA"])
    assert age.meaning == "a number from 0.5 to 120; becomes (value - 50) / 20; not known: NaN, -9"
    assert (age.shape, age.missing) == (("batch", 1), "NaN")
    drug = column_of(name="drug", kind="categorical", levels=["x", ""], unseen="other")
    assert drug.meaning == "one of 'x', ''; any other counts as 'other'"
    assert drug.missing == "?"
    many = column_of(name="ward", kind="categorical", levels=[str(n) for n in range(30)])
    assert "'19' and 10 more, see preprocessing; any other refuses the row" in many.meaning
    smoker = column_of(name="smoker", kind="boolean")
    assert smoker.meaning.endswith("'n', '0', in any case; any other refuses the row")


def test_a_text_means_what_the_reader_takes_it_for():
    both = preprocessing(
        {"name": "able", "kind": "boolean", "missing": ["n"]},
        {"name": "drug", "kind": "categorical", "levels": ["x", "NA"], "unseen": "missing"},
    )
    able = ["true", "N", "n", "", "No", "maybe"]
    drug = ["x", "NA", "q", "", "X", "x"]
    inputs, refused = both.prepare({"able": np.array(able, object)[:, None], "drug": np.array(drug, object)[:, None]})
    assert inputs[:5].tolist() == [[1, 1, 0], [0, 0, 1], [0.5, 0, 0], [0.5, 0, 0], [0, 0, 0]]
    assert refused.tolist() == [False] * 5 + [True]
