"""The compression experiment: folds, cells at real sites with ledgers, the table, and going on where it was."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.compression import page
from experiments.compression.__main__ import main
from experiments.compression.cells import Store
from experiments.compression.dealing import deal_fold, fold_of
from experiments.compression.results import Results
from experiments.compression.settings import ExperimentSettings, references, students
from experiments.sources import load_source
from fedclaw.cli import compose_settings

SMALL = (
    *("~tasks.digits", "folds=2", "workers=1", "fractions=[0.3]"),
    "tasks.breast_cancer.model.args.hidden=[12,6]",
    "tasks.breast_cancer.recovery.steps=20",
    *(f"tasks.breast_cancer.teachers.{kind}.rounds=2" for kind in ("plain", "private")),
)
QUICK = ("kinds=[plain]", "modes=[none,proxy,federated]")


def settings_of(*changes: str) -> ExperimentSettings:
    return compose_settings("model_compression", changes, ExperimentSettings)


def test_each_row_is_tested_once_and_is_nowhere_else_meanwhile() -> None:
    task = settings_of().tasks["breast_cancer"]
    raw = load_source(task.dataset).inputs
    tested = list[int]()
    for number in range(5):
        fold = deal_fold(task, 5, number, seed=3)
        tested += fold.rows.tolist()
        parts = (fold.test, fold.public, *fold.sites.values())
        assert sum(map(len, parts)) == len(raw)
        # No two rows of this data set are alike: in all parts together each one is there once.
        assert len(np.unique(np.concatenate([part.inputs for part in parts]), axis=0)) == len(np.unique(raw, axis=0))
        assert len(fold.public) == task.public
    assert sorted(tested) == list(range(len(raw)))


def test_folds_have_every_label_alike() -> None:
    labels = np.repeat([0, 1, 2], [50, 13, 7])
    folds = fold_of(labels, 5, seed=0)
    for label in range(3):
        counts = np.bincount(folds[labels == label], minlength=5)
        assert counts.max() - counts.min() <= 1
    assert np.ptp(np.bincount(folds)) <= 1
    assert not np.array_equal(folds, fold_of(labels, 5, seed=1))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole small run, which wrote its page over one that had more in it."""
    root = tmp_path_factory.mktemp("compression")
    (root / "docs").mkdir()
    earlier = f"# Title\n\nBefore.\n\n{page.BEGIN}\nmade earlier\n{page.END}\nAfter.\n"
    (root / "docs" / "compression.md").write_text(earlier)
    main([*SMALL, *QUICK, f"output={root / 'docs'}", f"runs={root / 'runs'}"])
    return root


def test_a_run_ends_with_table_plot_and_figures(done: Path) -> None:
    text = (done / "docs" / "compression.md").read_text()
    assert text.startswith("# Title\n\nBefore.")
    assert text.endswith("After.\n")
    assert "made earlier" not in text
    learnt = "proxy: 40 public inputs, labelled by the teacher; federated: the sites' own examples."
    assert f"What the controls without a teacher learnt from: {learnt}" in " ".join(text.split())
    results = Results.read(done / "runs" / "results.json")
    assert len(results.rows) == 3
    for row in results.rows:
        assert row.recovered.parameters <= 0.3 * results.reference(row.task, row.kind).parameters
        low, high = row.recovered.interval.low, row.recovered.interval.high
        assert low < row.recovered.accuracy < high
        assert f"**{100 * row.recovered.kept:.1f}**" in text
        if row.mode == "none":
            assert row.recovered == row.pruned
            continue
        assert {"fine-tuned without teacher", "trained from scratch"} <= set(row.controls)
        best = max(model.accuracy for model in row.controls.values())
        assert row.difference is not None
        assert row.difference.value == pytest.approx(row.recovered.accuracy - best)
        assert row.difference.examples == 569
    assert (done / "docs" / "compression.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_recovery_at_the_sites_stays_within_the_whole_budget(tmp_path: Path) -> None:
    main([*SMALL, "kinds=[private]", f"output={tmp_path / 'docs'}", f"runs={tmp_path / 'runs'}"])
    results, settings = Results.read(tmp_path / "runs" / "results.json"), settings_of(*SMALL)
    assert {row.mode for row in results.rows} == {"none", "proxy", "synthetic", "federated", "proxy, federated"}
    for mode in ("federated", "proxy, federated"):
        (row,) = [row for row in results.rows if row.mode == mode]
        for model in (row.recovered, *row.controls.values()):
            assert model.epsilon is not None
            assert model.epsilon <= settings.epsilon
        # Its teacher's cost is in it.
        assert row.recovered.epsilon > settings.teacher_epsilon
        assert row.controls["trained from scratch"].epsilon == pytest.approx(settings.epsilon, rel=0.02)
    # Each has rounds of its own, with noise of their own, also where the teacher weighs nothing at the sites.
    store = Store(tmp_path / "runs")
    for cell in students(settings_of(*SMALL, "kinds=[private]")):
        arms = store.finished(cell).arms
        if cell.mode.endswith("federated"):
            assert arms["recovered"].right != arms["fine-tuned without teacher"].right
    (other,) = [row for row in results.rows if row.mode == "proxy"]
    assert other.recovered.epsilon is None
    assert results.reference("breast_cancer", "private").epsilon == pytest.approx(settings.epsilon, rel=0.02)


def test_it_goes_on_where_it_was(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_of(*SMALL, *QUICK, f"runs={done / 'runs'}")
    store, cells = Store(settings.runs), list(students(settings))
    lost = cells[0]
    store.path(lost).write_text("{")
    files = {path: path.stat().st_mtime_ns for path in (done / "runs" / "cells").iterdir()}
    main([*SMALL, *QUICK, f"output={done / 'again'}", f"runs={done / 'runs'}"])
    out = capsys.readouterr().out
    assert f"{len(cells)} runs, of which {len(cells) - 1} are done" in out
    again = {path: path.stat().st_mtime_ns for path in (done / "runs" / "cells").iterdir()}
    assert {path for path in files if again[path] != files[path]} == {store.path(lost)}
    last = json.loads(out.strip().splitlines()[-1])
    assert last == json.loads(Results.read(done / "runs" / "results.json").model_dump_json())
    assert len({store.path(cell) for cell in (*references(settings), *cells)}) == 2 + len(cells)
