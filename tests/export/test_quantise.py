"""8-bit and 16-bit forms: what they look at, what is measured of them, and when one is recommended."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fedclaw.clients.tabular import Mlp
from fedclaw.compress.intervals import Difference
from fedclaw.compress.record import Compression, SearchChoice
from fedclaw.errors import BundleError, UsageError
from fedclaw.export import graph, layout
from fedclaw.export.__main__ import main, quantised
from fedclaw.export.bundle import Request, export_bundle
from fedclaw.export.check import verify_bundle
from fedclaw.export.layout import HALF, ONNX, QUANTISED, FormFigures
from fedclaw.export.predictor import Predictor
from fedclaw.export.quantise import FEWEST_INPUTS, choose, measure, public_samples, synthetic_samples, to_float16
from fedclaw.export.runtime import open_session, run_session
from fedclaw.files import sha256_file
from fedclaw.learning.tasks.classification import Classification
from fedclaw.learning.workload import Table

PAST = Path(__file__).parent.parent / "past" / "437d1ac"
ROWS = "age,smoker,ward\n" + "".join(
    f"{20 + age},{('yes', 'no')[age % 2]},{('surgery', 'medicine')[age % 3 == 0]}\n" for age in range(60)
)


@pytest.fixture
def public(tmp_path):
    path = tmp_path / "public.csv"
    path.write_text(ROWS)
    return path


def exported(source, home, target, **options):
    return export_bundle(source, home.signer(), target, Request(quantised=True, **options)).manifest


# What quantisation looks at


def test_real_inputs_of_the_parity_check_leave_no_trace_in_the_quantised_files(
    table_source, table_bundle, home, tmp_path
):
    """The 8-bit file holds the extremes of what it was calibrated on; `table_bundle` had other inputs."""
    extreme = 50 * table_source.schema.synthetic_inputs(40, np.random.default_rng(0))
    forms = exported(table_source, home, tmp_path / "extreme", inputs=extreme).forms
    assert forms.calibration.origin == forms.measurement.origin == "synthetic"
    for form in (QUANTISED, HALF):
        assert (tmp_path / "extreme" / form).read_bytes() == (table_bundle / form).read_bytes()


def test_one_half_of_a_public_file_calibrates_and_the_other_is_measured_on(
    table_source, table_bundle, home, public, tmp_path
):
    forms = exported(table_source, home, tmp_path / "public", calibration=public, loss=1e-6).forms
    assert (tmp_path / "public" / QUANTISED).read_bytes() != (table_bundle / QUANTISED).read_bytes()
    # So little loss is allowed that so few rows cannot show it.
    assert (forms.loss, forms.chosen) == (1e-6, ONNX)
    for step, name, half in ((forms.calibration, "calibration", "first"), (forms.measurement, "measurement", "second")):
        assert (step.step, step.origin, step.examples) == (name, "public", 30)
        assert step.description == f"the {half} half of public.csv, shuffled"
        assert step.sha256 == sha256_file(public)
    samples = public_samples(table_source.schema, public, 0)
    rows = {tuple(row) for row in table_source.schema.read_inputs(public).tolist()}
    first, second = ({tuple(row) for row in part.tolist()} for part in (samples.calibration, samples.measurement))
    assert not first & second
    assert first | second == rows
    card = (tmp_path / "public" / layout.CARD).read_text()
    assert "calibration: 30 public inputs (the first half of public.csv, shuffled)" in card


def test_synthetic_inputs_are_measured_on_others_than_were_calibrated_on(table_source):
    samples = synthetic_samples(table_source.schema, 0)
    first, second = ({tuple(row) for row in part.tolist()} for part in (samples.calibration, samples.measurement))
    # Some are at the ends of their ranges in both.
    assert len(first & second) < 0.1 * len(first)
    assert [step.examples for step in samples.looked_at] == [len(samples.calibration), len(samples.measurement)]


def test_too_few_public_inputs_are_refused(table_source, home, public, tmp_path, monkeypatch):
    public.write_text("".join(ROWS.splitlines(keepends=True)[:FEWEST_INPUTS]))
    monkeypatch.setattr(graph, "trace", None)
    with pytest.raises(BundleError, match=rf"holds {FEWEST_INPUTS - 1} inputs; calibration and its check need"):
        exported(table_source, home, tmp_path / "bundle", calibration=public)
    assert not (tmp_path / "bundle").exists()


# What is measured


def test_every_form_takes_and_gives_float32_and_answers_alike(table_bundle, table_source):
    inputs = table_source.schema.synthetic_inputs(500, np.random.default_rng(3))
    contents = {name: (table_bundle / name).read_bytes() for name in (ONNX, QUANTISED, HALF)}
    sessions = {name: open_session(content, name, "export") for name, content in contents.items()}
    exact = run_session(sessions[ONNX], inputs)[1]
    for name, session in sessions.items():
        probabilities = run_session(session, inputs)[1]
        assert probabilities.dtype == np.float32
        assert (probabilities.argmax(1) == exact.argmax(1)).mean() > 0.97
        assert name == ONNX or not np.array_equal(probabilities, exact)


def test_the_figures_are_those_of_the_files(table_bundle, table_source):
    forms = verify_bundle(table_bundle).manifest.forms
    assert list(forms.files) == [ONNX, QUANTISED, HALF]
    assert (forms.chosen, forms.why) == choose(forms.files, forms.loss)
    samples = synthetic_samples(table_source.schema, 0)
    outputs = {
        name: run_session(open_session((table_bundle / name).read_bytes(), name, "export"), samples.measurement)[1]
        for name in forms.files
    }
    for name, figures in forms.files.items():
        assert figures.file_bytes == (table_bundle / name).stat().st_size
        assert set(figures.latency_ms) == {"1", "32"}
        assert figures.agreement == (outputs[name].argmax(1) == outputs[ONNX].argmax(1)).mean()
        assert figures.max_abs_diff == pytest.approx(np.abs(outputs[name] - outputs[ONNX]).max(), abs=1e-6)
        assert figures.agreement_low < figures.agreement
    assert forms.files[ONNX].agreement == 1
    assert 0 < forms.files[HALF].max_abs_diff < forms.files[QUANTISED].max_abs_diff < 0.2
    card = (table_bundle / layout.CARD).read_text()
    assert f"| Recommended | {forms.chosen}: " in card
    assert f"{forms.files[QUANTISED].file_bytes:,} bytes" in card


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A net large enough for its weights to weigh, as an ONNX file."""
    torch.manual_seed(0)
    model, task = Mlp(2, (64, 32), 2).eval(), Classification(("no", "yes"))
    path = tmp_path_factory.mktemp("wide") / ONNX
    graph.save_onnx(graph.trace(model, task, (2,)), task, (2,), path)
    return path, task


def test_half_precision_that_would_overflow_is_not_recommended(wide, tmp_path):
    """Raw units: 260,000 is no float16. This CPU computes in float32 and does not show it; a GPU would."""
    path, task = wide
    to_float16(path, tmp_path / HALF)
    files = {ONNX: path.read_bytes(), HALF: (tmp_path / HALF).read_bytes()}
    raw = np.random.default_rng(0).normal(260_000, 9_000, (50, 2)).astype(np.float32)
    figures = measure(files, raw, task)
    assert figures[ONNX].agreement == 1
    assert figures[HALF].agreement is None
    assert choose(figures, 0.5) == (ONNX, f"{HALF} has values that are not finite or beyond its range")
    assert measure(files, raw / 100_000, task)[HALF].agreement > 0.9


def test_values_inside_the_model_may_overflow_too(wide, tmp_path):
    """Ordinary inputs, ordinary outputs: 3e5 between the layers."""
    _, task = wide
    model = Mlp(2, (4, 4), 2).eval()
    with torch.no_grad():
        for layer, value in zip((*model.hidden, model.head), (3e5, 1e-5, 0.1), strict=True):
            layer.weight.fill_(value)
    path = tmp_path / ONNX
    graph.save_onnx(graph.trace(model, task, (2,)), task, (2,), path)
    to_float16(path, tmp_path / HALF)
    files = {ONNX: path.read_bytes(), HALF: (tmp_path / HALF).read_bytes()}
    assert measure(files, np.ones((40, 2), np.float32), task)[HALF].agreement is None


def test_labels_are_those_of_the_bundles_threshold(wide, tmp_path):
    """Answers that only the likelier class has in common are none in common."""
    path, task = wide
    to_float16(path, tmp_path / HALF)
    files = {ONNX: path.read_bytes(), HALF: (tmp_path / HALF).read_bytes()}
    inputs = np.random.default_rng(0).normal(size=(400, 2)).astype(np.float32)
    positive = run_session(open_session(files[ONNX], ONNX, "export"), inputs)[1][:, 1]
    labelled = Table(inputs, (positive >= np.quantile(positive, 0.9)).astype(np.int64))
    cut = float(np.quantile(positive, 0.9))
    assert measure(files, inputs, task, cut, labelled)[ONNX].accuracy == 1
    assert measure(files, inputs, task, None, labelled)[ONNX].accuracy < 1
    between = np.tile(inputs[np.argmin(np.abs(positive - cut))], (30, 1))
    other = {ONNX: files[ONNX], HALF: files[HALF]}
    exact, half = (
        float(run_session(open_session(content, name, "export"), between[:1])[1][0, 1])
        for name, content in other.items()
    )
    assert exact != half
    assert measure(other, between, task)[HALF].agreement == 1
    assert measure(other, between, task, (exact + half) / 2)[HALF].agreement == 0


# The rule


def figures(size=25, one=0.3, batch=0.3, agreement=0.999, low=0.995):
    return FormFigures(
        file_bytes=size,
        latency_ms={"1": one, "32": batch},
        agreement=agreement,
        agreement_low=low,
        max_abs_diff=0.0,
    )


EXACT = figures(size=100, one=1.0, batch=1.0, agreement=1.0, low=0.998)


@pytest.mark.parametrize(
    ("int8", "half", "chosen", "why"),
    [
        (figures(), figures(size=50), QUANTISED, "it has 25% of the exact model's bytes and takes 30%"),
        (figures(low=0.989), figures(size=50), HALF, "it has 50%"),
        (figures(low=0.989), figures(size=50, one=1.2), ONNX, "takes 120% of the time at batch 1"),
        (figures(low=0.989), figures(size=50, batch=1.2), ONNX, "takes 120% of the time at batch 32"),
        (figures(low=0.989), figures(size=95, one=0.95, batch=1.0), ONNX, "is neither smaller nor faster by a tenth"),
        (figures(low=0.989), figures(size=110, one=0.5, batch=1.0), HALF, "it has 110%"),
        (figures(size=95, one=1.05, batch=1.0), figures(size=50, one=1.05, batch=1.05), HALF, "it has 50%"),
        (figures(agreement=1.0, low=0.98), figures(low=0.9), ONNX, "agrees by 1.0000, perhaps only 0.9800"),
    ],
)
def test_only_a_form_that_wins_is_recommended(int8, half, chosen, why):
    found, reason = choose({ONNX: EXACT, QUANTISED: int8, HALF: half}, loss=0.01)
    assert found == chosen
    assert why in reason


# Using it


@pytest.fixture(scope="module")
def recommending(table_source, home, tmp_path_factory):
    """A bundle that recommends the 8-bit form, whatever the timing on this machine."""
    target = tmp_path_factory.mktemp("recommending") / "bundle"
    measured = {ONNX: EXACT, QUANTISED: figures(), HALF: figures(one=9.0)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedclaw.export.quantise.measure", lambda *_: measured)
        assert exported(table_source, home, target).forms.chosen == QUANTISED
    return target


@pytest.mark.parametrize(
    ("precision", "name"),
    [((), ONNX), (("recommended",), QUANTISED), (("int8",), QUANTISED), (("float16",), HALF), (("float32",), ONNX)],
)
def test_the_exact_model_predicts_unless_another_form_is_asked_for(recommending, table_source, precision, name):
    inputs = table_source.schema.synthetic_inputs(60, np.random.default_rng(0))
    session = open_session((recommending / name).read_bytes(), name, "export")
    predicted = Predictor.open(recommending, None, "cpu", *precision).predict(inputs)
    np.testing.assert_array_equal(predicted, run_session(session, inputs)[1])


def test_a_bundle_without_such_a_form_says_so(command, image_bundle, tmp_path):
    assert Predictor.open(image_bundle, precision="recommended").predict(np.zeros((1, 1, 8, 8), np.float32)).size == 3
    with pytest.raises(BundleError, match=r"has no model-int8\.onnx: precision=int8 needs it"):
        Predictor.open(image_bundle, precision="int8")
    np.savez(tmp_path / "rows.npz", images=np.zeros((1, 1, 8, 8), np.uint8))
    failed = command("fedclaw.predict", f"bundle={image_bundle}", f"input={tmp_path / 'rows.npz'}", "precision=float16")
    assert failed.returncode == 1
    assert "has no model-fp16.onnx" in failed.stderr


def test_an_older_bundle_keeps_its_figures_and_recommends_the_exact_model():
    bundle = PAST / "runs" / "local" / "bundle"
    manifest = verify_bundle(bundle).manifest
    assert manifest.quantised.same_label > 0.9
    assert manifest.forms is None
    exact, recommended, small = (
        Predictor.open(bundle, precision=precision) for precision in ("float32", "recommended", "int8")
    )
    inputs = exact.schema.synthetic_inputs(20, np.random.default_rng(0))
    np.testing.assert_array_equal(exact.predict(inputs), recommended.predict(inputs))
    assert not np.array_equal(exact.predict(inputs), small.predict(inputs))


def test_what_forms_are_calibrated_with_is_not_what_their_accuracy_is_of(table_run, home, public, tmp_path):
    copy = shutil.copy(public, tmp_path / "copy.csv")
    with pytest.raises(UsageError, match="calibration= and threshold_data= have the same content"):
        main(
            [
                *(f"run={table_run.root}", f"federation={home.root}", "quantise=true"),
                *(f"calibration={public}", f"threshold_data={copy}"),
            ]
        )


def test_the_command_says_which_form_is_recommended(command, table_run, home, public, tmp_path):
    run = shutil.copytree(table_run.root, tmp_path / "run", ignore=shutil.ignore_patterns("bundle"))
    arguments = [f"run={run}", f"federation={home.root}", f"calibration={public}"]
    failed = command("fedclaw.export", *arguments)
    assert failed.returncode == 2
    assert "calibration= is for quantise=true" in failed.stderr
    done = command("fedclaw.export", *arguments, "quantise=true", "quantise_loss=0.3")
    assert done.returncode == 0, done.stderr
    forms = verify_bundle(run / "bundle").manifest.forms
    assert forms.loss == 0.3
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("forms")]
    assert line.startswith(f"forms     {forms.chosen} is recommended: ")


def test_inputs_that_every_site_standardises_by_itself_are_no_public_file(table_source, public):
    class PerSite(type(table_source.schema)):
        data_dependent = True

    own = PerSite.parse(table_source.schema.to_json(), "test")
    with pytest.raises(UsageError, match="standardises by site"):
        public_samples(own, public, 0)
    assert dataclasses.is_dataclass(synthetic_samples(own, 0))


@pytest.mark.parametrize(
    ("precision", "given", "added"), [("int8", None, True), ("float32", None, False), ("int8", False, False)]
)
def test_an_export_adds_what_a_search_chose(table_source, precision, given, added):
    choice = SearchChoice(
        precision=precision,
        loss=0.01,
        candidates=3,
        measure="agreement with the teacher",
        score=0.99,
        difference=Difference(value=-0.01, interval=None, examples=100),
    )
    compression = Compression.model_construct(search=choice)
    assert quantised(dataclasses.replace(table_source, compression=compression), given) is added
    assert quantised(table_source, None) is False
    assert quantised(table_source, True) is True
