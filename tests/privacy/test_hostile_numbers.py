"""What a dishonest coordinator's numbers, and one example's, do to the bound that noise is made for: nothing.

Weights that saturate, of 1e9 or near nothing, gradients of 1e18 to infinity, bounds at both ends of
what a site allows: in every way of taking a step, one example moves the sum before noise by at most the bound.
"""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fedclaw.errors import PrivacyError
from fedclaw.learning import postprocess
from fedclaw.learning.stacked.engines import BatchedModel
from fedclaw.learning.stacked.layout import pack
from fedclaw.learning.stacked.private import ClientSampling, PrivateStep
from fedclaw.privacy.distributed import SumWithShare, share_noise
from fedclaw.privacy.fixed_point import Encoding
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.mechanisms.sum_noise import clip_to, moved
from fedclaw.privacy.noise import GaussianSource
from fedclaw.privacy.speed import Mode, StepSpeed
from fedclaw.privacy.steps import PrivateGradients
from fedclaw.protocol.arrays import Update
from fedclaw.protocol.limits import LARGEST_CLIP, SMALLEST_CLIP
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.protocol.terms import AdaptiveClip, CentralNoise, PrivacyRequest
from tests.privacy.wire import WireSite, sgd

ENGINES: tuple[Mode, ...] = ("opacus", "vmap", "bookkeeping")
BOUNDS = [SMALLEST_CLIP, 1.0, LARGEST_CLIP]
FLOAT32 = 2.0**-23
"""How much further apart two sums are when both are rounded to float32, as a share of their norm."""


def cross_entropy(_: torch.Tensor, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(outputs, targets)


def network(kind: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A model and the shape of one input."""
    if kind == "linear":
        return nn.Linear(6, 3), (6,)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)), (6,)
    layers = (nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    return nn.Sequential(*layers), (1, 4, 4)


def weights_of(model: nn.Module, kind: str) -> None:
    """What a dishonest coordinator sends."""
    scale = {"plain": 1.0, "huge": 1e9, "vanishing": 1e-30, "saturated": 1e4, "overflowing": 1e30}[kind]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * scale)


def taker(model: nn.Module, mode: Mode, bound: float, expected: float = 3.0, **changes: object) -> PrivateGradients:
    return PrivateGradients(
        model,
        changes.pop("loss", cross_entropy),
        max_grad_norm=bound,
        noise_multiplier=0.0,
        expected_batch_size=expected,
        source=GaussianSource(),
        speed=StepSpeed(mode=mode, **changes),
    )


def exact(steps: PrivateGradients) -> torch.Tensor:
    return torch.cat([values.flatten() for values in steps.exact]).clone()


def rounded(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double()


@pytest.mark.parametrize("mode", ENGINES)
@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["linear", "mlp", "conv"]),
    weights=st.sampled_from(["plain", "huge", "vanishing", "saturated", "overflowing"]),
    loud=st.sampled_from([0.0, 1e-40, 1e-20, 1.0, 1e3, 1e10, 1e18, 1e30, math.inf, math.nan]),
    bound=st.sampled_from(BOUNDS),
    count=st.integers(1, 6),
    expected=st.sampled_from([1.0, 3.0, 1e6]),
    chunk=st.sampled_from([None, 1, 2, 3]),
)
def test_one_example_moves_the_sum_by_at_most_the_bound(
    mode: Mode, kind: str, weights: str, loud: float, bound: float, count: int, expected: float, chunk: int | None
) -> None:
    model, shape = network(kind)
    weights_of(model, weights)
    inputs, targets = torch.randn(count, *shape), torch.randint(0, 3, (count,))
    inputs[0] *= loud
    with taker(model, mode, bound, expected, chunk_size=chunk) as steps:
        steps.gradients(inputs, targets)
        there, told = exact(steps), rounded(model)
        steps.gradients(inputs[1:], targets[1:])
        gone, other = exact(steps), rounded(model)
        assert bool(there.isfinite().all())
        assert float((there - gone).norm()) <= steps.sensitivity
        slack = FLOAT32 * float(torch.maximum(there.norm(), gone.norm())) + 1e-44
        assert float((told - other).norm()) <= steps.sensitivity + slack


def steep(size: float) -> "object":
    """A loss whose gradient has about that size, whatever the parameters."""
    return lambda _inputs, outputs, _targets: (outputs[:, 0] * size).mean()


@pytest.mark.parametrize("mode", ENGINES)
@pytest.mark.parametrize("size", [1e18, 4.1e35, 3e37])
def test_a_factor_that_float32_has_no_number_for_does_not_round_up(mode: Mode, size: float) -> None:
    """1e-6 / 1e36 / 1000 is less than the smallest float32."""
    model = nn.Linear(6, 1, bias=False)
    with taker(model, mode, 1e-6, 1000.0, loss=steep(size)) as steps:
        steps.gradients(torch.ones(3, 6), torch.zeros(3, dtype=torch.int64))
        assert float(rounded(model).norm()) <= 3 * steps.sensitivity
        assert float(rounded(model).norm()) == pytest.approx(3 * steps.sensitivity, rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_steps_keep_the_bound_too() -> None:
    """What is compiled has a clipping formula of its own. One shape: compiling takes long."""
    for size in (1e18, 4.1e35, 3e37):
        model = nn.Linear(6, 1, bias=False)
        inputs, targets = torch.randn(5, 6), torch.zeros(5, dtype=torch.int64)
        for loud in (1.0, 1e9, 1e-30, math.inf):
            inputs[0] = loud
            with taker(model, "compiled", 1e-6, 1000.0, loss=steep(size)) as steps:
                steps.gradients(inputs, targets)
                there = exact(steps)
                steps.gradients(inputs[1:], targets[1:])
                assert steps.engine == "compiled"
                assert float((there - exact(steps)).norm()) <= steps.sensitivity


@pytest.mark.parametrize("mode", ENGINES)
def test_a_sum_of_a_million_is_as_exact_as_a_sum_of_one(mode: Mode) -> None:
    """In float32 such a sum has a unit in the last place of a sixteenth of the bound."""
    count = 1_000_000
    model = nn.Linear(4, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    inputs = torch.rand(count, 4, generator=torch.Generator().manual_seed(0)) + 3
    targets = torch.zeros(count, dtype=torch.int64)
    inputs[0] *= 1.1
    with taker(model, mode, 1.0, 1.0) as steps:
        steps.gradients(inputs, targets)
        there = exact(steps)
        steps.gradients(inputs[1:], targets[1:])
        step = float((there - exact(steps)).norm())
    assert 1 - 1e-4 < step <= 1


@pytest.mark.parametrize("mode", ENGINES)
@pytest.mark.parametrize("chunk", [None, 2, 1])
def test_an_example_is_never_alone_among_others_that_are_not(mode: Mode, chunk: int | None) -> None:
    """With one row a matrix product rounds otherwise, and weights can make of that what they like."""
    model, shape = network("mlp")
    twin, _ = network("mlp")
    twin.load_state_dict(model.state_dict())
    seen: list[int] = []
    model[0].register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    inputs, targets = torch.randn(5, *shape), torch.randint(0, 3, (5,))
    with taker(model, mode, 0.5, chunk_size=chunk) as steps:
        steps.gradients(inputs[:1], targets[:1])
        one = exact(steps)
        steps.gradients(inputs, targets)
        five = exact(steps)
        steps.gradients(inputs[1:], targets[1:])
        torch.testing.assert_close(five - exact(steps), one, rtol=1e-4, atol=1e-7)
    if mode != "vmap":  # which calls the model with one example, of which it makes a batch inside
        assert (1 in seen) == (chunk == 1)


@pytest.mark.parametrize("bad", [2e-45, 1e-38, 1e38])
def test_a_bound_that_float32_has_no_numbers_for_is_refused(bad: float) -> None:
    with pytest.raises(PrivacyError, match="max_grad_norm"):
        taker(nn.Linear(2, 2), "vmap", bad)


@pytest.mark.parametrize("loud", [1.0, 1e9, 1e25, math.inf])
@pytest.mark.parametrize("bound", BOUNDS)
def test_the_stacked_formula_of_a_simulation_keeps_the_bound(bound: float, loud: float) -> None:
    model, _ = network("mlp")
    engine = BatchedModel(model, cross_entropy)
    start = {name: value.detach().numpy() * np.float32(1e9) for name, value in model.named_parameters()}
    inputs, targets = torch.randn(12, 6), torch.randint(0, 3, (12,))
    inputs[0] *= loud

    def gradients(first: list[int]) -> torch.Tensor:
        stack = engine.layout.row(start).expand(2, -1).clone()
        found = torch.zeros_like(stack)
        engine.bind(stack, found)
        (packing,) = pack([[np.array(first)], [np.arange(6, 12)]], spare=4)
        samplings = [ClientSampling(0.5, 0.0, bound, 12, GaussianSource()) for _ in range(2)]
        PrivateStep(engine).gradients(packing, inputs[packing.rows], targets[packing.rows], found, samplings)
        return found.double()

    there, gone = gradients([0, 1, 2, 3, 4]), gradients([1, 2, 3, 4])
    assert bool(there.isfinite().all())
    limit = bound / 6
    assert float((there[0] - gone[0]).norm()) <= limit + FLOAT32 * float(there[0].norm())
    assert torch.equal(there[1], gone[1])


@pytest.mark.parametrize("size", [1e-40, 1.0, 1e18, 1.4e38, math.nan])
@pytest.mark.parametrize("bound", BOUNDS)
def test_a_site_s_update_stays_within_the_bound(bound: float, size: float) -> None:
    """At 1.4e38 the factor, 1e-6 / 4.4e38, is 1.6 of the smallest float32, and would be 2 of it."""
    arrays = {"a": np.full(6, size, np.float32), "b": np.full((2, 2), -size, np.float32)}
    norm = clip_to(arrays, bound)
    left = math.sqrt(sum(float((array.astype(np.float64) ** 2).sum()) for array in arrays.values()))
    assert left <= bound
    if math.isfinite(size) and size * math.sqrt(10) > bound:
        assert norm == pytest.approx(size * math.sqrt(10))
        assert left == pytest.approx(bound, rel=1e-5)


def test_an_adaptive_bound_stays_among_those_that_a_site_allows() -> None:
    adaptive = AdaptiveClip(count_noise=1.0, learning_rate=50.0)
    assert moved(1.0, 1.0, adaptive) == SMALLEST_CLIP
    assert moved(1.0, 0.0, adaptive) == LARGEST_CLIP


EXAMPLE = CentralNoise(unit="example", noise_by="server", epsilon=4, delta=1e-3, clip=0.5, noise_multiplier=1.0)


@pytest.fixture
def wire(tmp_path):
    return WireSite(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"privacy": PrivacyRequest(epsilon=4, delta=1e-3, max_grad_norm=9e-7)}, "privacy.max_grad_norm is 9e-07"),
        ({"privacy": PrivacyRequest(epsilon=4, delta=1e-3, max_grad_norm=2e6)}, "in \\[1e-06, 1e\\+06\\]"),
        ({"training": sgd(1, 16, learning_rate=1.1e3)}, "learning rate is 1100"),
        ({"central": EXAMPLE.model_copy(update={"clip": 1e-35}), "privacy": None}, "central.clip is 1e-35"),
        (
            {"central": EXAMPLE.model_copy(update={"sample_rate": 1e-300}), "privacy": None},
            "floating point has no room",
        ),
        (
            {"central": EXAMPLE.model_copy(update={"noise_multiplier": 1e40}), "privacy": None},
            "floating point has no room",
        ),
    ],
)
def test_a_site_refuses_numbers_that_no_guarantee_holds_at(wire, changes, words):
    asked = {"training": sgd(1, 16), **changes}
    reply = wire.asker.ask(**asked)
    assert reply.has_error()
    assert reply.error.code == RefusalCode.MALFORMED
    assert re.search(words, reply.error.reason)
    assert wire.site.ledger.spent(1e-3) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_site_refuses_parameters_that_are_not_finite(wire, bad):
    name = next(iter(wire.asker.parameters))
    wire.asker.parameters[name] = wire.asker.parameters[name].copy()
    wire.asker.parameters[name].flat[0] = bad
    reply = wire.asker.ask(training=sgd(1, 16))
    assert reply.error.code == RefusalCode.MALFORMED
    assert "not finite" in reply.error.reason
    assert wire.site.ledger.spent(1e-3) == 0


@pytest.mark.parametrize("weights", [1e9, 1e30])
@pytest.mark.parametrize("clip", [SMALLEST_CLIP, 0.5])
def test_hostile_weights_at_the_wire(wire, weights, clip):
    """One of 363 real records, under noise on the sum, whose gradients are clipped and not noised at the site."""
    central = EXAMPLE.model_copy(update={"clip": clip})
    asked = {"training": sgd(1, 16, learning_rate=1e3), "privacy": None, "central": central}
    random = np.random.default_rng(0)
    wire.asker.parameters = {
        name: (random.normal(size=array.shape) * weights).astype(np.float32)
        for name, array in wire.asker.parameters.items()
    }
    there, gone = wire.leaves(**asked), wire.leaves(wire.inputs[1:], wire.targets[1:], **asked)
    bound = 1e3 * clip
    assert np.linalg.norm(there - gone) <= bound + FLOAT32 * np.linalg.norm(there)
    assert 0 < np.linalg.norm(there) <= len(wire.inputs) * bound


def test_the_server_s_noise_covers_what_rounding_on_the_wire_adds(wire):
    """A thousand bounds long, one example apart, rounded to float32: further apart than the bound by itself."""
    plan = wire.asker.plan.model_copy(
        update={"central": EXAMPLE, "privacy": None, "training": sgd(1, 16, learning_rate=1.0)}
    )
    bound, count, random = EXAMPLE.clip, 100_000, np.random.default_rng(0)
    direction = random.uniform(0.5, 1, 1000)
    direction *= bound / np.linalg.norm(direction)
    worst = max(
        float(np.linalg.norm(np.float32(direction * n).astype(float) - np.float32(direction * (n - 1)).astype(float)))
        for n in range(count - 20, count)
    )
    mean = Update({}, float(count), count, divisor=float(count))
    claimed = mechanism_of(plan).mean_sensitivity(mean) * count
    assert bound < worst <= claimed <= bound * 1.02


def test_a_server_adds_in_float64_what_it_makes_noise_for(wire):
    plan = wire.asker.plan.model_copy(
        update={"central": EXAMPLE, "privacy": None, "training": sgd(1, 16, learning_rate=1.0)}
    )
    assert {array.dtype for array in postprocess.sum_of(wire.asker.parameters, plan).values()} == {np.dtype("float64")}
    total = Update({"w": np.full(3, 0.1)}, 2.0, 2)
    assert postprocess.at_server(total, plan, {"w": (3,)}).arrays["w"].dtype == np.float32


def test_a_sum_that_leaves_in_integers_was_never_rounded_to_float32(wire, monkeypatch):
    """What one example adds to a sum of many is in its last digits."""
    kept = []
    monkeypatch.setattr(
        "fedclaw.site.training.at_site",
        lambda part, plan, context: (
            kept.append(part.value) or postprocess.Weighting(plan.weight).at_site(part, context)
        ),
    )
    wire.leaves(training=sgd(1, 16), privacy=None, central=EXAMPLE)
    assert {array.dtype for array in kept[0].arrays.values()} == {np.dtype("float64")}
    left = SumWithShare(share_noise(0.5, 3, 2, 1.0), 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedclaw.privacy.distributed.with_noise", lambda encoded, *_: encoded)
        step = left.shares.step
        wide = left.encode(np.array([1 + step, 0.0, 0.0]), GaussianSource()).view(np.int32)
    assert wide[0] * step == 1 + step


@settings(max_examples=30, deadline=None)
@given(size=st.sampled_from([0.0, 1e-3, 1.0, 1e3, 1e8, 1e30]), parts=st.integers(1, 9))
def test_the_sum_is_looked_at_once_more_where_it_is_cut_to_integers(size: float, parts: int) -> None:
    """Whatever went wrong before, no more leaves than so many clipped parts add up to."""
    shares = share_noise(0.5, 40, 2, 1.0)
    encoded, _ = Encoding(shares.step).encode_sum(np.full(40, size), shares.largest, GaussianSource(), parts * 0.5)
    norm = float(np.linalg.norm(encoded.view(np.int32).astype(np.float64)))
    assert norm <= parts * 0.5 / shares.step + math.sqrt(40)
