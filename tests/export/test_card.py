"""MODEL_CARD.md: its fields by the hub's own reader, its text by a Markdown parser, its code by running it."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from itertools import pairwise

import pytest
import yaml
from markdown_it import MarkdownIt
from scipy.stats import binomtest

from fedclaw.compress.intervals import CONFIDENCE, Difference, Interval
from fedclaw.compress.record import Control, CoordinatorReport, StepInputs
from fedclaw.export import layout
from fedclaw.export.bundle import Request, export_bundle
from fedclaw.export.card import model_card
from fedclaw.export.card_metadata import front_matter
from fedclaw.export.evaluation import accuracy_interval, evaluation_of
from fedclaw.export.markdown import plain
from fedclaw.export.signature import VerifiedSigner
from fedclaw.export.source import load_source
from fedclaw.export.statement import PrivacyStatement, state
from fedclaw.protocol.terms import ModelSpec
from fedclaw.server.run_directory import Simulated
from tests.samples import compression_record

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
import huggingface_hub

PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
SECTIONS = [
    "Intended use", "How to use", "Model", "Data", "Training", "Metrics", "Compression", "Privacy", "Limits", "Licence",
    "Who signed",
]  # fmt: skip


@pytest.fixture(scope="module")
def statement(table_bundle):
    return PrivacyStatement.model_validate_json((table_bundle / layout.PRIVACY).read_bytes())


@pytest.fixture(scope="module")
def fields_of(statement):
    """The front matter of a source, as the hub's library reads it."""

    def read(source, license=None):
        text = front_matter(source, statement, license) + "\n# Model card\n"
        return huggingface_hub.ModelCard(text).data

    return read


def test_the_hub_reads_task_library_licence_and_results(table_bundle, image_bundle):
    data = huggingface_hub.ModelCard.load(table_bundle / layout.CARD).data
    assert (data.library_name, data.pipeline_tag) == ("onnx", "tabular-classification")
    assert {"federated-learning", "differential-privacy"} <= set(data.tags)
    assert data.get("license") is None
    assert data.get("base_model") is None
    (accuracy, loss) = data.eval_results
    assert (accuracy.metric_type, accuracy.metric_value, accuracy.task_type) == (
        "accuracy", 0.875, "tabular-classification",
    )  # fmt: skip
    assert accuracy.dataset_name == "the sites' own test data"
    assert accuracy.metric_args["low"] < 0.875 < accuracy.metric_args["high"]
    assert loss.metric_args is None
    raw = huggingface_hub.metadata_load(table_bundle / layout.CARD)
    assert raw == huggingface_hub.ModelCard.load(table_bundle / layout.CARD).data.to_dict()
    assert huggingface_hub.ModelCard.load(image_bundle / layout.CARD).data.pipeline_tag == "image-classification"


def test_the_hub_can_write_what_it_read(table_bundle):
    """Its own fields for results, made anew from what we wrote, are the ones that we wrote."""
    written = huggingface_hub.metadata_load(table_bundle / layout.CARD)["model-index"]
    name, results = huggingface_hub.repocard_data.model_index_to_eval_results(written)
    again = huggingface_hub.repocard_data.eval_results_to_model_index(name, results)
    assert again == written


@pytest.mark.parametrize(
    ("license", "told"),
    [
        (None, {}),
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("mit", {"license": "mit"}),
        ("GPL-3.0-or-later", {"license": "gpl-3.0"}),
        ("Clinic's own: ask first", {"license": "other", "license_name": "Clinic's own: ask first"}),
    ],
)
def test_a_licence_is_told_as_the_hub_knows_it_and_never_invented(fields_of, table_source, license, told):
    data = fields_of(table_source, license).to_dict()
    assert {key: value for key, value in data.items() if key.startswith("license")} == told


def test_results_are_of_the_very_model_that_is_exported(fields_of, table_source):
    measured = dataclasses.replace(table_source, compression=compression_record())
    (result,) = fields_of(measured).eval_results
    assert (result.metric_value, result.dataset_name) == (0.85, "a labelled public file")
    assert result.metric_args["low"] < 0.85 < result.metric_args["high"]
    unknown = dataclasses.replace(table_source, compression=compression_record("agreement with the teacher"))
    assert fields_of(unknown).eval_results is None
    assert evaluation_of(unknown) is None


def test_a_simulation_does_not_pass_for_sites(fields_of, table_source):
    record = table_source.record.model_copy(update={"simulated": Simulated(clients=2)})
    data = fields_of(dataclasses.replace(table_source, record=record))
    assert "simulated" in data.tags
    assert data.eval_results[0].dataset_name == "the simulated clients' test data"


def test_intervals_of_a_share_are_wilsons_and_none_is_given_for_a_noised_one():
    for right, examples in ((90, 100), (0, 7), (10, 10), (1, 3)):
        exact = binomtest(right, examples).proportion_ci(CONFIDENCE, "wilson")
        found = accuracy_interval(right / examples, examples)
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
    assert accuracy_interval(0.9013, 100) is None
    assert accuracy_interval(0.5, 0) is None
    assert accuracy_interval(float("nan"), 10) is None


HOSTILE = [
    "---\nlicense: mit\n---",
    "<script>alert(1)</script>",
    "`` ` ```",
    "| a | b |\n| --- | --- |",
    "# heading\n\n## Privacy\n\nNone was lost.",
    "[x](https://evil.example)",
    "a: b\n- c: !!python/object:os.system",
    "<!--",
    "\u202egnp",
]


@pytest.fixture(scope="module")
def hostile_card(samples, table_bundle, statement, tmp_path_factory):
    """The card of a run in which whatever somebody else names is an attack, in every place where one can be."""
    manifest = layout.Manifest.model_validate_json((table_bundle / layout.MANIFEST).read_bytes())

    def make(name):
        table = {
            "columns": [{"name": name, "kind": "numeric", "center": 50, "scale": 20, "range": [0, 120]}],
            "target": {"name": "outcome", "labels": [name, "other"]},
        }
        spec = ModelSpec(name="mlp", args={"hidden": [3]})
        source = load_source(samples.make_run(tmp_path_factory.mktemp("hostile") / "run", "tabular", table, spec))
        strategy = source.record.strategy.model_copy(update={"name": name, "settings": {name: name}})
        looked = (StepInputs(step="importance", origin="public", description=name, examples=3),)
        control = Control(name="distilled from scratch", data=name, accuracy=0.5, agreement=0.5)
        said = {"controls": (control,), "verdict": name, "controls_note": name}
        recovery = CoordinatorReport(inputs=name, steps=1, agreement_pruned=0.5, agreement_after=0.9)
        line = {
            "metrics": {"accuracy": 0.5, name: 0.25},
            "test_examples": 40,
            "majority": {"label": name, "accuracy": 0.625},
            "by_class": {name: {"precision": 0.5}},
            "over_sites": {name: {"mean": 0.5, "spread": 0.1}},
            "round": 3,
        }
        by_site = {name: samples.private["north"], "south": samples.bare}
        source = dataclasses.replace(
            source,
            record=source.record.model_copy(update={"run": name, "federation": name, "strategy": strategy}),
            spec=ModelSpec(name="mlp", args={name: name}),
            receipts=(dataclasses.replace(source.receipts[0], run=name, by_site=by_site),),
            metrics=(line,),
            compression=compression_record(looked_at=looked, recovery=(recovery,), **said),
        )
        hostile = statement.model_copy(update=dict.fromkeys(("summary", "unit", "holds_against", "source"), name))
        hostile = hostile.model_copy(update={"warnings": (name,), "not_covered": (name,), "sites": state_of(source)})
        tensors = tuple(tensor.model_copy(update={"name": name}) for tensor in manifest.inputs)
        texts = dict.fromkeys(("name", "column", "meaning", "missing"), name)
        columns = tuple(column.model_copy(update=texts) for column in manifest.pipeline.columns)
        pipeline = manifest.pipeline.model_copy(update={"columns": columns})
        told = {"federation": name, "labels": (name, "other"), "inputs": tensors, "pipeline": pipeline}
        told = manifest.model_copy(update=told)
        signer = VerifiedSigner(name, name, name, datetime.now(UTC))
        return model_card(source, told, hostile, signer, name)

    return make


def state_of(source):
    return state(source.receipts, None, "none.").sites


@pytest.mark.parametrize("name", HOSTILE)
def test_text_of_others_adds_no_field_no_section_and_no_markup(hostile_card, name):
    card = hostile_card(name)
    data = huggingface_hub.ModelCard(card)
    assert set(data.data.to_dict()) == {
        "license", "license_name", "library_name", "pipeline_tag", "tags", "model-index",
    }  # fmt: skip
    assert data.data.license == "other"
    tokens = PARSER.parse(data.text)
    titles = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    assert titles[0].startswith("Model card: ")
    assert titles[1:] == SECTIONS
    inside = [child for token in tokens if token.type == "inline" for child in token.children]
    assert not {token.type for token in (*tokens, *inside)} & {"html_block", "html_inline", "link_open", "image", "hr"}
    assert [token.info for token in tokens if token.type == "fence"] == ["python", "python"]
    assert "\u202e" not in card
    whole = [child for token in PARSER.parse(card) if token.type == "inline" for child in token.children]
    assert not {token.type for token in whole} & {"html_inline", "link_open", "image"}
    assert data.data.license_name == plain(name)


@pytest.mark.parametrize("which", ["table_bundle", "image_bundle"])
def test_the_code_in_the_card_runs_in_the_bundle_with_onnxruntime_alone(request, which):
    place = request.getfixturevalue(which)
    typed, prepared = re.findall(r"```python\n(.*?)```", (place / layout.CARD).read_text(), re.DOTALL)
    for block, named in ((typed, "label"), (prepared, "logits")):
        line = [sys.executable, "-I", "-c", block]
        done = subprocess.run(line, cwd=place, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert named in done.stdout
        assert "fedclaw" not in block


def test_the_command_in_the_card_predicts(table_bundle, command, monkeypatch, tmp_path):
    (line,) = re.findall(
        r"^    python -m (fedclaw\.predict .*)$", (table_bundle / layout.CARD).read_text(), re.MULTILINE
    )
    place = shutil.copytree(table_bundle, tmp_path / "bundle")
    (tmp_path / "rows.csv").write_text("age,smoker,ward\n61,yes,surgery\n")
    monkeypatch.chdir(place)
    done = command(*line.replace("rows.csv", "../rows.csv").split())
    assert done.returncode == 0, done.stderr
    assert "benign" in done.stdout


def test_the_card_says_who_signed_and_that_the_signature_has_to_be_checked(table_bundle, home):
    card = (table_bundle / layout.CARD).read_text()
    assert "test-federation" in card.partition("## Who signed")[2]
    assert "VERIFY.md says how to check it" in card


def test_the_front_matter_is_plain_ascii_yaml(table_bundle):
    _, block, _ = (table_bundle / layout.CARD).read_text().split("---\n", 2)
    assert block.isascii()
    assert yaml.safe_load(block)["tags"][0] == "fedclaw"


def test_the_compression_report_is_in_a_compressed_models_bundle_alone(table_source, table_bundle, home, tmp_path):
    record = compression_record()
    report = record.model_dump_json(indent=1).encode()
    source = dataclasses.replace(table_source, compression=record, report=report)
    export_bundle(source, home.signer(), tmp_path / "b", Request())
    assert (tmp_path / "b" / layout.COMPRESSION).read_bytes() == report
    assert not (table_bundle / layout.COMPRESSION).exists()
    card = (tmp_path / "b" / layout.CARD).read_text()
    assert "| accuracy | 0.8500 | 0.7939 to 0.8929 |" in card
    assert "No controls were trained" in card


def test_a_compression_stands_beside_its_teacher_and_its_controls_with_the_verdict(
    table_source, table_bundle, statement
):
    control = Control(
        name="trained from scratch",
        data="100 labelled rows",
        accuracy=0.84,
        difference=Difference(value=0.01, interval=Interval(low=-0.02, high=0.04), examples=200),
    )
    record = compression_record(
        difference=Difference(value=-0.05, interval=Interval(low=-0.08, high=-0.02), examples=200),
        controls=(control,),
        verdict="Recovery gained nothing that the better control does not reach.",
        looked_at=(StepInputs(step="recovery", origin="public", description="a.csv", examples=100),),
        after=compression_record().after.model_copy(update={"interval": Interval(low=0.8, high=0.9)}),
    )
    source = dataclasses.replace(table_source, compression=record)
    manifest = layout.Manifest.model_validate_json((table_bundle / layout.MANIFEST).read_bytes())
    card = model_card(source, manifest, statement, VerifiedSigner("f", "AB", "CD", datetime.now(UTC)))
    text = card.partition("## Compression")[2].partition("\n## ")[0]
    assert "After less before, on the same 200 examples: -0.0500 (-0.0800 to -0.0200)." in text
    assert "| trained from scratch | 100 labelled rows | 0.8400 | +0.0100 (-0.0200 to +0.0400) |" in text
    assert "Recovery gained nothing that the better control does not reach." in text
    assert "| recovery | public | a.csv | 100 |" in text
    assert "| accuracy | 0.8500 | 0.8000 to 0.9000 |" in card  # the interval that came with the figure
