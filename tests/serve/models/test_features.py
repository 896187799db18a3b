"""Versions with the same preprocessing prepare a request once, and answer as each does alone."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from fedclaw.export.bundle import Request, export_bundle
from fedclaw.export.check import Trust, Verified, verify_bundle
from fedclaw.export.layout import INPUT, PIPELINE
from fedclaw.export.source import load_source
from fedclaw.identity.federation_home import FederationHome
from fedclaw.learning.preprocessing import LABEL, REFUSED, Columns
from fedclaw.protocol.terms import ModelSpec
from fedclaw.serve.models import probe as probe_module
from fedclaw.serve.models.batching import EagerBatcher, Execution, Outputs
from fedclaw.serve.models.bundle_store import BundleStore
from fedclaw.serve.models.features import SharedFeatures, cut_features
from fedclaw.serve.models.graphs import SplitGraph
from fedclaw.serve.models.pool import ModelPool, ModelVersion
from fedclaw.serve.models.probe import ExecutionSettings, ProbeFigures, sharing_pays
from fedclaw.serve.models.served_model import KEPT, ServedModel, load_graph, split_graph
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.requests import InferenceRequest
from tests.bundles import TABLE, make_run

pytestmark = pytest.mark.anyio
BY_HAND = ExecutionSettings(threads=1, max_batch=16, batching=True, inline=True)


@pytest.fixture(scope="module")
def bundles(table_bundle: Path, home: FederationHome, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models with the same preprocessing."""
    run = make_run(
        tmp_path_factory.mktemp("other") / "run", "tabular", TABLE, ModelSpec(name="mlp", args={"hidden": [6]})
    )
    export_bundle(load_source(run), home.signer(), run.root / "bundle", Request())
    return [table_bundle, run.root / "bundle"]


@pytest.fixture(scope="module")
def verified(bundles: list[Path]) -> list[Verified]:
    return [verify_bundle(bundle, keep=KEPT) for bundle in bundles]


def split_of(verified: Verified) -> SplitGraph:
    split = split_graph(verified, load_graph(verified))
    assert split is not None
    return split


def same(found: Outputs, expected: Outputs) -> None:
    assert list(found) == list(expected)
    assert np.array_equal(found[REFUSED], expected[REFUSED])
    assert (found[LABEL] == expected[LABEL]).all()
    np.testing.assert_allclose(found["probabilities"], expected["probabilities"], atol=1e-5)


def test_a_pipeline_in_two_answers_as_it_does_in_one(verified: list[Verified], image_bundle: Path) -> None:
    for whole in (*verified, verify_bundle(image_bundle, keep=KEPT)):
        loaded = load_graph(whole)
        columns = loaded.schema.preprocessing().synthetic(100, np.random.default_rng(1))
        expected = loaded.graph.run(columns)
        assert expected[REFUSED].any() or loaded.schema.name == "vision"
        same(split_of(whole).run(columns), expected)
        inputs, refused = loaded.schema.preprocessing().prepare(columns)
        prepared = split_of(whole).features.run(columns)
        assert np.array_equal(prepared[REFUSED], refused)
        np.testing.assert_allclose(prepared[INPUT][~refused], inputs[~refused], atol=1e-5)


def digest(pipeline: Any) -> str:
    features = cut_features(pipeline.SerializeToString())
    assert features is not None
    return features.digest


def test_what_computes_the_same_has_the_same_digest_and_nothing_else_has(verified: list[Verified]) -> None:
    first, second = (onnx.load_model_from_string(own.contents[PIPELINE]) for own in verified)
    assert first.SerializeToString() != second.SerializeToString()
    assert digest(first) == digest(second)
    before, weights, constants = digest(first), 0, 0
    for tensor in first.graph.initializer:
        values = numpy_helper.to_array(tensor).copy()
        if values.dtype.kind != "f" or not values.size or not np.isfinite(values).all():
            continue
        genuine = tensor.SerializeToString()
        tensor.CopyFrom(numpy_helper.from_array(values / values.dtype.type(2) + values.dtype.type(1), tensor.name))
        of_the_model = "/model/" in tensor.name or "/answer/" in tensor.name
        assert (digest(first) == before) is of_the_model, tensor.name
        weights, constants = weights + of_the_model, constants + (not of_the_model)
        tensor.ParseFromString(genuine)
    assert weights
    assert constants
    assert digest(first) == before


def test_a_pipeline_of_another_program_is_not_cut(verified: list[Verified]) -> None:
    model = onnx.load_model_from_string(verified[0].contents[PIPELINE])
    assert cut_features(model.SerializeToString()) is not None
    for node in model.graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = "elsewhere" if name.endswith("/model/inputs") else name
    assert cut_features(model.SerializeToString()) is None


def figures(single: float, many: float) -> ProbeFigures:
    """Of one row, and of batches of 16 and 32, in microseconds."""
    return ProbeFigures(1, {1: single * 1e-6, 16: many * 1e-6, 32: many * 2e-6})


def test_it_is_shared_where_two_versions_gain_and_one_does_not_lose() -> None:
    assert sharing_pays(figures(4300, 6000), figures(1600, 1800), figures(2000, 4200), most=16)
    # two versions: 9 + 2 * 27 us, or two pipelines of 28 us
    assert not sharing_pays(figures(28, 155), figures(9, 10), figures(27, 150), most=32)
    assert not sharing_pays(figures(4300, 6000), figures(1600, 1800), figures(3200, 4200), most=16), "one alone loses"
    # a batch of 16 gains 60 us, and 16 requests pay 192 us for their second queue
    assert not sharing_pays(figures(60, 80), figures(20, 60), figures(20, 20), most=16)


@pytest.fixture
async def pool(
    bundles: list[Path], image_bundle: Path, home: FederationHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[ModelPool]:
    """Two versions and another model, all in two; whether that pays by the clock is not what is tested."""
    monkeypatch.setattr(probe_module, "_MANY_COLUMNS", 1)
    monkeypatch.setattr(probe_module, "sharing_pays", lambda *_: True)
    trust = Trust((home.root / "ca.crt").read_bytes())
    store = BundleStore(tmp_path / "store")
    made = ModelPool(store, trust)
    for version, bundle in zip(("one", "two", "images"), (*bundles, image_bundle), strict=True):
        made.register(ModelVersion("m", version, store.put(bundle, trust), pinned=True, execution=BY_HAND))
        await made.load("m", version)
    yield made
    await made.close()


def get(pool: ModelPool, version: str) -> ServedModel:
    served = pool.loaded("m", version)
    assert served is not None
    return served


def batches_of(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that are prepared from now on."""
    assert served.features is not None
    seen = list[int]()
    batcher, genuine = served.features.batcher, served.features.batcher._infer

    def counting(columns: Columns) -> Outputs:
        seen.append(len(columns["age"]))
        return genuine(columns)

    monkeypatch.setattr(batcher, "_infer", counting)
    return seen


async def test_versions_side_by_side_prepare_a_request_once_and_answer_as_alone(
    pool: ModelPool, verified: list[Verified], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, images = (get(pool, version) for version in ("one", "two", "images"))
    assert one.features is two.features
    assert images.features is not one.features
    prepared = batches_of(one, monkeypatch)
    columns = one.schema.preprocessing().synthetic(10, np.random.default_rng(2))
    request = InferenceRequest("m", columns, 10, "me", "key")
    answers = await asyncio.gather(*(served.answer(request) for served in (one, two)))
    assert prepared == [10]
    for answer, whole in zip(answers, verified, strict=True):
        same(answer.outputs, load_graph(whole).graph.run(columns))
    assert not np.allclose(answers[0].outputs["probabilities"], answers[1].outputs["probabilities"], equal_nan=True)
    mirrored = await two.answer(request)
    assert prepared == [10], "a version that mirrors it a little later too"
    same(mirrored.outputs, answers[1].outputs)


async def test_requests_to_several_versions_are_prepared_in_one_batch(
    pool: ModelPool, verified: list[Verified], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = get(pool, "one"), get(pool, "two")
    prepared = batches_of(one, monkeypatch)
    asked = []
    for number in range(8):
        columns = one.schema.preprocessing().synthetic(2, np.random.default_rng(number))
        asked.append((number % 2, InferenceRequest("m", columns, 2, "me", "key")))
    answers = await asyncio.gather(*((one, two)[which].answer(request) for which, request in asked))
    assert prepared == [16]
    for answer, (which, request) in zip(answers, asked, strict=True):
        same(answer.outputs, load_graph(verified[which]).graph.run(request.columns))


async def test_a_version_that_leaves_is_drained_whichever_half_its_requests_are_in(pool: ModelPool) -> None:
    one, two = get(pool, "one"), get(pool, "two")
    columns = one.schema.preprocessing().synthetic(2, np.random.default_rng(0))
    asked = [asyncio.create_task(one.answer(InferenceRequest("m", columns, 2, "me", "key"))) for _ in range(3)]
    await asyncio.sleep(0)
    assert one.in_flight == 3
    await pool.unload("m", "one")
    assert all(task.done() for task in asked)
    assert two.features is not None
    assert two.features.versions == 1
    await pool.unload("m", "two")
    await pool.load("m", "one")
    again = get(pool, "one").features
    assert again is not None
    assert again is not two.features
    assert again.versions == 1


class Held:
    """A preprocessing that waits."""

    def __init__(self) -> None:
        self.runs = 0
        self.go_on = threading.Event()

    def __call__(self, columns: Columns) -> dict[str, Any]:
        self.runs += 1
        assert self.go_on.wait(60)
        if (columns["x"] < 0).any():
            raise ValueError("no")
        return {INPUT: columns["x"]}


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.fixture
def features(held: Held) -> Iterator[SharedFeatures]:
    with ThreadPoolExecutor(1) as executor:
        made = SharedFeatures("0" * 64, EagerBatcher(held, Execution(max_batch=4), executor=executor))
        made.versions = 2
        yield made
        held.go_on.set()


async def test_who_leaves_takes_the_preparation_along_only_if_nobody_else_waits(
    held: Held, features: SharedFeatures
) -> None:
    x = {"x": np.ones((3, 1), np.float32)}
    running = asyncio.create_task(features.prepare({"x": np.zeros((4, 1), np.float32)}, 4))
    await asyncio.sleep(0.05)
    leaves, stays = (asyncio.create_task(features.prepare(x, 3)) for _ in range(2))
    await asyncio.sleep(0.01)
    assert features.batcher.queued_rows == 3, "once for both"
    leaves.cancel()
    await asyncio.sleep(0.01)
    assert features.batcher.queued_rows == 3
    alone = asyncio.create_task(features.prepare({"x": np.ones((2, 1), np.float32)}, 2))
    await asyncio.sleep(0.01)
    alone.cancel()
    await asyncio.sleep(0.01)
    assert features.batcher.queued_rows == 3
    held.go_on.set()
    assert (await stays)[INPUT].tolist() == x["x"].tolist()
    await running
    assert held.runs == 2


async def test_a_failure_is_told_to_all_who_wait_and_equal_places_in_memory_are_no_equal_requests(
    held: Held, features: SharedFeatures
) -> None:
    held.go_on.set()
    bad = {"x": -np.ones((1, 1), np.float32)}
    told = await asyncio.gather(*(features.prepare(bad, 1) for _ in range(2)), return_exceptions=True)
    assert all(isinstance(own, ServeRefusal) for own in told)
    for number in range(300):
        x = {"x": np.full((1, 1), number, np.float32)}
        assert (await features.prepare(x, 1))[INPUT][0, 0] == number
        del x
    assert len(features._recent) == 64
