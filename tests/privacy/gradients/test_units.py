"""The unit person: the gradients of a person's rows are summed and clipped together, by every engine."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fedclaw.errors import PrivacyError
from fedclaw.privacy.gradients import bookkeeping, choice
from fedclaw.privacy.gradients.choice import made
from fedclaw.privacy.gradients.interface import Clip, trainable
from fedclaw.privacy.gradients.segments import Segments
from fedclaw.privacy.noise import GaussianSource
from fedclaw.privacy.speed import Mode, StepSpeed
from fedclaw.privacy.steps import PlainGradients, PrivateGradients

ENGINES: tuple[Mode, ...] = ("opacus", "vmap", "bookkeeping")
CLASSES, BOUND, EXPECTED = 3, 0.7, 3.0
NOT_FOR_OPACUS = ("tied",)
"""Opacus' hooks do not see a parameter that is used otherwise than through its layer."""
TAKEN_OVER = {"tied": "vmap", "embedding": "vmap"}
"""Which engine takes what book-keeping cannot."""


def loss(_: torch.Tensor, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(outputs, targets)


class Tied(nn.Module):
    """Uses one matrix both as a layer and by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(torch.tanh(self.layer(inputs)) + inputs @ self.layer.weight)
        return outputs


class Words(nn.Module):
    """The first column chooses a row of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(4, 6), nn.Linear(6, CLASSES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(torch.tanh(self.table((inputs[:, 0].abs() * 2).long().clamp(max=3))))
        return outputs


class Attention(nn.Module):
    """One head over the places of an example, with a layer norm and a connection past it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(5)
        self.query, self.key, self.value = (nn.Linear(5, 4, bias=bias) for bias in (False, True, True))
        self.back, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        seen = self.norm(inputs)
        weights = (self.query(seen) @ self.key(seen).transpose(1, 2) / 2).softmax(2)
        outputs: torch.Tensor = self.head((inputs + self.back(weights @ self.value(seen))).mean(1))
        return outputs


def make(kind: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A model and the shape of one input; in `wide`, gradients of two layers are there as their factors alone."""
    if kind == "conv":
        layers = (nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, CLASSES))
        return nn.Sequential(*layers), (1, 4, 4)
    if kind == "linear":
        return nn.Linear(6, CLASSES), (6,)
    if kind == "wide":
        return nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 60, bias=False), nn.Linear(60, 3)), (40,)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, CLASSES, bias=False)), (6,)
    models = {"tied": Tied, "embedding": Words, "attention": Attention}
    return models[kind](), (4, 5) if kind == "attention" else (5,)


KINDS = ["linear", "mlp", "wide", "conv", "embedding", "tied", "attention"]


def batch(shape: tuple[int, ...], sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, targets, and whose they are, for units of so many rows."""
    count = sum(sizes)
    units = torch.repeat_interleave(torch.arange(len(sizes)) * 3 + 1, torch.tensor(sizes, dtype=torch.int64))
    return torch.randn(count, *shape), torch.randint(0, CLASSES, (count,)), units


def taker(model: nn.Module, mode: Mode, chunk: int | None = None, **changes: object) -> PrivateGradients:
    values = {"max_grad_norm": BOUND, "noise_multiplier": 0.0, "expected_batch_size": EXPECTED, "loss": loss} | changes
    speed = StepSpeed(mode=mode, chunk_size=chunk)
    return PrivateGradients(model, source=GaussianSource(), speed=speed, **values)  # type: ignore[arg-type]


def exact(steps: PrivateGradients) -> torch.Tensor:
    return torch.cat([values.flatten() for values in steps.exact]).clone()


def summed(model: nn.Module, mode: Mode, data: tuple[torch.Tensor, ...], chunk: int | None = None) -> torch.Tensor:
    with taker(model, mode, chunk) as steps:
        steps.gradients(*data)
        return exact(steps)


def unit_by_unit(
    model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, units: torch.Tensor, bound: float = BOUND
) -> torch.Tensor:
    """The definition, in float64: the gradient of the sum of a unit's losses, clipped."""
    model = copy.deepcopy(model).double()
    parameters = list(model.parameters())
    total = torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=torch.float64)
    for unit in units.unique():
        own = units == unit
        whole = loss(inputs, model(inputs[own].double()), targets[own]) * int(own.sum())
        gradient = torch.cat([part.flatten() for part in torch.autograd.grad(whole, parameters)])
        total += gradient * min(1.0, bound / float(gradient.norm()))
    return total / EXPECTED


def assert_same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """To 2e-6 of the whole: 1e-6 is the margin that a norm is enlarged by."""
    assert float((ours - expected).norm()) <= 2e-6 * float(expected.norm())


@pytest.mark.parametrize(
    ("kind", "mode"),
    [(kind, mode) for kind in KINDS for mode in ENGINES if mode != "opacus" or kind not in NOT_FOR_OPACUS],
)
def test_every_engine_clips_the_sum_of_a_unit_s_gradients(kind: str, mode: Mode) -> None:
    model, shape = make(kind)
    for sizes in ([3], [1, 4, 2, 1, 4], [20, 1, 7, 20, 13, 2]):
        data = batch(shape, sizes)
        expected = unit_by_unit(model, *data)
        for chunk in (None, 1, 8):
            with taker(model, mode, chunk) as steps:
                steps.gradients(*data)
                assert_same(exact(steps), expected)
                assert steps.engine == (TAKEN_OVER.get(kind, mode) if mode == "bookkeeping" else mode)


@pytest.mark.parametrize("mode", ENGINES)
@pytest.mark.parametrize("kind", ["wide", "conv", "attention"])
@settings(max_examples=6, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=7), bound=st.sampled_from([1e-3, 1.0, 1e3]))
def test_units_of_any_sizes(kind: str, mode: Mode, sizes: list[int], bound: float) -> None:
    model, shape = make(kind)
    data = batch(shape, sizes)
    expected = unit_by_unit(model, *data, bound)
    with taker(model, mode, max_grad_norm=bound) as steps:
        steps.gradients(*data)
        assert_same(exact(steps), expected)


@pytest.mark.parametrize("mode", ENGINES)
@pytest.mark.parametrize("kind", ["wide", "conv"])
@pytest.mark.parametrize("chunk", [None, 64])
def test_a_unit_of_five_thousand_rows(kind: str, mode: Mode, chunk: int | None) -> None:
    model, shape = make(kind)
    data = batch(shape, [2, 5000, 3])
    assert_same(summed(model, mode, data, chunk), unit_by_unit(model, *data))


@pytest.mark.parametrize("mode", ENGINES)
def test_a_unit_of_many_rows_takes_no_more_memory_than_its_sum(mode: Mode) -> None:
    model, shape = make("wide")
    seen: list[int] = []
    model[0].register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    summed(model, mode, batch(shape, [5000, 1]), 100)
    assert max(seen) <= 100
    assert sum(seen) >= 5000


@pytest.mark.parametrize("mode", ENGINES)
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_units_of_one_row_give_bit_for_bit_what_rows_give(mode: Mode, chunk: int | None) -> None:
    for kind in ("wide", "conv"):
        model, shape = make(kind)
        inputs, targets, _ = batch(shape, [1] * 11)
        rows = summed(model, mode, (inputs, targets), chunk)
        assert torch.equal(summed(model, mode, (inputs, targets, torch.arange(11)), chunk), rows)


@pytest.mark.parametrize("mode", ENGINES)
def test_the_way_of_several_rows_takes_one_too(mode: Mode) -> None:
    for kind in ("wide", "conv"):
        model, shape = make(kind)
        inputs, targets, _ = batch(shape, [1] * 12)
        engine = made(mode, model, loss, Clip(BOUND, 1 / EXPECTED))
        totals = [[torch.ones_like(p, dtype=torch.float64) for p in trainable(model)] for _ in range(2)]
        for total, units in zip(totals, (None, Segments(np.ones(12, np.int64))), strict=True):
            engine.add(total, inputs, targets, fresh=True, units=units)
        engine.close()
        torch.testing.assert_close(*totals, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ENGINES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_unit_with_a_row_that_is_not_finite_counts_as_zero_as_a_whole(mode: Mode, bad: float) -> None:
    """1e30 is, but makes a gradient of 1e39; and a unit counts as zero in a chunk with others and by itself."""
    for model, shape in ((nn.Linear(6, 3), (6,)), (nn.Linear(50, 60), (50,)), make("conv")):
        inputs, targets, units = batch(shape, [3, 4, 30, 1, 2])
        inputs[4], kept = bad, units != 4
        for chunk in (None, 8, 3):
            with taker(model, mode, chunk, loss=lambda _, outputs, __: (outputs[:, 0] * 1e9).mean()) as steps:
                steps.gradients(inputs, targets, units)
                whole = exact(steps)
                steps.gradients(inputs[kept], targets[kept], units[kept])
                if len(shape) == 1 or not math.isfinite(bad):
                    torch.testing.assert_close(whole, exact(steps), rtol=1e-9, atol=1e-12)
                assert float(whole.norm()) > 0


@pytest.mark.parametrize("mode", ENGINES)
def test_a_step_clips_sums_and_not_rows(mode: Mode) -> None:
    """Twenty rows alike count as one, and rows that are each below the bound are clipped together."""
    model, shape = make("linear")
    inputs, targets, _ = batch(shape, [1])
    inputs, targets = inputs.expand(20, *shape), targets.expand(20)
    with taker(model, mode, max_grad_norm=1e-3, expected_batch_size=1.0) as steps:
        steps.gradients(inputs, targets, torch.zeros(20, dtype=torch.int64))
        assert float(exact(steps).norm()) == pytest.approx(1e-3, rel=1e-5)
        steps.gradients(inputs, targets, torch.arange(20))
        assert float(exact(steps).norm()) == pytest.approx(20e-3, rel=1e-5)


def weights_of(model: nn.Module, kind: str) -> None:
    """What a dishonest coordinator sends."""
    scale = {"plain": 1.0, "huge": 1e9, "vanishing": 1e-30, "saturated": 1e4, "overflowing": 1e30}[kind]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * scale)


@pytest.mark.parametrize("mode", ENGINES)
@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["linear", "mlp", "wide", "conv"]),
    weights=st.sampled_from(["plain", "huge", "vanishing", "saturated", "overflowing"]),
    loud=st.sampled_from([0.0, 1e-40, 1e-20, 1.0, 1e3, 1e10, 1e18, 1e30, math.inf, math.nan]),
    bound=st.sampled_from([1e-6, 1.0, 1e6]),
    sizes=st.lists(st.integers(1, 6) | st.just(40), min_size=2, max_size=5),
    moved=st.integers(0, 4),
    chunk=st.sampled_from([None, 1, 3, 8]),
)
def test_one_unit_moves_the_sum_by_at_most_the_bound(
    mode: Mode, kind: str, weights: str, loud: float, bound: float, sizes: list[int], moved: int, chunk: int | None
) -> None:
    model, shape = make(kind)
    weights_of(model, weights)
    inputs, targets, units = batch(shape, sizes)
    own = units == units.unique()[moved % len(sizes)]
    inputs[own] *= loud
    with taker(model, mode, chunk, max_grad_norm=bound) as steps:
        steps.gradients(inputs, targets, units)
        there = exact(steps)
        steps.gradients(inputs[~own], targets[~own], units[~own])
        assert bool(there.isfinite().all())
        assert float((there - exact(steps)).norm()) <= steps.sensitivity


def weighted(_: torch.Tensor, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient is a row's target times the same for all."""
    return (outputs @ torch.linspace(0.3, 1.7, outputs.shape[1]) * targets).mean()


def cancelling(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (size, 30) and targets of a unit whose large gradients cancel, and whose small ones are lost in the
    rounding of their sum: by the order of summing, something else is left."""
    generator = torch.Generator().manual_seed(size)
    large, small = size // 3, size - 2 * (size // 3)
    inputs, others = torch.randn(large, 30, generator=generator), torch.randn(small, 30, generator=generator)
    weights = 10 ** torch.linspace(25, 5, large)
    rest = torch.rand(small, generator=generator) + 0.5
    return torch.cat([inputs, others, inputs]), torch.cat([weights, rest, -weights])


def networks() -> list[nn.Module]:
    """Gradients that are there as their factors; that are written out; and both."""
    return [
        nn.Linear(30, 64),
        nn.Linear(30, 8),
        nn.Sequential(nn.Linear(30, 64), nn.Tanh(), nn.LayerNorm(64), nn.Linear(64, 50, bias=False)),
    ]


@pytest.mark.parametrize("mode", ENGINES)
@pytest.mark.parametrize("size", [6, 13, 60])
@pytest.mark.parametrize("chunk", [None, 16])
def test_rows_that_cancel_leave_nothing_that_others_turn(mode: Mode, size: int, chunk: int | None) -> None:
    """What is left of such a unit is rounding, and which way it points must not hang on who else is there."""
    torch.manual_seed(0)
    inputs, targets = cancelling(size)
    for model in networks():
        with taker(model, mode, chunk, max_grad_norm=1e-3, expected_batch_size=1.0, loss=weighted) as steps:
            steps.gradients(inputs, targets, torch.full((size,), 5))
            alone = exact(steps)
            assert float(alone.norm()) == pytest.approx(1e-3, rel=1e-5)
            for sizes in ([1], [2, 7, 1], [5, 30]):
                others, _, owners = batch((30,), sizes)
                answers = torch.randn(len(others))
                steps.gradients(others, answers, owners)
                gone = exact(steps)
                for first in (True, False):
                    both = [(inputs, others), (targets, answers), (torch.full((size,), 0 if first else 500), owners)]
                    steps.gradients(*(torch.cat(pair if first else pair[::-1]) for pair in both))
                    there = exact(steps)
                    assert float((there - gone).norm()) <= steps.sensitivity
                    assert float((there - gone - alone).norm()) <= 1e-9 * steps.sensitivity


@pytest.mark.parametrize("mode", ENGINES)
def test_a_first_step_is_like_any_other(mode: Mode) -> None:
    """Whether a unit is worked on alone must not hang on whether somebody else's batch came before."""
    torch.manual_seed(0)
    inputs, targets = cancelling(10_000)
    units = torch.full((10_000,), 5)
    for model in networks():
        with taker(model, mode, max_grad_norm=1e-6, loss=weighted) as steps:
            steps.gradients(inputs, targets, units)
            first = exact(steps)
            steps.gradients(inputs, targets, units)
            assert torch.equal(exact(steps), first)


def test_a_unit_that_cancels_has_its_sum_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the two ways meet, they give the same."""
    model, shape = make("wide")
    data = batch(shape, [6, 1, 20, 3])
    usual = summed(model, "bookkeeping", data)
    for limit in (0.0, 1.0, 1e9):
        monkeypatch.setattr(bookkeeping, "_CANCELS", limit)
        found = summed(model, "bookkeeping", data)
        assert float((found - usual).norm()) <= 1e-12 * float(usual.norm())


@pytest.mark.parametrize(("size", "apart"), [(1.0, False), (2.5e38, True)])
def test_a_unit_that_hardly_counts_any_more_is_measured_by_its_rows_alone(
    size: float, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is beyond float32 must not hang on how a norm was rounded among others."""
    measured, written_out = [], bookkeeping._add_written_out
    monkeypatch.setattr(
        bookkeeping, "_add_written_out", lambda *values: measured.append(values[3]) or written_out(*values)
    )
    model = nn.Linear(30, 64, bias=False)
    with taker(model, "bookkeeping", loss=weighted) as steps:
        inputs = torch.zeros(4, 30)
        inputs[:, 0] = 1.0
        gradient = float(torch.linspace(0.3, 1.7, 64).norm())
        steps.gradients(inputs, torch.tensor([0.5, 0.5, 1e-3, 1e-3]) * size / gradient, torch.tensor([0, 0, 1, 1]))
        assert bool(measured) == apart
        assert float(exact(steps).norm()) >= BOUND / EXPECTED * (1 - 1e-5)


@pytest.mark.parametrize("mode", ENGINES)
def test_noise_comes_once_for_all_units(mode: Mode) -> None:
    model, shape = make("linear")
    with taker(model, mode, noise_multiplier=2.0) as steps:
        assert steps.noise_std == pytest.approx(2.0 * BOUND / EXPECTED)
        empty = batch(shape, [])
        steps.gradients(*empty)
        assert all(bool(parameter.grad.any()) for parameter in model.parameters())  # type: ignore[union-attr]


def test_wrong_units_are_refused_before_anything_is_added() -> None:
    model, shape = make("linear")
    inputs, targets, units = batch(shape, [2, 3])
    with taker(model, "bookkeeping") as steps:
        with pytest.raises(PrivacyError, match="ascending"):
            steps.gradients(inputs, targets, units.flip(0))
        for wrong in (units[:4], units[:, None], units.double()):
            with pytest.raises(PrivacyError, match="5 rows"):
                steps.gradients(inputs, targets, wrong)


def test_without_privacy_it_does_not_matter_whose_rows_they_are() -> None:
    model, shape = make("mlp")
    inputs, targets, units = batch(shape, [2, 3])
    with PlainGradients(model, loss) as steps:
        steps.gradients(inputs, targets)
        plain = [parameter.grad.clone() for parameter in model.parameters()]  # type: ignore[union-attr]
        steps.gradients(inputs, targets, units)
        for parameter, expected in zip(model.parameters(), plain, strict=True):
            assert torch.equal(parameter.grad, expected)  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12), padding=st.integers(0, 3))
def test_segments_add_each_unit_s_rows_in_their_order(sizes: list[int], padding: int) -> None:
    segments = Segments(np.array(sizes), padding)
    rows = torch.randn(sum(sizes) + padding, 3) * 10 ** torch.empty(sum(sizes) + padding, 3).uniform_(-10, 25)
    left, right = torch.randn(len(rows), 5).double(), torch.randn(len(rows), 4).double()
    units = torch.repeat_interleave(torch.arange(len(sizes) + padding), torch.tensor([*sizes, *[1] * padding]))
    order = sorted(range(len(segments)), key=lambda unit: -[*sizes, *[1] * padding][unit])
    sums, squares = segments.sums(rows), segments.squared_norms(left, right, 1.0)
    turns = segments._added_by_turn(torch.zeros_like(sums), rows)
    for place, unit in enumerate(order):
        expected = torch.zeros(3, dtype=torch.float64)
        for row in rows[units == unit].double():
            expected += row
        assert torch.equal(sums[place], expected)
        assert torch.equal(turns[place], expected)
        own = segments.rows_of(place)
        assert torch.equal(torch.arange(len(rows))[own], (units == unit).nonzero()[:, 0])
        matrix = left[own].t() @ torch.cat([right[own], torch.ones(own.stop - own.start, 1).double()], 1)
        assert float(squares[place]) == pytest.approx(float(matrix.square().sum()), rel=1e-9)
        assert (segments.by_row(torch.arange(len(segments)))[own] == place).all()


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [1, 3, 1]])
def test_what_is_compiled_does_not_hang_on_how_many_rows_somebody_has(sizes: list[int]) -> None:
    """Code for units of several rows is not compiled, and rounds otherwise than what is: with parameters that leave but
    rounding of a gradient, a person of two rows and no gradient moved the others' sum by eleven bounds."""
    model, shape = make("mlp")
    steps = taker(model, "compiled", 4)
    steps.gradients(*batch(shape, sizes))
    assert steps.engine == "vmap"


def test_which_engine_is_taken_does_not_hang_on_who_is_sampled_first(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []

    def seconds(mode: str, model: nn.Module, loss: object, clip: Clip, *made_up: torch.Tensor) -> float:
        looked.append((mode, *((tuple(part.shape), float(part.abs().sum())) for part in made_up)))
        return 1.0

    monkeypatch.setattr(choice, "_seconds", seconds)
    for sizes in ([1, 1], [1, 1, 1, 1, 1], [4, 2]):
        model, shape = make("mlp")
        steps = taker(model, "auto", steps_ahead=10**6, expected_batch_size=40.0)
        steps.gradients(*batch(shape, sizes))
        assert looked == [(mode, ((40, *shape), 0.0), ((40,), 0.0)) for mode in ("bookkeeping", "vmap")]
        looked.clear()
