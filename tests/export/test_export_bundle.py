import dataclasses
import json
import shutil
import zipfile

import numpy as np
import onnx
import pytest
import torch

from fedclaw.compress.record import Compression, CoordinatorReport, Side, SitesReport, write_compressed
from fedclaw.errors import BundleError, CheckpointError, UsageError
from fedclaw.export import graph, layout
from fedclaw.export.bundle import Request, export_bundle
from fedclaw.export.runtime import open_session, run_session
from fedclaw.export.source import load_source
from fedclaw.files import sha256_file
from fedclaw.learning.registry import schema_class
from fedclaw.privacy.claims import Claim
from fedclaw.protocol.terms import ModelSpec
from fedclaw.server.run_directory import RunDirectory, SiteReceipt


@pytest.fixture(params=["table", "image"])
def exported(request):
    """(source, bundle) of both workloads."""
    run = request.getfixturevalue(f"{request.param}_run")
    return load_source(run), request.getfixturevalue(f"{request.param}_bundle")


def manifest_of(bundle):
    return layout.Manifest.model_validate_json((bundle / layout.MANIFEST).read_bytes())


def test_holds_exactly_the_promised_files(table_bundle, image_bundle):
    promised = layout.REQUIRED | layout.UNSIGNED | {layout.PIPELINE}
    assert {path.name for path in table_bundle.iterdir()} == promised | {layout.QUANTISED, layout.HALF}
    assert {path.name for path in image_bundle.iterdir()} == promised
    assert not [path for path in table_bundle.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("size", [1, 2, 5, 33])
def test_both_forms_answer_as_the_torch_model_for_any_batch(exported, size):
    source, bundle = exported
    inputs = source.schema.synthetic_inputs(size, np.random.default_rng(size))
    with torch.no_grad():
        logits = source.model(torch.from_numpy(inputs))
    expected = [logits.numpy(), torch.softmax(logits, 1).numpy()]
    session = open_session((bundle / layout.ONNX).read_bytes(), layout.ONNX, "export")
    program = graph.load_program(bundle / layout.PROGRAM)
    for outputs in (run_session(session, inputs), graph.torch_outputs(program, inputs)):
        for left, right in zip(expected, outputs, strict=True):
            np.testing.assert_allclose(right, left, atol=2e-6)


def test_the_onnx_graph_names_its_tensors_and_its_batch(exported):
    source, bundle = exported
    model = onnx.load(bundle / layout.ONNX, load_external_data=False)

    def shapes(values):
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    manifest = manifest_of(bundle)
    assert shapes(model.graph.input) == {t.name: list(t.shape) for t in manifest.inputs}
    assert shapes(model.graph.output) == {t.name: list(t.shape) for t in manifest.outputs}
    assert shapes(model.graph.input) == {"inputs": ["batch", *source.schema.input_shape]}
    assert not any(tensor.external_data for tensor in model.graph.initializer)


def test_neither_file_tells_about_the_machine_or_holds_an_example(exported):
    _, bundle = exported
    with zipfile.ZipFile(bundle / layout.PROGRAM) as archive:
        program = {name: archive.read(name) for name in archive.namelist()}
    content = b"".join(program.values()) + (bundle / layout.ONNX).read_bytes()
    assert b"stack_trace" not in content
    assert b".py" not in content
    assert [content for name, content in program.items() if "sample_inputs" in name] == [b""]


def test_the_manifest_and_schema_say_what_the_run_was(exported, samples):
    source, bundle = exported
    manifest = manifest_of(bundle)
    assert (manifest.federation, manifest.run, manifest.workload) == (
        samples.federation, source.record.run, source.record.workload,
    )  # fmt: skip
    assert manifest.model == source.spec
    assert manifest.labels == source.schema.labels
    assert manifest.preprocessing == json.loads(json.dumps(source.schema.describe_inputs()))
    assert manifest.parameters == sum(p.numel() for p in source.model.parameters())
    assert {"torch", "onnx", "onnxruntime"} <= set(manifest.versions)
    schema = schema_class(manifest.workload).parse((bundle / layout.SCHEMA).read_text(), "bundle")
    assert schema.to_json() == source.record.schema_text


def test_parity_says_which_inputs_it_saw(table_bundle, image_bundle):
    real, synthetic = manifest_of(table_bundle).parity, manifest_of(image_bundle).parity
    assert (real.inputs, synthetic.inputs) == ("real", "synthetic")
    assert real.files[layout.ONNX].examples == 70
    assert set(real.files) == {layout.ONNX, layout.PROGRAM, layout.PIPELINE}
    assert all(figures.max_abs_diff <= 1e-5 for figures in (*real.files.values(), *synthetic.files.values()))
    assert "synthetic inputs only" in (image_bundle / layout.CARD).read_text()
    assert "synthetic inputs only" not in (table_bundle / layout.CARD).read_text()


def test_above_tolerance_nothing_is_written(table_source, home, tmp_path):
    with pytest.raises(BundleError, match="differs from the torch model"):
        export_bundle(table_source, home.signer(), tmp_path / "bundle", Request(tolerance=1e-12))
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_gives_nan_is_refused(table_source, home, tmp_path):
    class Broken(torch.nn.Module):
        def forward(self, inputs):
            return torch.log(inputs[:, :2] * 0 - 1)

    source = dataclasses.replace(table_source, model=Broken())
    with pytest.raises(BundleError, match="NaN"):
        export_bundle(source, home.signer(), tmp_path / "bundle", Request())
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_depends_on_its_values_is_refused(table_source, home, tmp_path):
    class Branches(torch.nn.Module):
        def forward(self, inputs):
            return inputs[:, :2] if inputs.sum() > 0 else inputs[:, 2:]

    source = dataclasses.replace(table_source, model=Branches())
    with pytest.raises(BundleError, match="the model cannot be exported"):
        export_bundle(source, home.signer(), tmp_path / "bundle", Request())
    assert list(tmp_path.iterdir()) == []


def test_an_older_bundle_is_replaced_only_when_asked(bundle, table_source, home):
    before = (bundle / layout.SIGNATURE).read_bytes()
    with pytest.raises(BundleError, match="already exists"):
        export_bundle(table_source, home.signer(), bundle, Request())
    assert (bundle / layout.SIGNATURE).read_bytes() == before
    export_bundle(table_source, home.signer(), bundle, Request(overwrite=True))
    assert (bundle / layout.SIGNATURE).read_bytes() != before
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_a_directory_that_is_no_bundle_is_never_replaced(table_source, home, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years")
    with pytest.raises(BundleError, match="left alone"):
        export_bundle(table_source, home.signer(), tmp_path / "precious", Request(overwrite=True))
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years"


def test_inputs_of_another_shape_are_refused(table_source, home, tmp_path):
    with pytest.raises(BundleError, match="shape"):
        export_bundle(table_source, home.signer(), tmp_path / "b", Request(inputs=np.zeros((2, 3), np.float32)))


def test_privacy_and_card_warn_of_a_site_without_privacy(with_receipts, samples, home, tmp_path):
    export_bundle(with_receipts({**samples.private, "west": samples.bare}), home.signer(), tmp_path / "b", Request())
    assert json.loads((tmp_path / "b" / layout.PRIVACY).read_bytes())["guarantee"] == "some sites"
    card = (tmp_path / "b" / layout.CARD).read_text()
    head = card.partition("## Intended use")[0]
    assert "NO DIFFERENTIAL PRIVACY AT SITE west" in head
    assert "unbounded" in card


def test_the_bundle_and_its_card_say_the_sentences_of_the_receipts_claim(with_receipts, samples, home, tmp_path):
    told = {"relation": "add-or-remove", "trust": "aggregation", "mechanism": "distributed"}
    by_site = {"north": SiteReceipt(examples=120, receipt=samples.receipt(**told))}
    export_bundle(with_receipts(by_site), home.signer(), tmp_path / "b", Request())
    claim = Claim("example", "add-or-remove", "aggregation")
    statement = json.loads((tmp_path / "b" / layout.PRIVACY).read_bytes())
    assert (statement["unit"], statement["holds_against"]) == (claim.protects, claim.against)
    assert statement["not_covered"] == list(claim.not_covered)
    card = (tmp_path / "b" / layout.CARD).read_text()
    assert all(sentence in card for sentence in (claim.protects, claim.against, *claim.not_covered))


def test_no_bundle_of_receipts_that_say_another_unit_than_the_schema(with_receipts, samples, home, tmp_path):
    by_site = {**samples.private, "south": SiteReceipt(examples=80, receipt=samples.receipt(unit="person"))}
    with pytest.raises(BundleError, match="south in run table is for the unit person, and the run's schema"):
        export_bundle(with_receipts(by_site), home.signer(), tmp_path / "b", Request())
    assert not (tmp_path / "b").exists()


def test_the_card_states_facts_and_leaves_the_use_open(table_bundle):
    card = (table_bundle / layout.CARD).read_text()
    for fact in ("To be filled in by the coordinator", "| accuracy | 0.8750 |", "200 training examples", "| north |"):
        assert fact in card


class TestSource:
    @pytest.fixture
    def run(self, table_run, tmp_path):
        """A copy of the tabular run without its bundle."""
        copied = shutil.copytree(table_run.root, tmp_path / "run", ignore=shutil.ignore_patterns("bundle"))
        return RunDirectory.open(copied)

    @pytest.fixture
    def compress(self, run, tmp_path, samples):
        """Leaves a smaller model in `run`, as compression does."""
        spec = ModelSpec(name="mlp", args={"hidden": [3, 2]})
        small = samples.make_run(tmp_path / "small", "tabular", samples.table, spec).read_model()
        side = {"multiply_adds": 50, "file_bytes": 1000, "latency_ms": {"1": 0.1}, "metrics": {}}

        def write(recovery, teacher=None):
            record = Compression(
                run="table",
                model=spec,
                teacher_sha256=teacher or sha256_file(run.model_path),
                fraction=0.5,
                parameters_before=86,
                parameters_after=29,
                accuracy_measure="agreement with the teacher",
                accuracy_examples=100,
                accuracy_before=1.0,
                accuracy_pruned=0.5,
                accuracy_after=0.9375,
                before=Side(parameters=86, **side),
                after=Side(parameters=29, **side),
                recovery=recovery,
                seed=0,
            )
            write_compressed(run, record, small)

        return write

    PROXY = CoordinatorReport(inputs="100 synthetic", steps=1, agreement_pruned=0.5, agreement_after=0.9)

    def test_auto_takes_the_compressed_model(self, run, compress):
        assert load_source(run).variant == "final"
        compress(self.PROXY)
        source = load_source(run)
        assert (source.variant, source.parameters) == ("compressed", 29)
        assert load_source(run, "final").parameters == 86

    def test_a_compressed_bundle_says_so(self, run, compress, home, tmp_path):
        compress(self.PROXY)
        verified = export_bundle(load_source(run), home.signer(), tmp_path / "b", Request())
        assert (verified.manifest.variant, verified.manifest.parameters) == ("compressed", 29)
        assert "| Agreement with the teacher | 1.0000 | 0.9375 |" in (tmp_path / "b" / layout.CARD).read_text()
        assert "post-processing" in json.loads((tmp_path / "b" / layout.PRIVACY).read_bytes())["compression"]

    def test_recovery_at_the_sites_brings_its_receipts(self, run, compress, samples):
        more = {"north": SiteReceipt(examples=120, receipt=samples.receipt(epsilon_run=0.5))}
        recovery = RunDirectory(run.root / "recovery")
        recovery.root.mkdir()
        shutil.copy(run.root / "run.json", recovery.root / "run.json")
        recovery.write_receipts(more)
        compress(SitesReport(run="table-recovery", directory="recovery", rounds=2, epsilon={"north": 0.5}))
        assert load_source(run).receipts[1].by_site == more

    def test_a_compressed_model_of_another_training_is_refused(self, run, compress):
        compress(self.PROXY, teacher="00" * 32)
        with pytest.raises(BundleError, match="was not made from"):
            load_source(run)

    def test_compressed_is_asked_for_and_missing(self, run):
        with pytest.raises(UsageError, match=r"fedclaw\.compress"):
            load_source(run, "compressed")

    def test_a_run_that_has_not_finished(self, run):
        run.model_path.unlink()
        with pytest.raises(CheckpointError, match="has not finished"):
            load_source(run)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda a: {**a, "extra": np.zeros(1, np.float32)}, r"does not fit its spec: extra \(1,\) against nothing"),
            (lambda a: {**a, "head.bias": np.zeros(3, np.float32)}, r"head.bias \(3,\) against \(2,\)"),
            (lambda a: {**a, "head.bias": np.full(2, np.nan, np.float32)}, "NaN"),
        ],
    )
    def test_parameters_that_do_not_fit_are_refused(self, run, change, message):
        run.write_model(change(run.read_model()))
        with pytest.raises(BundleError, match=message):
            load_source(run)
