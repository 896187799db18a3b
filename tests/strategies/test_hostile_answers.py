"""Every field of an answer in hostile hands, for every installed strategy that promises to withstand hostile sites.

The answers go through what the server does with them: read, checked, kept, combined, divided. What the hostile sites
send is either refused, by name, and the round goes on, or it moves the result no further than the strategy promises.
"""

import math
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclaw.errors import UpdateError
from fedclaw.learning import postprocess
from fedclaw.learning.postprocess import compressor_of, layout
from fedclaw.learning.registry import STRATEGIES, installed, strategy_class
from fedclaw.learning.strategy import Strategy
from fedclaw.protocol.arrays import LARGEST, all_within, pack, pack_wire, shapes_of, unpack
from fedclaw.protocol.message_identity import assume_server_identity
from fedclaw.protocol.questions import Outgoing
from fedclaw.protocol.terms import (
    Compression,
    HalfPrecision,
    LocalTraining,
    Plan,
    PowerSgd,
    Quantisation,
    StrategyRecord,
    TopK,
)
from fedclaw.server.session import make_strategy
from fedclaw.server.training import TrainingQuestion, robust_aggregation
from tests.samples import plan_of, receipt, run_record

SITES = 13
"""Enough for Bulyan against two hostile sites, when two answers have been refused."""
TEMPLATE = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(2, np.float32)}
WEIGHTINGS: tuple[tuple[str, int | None], ...] = (("uniform", None), ("capped", 5), ("examples", None))


def promising() -> list[str]:
    made = {name: strategy_class(name) for name in sorted(installed(STRATEGIES))}
    return [name for name, kind in made.items() if kind.byzantine_tolerance is not Strategy.byzantine_tolerance]


def made(name: str) -> Strategy:
    kind = strategy_class(name)
    hostile = {"hostile": 2} if "hostile" in kind.model_fields else {}
    return make_strategy(run_record(strategy=StrategyRecord(name=name, settings=hostile)))


def plan(name: str, weighting: str, cap: int | None) -> Plan:
    training = LocalTraining(steps=3, batch_size=8, learning_rate=0.1)
    strategy = StrategyRecord(name=name)
    return plan_of(run_record(strategy=strategy, privacy=None, training=training, weighting=weighting, weight_cap=cap))


OPEN = receipt(
    mechanism="none",
    trust="everybody",
    sampler="shuffle",
    accountant="none",
    steps=3,
    noise_multiplier=0.0,
    max_grad_norm=0.0,
    epsilon_run=None,
    epsilon_lifetime=None,
    epsilon_left=None,
)
"""What a round without noise cost."""


def honest(plan: Plan, draw: np.random.Generator, examples: int) -> RecordDict:
    weight = plan.weight(examples)
    told = OPEN.model_copy(update={"sample_rate": min(1.0, plan.training.batch_size / examples)})
    arrays = {name: (draw.normal(0, 1, a.shape) * weight).astype(np.float32) for name, a in TEMPLATE.items()}
    return RecordDict(
        {
            "sum": pack(arrays),
            "metrics": MetricRecord({"weight": weight, "examples": examples}),
            "receipt": ConfigRecord({"json": told.model_dump_json()}),
        }
    )


ODD = [0.0, -1.0, 1e-46, 5e-324, 1e-38, 0.5, 1.0, 100.0, 1e12, 1e13, 1e300, math.inf, -math.inf, math.nan]
numbers = st.one_of(st.sampled_from(ODD), st.integers(-(2**63), 2**63 - 1), st.floats())
floats = st.sampled_from([0.0, 1e-45, -1e-38, 1.0, -1e4, 1e18, 1e30, -3.4e38, math.inf, math.nan])
words = st.sampled_from(["", "{}", "null", '{"mechanism": 1}', "[" * 50])


@st.composite
def changes(draw: st.DrawFn) -> dict[str, Any]:
    """What a hostile site writes over its answer, by the record and field."""
    fields: dict[str, Any] = {}
    for name in draw(st.sets(st.sampled_from(["weight", "examples", "sum", "receipt", "missing"]), min_size=1)):
        fields[name] = draw(
            {
                "weight": numbers | st.just([1.0]),
                "examples": numbers | st.just([3]),
                "receipt": words,
                "missing": st.sampled_from(["sum", "metrics", "receipt"]),
                "sum": st.one_of(
                    floats,
                    st.just(pack({"w": TEMPLATE["w"]})),
                    st.just(pack({**TEMPLATE, "b": np.zeros(3, np.float32)})),
                    st.just(pack_wire({**TEMPLATE, "b": np.zeros(2, np.float64)})),
                    st.just(ArrayRecord()),
                ),
            }[name]
        )
    return fields


def spoilt(content: RecordDict, fields: dict[str, Any]) -> RecordDict:
    content = RecordDict(dict(content))
    for name in ("weight", "examples"):
        if name in fields:
            content["metrics"] = MetricRecord({**content.metric_records["metrics"], name: fields[name]})
    if "sum" in fields:
        value = fields["sum"]
        filled = {name: np.full_like(a, value) for name, a in TEMPLATE.items()} if isinstance(value, float) else {}
        content["sum"] = pack(filled) if filled else value
    if "receipt" in fields:
        content["receipt"] = ConfigRecord({"json": fields["receipt"]})
    if "missing" in fields:
        del content[fields["missing"]]
    return content


def question() -> Message:
    assume_server_identity(5)
    return Message(RecordDict(), 1, "train", group_id="1")


def test_the_robust_ones_are_among_them() -> None:
    named = {"bulyan", "centred_clipping", "krum", "median", "multi_krum", "norm_bounding", "rfa", "trimmed_mean"}
    assert named <= set(promising())
    assert made("fedavg").byzantine_tolerance(SITES) == 0
    assert all(made(name).byzantine_tolerance(SITES) >= 2 for name in promising())
    assert all(made(name).byzantine_tolerance(2) == 0 for name in promising())


@pytest.mark.parametrize("name", promising())
@settings(max_examples=30, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1000), weighting=st.sampled_from(WEIGHTINGS))
def test_what_hostile_sites_send_is_refused_or_moves_nothing_far(
    name: str, data: st.DataObject, seed: int, weighting: tuple[str, int | None]
) -> None:
    strategy, asked, draw = made(name), plan(name, *weighting), np.random.default_rng(seed)
    hostile = min(2, strategy.byzantine_tolerance(SITES))
    state = strategy.server_state(TEMPLATE)
    trained = TrainingQuestion(asked, Outgoing(TEMPLATE), robust_aggregation(strategy, state))
    longest, asking = 0.0, question()
    for site in range(SITES):
        content = honest(asked, draw, int(draw.integers(5, 50)))
        if site < hostile:
            content = spoilt(content, data.draw(changes()))
        else:
            weight = content.metric_records["metrics"]["weight"]
            assert isinstance(weight, float)
            sent = unpack(content.array_records["sum"])
            longest = max(longest, math.hypot(*(float(np.linalg.norm(array)) for array in sent.values())) / weight)
        trained.add_reply(str(site), Message(content, reply_to=asking))
    refused = {item.site: item.code for item in trained.declined}
    assert set(refused.values()) <= {"unusable"}
    assert set(refused).isdisjoint(map(str, range(hostile, SITES))), "an honest site was refused"
    assert len(trained.answered) + len(refused) == SITES
    mean = postprocess.at_server(trained.read(), asked, shapes_of(TEMPLATE)).arrays
    result = np.concatenate([array.reshape(-1) for array in mean.values()]).astype(np.float64)
    assert np.isfinite(result).all()
    assert np.linalg.norm(result) <= 2 * SITES * longest


@pytest.mark.parametrize("name", promising())
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=lambda weighting: weighting[0])
@pytest.mark.parametrize("weight", [1e-46, 1e-30, 100.0, 1e12])
def test_a_weight_that_the_plan_does_not_give_is_refused(
    name: str, weighting: tuple[str, int | None], weight: float
) -> None:
    """Of these, 1e-46 made five strategies NaN, 100 moved RFA to 0, and 1e12 took all of a mean."""
    strategy, asked, draw = made(name), plan(name, *weighting), np.random.default_rng(1)
    trained = TrainingQuestion(asked, Outgoing(TEMPLATE), robust_aggregation(strategy, strategy.server_state(TEMPLATE)))
    asking = question()
    for site in range(SITES):
        content = honest(asked, draw, 10)
        if site == 0:
            content["metrics"] = MetricRecord({"weight": weight, "examples": 10})
        trained.add_reply(str(site), Message(content, reply_to=asking))
    assert [(item.site, item.code) for item in trained.declined] == [("0", "unusable")]
    assert len(trained.answered) == SITES - 1


def test_examples_that_a_site_claims_do_not_decide_where_a_strategy_promises_anything() -> None:
    for name in promising():
        results = []
        for claimed in (10, 10**12):
            strategy, asked, draw = made(name), plan(name, "examples", None), np.random.default_rng(1)
            trained = TrainingQuestion(
                asked, Outgoing(TEMPLATE), robust_aggregation(strategy, strategy.server_state(TEMPLATE))
            )
            asking = question()
            for site in range(SITES):
                content = honest(asked, draw, claimed if site == 0 else 10)
                if site == 0:
                    content["sum"] = pack({key: np.full_like(array, 5.0 * claimed) for key, array in TEMPLATE.items()})
                trained.add_reply(str(site), Message(content, reply_to=asking))
            assert len(trained.answered) == SITES
            results.append(postprocess.at_server(trained.read(), asked, shapes_of(TEMPLATE)).arrays["w"])
        np.testing.assert_allclose(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [2 * LARGEST, 3.3e38])
def test_numbers_that_would_overflow_a_mean_are_refused_where_they_come_from(value: float) -> None:
    """Of two such a plain mean made infinity, and the run ended without naming anybody."""
    asked, draw = plan("fedavg", "uniform", None), np.random.default_rng(1)
    trained = TrainingQuestion(asked, Outgoing(TEMPLATE))
    asking = question()
    for site in range(4):
        content = honest(asked, draw, 10)
        if site < 2:
            content["sum"] = pack({name: np.full_like(array, value) for name, array in TEMPLATE.items()})
        trained.add_reply(str(site), Message(content, reply_to=asking))
    assert [item.site for item in trained.declined] == ["0", "1"]
    mean = postprocess.at_server(trained.read(), asked, shapes_of(TEMPLATE)).arrays
    assert all(np.isfinite(array).all() for array in mean.values())


FORMS = (
    HalfPrecision(method="fp16"),
    Quantisation(method="int8"),
    Quantisation(method="int4"),
    TopK(method="topk", fraction=0.2),
    PowerSgd(method="powersgd", rank=2),
)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.method)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_bytes_of_a_compressed_update_are_refused_or_stand_for_numbers(form: Compression, data: st.DataObject) -> None:
    """Scales of NaN, positions that are not there, factors of 1e38: whatever the bytes of each array are."""
    template = {"w": np.zeros((8, 6), np.float32), "b": np.zeros(40, np.float32)}
    asked = plan_of(run_record(privacy=None, compression=form))
    compressor = compressor_of(asked.compression)
    assert compressor is not None
    trained, wire = TrainingQuestion(asked, Outgoing(template)), {}
    for name, kind in layout(compressor, shapes_of(postprocess.template(template, asked))).items():
        content = data.draw(st.binary(min_size=1, max_size=8)) * kind.nbytes
        wire[name] = np.frombuffer(content[: kind.nbytes], kind.dtype).reshape(kind.shape)
    try:
        arrays, _ = postprocess.reader(template, asked)(pack_wire(wire))
        trained.total.add(arrays, 10.0, 10)
    except UpdateError:
        assert not any(array.any() for array in trained.total.arrays.values())
    assert all(all_within(array) for array in trained.total.arrays.values())
