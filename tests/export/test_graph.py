import numpy as np
import pytest
import torch

from fedclaw.clients.tabular import Mlp
from fedclaw.errors import BundleError
from fedclaw.export import graph
from fedclaw.export.graph import BATCH_SIZES, compare, require_parity
from fedclaw.export.runtime import open_session, run_session
from fedclaw.learning.tasks.classification import Classification

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
    require_parity(figures, 0.25, "it")
    with pytest.raises(BundleError, match=r"it differs from the torch model by 0\.25 on 10 inputs, allowed is 0\.2"):
        require_parity(figures, 0.2, "it")


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


def large(batch):
    return [1e6 * batch.astype(np.float64)]


def test_large_outputs_are_held_to_what_float32_has_digits_for():
    """Raw units make logits of 10^7: a difference of 1 there is in the seventh digit."""
    figures = compare(large, lambda batch: [large(batch)[0] + 1], INPUTS)
    assert (figures.max_abs_diff, figures.scale) == (1, 1.9e7)
    require_parity(figures, 1e-4, "it")
    with pytest.raises(BundleError, match=r"differs from the torch model by 191 on 10 inputs, allowed is 190"):
        require_parity(compare(large, lambda batch: [large(batch)[0] + 191], INPUTS), 1e-4, "it")


def test_ordinary_outputs_are_held_to_the_tolerance_alone():
    def small(batch):
        return [batch / 2]

    figures = compare(small, lambda batch: [small(batch)[0] + np.float32(2e-4)], INPUTS)
    assert figures.scale is None
    with pytest.raises(BundleError, match=r"allowed is 0\.0001"):
        require_parity(figures, 1e-4, "it")


def test_a_model_of_raw_units_is_exported(tmp_path):
    torch.manual_seed(0)
    model = Mlp(2, (64, 32), 2).eval()
    random = np.random.default_rng(0)
    inputs = np.stack([random.normal(260_000, 90_000, 50), random.normal(60, 12, 50)], 1).astype(np.float32)
    path = tmp_path / "model.onnx"
    task = Classification(("no", "yes"))
    graph.save_onnx(graph.trace(model, task, (2,)), task, (2,), path)
    session, reference = open_session(path.read_bytes(), "model.onnx", "export"), graph.Linked(model, task).eval()
    figures = compare(lambda batch: graph.torch_outputs(reference, batch), lambda b: run_session(session, b), inputs)
    require_parity(figures, 1e-4, "model.onnx")
    other = graph.Linked(Mlp(2, (64, 32), 2), task).eval()
    with pytest.raises(BundleError, match="differs from the torch model"):
        require_parity(
            compare(lambda b: graph.torch_outputs(other, b), lambda b: run_session(session, b), inputs), 1e-4, "it"
        )
