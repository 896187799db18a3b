"""Clipped sums from one backward pass (Bu, Wang, Zha and Karypis 2023, "Differentially Private Optimization on Large
Model at Small Cost", section 3: book-keeping).

The backward pass goes only to the layers' outputs, not to their weights. For a linear layer with one row an example,
activations a and output gradients g give the norm of the example's gradient without the gradient itself
(||g|| ||a, 1||, the ghost norm of Goodfellow 2015), and the clipped sum is one matrix product. Other layers' gradients
are small, or have to be added over places anyway: they are worked out (`layers`), measured and summed.

A unit of several rows has the sum of their gradients: the sum of g_i a_i^T over its rows i, with the squared norm sum
<g_i, g_j> <a_i, a_j> over its pairs of rows; the clipped sum is the same one product, each row with its unit's factor.

Goes for models whose trainable parameters all belong to layers that have a rule, each called once in a forward pass.
Whether the rules tell the truth about the model is checked against the plain gradient before the first batch, on
made-up examples. Would it depend on the batch, one huge example could hide a wrong rule behind its own gradient; a step
with it would be taken by another engine than one without it, and the two be further apart than the clipping bound.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import nn

from fedclaw.privacy.gradients.interface import (
    LARGEST_NORM,
    Clip,
    ClippedSums,
    Loss,
    Products,
    Unsuited,
    clip_factors,
    overflows,
    without_overflow,
)
from fedclaw.privacy.gradients.layers import LayerRule, LinearRule, Spread, rule_for
from fedclaw.privacy.gradients.segments import Segments, summed_product

_SAME_GRADIENT = 1e-3
_WORTH_MERGING = 1 << 17
_WORTH_WRITING_OUT = 1 << 10
"""Numbers of a linear layer up to which its gradients are written out: calls that are saved cost more."""
_WORTH_LEAVING = 1 << 14
"""Numbers of a total (128 KiB) from which it is left as its factors."""
_MADE_UP = 4
_CANCELS = 16
"""Bounds that the rows of a clipped sum may be long, together, to be added to a total one by one."""


@dataclass(frozen=True)
class _Layer:
    """A layer with trainable parameters, and where these stand among the model's."""

    module: nn.Module
    rule: LayerRule
    places: tuple[int, ...]


@dataclass(frozen=True)
class _Pass:
    """What went into a layer in a forward pass and what came out, with their versions at that time."""

    layer: _Layer
    inputs: torch.Tensor
    output: torch.Tensor
    versions: tuple[int, int]


@dataclass(frozen=True)
class _Rows:
    """Each example's share in the gradient of a layer: its activations a (B, in) and output gradients g (B, out), of
    which the gradient is the outer product, or the gradients themselves (B, n) and nothing in `activations`."""

    places: tuple[int, ...]
    spread: Spread
    gradients: torch.Tensor
    activations: torch.Tensor | None

    def widened(self) -> Self:
        """The same in float64, in memory of its own."""
        activations = None if self.activations is None else self.activations.to(torch.float64, copy=True)
        return replace(self, gradients=self.gradients.to(torch.float64, copy=True), activations=activations)

    def without_overflow(self, norms: torch.Tensor) -> Self:
        """The same, overwritten, with zeros for the examples that count as zero by their `norms` (B,)."""
        activations = None if self.activations is None else without_overflow(self.activations, norms)
        return replace(self, gradients=without_overflow(self.gradients, norms), activations=activations)

    def of(self, units: Segments) -> Self:
        """The same in float64, in memory of its own, where gradients that are written out are summed: (U, n)."""
        return replace(self, gradients=units.sums(self.gradients)) if self.activations is None else self.widened()

    def lengths(self) -> torch.Tensor:
        """(B,): the norm of each example's gradient, which is there as its factors."""
        assert self.activations is not None
        own = torch.linalg.vector_norm(self.activations, dim=1)
        # The bias is one more activation, of 1.
        own = own.square_().add_(1.0).sqrt_() if len(self.places) > 1 else own
        lengths: torch.Tensor = own.mul_(torch.linalg.vector_norm(self.gradients, dim=1))
        return lengths

    def sum_over(self, part: slice) -> list[torch.Tensor]:
        """The sum of the gradients of those rows, which are there as their factors, in the shapes of the parameters."""
        assert self.activations is not None
        return summed_product(self.gradients[part], self.activations[part], bias=len(self.places) > 1)


class Bookkeeping(ClippedSums):
    """See ClippedSums."""

    name = "bookkeeping"

    def __init__(self, model: nn.Module, loss: Loss, clip: Clip) -> None:
        """Raises Unsuited if the model has trainable parameters outside of layers with a rule."""
        super().__init__(model, loss, clip)
        layers = _layers(model, self._parameters)
        self._numbers = sum(parameter.shape[0] for parameter in self._parameters)
        self._passes: list[_Pass] = []
        self._recording = self._trusted = self._prepared = False
        self._hooks = [layer.module.register_forward_hook(self._recorder(layer)) for layer in layers]

    def add(
        self,
        totals: Sequence[torch.Tensor],
        inputs: torch.Tensor,
        targets: torch.Tensor,
        *,
        fresh: bool,
        padding: int = 0,
        products: Products | None = None,
        units: Segments | None = None,
    ) -> None:
        """See ClippedSums."""
        if not self._prepared:
            self.prepare(inputs, targets)
        rows, _ = self._rows(inputs, targets)
        with torch.no_grad():
            if units is not None:
                _add_units(totals, rows, units, self._clip, fresh=fresh, padding=padding, products=products)
                return
            rows = [row.widened() for row in rows]
            norms = _norms(rows) if rows else inputs.new_zeros(inputs.shape[0], dtype=torch.float64)
            overflow = overflows(norms)
            factors = clip_factors(norms, self._clip, padding, overflow=overflow)
            if overflow:
                rows = [row.without_overflow(norms) for row in rows]
            _add_sums(totals, rows, factors, factors, fresh=fresh, products=products)

    def prepare(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """See ClippedSums."""
        if not self._trusted:
            self._verify(inputs, targets)
        self._prepared = True

    def close(self) -> None:
        """See ClippedSums."""
        for hook in self._hooks:
            hook.remove()
        self._passes.clear()

    def _recorder(self, layer: _Layer) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def record(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            # Without a gradient it has no part in the loss, as far as training goes.
            if self._recording and output.requires_grad:
                versions = inputs[0]._version, output._version
                self._passes.append(_Pass(layer, inputs[0].detach(), output, versions))

        return record

    def _verify(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Compare on made-up examples of these shapes. Raises Unsuited; trusts the rules only if it could tell."""
        made = inputs.new_zeros(_MADE_UP, *inputs.shape[1:])
        if made.is_floating_point():
            made.normal_(generator=torch.Generator(made.device).manual_seed(0))
        with torch.random.fork_rng(devices=[]):
            rows, plain = self._rows(made, targets.new_zeros(_MADE_UP, *targets.shape[1:]), self._parameters)
        if rows:
            self._numbers = sum(row.gradients.shape[1] for row in rows)
            with torch.no_grad():
                self._compare(rows, plain, _MADE_UP)

    def _rows(
        self, inputs: torch.Tensor, targets: torch.Tensor, checked: Sequence[nn.Parameter] = ()
    ) -> tuple[list[_Rows], Sequence[torch.Tensor | None]]:
        """Each example's shares by layer, and the plain gradient of the sum of losses for the parameters `checked`."""
        self._recording = True
        try:
            loss = self._loss(inputs, self._model(inputs), targets)
        finally:
            self._recording = False
            passes, self._passes = self._passes, []
        if len({id(one.layer) for one in passes}) < len(passes):
            raise Unsuited("a layer is used more than once in a forward pass")
        if any((one.inputs._version, one.output._version) != one.versions for one in passes):
            raise Unsuited("the model overwrites what went into a layer or came out of it")
        outputs = [one.output for one in passes]
        if not loss.requires_grad:
            return [], ()
        # Times the number of examples, the gradient of the mean is that of the examples' own losses.
        found = torch.autograd.grad(
            loss, [*outputs, *checked], grad_outputs=loss.new_full((), len(inputs)), allow_unused=True
        )
        with torch.no_grad():
            rows = _merged(
                [
                    _layer_rows(one, gradient)
                    for one, gradient in zip(passes, found[: len(passes)], strict=True)
                    if gradient is not None
                ]
            )
        return rows, found[len(passes) :]

    def _compare(self, rows: Sequence[_Rows], plain: Sequence[torch.Tensor | None], count: int) -> None:
        """Raise Unsuited if the rules' gradients do not add up to the plain gradient."""
        sums = [torch.empty(p.shape, dtype=torch.float64, device=p.device) for p in self._parameters]
        ones = sums[0].new_ones(count)
        _add_sums(sums, [row.widened() for row in rows], ones, ones, fresh=True)
        wrong = [ours if other is None else ours - other for ours, other in zip(sums, plain, strict=True)]
        size = torch.stack([ours.norm() for ours in sums]).norm()
        error = torch.stack([part.norm() for part in wrong]).norm()
        if not 0 < float(size) < math.inf:
            return
        if bool(error > _SAME_GRADIENT * size):
            raise Unsuited("the model uses its parameters otherwise than through its layers")
        self._trusted = True


def _layers(model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[_Layer]:
    place = {parameter: index for index, parameter in enumerate(parameters)}
    layers, owned = [], 0
    for name, module in model.named_modules():
        own = [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
        if not own:
            continue
        rule = rule_for(module)
        if rule is None or len(own) != len(list(module.parameters(recurse=False))):
            raise Unsuited(f"layer {name!r} ({type(module).__name__}) has no rule, or some of its parameters are fixed")
        layers.append(_Layer(module, rule, tuple(place[parameter] for parameter in own)))
        owned += len(own)
    if owned != len(parameters) or not layers:
        raise Unsuited("layers share parameters, or there are none")
    return layers


def _layer_rows(one: _Pass, gradient: torch.Tensor) -> _Rows:
    rule, inputs = one.layer.rule, one.inputs
    if isinstance(rule, LinearRule) and inputs.dim() == 2:
        if inputs.shape[1] * gradient.shape[1] > _WORTH_WRITING_OUT:
            return _Rows(one.layer.places, rule.spread, gradient, inputs)
        inputs, gradient = inputs[:, None], gradient[:, None]
    return _Rows(one.layer.places, rule.spread, rule.rows(inputs, gradient), None)


def _merged(rows: list[_Rows]) -> list[_Rows]:
    """The same, with small gradients that are written out side by side: fewer calls cost less than the copy."""
    small = [row for row in rows if row.activations is None]
    if len(small) < 2 or sum(row.gradients.numel() for row in small) > _WORTH_MERGING:
        return rows
    sizes = [row.gradients.shape[1] for row in small]

    def spread(total: torch.Tensor) -> list[torch.Tensor]:
        parts = zip(small, torch.split(total, sizes), strict=True)
        return [shaped for row, part in parts for shaped in row.spread(part)]

    places = tuple(place for row in small for place in row.places)
    together = _Rows(places, spread, torch.cat([row.gradients for row in small], 1), None)
    return [*(row for row in rows if row.activations is not None), together]


def _norms(rows: Sequence[_Rows]) -> torch.Tensor:
    """(B,) norms of the examples' gradients over all layers, of which there is at least one."""
    first = rows[0].gradients
    if len(rows) == 1 and rows[0].activations is None:
        alone: torch.Tensor = torch.linalg.vector_norm(first, dim=1)
        return alone
    parts = first.new_empty(len(rows), first.shape[0])
    for row, part in zip(rows, parts, strict=True):
        if row.activations is None:
            torch.linalg.vector_norm(row.gradients, dim=1, out=part)
        else:
            part.copy_(row.lengths())
    norms: torch.Tensor = torch.linalg.vector_norm(parts, dim=0)
    return norms


def _add_units(
    totals: Sequence[torch.Tensor],
    rows: Sequence[_Rows],
    units: Segments,
    clip: Clip,
    *,
    fresh: bool,
    padding: int,
    products: Products | None,
) -> None:
    """`ClippedSums.add` for units, of their examples' shares.

    A layer's gradients that are there as their factors are never summed by unit: each row is added to the total with
    its unit's factor. Where a unit's rows nearly cancel, as parameters can bring about, this would add them with all of
    their rounding, and the norm of their sum would be rounding itself. So a unit whose rows are together longer than
    _CANCELS bounds after clipping has its sums written out, of its rows alone; by either way it comes out alike to
    within a millionth of a millionth of the bound where the two meet.
    """
    parts = [row.of(units) for row in rows]
    lengths, squares = _lengths(parts, units), _written_squares(parts, units)
    finite = (lengths + squares).isfinite()
    if not bool(finite.all()):
        marks = torch.where(finite, 0.0, math.inf)
        parts = [row.without_overflow(marks if row.activations is None else units.by_row(marks)) for row in parts]
        squares = torch.where(finite, squares, math.inf)
    for row in parts:
        if row.activations is not None:
            squares += units.squared_norms(row.gradients, row.activations, float(len(row.places) > 1))
    norms = squares.sqrt_()
    factors = clip_factors(norms, clip, padding)
    doubtful = (lengths * factors > _CANCELS * clip.max_norm * clip.scale) | (norms > LARGEST_NORM / 2)
    doubtful &= finite
    if padding:
        doubtful[-padding:] = False
    by_row = units.by_row(factors)
    if bool(doubtful.any()):
        if fresh:
            torch._foreach_zero_(list(totals))
        fresh, products = False, None
        for place in doubtful.nonzero()[:, 0].tolist():
            factors[place] = _add_written_out(totals, parts, units, place, clip)
            by_row[units.rows_of(place)] = 0.0
    _add_sums(totals, parts, factors, by_row, fresh=fresh, products=products)


def _add_written_out(
    totals: Sequence[torch.Tensor], rows: Sequence[_Rows], units: Segments, place: int, clip: Clip
) -> torch.Tensor:
    """Add to `totals` what the unit in that place has of the layers whose gradients are there as their factors; its
    factor, a scalar."""
    part, squares = units.rows_of(place), []
    found: list[tuple[int, torch.Tensor]] = []
    for row in rows:
        if row.activations is None:
            squares.append(row.gradients[place].square().sum())
            continue
        sums = row.sum_over(part)
        found += zip(row.places, sums, strict=True)
        squares += [one.square().sum() for one in sums]
    factor = clip_factors(torch.stack(squares).sum().sqrt(), clip)
    for index, values in found:
        totals[index].add_(values.mul_(factor))
    return factor


def _lengths(rows: Sequence[_Rows], units: Segments) -> torch.Tensor:
    """(U,): the sum of the norms of a unit's rows, in the layers where they are there as their factors."""
    by_row = [row.lengths() for row in rows if row.activations is not None]
    if not by_row:
        return rows[0].gradients.new_zeros(len(units)) if rows else torch.zeros(len(units), dtype=torch.float64)
    lengths: torch.Tensor = torch.linalg.vector_norm(units.sums(torch.stack(by_row, 1)), dim=1)
    return lengths


def _written_squares(rows: Sequence[_Rows], units: Segments) -> torch.Tensor:
    """(U,): the squared norms of the units' sums, in the layers where these are written out."""
    squares = [row.gradients.square().sum(1) for row in rows if row.activations is None]
    return torch.stack(squares).sum(0) if squares else torch.zeros_like(_lengths(rows, units))


def _add_sums(
    totals: Sequence[torch.Tensor],
    rows: Sequence[_Rows],
    factors: torch.Tensor,
    by_row: torch.Tensor,
    *,
    fresh: bool,
    products: Products | None = None,
) -> None:
    """Add to `totals` the sums over the units, weighted with `factors` (U,), and where gradients are there as their
    factors those over the examples, weighted with `by_row` (B,); `products` as in ClippedSums."""
    keep = 0 if fresh else 1
    if fresh:
        reached = {place for row in rows for place in row.places}
        for place, total in enumerate(totals):
            if place not in reached:
                total.zero_()
    targets, parts = [], []
    for row in rows:
        gradients, activations, places = row.gradients, row.activations, row.places
        if activations is None:
            targets += [totals[place] for place in places]
            parts += row.spread(torch.mv(gradients.t(), factors))
            continue
        if len(places) > 1:
            totals[places[1]].addmv_(gradients.t(), by_row, beta=keep)
        if activations.shape[1] < gradients.shape[1]:
            left, right = gradients.t(), activations * by_row[:, None]
        else:
            left, right = (gradients * by_row[:, None]).t(), activations
        if products is not None and totals[places[0]].numel() >= _WORTH_LEAVING:
            products[places[0]] = left, right
        else:
            totals[places[0]].addmm_(left, right, beta=keep)
    if targets:
        torch._foreach_copy_(targets, parts) if fresh else torch._foreach_add_(targets, parts)
