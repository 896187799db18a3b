"""The search: what is on the front, what is chosen and by what, what it may cost, and that nothing is done twice."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch

from fedclaw.cli import make_console
from fedclaw.compress import search as searching
from fedclaw.compress.__main__ import notes
from fedclaw.compress.intervals import Difference, Interval
from fedclaw.compress.models import arrays_of, load_arrays
from fedclaw.compress.record import (
    CompressSettings,
    RecoverySettings,
    SearchSettings,
    SiteRecovery,
    SitesReport,
    StepInputs,
    read_compressed,
)
from fedclaw.compress.search import prepare, require_allowed, search
from fedclaw.compress.search_figures import plot, selected, table
from fedclaw.compress.search_record import (
    CANDIDATES,
    DIRECTORY,
    PLOT,
    RESULT,
    FrontPoint,
    PrecisionForm,
    SearchResult,
    front,
    weigh,
)
from fedclaw.compress.stage import Made
from fedclaw.errors import BundleError, CompressionError, UsageError
from fedclaw.export.bundle import _compression_cost
from fedclaw.export.source import load_source
from fedclaw.protocol.arrays import arrays_to_npz
from fedclaw.server.run_directory import ReleaseUse

FRACTIONS = (0.5, 0.25)
QUICK = RecoverySettings(steps=150, learning_rate=0.01)


def point(size=100, latency=1.0, score=0.9, epsilon=0.0, loss=0.0, precision="float32"):
    form = PrecisionForm(
        precision=precision,
        file_bytes=size,
        latency_ms={"1": latency, "32": latency},
        latency_ratio={"1": latency, "32": latency},
        score=score,
        interval=Interval(low=score - 0.1, high=min(1.0, score + 0.1)),
        difference=Difference(value=-loss, interval=None, examples=10),
    )
    return FrontPoint(fraction=0.5, mode=("proxy",), parameters=10, epsilon=epsilon, form=form)


# The front and the choice


@pytest.mark.parametrize(
    ("other", "on_front"),
    [
        ({"size": 99}, False),  # smaller, and else the same
        ({"latency": 0.8}, False),
        ({"score": 0.91}, False),
        ({"size": 99, "score": 0.89}, True),  # smaller and worse
        ({"size": 99, "latency": 1.2}, True),
        ({"size": 99, "epsilon": 1.0}, True),
        ({"size": 99, "epsilon": None}, True),
        ({"latency": 0.99}, True),  # the same within the noise of timing
        ({}, True),
    ],
)
def test_a_point_is_on_the_front_unless_another_is_as_good_in_all_and_better_in_one(other, on_front):
    assert front([point(), point(**other)])[0] is on_front


def test_no_bound_on_epsilon_is_worse_than_any():
    assert front([point(epsilon=None), point(epsilon=100.0)]) == [False, True]


def test_the_smallest_within_the_loss_is_chosen():
    points = [
        point(size=100, loss=0.0),
        point(size=50, loss=0.01),
        point(size=20, loss=0.0101),
        point(size=60, loss=-0.1),
    ]
    assert [item.chosen for item in weigh(points, 0.01)] == [False, True, False, False]
    assert [item.chosen for item in weigh(points, 0.02)] == [False, False, True, False]
    assert not any(item.chosen for item in weigh(points[2:3], 0.0))


# On a run


class TorchRuntime:
    """Models as arrays: int8 is rounded to 1/8 and a quarter of the size; latency is by the number of bytes."""

    calibration = StepInputs(step="calibration", origin="synthetic", description="none", examples=1)

    def __init__(self):
        self.models = {}

    def forms(self, model, precisions):
        found = {}
        for precision in precisions:
            arrays = arrays_of(model)
            if precision == "int8":
                arrays = {name: np.round(array * 8) / 8 for name, array in arrays.items()}
            content = arrays_to_npz(arrays)[: None if precision == "float32" else len(arrays_to_npz(arrays)) // 4]
            copy = self.models[content] = _copy(model)
            load_arrays(copy, arrays)
            found[precision] = content
        return found

    def outputs(self, content, inputs):
        with torch.no_grad():
            return self.models[content](torch.from_numpy(inputs)).numpy()

    def milliseconds(self, contents, inputs):
        return [{"1": len(content) / 1000, "32": len(content) / 500} for content in contents]


def _copy(model):
    import copy

    return copy.deepcopy(model)


@pytest.fixture(autouse=True)
def _drawn(request, monkeypatch):
    """Drawing takes a second: only the tests of the plot do it."""
    if "result" not in request.fixturenames:
        monkeypatch.setattr(searching, "plot", lambda _: b"")


@pytest.fixture
def run(make_run, trained):
    return make_run(*trained)


def settings_for(run, search=None, **changes):
    usual = {"fractions": FRACTIONS, "modes": ("proxy", "none"), "precisions": ("float32", "int8"), "loss": 0.1}
    base = {"run": run.root, "latency_repeats": 1, "device": "cpu", "controls": False, "recovery": QUICK}
    return CompressSettings(**base | changes, search=SearchSettings(**usual | (search or {})))


def searched(settings, **options):
    return search(settings, lambda _: TorchRuntime(), **options)


@pytest.fixture
def recoveries(monkeypatch):
    """The fraction and mode of each recovery, in their order."""
    seen, real = [], searching.recover

    def recover(settings, *rest, **options):
        seen.append((settings.fraction, settings.mode))
        return real(settings, *rest, **options)

    monkeypatch.setattr(searching, "recover", recover)
    return seen


def test_the_smallest_within_the_loss_is_written_with_its_record(run, digits, trained, recoveries):
    told = []
    result = searched(settings_for(run, inputs=digits.public, evaluation=digits.test), tell=told.append)
    assert told == [result]
    assert recoveries[:4] == [(0.5, ("proxy",)), (0.5, ("none",)), (0.25, ("proxy",)), (0.25, ("none",))]
    chosen = result.chosen
    within = [item for item in result.points if item.form.difference.value >= -0.1]
    assert chosen.form.file_bytes == min(item.form.file_bytes for item in within)
    assert chosen.mode == ("proxy",)
    assert {item.epsilon for item in result.points} == {0.0}
    record, parameters = read_compressed(run)
    assert record.fraction == chosen.fraction
    assert record.parameters_after == chosen.parameters
    assert record.search.precision == chosen.form.precision == "int8"
    assert record.search.score == chosen.form.score
    assert record.search.candidates == len(result.points) == 8
    # The figures that are reported are of the evaluation file; no candidate was chosen by it.
    assert record.accuracy_measure == "evaluation file"
    assert record.accuracy_examples == 397
    steps = {looked.step: looked for looked in record.looked_at}
    assert (steps["search"].origin, steps["search"].examples) == ("public", 160)
    assert "which recovery did not see" in steps["search"].description
    assert steps["calibration"].origin == "synthetic"
    assert steps["recovery"].examples == 640
    # What is written is what was measured.
    workload, _ = trained
    model = workload.build(record.model)
    load_arrays(model, parameters)
    shared = prepare(settings_for(run, inputs=digits.public, evaluation=digits.test, overwrite=True))
    with torch.no_grad():
        agreement = (model(shared.examples.inputs).argmax(1).numpy() == shared.examples.targets).mean()
    exact = next(
        item
        for item in result.points
        if (item.fraction, item.mode, item.form.precision) == (chosen.fraction, chosen.mode, "float32")
    )
    assert agreement == exact.form.score
    assert SearchResult.model_validate_json((run.root / DIRECTORY / RESULT).read_bytes()) == result


def test_what_is_chosen_by_is_neither_learnt_from_nor_reported(run, digits):
    shared = prepare(settings_for(run, inputs=digits.public))
    parts = [shared.given.proxy.values, shared.examples.inputs, shared.given.measured.values]
    rows = [{row.tobytes() for row in part.numpy()} for part in parts]
    assert all(not one & other for place, one in enumerate(rows) for other in rows[:place])
    table = shared.teacher.workload.schema.read_inputs(digits.public)
    assert set.union(*rows) == {row.tobytes() for row in table}


def test_where_labels_are_learnt_candidates_are_chosen_by_other_inputs(run, digits):
    shared = prepare(settings_for(run, labelled=digits.train))
    assert shared.looked_at.origin == "synthetic"
    learnt, measured = (
        {row.tobytes() for row in part.numpy()} for part in (shared.given.labelled.inputs, shared.given.measured.values)
    )
    assert len(shared.given.proxy.values) == 600
    assert not learnt & measured
    assert not learnt & {row.tobytes() for row in shared.examples.inputs.numpy()}


def test_a_selection_file_gives_accuracies_and_shares_no_row(run, digits, tmp_path):
    lines = digits.test.read_text().splitlines(keepends=True)
    parts = {"selection": lines[1:200], "evaluation": lines[200:]}
    paths = {}
    for name, rows in parts.items():
        paths[name] = tmp_path / f"{name}.csv"
        paths[name].write_text(lines[0] + "".join(rows))
    asked = {"inputs": digits.public, "evaluation": paths["evaluation"]}
    shared = prepare(settings_for(run, {"selection": paths["selection"]}, **asked))
    assert (shared.looked_at.origin, len(shared.examples)) == ("public", 199)
    assert len(shared.given.proxy.values) == 800
    before = shared.examples.score(shared.teacher.model)
    assert 0.9 < before.metrics["accuracy"] < 1
    unlabelled = tmp_path / "inputs.csv"
    unlabelled.write_text("".join(line.rpartition(",")[0] + "\n" for line in lines[:60]))
    with pytest.raises(UsageError, match=r"59 of 59 rows of inputs=.* are in search\.selection="):
        prepare(settings_for(run, {"selection": paths["selection"]}, inputs=unlabelled))
    paths["selection"].write_text(lines[0] + "".join(parts["selection"]) + parts["evaluation"][0])
    with pytest.raises(UsageError, match=r"1 of 198 rows of evaluation=.* are in search\.selection="):
        prepare(settings_for(run, {"selection": paths["selection"]}, **asked))


def test_too_few_public_inputs_to_choose_by(run, digits, tmp_path):
    few = tmp_path / "few.csv"
    few.write_text("".join(digits.public.read_text().splitlines(keepends=True)[:12]))
    with pytest.raises(CompressionError, match="too few to learn from and to choose by"):
        prepare(settings_for(run, inputs=few, evaluation=digits.test))


def test_a_search_that_is_stopped_goes_on_where_it_was(run, digits, recoveries, monkeypatch):
    asked = settings_for(run, inputs=digits.public, evaluation=digits.test)
    real = searching.recover

    def stopped(settings, *rest, **options):
        if settings.fraction == 0.25:
            raise KeyboardInterrupt
        return real(settings, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(searching, "recover", stopped)
        with pytest.raises(KeyboardInterrupt):
            searched(asked)
    assert not run.compressed.exists()
    kept = run.root / DIRECTORY / CANDIDATES
    assert len(kept.read_text().splitlines()) == 2
    # A line that the stop cut short is none, and spoils no later one.
    whole = kept.read_text()
    kept.write_text(whole + whole.splitlines()[0][:50])
    recoveries.clear()
    first = searched(asked)
    assert recoveries[:2] == [(0.25, ("proxy",)), (0.25, ("none",))]
    assert len(recoveries) == 3
    recoveries.clear()
    again = searched(asked.model_copy(update={"overwrite": True}))
    assert recoveries == [(first.chosen.fraction, first.chosen.mode)]
    assert again.points == first.points


def test_other_settings_are_other_candidates(run, digits, recoveries):
    searched(settings_for(run, {"fractions": (0.5,), "modes": ("proxy",), "loss": 0.9}, inputs=digits.public))
    more = QUICK.model_copy(update={"steps": 160})
    wanted = {"fractions": (0.5,), "modes": ("proxy",), "loss": 0.9}
    recoveries.clear()
    searched(settings_for(run, wanted, inputs=digits.public, recovery=more, overwrite=True))
    assert len(recoveries) == 2


def test_nothing_within_the_loss_is_an_error_and_the_figures_are_kept(run, digits):
    hopeless = {"modes": ("none",), "loss": 0.0, "fractions": (0.05,)}
    with pytest.raises(CompressionError, match=r"no candidate is within search\.loss=0: the best one loses 0\.\d+"):
        searched(settings_for(run, hopeless, inputs=digits.public))
    assert not run.compressed.exists()
    result = SearchResult.model_validate_json((run.root / DIRECTORY / RESULT).read_bytes())
    assert result.chosen is None
    assert (run.root / DIRECTORY / PLOT).is_file()


def test_a_fraction_that_cannot_be_is_left_out_and_said(run, digits):
    result = searched(settings_for(run, {"fractions": (0.5, 0.001), "modes": ("proxy",)}, inputs=digits.public))
    assert {item.fraction for item in result.points} == {0.5}
    (reason,) = result.failed.values()
    assert "cannot be pruned to" in reason
    assert any("Left out: fraction 0.001, proxy" in note for note in selected(result))
    with pytest.raises(CompressionError, match="no candidate could be made"):
        searched(settings_for(run, {"fractions": (0.001,), "modes": ("proxy",)}, inputs=digits.public, overwrite=True))


def test_a_candidate_that_cannot_be_recovered_or_served_is_left_out_and_said(run, digits, monkeypatch):
    real, forms = searching.recover, TorchRuntime.forms

    def recover(settings, *rest, **options):
        if settings.fraction == 0.25:
            raise CompressionError("recovery diverged")
        return real(settings, *rest, **options)

    def some(self, model, precisions):
        if "int8" in precisions and sum(value.numel() for value in model.parameters()) < 2000:
            raise BundleError("the model cannot be quantised to 8 bits")
        return forms(self, model, precisions)

    monkeypatch.setattr(searching, "recover", recover)
    monkeypatch.setattr(TorchRuntime, "forms", some)
    wanted = {"modes": ("none",), "fractions": (0.7, 0.25, 0.15), "loss": 0.9}
    result = searched(settings_for(run, wanted, inputs=None))
    assert {point.fraction for point in result.points} == {0.7}
    assert result.failed == {
        "fraction 0.25, none": "recovery diverged",
        "fraction 0.15, none": "the model cannot be quantised to 8 bits",
    }


def test_a_recovery_at_the_sites_that_fails_ends_the_search(run, tmp_path, monkeypatch):
    """What the sites were charged for it would otherwise be in no record."""

    def recover(*_, **__):
        raise CompressionError("diverged")

    monkeypatch.setattr(searching, "recover", recover)
    with pytest.raises(CompressionError, match=r"^diverged$"):
        searched(at_sites(run, tmp_path, 8))


def test_a_chosen_candidate_that_comes_out_otherwise_is_not_written(run, digits, monkeypatch):
    asked = settings_for(run, {"modes": ("proxy",), "loss": 0.05}, inputs=digits.public)
    real, count = searching.recover, 0

    def worse(settings, teacher, student, *rest, **options):
        nonlocal count
        count += 1
        made = real(settings, teacher, student, *rest, **options)
        return made if count <= len(FRACTIONS) else dataclasses.replace(made, model=student.model)

    monkeypatch.setattr(searching, "recover", worse)
    with pytest.raises(CompressionError, match="when it is made again, more than search"):
        searched(asked)
    assert not run.compressed.exists()


# What it may cost


def test_nothing_is_tried_at_the_sites_unless_it_is_named(run, digits, tmp_path):
    asked = settings_for(run, {"modes": None}, federation=tmp_path, inputs=digits.public)
    assert searching.modes_of(asked) == (("none",), ("synthetic",), ("proxy",))
    assert require_allowed(asked, run) == ""
    assert searching.modes_of(settings_for(run, {"modes": None})) == (("none",), ("synthetic",))


def at_sites(run, tmp_path, epsilon, each=None, **changes):
    """Two fractions of two ways of recovery, one of them at the sites; the run's epsilon is 4."""
    modes = (("synthetic", "federated"), "none")
    return settings_for(
        run, {"modes": modes, "epsilon": epsilon}, federation=tmp_path, sites=SiteRecovery(epsilon=each), **changes
    )


def test_what_candidates_at_the_sites_would_spend_is_said_and_has_to_be_allowed(run, tmp_path, recoveries):
    told = "2 candidates are recovered at the sites, for up to 4 epsilon each: up to 8 at every site, beyond the run"
    for allowed in (None, 7.9):
        with pytest.raises(UsageError) as caught:
            searched(at_sites(run, tmp_path, allowed))
        assert str(caught.value) == f"{told}; search.epsilon=8 allows that, sites.epsilon= less each"
    assert recoveries == []
    assert not (run.root / DIRECTORY).exists()
    assert require_allowed(at_sites(run, tmp_path, 8), run) == told
    assert "up to 1 at every site" in require_allowed(at_sites(run, tmp_path, 1, each=0.5), run)
    with pytest.raises(UsageError, match="needs federation=DIR"):
        require_allowed(at_sites(run, None, 8), run)


def test_a_run_without_privacy_has_no_bound_and_that_has_to_be_meant(run, tmp_path):
    plain = run.record().model_copy(update={"privacy": None})
    (run.root / "run.json").write_text(plain.model_dump_json())
    with pytest.raises(
        UsageError, match=r"no epsilon bounds it; search\.epsilon=… \(any number\) says that you mean it"
    ):
        require_allowed(at_sites(run, tmp_path, None), run)
    assert "no epsilon bounds it" in require_allowed(at_sites(run, tmp_path, 1), run)


def test_epsilon_is_the_highest_of_all_sites_with_that_of_charged_statistics():
    def made(epsilon, *looked_at):
        report = SitesReport(run="r", directory="d", rounds=1, epsilon=epsilon)
        return Made(torch.nn.Linear(1, 1), (report,), looked_at)

    charged = StepInputs(
        step="recovery",
        origin="charged question",
        description="statistics",
        release=ReleaseUse(run="statistics", epsilon=0.5, delta=1e-5),
    )
    assert searching._spent(Made(torch.nn.Linear(1, 1))) == 0
    assert searching._spent(made({"a": 1.0, "b": 2.0})) == 2
    assert searching._spent(made({"a": 1.0, "b": 2.0}, charged)) == 2.5
    assert searching._spent(made({"a": 1.0, "b": None})) is None
    assert searching._spent(made({})) is None
    # Pruning looked at the same release, which was charged once; at it alone where there is no recovery.
    assert searching._spent(made({"a": 1.0}, charged), (charged,)) == 1.5
    assert searching._spent(Made(torch.nn.Linear(1, 1)), (charged,)) == 0.5


def test_a_release_that_pruning_alone_looked_at_is_a_cost(run):
    searched(settings_for(run, {"modes": ("none",), "loss": 0.9}))
    record, _ = read_compressed(run)
    assert "Privacy cost: none" in " ".join(notes(record, run.compressed))
    used = ReleaseUse(run="statistics", epsilon=0.5, delta=1e-5)
    looked = tuple(item.model_copy(update={"release": used}) for item in record.looked_at)
    told = record.model_copy(update={"looked_at": looked})
    assert "Privacy cost: that of the statistics statistics (epsilon 0.5)" in " ".join(notes(told, run.compressed))
    source = load_source(run)
    assert "cost nothing" in _compression_cost(source)
    assert "which the bound includes" in _compression_cost(dataclasses.replace(source, compression=told))


def test_what_candidates_that_were_not_chosen_cost_at_the_sites_is_part_of_the_record(run, tmp_path, monkeypatch):
    measured = []

    def recover(settings, teacher, student, *rest, **options):
        measured.append(options.get("measured", True))
        report = SitesReport(run=f"recovery-{settings.fraction}", directory="d", rounds=1, epsilon={"north": 1.0})
        return Made(student.model, (report,))

    monkeypatch.setattr(searching, "recover", recover)
    wanted = {"modes": ("federated",), "epsilon": 8, "loss": 0.9, "precisions": ("float32",)}
    for overwrite in (False, True):  # the second search takes the candidates of the first
        measured.clear()
        searched(settings_for(run, wanted, federation=tmp_path, overwrite=overwrite))
        record, _ = read_compressed(run)
        assert measured == ([True] if overwrite else [False, False, True]), "the sites measure the chosen one alone"
        assert record.at_sites.run == "recovery-0.25"
        assert [report.run for report in record.search.at_sites] == ["recovery-0.5"]
        assert [report.run for report in record.runs_at_sites] == ["recovery-0.25", "recovery-0.5"]
        (step,) = [item for item in record.looked_at if (item.step, item.origin) == ("search", "sites")]
        assert "recovery-0.5" in step.description


# Table and plot


@pytest.fixture
def result(run, digits):
    return searched(settings_for(run, {"modes": ("proxy", "none")}, inputs=digits.public))


def test_the_table_has_the_front_and_marks_the_chosen_one(result):
    console = make_console()
    with console.capture() as captured:
        console.print(table(result))
    lines = captured.get().splitlines()
    assert sum("float32" in line or "int8" in line for line in lines) == 1 + sum(
        item.on_front for item in result.points
    )
    (line,) = [line for line in lines if "chosen" in line]
    assert f"{result.chosen.form.file_bytes:,}" in line
    assert f"{result.chosen.form.score:.3f}" in line
    assert any("Chosen: fraction" in note for note in selected(result))


def test_the_plot_shows_every_form_and_the_chosen_one_alone_is_ringed(result, run):
    from matplotlib import image

    pixels = image.imread(io.BytesIO((run.root / DIRECTORY / PLOT).read_bytes()))
    assert pixels.shape[0] > 500
    assert pixels.shape[1] > 1000
    none_chosen = result.model_copy(
        update={"points": tuple(item.model_copy(update={"chosen": False}) for item in result.points)}
    )
    assert plot(result) == plot(result)
    assert plot(none_chosen) != plot(result)
    fewer = result.model_copy(update={"points": result.points[:-1]})
    assert plot(fewer) != plot(result)
    assert json.loads((run.root / DIRECTORY / RESULT).read_text())["points"]
