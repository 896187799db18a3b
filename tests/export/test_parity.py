import numpy as np
import pytest

from fedclaw.errors import BundleError
from fedclaw.export.parity import BATCH_SIZES, compare, require

INPUTS = np.arange(20, dtype=np.float32).reshape(10, 2)


def double(batch):
    return [2 * batch, batch]


def test_finds_the_largest_difference_over_all_outputs_and_rows():
    def off(batch):
        first, second = double(batch)
        return [first, np.where(batch == 13, batch + np.float32(0.25), second)]

    figures = compare(double, off, INPUTS)
    assert figures.max_abs_diff == 0.25
    assert figures.examples == 10
    require(figures, 0.25, "it")
    with pytest.raises(BundleError, match=r"it differs from the torch model by 0\.25 on 10 inputs, allowed is 0\.2"):
        require(figures, 0.2, "it")


def test_runs_every_batch_size_and_every_input():
    sizes, seen = [], set()

    def watch(batch):
        sizes.append(len(batch))
        seen.update(batch[:, 0].tolist())
        return double(batch)

    inputs = np.arange(400, dtype=np.float32).reshape(200, 2)
    assert compare(double, watch, inputs).max_abs_diff == 0
    assert set(BATCH_SIZES) <= set(sizes)
    assert seen == set(inputs[:, 0].tolist())


def test_repeats_few_inputs_up_to_the_largest_batch():
    sizes = []

    def watch(batch):
        sizes.append(len(batch))
        return double(batch)

    compare(double, watch, INPUTS[:1])
    assert set(BATCH_SIZES) <= set(sizes)


def test_a_batch_size_frozen_into_the_graph_is_found():
    with pytest.raises(BundleError, match="shape"):
        compare(double, lambda batch: [output[:1] for output in double(batch)], INPUTS)


def test_nan_on_both_sides_is_no_agreement():
    with pytest.raises(BundleError, match="NaN"):
        compare(lambda batch: [batch * np.nan], lambda batch: [batch * np.nan], INPUTS)


def test_a_lost_output_is_found():
    with pytest.raises(BundleError, match="has 1 outputs"):
        compare(double, lambda batch: [2 * batch], INPUTS)


def test_no_inputs_are_refused():
    with pytest.raises(BundleError, match="no inputs"):
        compare(double, double, INPUTS[:0])
