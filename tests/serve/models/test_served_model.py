"""A served version answers as the bundle's own reader does, refuses what does not fit, and a bad row costs itself."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedclaw.errors import BundleError
from fedclaw.export.check import Verified, verify_bundle
from fedclaw.export.layout import INPUT, ONNX, PIPELINE
from fedclaw.export.predictor import Predictor
from fedclaw.learning.preprocessing import LABEL, REFUSED
from fedclaw.serve.models.batching import Execution
from fedclaw.serve.models.served_model import KEPT, LoadedGraph, ServedModel, load_graph
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.requests import InferenceRequest

pytestmark = pytest.mark.anyio
INLINE = Execution(inline=True)


LONG: Any = {"x" * 5000: np.zeros((2, 1), np.float32)}


def text(*values: object) -> np.ndarray:
    return np.array([[value] for value in values], object)


def floats(*values: float) -> np.ndarray:
    return np.array([[value] for value in values], np.float32)


def request(rows: int = 2, outputs: tuple[str, ...] | None = None, **columns: np.ndarray) -> InferenceRequest:
    usual = {
        "age": floats(*[40.0] * rows),
        "smoker": text(*["true"] * rows),
        "ward": text(*["surgery"] * rows),
    }
    return InferenceRequest("table", {**usual, **columns}, rows, "id", "key", outputs=outputs)


@pytest.fixture(scope="module")
def verified(table_bundle: Path) -> Verified:
    return verify_bundle(table_bundle, keep=KEPT)


@pytest.fixture(scope="module")
def loaded(verified: Verified) -> LoadedGraph:
    return load_graph(verified)


@pytest.fixture(scope="module")
def served(loaded: LoadedGraph) -> ServedModel:
    return loaded.serve("table", "one", "0" * 64, INLINE)


def without_pipeline(verified: Verified) -> Verified:
    """As a bundle whose preprocessing cannot be written as a graph."""
    manifest = verified.manifest.model_copy(update={"pipeline": None, "no_pipeline": "it cannot be written"})
    contents = {name: content for name, content in verified.contents.items() if name != PIPELINE}
    return dataclasses.replace(verified, manifest=manifest, contents=contents)


async def test_it_answers_as_the_predictor_does(served: ServedModel, table_bundle: Path) -> None:
    columns = served.schema.preprocessing().synthetic(200, np.random.default_rng(5))
    answer = await served.answer(InferenceRequest("table", columns, 200, "me", "key"))
    inputs, refused = served.schema.preprocessing().prepare(columns)
    predictor = Predictor.open(table_bundle)
    expected = predictor.predict(inputs)
    assert refused.any()
    assert (answer.model, answer.version, answer.identity) == ("table", "one", "me")
    assert np.array_equal(answer.outputs[REFUSED][:, 0], refused)
    np.testing.assert_allclose(answer.outputs["probabilities"][~refused], expected[~refused], atol=1e-5)
    assert np.isnan(answer.outputs["probabilities"][refused]).all()
    labels = np.array(predictor.labels)[predictor.decide(expected)]
    assert answer.outputs[LABEL][~refused, 0].tolist() == labels[~refused].tolist()
    assert set(answer.outputs[LABEL][refused, 0]) == {""}
    assert [(o.name, tuple(answer.outputs[o.name].shape)) for o in served.interface.outputs] == [
        (LABEL, (200, 1)),
        ("probabilities", (200, 2)),
        (REFUSED, (200, 1)),
    ]


@pytest.mark.parametrize("precision", ["float32", "int8", "float16", "recommended"])
async def test_every_form_takes_typed_columns_and_refuses_the_same_rows(
    precision: str, verified: Verified, served: ServedModel
) -> None:
    other = load_graph(verified, precision).serve("table", "other", "0" * 64, INLINE)  # type: ignore[arg-type]
    columns = served.schema.preprocessing().synthetic(100, np.random.default_rng(6))
    exact, found = served.infer(columns), other.infer(columns)
    assert np.array_equal(found[REFUSED], exact[REFUSED])
    answered = ~exact[REFUSED][:, 0]
    tolerance = {"float32": 1e-5, "float16": 1e-2}.get(precision, 0.1)
    np.testing.assert_allclose(found["probabilities"][answered], exact["probabilities"][answered], atol=tolerance)
    assert np.isnan(found["probabilities"][~answered]).all()
    assert found[LABEL].shape == exact[LABEL].shape
    assert found[LABEL].dtype == object
    assert set(found[LABEL][~answered, 0]) == {""}
    if precision == "int8":
        assert (found["probabilities"][answered] != exact["probabilities"][answered]).any(), "another graph computes"


async def test_a_bundle_without_a_pipeline_takes_prepared_inputs(verified: Verified, table_bundle: Path) -> None:
    loaded = load_graph(without_pipeline(verified))
    assert loaded.file == ONNX
    assert [column.name for column in loaded.interface.columns] == [INPUT]
    served = loaded.serve("table", "one", "0" * 64, INLINE)
    inputs = loaded.schema.synthetic_inputs(5, np.random.default_rng(7))
    expected = Predictor.open(table_bundle).predict(inputs)
    inputs[1, 0], inputs[3, 0] = np.nan, np.inf
    answer = await served.answer(InferenceRequest("table", {INPUT: inputs}, 5, "me", "key"))
    assert answer.outputs[REFUSED][:, 0].tolist() == [False, True, False, True, False]
    np.testing.assert_allclose(answer.outputs["probabilities"][::2], expected[::2], atol=1e-6)
    assert np.isnan(answer.outputs["probabilities"][1::2]).all()
    assert answer.outputs[LABEL][1::2, 0].tolist() == ["", ""]


async def test_an_unknown_level_or_a_value_out_of_range_costs_its_row_alone(served: ServedModel) -> None:
    alone = await served.answer(request(rows=1))
    mixed = request(rows=4, ward=text("surgery", "Surgery", "surgery", "surgery"), age=floats(40, 40, 121, 40))
    answer = await served.answer(mixed)
    assert answer.outputs[REFUSED][:, 0].tolist() == [False, True, True, False]
    for row in (0, 3):
        np.testing.assert_allclose(answer.outputs["probabilities"][row], alone.outputs["probabilities"][0], atol=1e-6)
    missing = await served.answer(request(rows=1, age=floats(float("nan"))))
    assert not missing.outputs[REFUSED].any(), "NaN is 'not known', which the schema fills in"


async def test_only_the_outputs_that_are_wanted_are_given(served: ServedModel) -> None:
    answer = await served.answer(request(outputs=(REFUSED, LABEL)))
    assert list(answer.outputs) == [REFUSED, LABEL]


@pytest.mark.parametrize(
    ("wrong", "code", "words"),
    [
        (request(rows=0), "bad_request", "no rows"),
        (request(age=floats(40)), "unprocessable", r"'age' has the shape \[1, 1\].*\[2, 1\] for 2 rows"),
        (request(age=np.zeros(2, np.float32)), "unprocessable", r"'age' has the shape \[2\]"),
        (request(age=np.zeros((2, 2), np.float32)), "unprocessable", r"'age' has the shape \[2, 2\]"),
        (request(age=np.zeros((2, 1))), "unprocessable", "'age' has values of type float64; the model takes float32"),
        (request(age=np.zeros((2, 1), ">f4")), "unprocessable", "'age' has values of type float32"),
        (request(age=text("40", "50")), "unprocessable", "'age' has values of type string"),
        (request(ward=floats(1, 2)), "unprocessable", "'ward' has values of type float32; the model takes string"),
        (request(ward=np.array([["a"], ["b"]])), "unprocessable", "'ward' has values of type"),
        (request(ward=text("surgery", None)), "unprocessable", "'ward' has a value that is not Unicode text"),
        (request(ward=text(b"surgery", b"x")), "unprocessable", "'ward' has a value that is not Unicode text"),
        (request(ward=text("surgery", "\ud800")), "unprocessable", "'ward' has a value that is not Unicode text"),
        (request(extra=floats(1, 2)), "unprocessable", "no column 'extra'"),
        (request(**LONG), "unprocessable", "no column 'x{60}'$"),
        (request(outputs=("logits",)), "bad_request", "no output 'logits'"),
    ],
)
async def test_a_request_that_does_not_fit_is_refused_by_its_column(
    wrong: InferenceRequest, code: str, words: str, served: ServedModel
) -> None:
    with pytest.raises(ServeRefusal, match=words) as told:
        await served.answer(wrong)
    assert told.value.code == code


async def test_a_missing_column_is_named(served: ServedModel) -> None:
    columns = {name: values for name, values in request().columns.items() if name != "smoker"}
    with pytest.raises(ServeRefusal, match="the column 'smoker' is missing"):
        await served.answer(InferenceRequest("table", columns, 2, "me", "key"))


async def test_text_of_any_kind_is_a_level_or_costs_its_row(served: ServedModel) -> None:
    odd = ["", "\0", "surgery\0", "ẞ" * 10_000, "\U0001f600", "surgery"]
    answer = await served.answer(request(rows=len(odd), ward=text(*odd)))
    assert not answer.outputs[REFUSED][-1, 0]
    assert answer.outputs[REFUSED][1:5].all()


def test_schema_and_manifest_must_agree(verified: Verified) -> None:
    manifest = verified.manifest.model_copy(update={"labels": ("malignant", "benign")})
    with pytest.raises(BundleError, match="disagree about labels"):
        load_graph(dataclasses.replace(verified, manifest=manifest))
    pipeline = verified.manifest.pipeline
    assert pipeline is not None
    fewer = pipeline.model_copy(update={"columns": pipeline.columns[:2]})
    with pytest.raises(BundleError, match="disagree about the columns: ward"):
        load_graph(dataclasses.replace(verified, manifest=verified.manifest.model_copy(update={"pipeline": fewer})))
    with pytest.raises(BundleError, match=r"pipeline\.onnx is not a model"):
        load_graph(dataclasses.replace(verified, contents={**verified.contents, PIPELINE: b"no model"}))


def test_a_form_that_the_bundle_lacks_is_said(image_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"model-int8\.onnx"):
        load_graph(verify_bundle(image_bundle, keep=KEPT), "int8")


async def test_images_are_pixels(image_bundle: Path) -> None:
    served = load_graph(verify_bundle(image_bundle, keep=KEPT)).serve("images", "one", "0" * 64, INLINE)
    columns = served.schema.preprocessing().synthetic(3, np.random.default_rng(1))
    answer = await served.answer(InferenceRequest("images", columns, 3, "me", "key"))
    expected = Predictor.open(image_bundle).predict(served.schema.preprocessing().prepare(columns)[0])
    np.testing.assert_allclose(answer.outputs["probabilities"], expected, atol=1e-5)
    with pytest.raises(ServeRefusal, match=r"'images' has the shape \[3, 8, 8\]"):
        await served.answer(InferenceRequest("images", {"images": columns["images"][..., 0]}, 3, "me", "key"))
