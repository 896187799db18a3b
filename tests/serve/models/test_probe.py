"""The probe's rules on figures worked out by hand, and the probe itself on real bundles."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest

from fedclaw.errors import BundleError
from fedclaw.export.check import verify_bundle
from fedclaw.export.layout import ONNX, PIPELINE
from fedclaw.serve.models.batching import Execution
from fedclaw.serve.models.probe import SIZES, ExecutionSettings, ProbeFigures, decide_execution, probe
from fedclaw.serve.models.served_model import KEPT

HAND_OVER = 60e-6
AUTO = ExecutionSettings()


def figures(fixed: float, per_row: float, most: int = 64) -> ProbeFigures:
    return ProbeFigures(1, {rows: fixed + rows * per_row for rows in SIZES if rows <= most})


def decided(fixed: float, per_row: float, settings: ExecutionSettings = AUTO, most: int = 64) -> Execution:
    return decide_execution(figures(fixed, per_row, most), HAND_OVER, settings)


def test_a_model_of_microseconds_is_computed_inline_in_batches() -> None:
    found = decided(25e-6, 4e-6)
    # 32 rows in 153 us are 209,000 a second, 64 in 281 us 228,000
    assert (found.inline, found.batching, found.max_batch) == (True, True, 32)
    assert found.seconds_a_batch == pytest.approx(25e-6)
    assert found.seconds_a_row == pytest.approx(4e-6)
    # 2 ms is the longest that the event loop may be held: 1000 us + 32 * 30 us
    assert not decided(1e-3, 30e-6).inline
    by_hand = decided(1e-3, 30e-6, ExecutionSettings(inline=True))
    assert (by_hand.inline, by_hand.max_batch) == (True, 32)


def test_a_large_model_is_computed_elsewhere_and_its_batch_ends_where_more_rows_gain_little() -> None:
    found = decided(1.5e-3, 0.2e-3)
    assert (found.inline, found.batching) == (False, True)
    # 32 rows: 4051 a second in 7.9 ms; 64 would take 14.3 ms, longer than a batch may
    assert found.max_batch == 32
    # 8 rows: 8889 a second, more than nine tenths of the 9846 with 64
    assert decided(0.1e-3, 0.1e-3).max_batch == 8


def test_batching_is_off_where_it_does_not_pay() -> None:
    found = decided(1e-6, 1e-3, most=16)
    assert (found.batching, found.inline) == (False, False)
    assert found.max_batch == 8, "the most rows of one request at a time within 10 ms"
    assert decided(1e-6, 1e-3, ExecutionSettings(batching=True)).batching


def test_what_the_operator_sets_stays() -> None:
    by_hand = ExecutionSettings(threads=1, max_batch=5, batching=False, inline=False)
    assert by_hand.complete
    assert not AUTO.complete
    found = decided(25e-6, 4e-6, by_hand)
    assert (found.threads, found.max_batch, found.batching, found.inline) == (1, 5, False, False)


def test_a_bundle_is_measured_and_the_figures_are_logged(table_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    verified = verify_bundle(table_bundle, keep=KEPT)
    with caplog.at_level(logging.INFO, "fedclaw.serve"):
        found = probe(verified, cores=2)
    assert [own.threads for own in found.figures] == [1, 2]
    assert all(1 in own.seconds and min(own.seconds.values()) > 0 for own in found.figures)
    assert found.execution.threads in {1, 2}
    assert found.execution.max_batch in SIZES
    assert "us by rows" in caplog.text
    columns = found.loaded.schema.preprocessing().synthetic(4, np.random.default_rng(0))
    assert found.loaded.graph.run(columns)["refused"].shape == (4, 1)


def test_prepared_inputs_are_probed_too(table_bundle: Path) -> None:
    verified = verify_bundle(table_bundle, keep=KEPT)
    manifest = verified.manifest.model_copy(update={"pipeline": None, "no_pipeline": "it cannot be written"})
    found = probe(dataclasses.replace(verified, manifest=manifest), settings=ExecutionSettings(2, 3, True, True))
    assert found.loaded.file == ONNX
    assert (found.execution.threads, found.execution.max_batch) == (2, 3)
    assert found.hand_over == 0


def test_a_graph_that_gives_no_answer_to_its_own_schema_is_refused(table_bundle: Path, image_bundle: Path) -> None:
    verified = verify_bundle(table_bundle, keep=KEPT)
    images = verify_bundle(image_bundle, keep=KEPT).contents[PIPELINE]
    with pytest.raises(BundleError, match="disagree about the columns"):
        probe(dataclasses.replace(verified, contents={**verified.contents, PIPELINE: images}))
    # A model whose graph was made for another number of columns
    wrong = {**verified.contents, ONNX: verify_bundle(image_bundle, keep=KEPT).contents[ONNX]}
    manifest = verified.manifest.model_copy(update={"pipeline": None})
    with pytest.raises(BundleError, match="gives no answer to rows made from the bundle's own schema"):
        probe(dataclasses.replace(verified, contents=wrong, manifest=manifest))
