"""The streaming sum against answers worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedclaw.errors import UpdateError
from fedclaw.learning import postprocess
from fedclaw.learning.postprocess import Postprocessor, SiteContext
from fedclaw.privacy.noise import GaussianSource
from fedclaw.privacy.provenance import Released
from fedclaw.protocol.arrays import Update
from fedclaw.protocol.terms import LocalTraining, ModelSpec, Plan
from fedclaw.server.training import WeightedSum

TEMPLATE = {"w": np.zeros((2, 2), np.float32), "b": np.zeros(2, np.float32)}


PLAN = Plan(
    federation="clinic",
    run="run-1",
    round=1,
    rounds=1,
    cohort=2,
    workload="tabular",
    schema_digest="0",
    model=ModelSpec(name="logistic"),
    strategy="fedavg",
    training=LocalTraining(epochs=1, batch_size=8, learning_rate=0.1),
    privacy=None,
)

CONTEXT = SiteContext(GaussianSource())


def mean_of(total):
    return postprocess.at_server(total.take(), PLAN, {}).arrays


def update(w, b):
    return {"w": np.array(w, np.float32), "b": np.array(b, np.float32)}


def test_mean_with_unequal_weights():
    total = WeightedSum(TEMPLATE)
    total.add(update([[3, 0], [0, 3]], [3, 6]), 3)  # 3 x ([[1, 0], [0, 1]], [1, 2])
    total.add(update([[5, 5], [0, 0]], [0, 1]), 1)
    mean = mean_of(total)
    assert mean["w"].tolist() == [[2.0, 1.25], [0.0, 0.75]]
    assert mean["b"].tolist() == [0.75, 1.75]
    assert total.count == 2


def test_a_sum_is_itself_an_update():
    """A regional aggregator's sum, sent upwards, gives the same mean as all updates at one place."""
    updates = [(update([[1, 2], [3, 4]], [1, 1]), 2.0), (update([[0, 1], [0, 1]], [2, 2]), 1.0)]
    region, top, flat = WeightedSum(TEMPLATE), WeightedSum(TEMPLATE), WeightedSum(TEMPLATE)
    for arrays, weight in updates:
        region.add(arrays, weight)
        flat.add(arrays, weight)
    third = update([[9, 9], [9, 9]], [9, 9])
    top.add(region.arrays, region.weight)
    top.add(third, 3.0)
    flat.add(third, 3.0)
    mean, expected = mean_of(top), mean_of(flat)
    assert all(np.array_equal(mean[name], expected[name]) for name in mean)


@given(st.integers(1, 4), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_one_bad_element_leaves_the_sum_as_it_was(position, value):
    total = WeightedSum(TEMPLATE)
    total.add(update([[1, 2], [3, 4]], [5, 6]), 1)
    bad = update([[1, 1], [1, 1]], [1, 1])
    bad["w"].reshape(-1)[position - 1] = value
    with pytest.raises(UpdateError, match="'w' holds NaN or infinite"):
        total.add(bad, 1)
    assert total.arrays["b"].tolist() == [5, 6]
    assert total.weight == 1


def test_large_finite_values_are_not_taken_for_infinite():
    total = WeightedSum(TEMPLATE)
    total.add(update([[3e38, 0], [0, 0]], [0, 0]), 1)
    assert total.arrays["w"][0, 0] == np.float32(3e38)


@pytest.mark.parametrize("weight", [0, -1, np.nan, np.inf])
def test_a_weight_is_positive_and_finite(weight):
    with pytest.raises(UpdateError, match="weight"):
        WeightedSum(TEMPLATE).add(update([[1, 1], [1, 1]], [1, 1]), weight)


def test_names_and_shapes_must_be_the_models():
    total = WeightedSum(TEMPLATE)
    with pytest.raises(UpdateError, match="missing or unknown: b"):
        total.add({"w": TEMPLATE["w"]}, 1)
    with pytest.raises(UpdateError, match="missing or unknown: extra"):
        total.add({**TEMPLATE, "extra": TEMPLATE["b"]}, 1)
    with pytest.raises(UpdateError, match=r"'b' has shape \(3,\), expected \(2,\)"):
        total.add({**TEMPLATE, "b": np.zeros(3, np.float32)}, 1)


def test_no_mean_of_nothing():
    with pytest.raises(UpdateError, match="no update"):
        mean_of(WeightedSum(TEMPLATE))


def test_finite_updates_with_an_infinite_sum_have_no_mean():
    total = WeightedSum(TEMPLATE)
    for _ in range(2):
        total.add(update([[3e38, 0], [0, 0]], [0, 0]), 1)
    with pytest.raises(UpdateError, match="overflowed in parameter 'w'"):
        mean_of(total)


@pytest.mark.parametrize(("weighting", "expected"), [("examples", 2.5), ("uniform", 2.0)])
def test_both_halves_of_the_weighting_give_the_mean(weighting, expected):
    plan = PLAN.model_copy(update={"weighting": weighting})
    total = WeightedSum(TEMPLATE)
    for examples, value in ((1, 1.0), (3, 3.0)):
        delta = {name: np.full_like(array, value) for name, array in TEMPLATE.items()}
        sent = postprocess.at_site(Released(Update(delta, 1.0, examples)), plan, CONTEXT).value
        total.add(sent.arrays, sent.weight, sent.examples)
    assert total.examples == 4
    assert set(postprocess.at_server(total.take(), plan, {}).arrays["b"].tolist()) == {expected}


def test_postprocessors_are_undone_in_reverse(monkeypatch):
    """(x + 1) * 2 at the site is y / 2 - 1 at the server; in any other order the result would not be x."""

    class Shift(Postprocessor):
        def at_site(self, part, context):
            return part.then(lambda one: replace(one, arrays={name: array + 1 for name, array in one.arrays.items()}))

        def at_server(self, total, shapes):
            return Update({name: array - 1 for name, array in total.arrays.items()}, total.weight, total.examples)

    class Scale(Postprocessor):
        def at_site(self, part, context):
            return part.then(lambda one: replace(one, arrays={name: array * 2 for name, array in one.arrays.items()}))

        def at_server(self, total, shapes):
            return Update({name: array / 2 for name, array in total.arrays.items()}, total.weight, total.examples)

    monkeypatch.setattr(postprocess, "postprocessors", lambda _plan: (Shift(), Scale()))
    sent = postprocess.at_site(Released(Update(update([[1, 2], [3, 4]], [5, 6]), 1.0, 1)), PLAN, CONTEXT).value
    assert sent.arrays["b"].tolist() == [12, 14]
    assert postprocess.at_server(sent, PLAN, {}).arrays["b"].tolist() == [5, 6]
