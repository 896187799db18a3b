"""The ways of taking a local step: what is left in the parameters' `.grad` when a batch has been seen.

The training loop is the same for all (`fedclaw.learning.step_loop`): it asks a step taker for gradients, lets the
strategy correct them, and lets an optimiser move. Differential privacy is one way of taking a step.

Formal guarantee of `PrivateGradients`. The unit is an example, or a person: all rows that `units` gives one number.

- G_u is the sum of the gradients of the losses of unit u's rows. It depends on these rows and on the parameters alone,
  if the loss is a mean of losses that each depend on one row alone, and the model treats the rows of a batch
  separately. Both are checked on the first batches.
- What gets noise is S(batch) = sum over the units in it of G_u min(1, C / ||G_u||), by a constant, the expected batch
  size. No other unit's summand depends on unit v, so S with v and S without it are G_v min(1, C / ||G_v||) apart: at
  most C, however many rows v has. The same if its rows are replaced by others whose gradients are nothing.
- A step, that of an empty batch too, is therefore one Gaussian mechanism on the units in the batch. Over batches from
  `poisson_batches(count, q, ...)` of `count` units, each with all of its rows (`fedclaw.privacy.units`), and the same
  source, it is a Poisson-sampled one with rate q and the given noise multiplier.
- Neighbouring: one unit more or less, if q, the number of steps and the expected batch size are the same for both. Who
  works them out from the number of units has to make that number public; then one unit is replaced by nothing.

Whatever is computed from the gradients afterwards is post-processing.

Floating point. Norms, factors and sums are float64, and a clipped gradient keeps 1e-6 of the bound in hand
(`fedclaw.privacy.gradients.interface`), so that one unit moves the sum before noise (`exact`) by at most the
sensitivity, at batches of up to ten million examples, whatever the parameters are; noise is added to that sum, and what
is rounded to float32 is the noisy one. The rows of a unit may cancel, so that what is left of their sum is rounding,
and points anywhere; hence a unit's rows are added in their order, or by one product or backward pass of theirs alone,
and never among those of others, but where rounding is a small part of the bound whichever way it goes
(`fedclaw.privacy.gradients.bookkeeping`). Whether a unit is one that has a pass of its own follows from its number of
rows. A large sum is multiplied out, noised and rounded some rows at a time, so that
its float64 form need not go through memory; each number is still a float64 sum, and gets its noise before it is
rounded. Without noise of its own, `.grad` is the rounded sum: one unit moves it by up to 2^-23 of the sum's own norm
more. The gradients themselves are float32: one row's has to come out alike whatever else is in the batch and
wherever it stands there, for parameters can be such that rounding is all that is left of it. On a CPU torch does that
(measured with MKL, whose promise it is, and oneDNN) where MKL is told to (`fedclaw.environment`) and the number of rows
is a multiple of COMPANY, so chunks are filled up to one.

Legend: B examples in a batch, D input shape, P trainable parameters.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import numpy as np
import torch

from fedclaw.errors import PrivacyError
from fedclaw.privacy.gradients.choice import choose, instead
from fedclaw.privacy.gradients.interface import (
    PROBE,
    Clip,
    ClippedSums,
    Loss,
    Products,
    Unsuited,
    add_clipped,
    check_model,
    check_separate,
    check_settings,
    filled,
    trainable,
)
from fedclaw.privacy.gradients.segments import Segments
from fedclaw.privacy.noise import CHUNK, GaussianSource
from fedclaw.privacy.speed import StepSpeed
from fedclaw.privacy.units import Indices, starts_of

COMPANY = 4
"""Rows that are worked out together are a multiple of it, or of more where there are threads: then each comes out as in
any other such number of rows."""
ALONE = 256
"""Rows of one unit that are worked out together where it has more than go together with others."""


class StepTaker(ABC):
    """A way of taking a local step. It switches the model to training mode, and as a context manager leaves nothing
    else behind on it."""

    @abstractmethod
    def gradients(self, inputs: torch.Tensor, targets: torch.Tensor, units: torch.Tensor | None = None) -> None:
        """Replace each trainable parameter's `.grad` by the step's gradient for inputs (B, *D), targets (B, ...).

        `units` (B,) int64: whose each row is, in ascending order, so that a unit's rows lie together; None: each row is
        a unit.
        """

    def close(self) -> None:  # noqa: B027
        """Take everything off the model that was put on it; calling it again does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class PlainGradients(StepTaker):
    """The gradient of the mean loss over the batch; no privacy. Zero for an empty batch."""

    def __init__(self, model: torch.nn.Module, loss: Loss) -> None:
        self._model = model.train()
        self._loss = loss
        self._parameters = trainable(model)

    def gradients(self, inputs: torch.Tensor, targets: torch.Tensor, units: torch.Tensor | None = None) -> None:
        """See StepTaker. Whose the rows are makes no difference."""
        for parameter in self._parameters:
            parameter.grad = None
        if len(inputs):
            self._loss(inputs, self._model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


class PrivateGradients(StepTaker):
    """DP-SGD (Abadi et al. 2016, algorithm 1): clip each unit's gradient, sum, add noise, divide by expected B.

    gradient = (sum_u g_u min(1, C / ||g_u||) + N(0, (noise_multiplier C)^2)) / expected_batch_size, C = max_grad_norm

    g_u is the sum of the gradients of unit u's rows, of each row's own loss; it is not divided by how many there are.

    The clipped sum comes from the engine that `speed` asks for (`fedclaw.privacy.gradients`), the noise from `source`.
    A unit whose gradient is not finite, or has a norm beyond float32, counts as zero with all of its rows: one that
    overflows must not decide by itself whether the whole update is usable. The gradients' memory is the same at every
    step; a unit of many rows takes as much as the sum besides.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss: Loss,
        *,
        max_grad_norm: float,
        noise_multiplier: float,
        expected_batch_size: float,
        source: GaussianSource,
        speed: StepSpeed | None = None,
        steps_ahead: int = 1,
    ) -> None:
        """Switch `model` to training mode; hooks are on it from the first batch until `close`.

        `expected_batch_size` is q times the number of units. `speed` and `steps_ahead` (how many steps are to be
        taken, about) decide how fast a step is and nothing else. Raises PrivacyError for a model with layers that mix
        examples or keep statistics (batch normalisation) and for settings outside their range.
        """
        check_settings(max_grad_norm, noise_multiplier, expected_batch_size)
        self._model = model.train()
        check_model(model)
        self._loss = loss
        self._clip = Clip(max_grad_norm, scale=1 / expected_batch_size)
        self._noise_multiplier = noise_multiplier
        self._source = source
        self._speed = speed or StepSpeed()
        self._steps_ahead = steps_ahead
        self._parameters = trainable(model)
        self._sums = _Sums(self._parameters)
        self._unchecked = True
        self._closed = False
        self._engine: ClippedSums | None = None

    @property
    def sensitivity(self) -> float:
        """How far, in the L2 norm over all parameters, one unit can move the gradient before noise."""
        return self._clip.max_norm * self._clip.scale

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise in each component of the gradient."""
        return self._noise_multiplier * self.sensitivity

    @property
    def exact(self) -> list[torch.Tensor]:
        """The clipped sum of the last step in float64, of which the parameters' `.grad` is the rounded form, by
        parameter; overwritten by the next step. Raises PrivacyError where steps have noise of their own."""
        if self._noise_multiplier:
            raise PrivacyError("a step with noise of its own keeps no sum without it")
        return self._sums.exact

    @property
    def engine(self) -> str | None:
        """The name of the engine that works out clipped sums; None before the first example."""
        return None if self._engine is None else self._engine.name

    def gradients(self, inputs: torch.Tensor, targets: torch.Tensor, units: torch.Tensor | None = None) -> None:
        """See StepTaker. Raises PrivacyError if closed, if the loss or the model couples examples, or if the rows of a
        unit do not lie together."""
        if self._closed:
            raise PrivacyError("private gradients were asked for after close()")
        starts = None if units is None else _starts(units, len(inputs))
        for parameter in self._parameters:
            parameter.grad = None
        products: Products = {}
        if inputs.shape[0]:
            self._ready(inputs, targets, rows_alone=units is None)
            self._add_all(inputs, targets, starts, products)
        else:
            self._sums.clear()
        noised = self._sums.noised(self._source, self.noise_std, products)
        for parameter, gradient in zip(self._parameters, noised, strict=True):
            parameter.grad = gradient

    def close(self) -> None:
        """See StepTaker."""
        self._closed = True
        if self._engine is not None:
            self._engine.close()

    def _ready(self, inputs: torch.Tensor, targets: torch.Tensor, *, rows_alone: bool) -> None:
        """Have an engine that can take the model, as far as it can tell beforehand."""
        engine = self._engine = self._engine or choose(
            self._speed,
            self._model,
            self._loss,
            self._clip,
            inputs,
            targets,
            steps_ahead=self._steps_ahead,
            rows_alone=rows_alone,
        )
        try:
            engine.prepare(inputs, targets)
        except Unsuited as reason:
            self._give_way(engine, reason).prepare(inputs, targets)

    def _add_all(self, inputs: torch.Tensor, targets: torch.Tensor, starts: Indices | None, products: Products) -> None:
        engine = self._engine
        assert engine is not None
        with _threads_for(self._speed.chunk_size or engine.chunk_size) as company:
            self._add_chunks(engine, inputs, targets, starts, company, products)

    def _give_way(self, engine: ClippedSums, reason: Unsuited) -> ClippedSums:
        engine.close()
        later = self._engine = instead(engine.name, reason, self._model, self._loss, self._clip)
        return later

    def _add_chunks(
        self,
        engine: ClippedSums,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        starts: Indices | None,
        company: int,
        products: Products,
    ) -> None:
        count = inputs.shape[0]
        if self._unchecked and count > 1:
            with engine.paused():
                check_separate(self._model, self._loss, inputs[:PROBE], targets[:PROBE])
            self._unchecked = False
        # A sum that is wanted, or added to, is written out.
        writes = self._noise_multiplier == 0 or not self._sums.takes_products
        start = 0
        while start < count:
            size = _whole(self._speed.chunk_size or engine.chunk_size, company)
            end = min(start + size, count) if starts is None else _whole_units(starts, start, size)
            if end - start > size:
                with engine.paused():
                    self._add_alone(inputs[start:end], targets[start:end], fresh=start == 0)
                start = end
                continue
            rows, labels, padding = _in_company(inputs[start:end], targets[start:end], size, company)
            units = None if starts is None else _segments(starts, start, end, padding, inputs.device)
            left = None if writes or start or end < count else products
            try:
                engine.add(
                    self._sums.exact, rows, labels, fresh=start == 0, padding=padding, products=left, units=units
                )
            except Unsuited as reason:
                engine = self._give_way(engine, reason)
                continue
            start = end

    def _add_alone(self, inputs: torch.Tensor, targets: torch.Tensor, *, fresh: bool) -> None:
        """Add the clipped sum of a unit that has more rows than go together. Of its gradients no one is needed by
        itself: this is the gradient of the sum of its losses, some rows at a time from its first on."""
        sums = [torch.zeros(p.shape, dtype=torch.float64, device=p.device) for p in self._parameters]
        size = self._speed.chunk_size or ALONE
        for rows, labels in zip(torch.split(inputs, size), torch.split(targets, size), strict=True):
            loss = self._loss(rows, self._model(rows), labels)
            if loss.requires_grad:
                found = torch.autograd.grad(
                    loss, self._parameters, grad_outputs=loss.new_full((), len(rows)), allow_unused=True
                )
                for own, part in zip(sums, found, strict=True):
                    if part is not None:
                        own.add_(part)
        add_clipped(self._sums.exact, [own[None] for own in sums], self._clip, fresh=fresh)


def poisson_batches(count: int, q: float, steps: int, source: GaussianSource) -> Iterator[torch.Tensor]:
    """`steps` batches of rows, or other units, by number (int64): each of `count` is in it with probability `q`,
    independently. A batch may be empty; that is a step like any other.
    """
    for _ in range(steps):
        yield torch.from_numpy(np.flatnonzero(source.bernoulli(count, q)))


def shuffled_batches(count: int, batch_size: int, steps: int, source: GaussianSource) -> Iterator[torch.Tensor]:
    """`steps` batches of row indices (int64) by going through shuffled epochs; the last of an epoch may be smaller.

    For training without privacy only: the accountant knows nothing of shuffling.
    """
    taken = 0
    while taken < steps:
        order = torch.from_numpy(source.permutation(count))
        for batch in torch.split(order, batch_size)[: steps - taken]:
            yield batch
            taken += 1


class _Sums:
    """Memory for the sums of a step, float64, and for what the parameters get of it: a block each if all parameters
    have one dtype and device, else one a parameter; and views of them by parameter."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        groups = [parameters] if len({(p.dtype, p.device) for p in parameters}) == 1 else [[p] for p in parameters]
        self._blocks: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.exact: list[torch.Tensor] = []
        self._rounded: list[torch.Tensor] = []
        for group in groups:
            sizes, first = [parameter.numel() for parameter in group], group[0]
            exact = torch.zeros(sum(sizes), dtype=torch.float64, device=first.device)
            rounded = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
            self._blocks.append((exact, rounded))
            for block, views in ((exact, self.exact), (rounded, self._rounded)):
                parts = torch.split(block, sizes)
                views += [part.view(parameter.shape) for part, parameter in zip(parts, group, strict=True)]

        self._spare = torch.empty(0, dtype=torch.float64)
        self._apart: dict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}

    @property
    def takes_products(self) -> bool:
        """Whether `noised` can be given sums as their factors."""
        return len(self._blocks) == 1 and self._blocks[0][0].device.type == "cpu"

    def clear(self) -> None:
        """Set the sums to zero."""
        for exact, _ in self._blocks:
            exact.zero_()

    def noised(self, source: GaussianSource, std: float, products: Products) -> list[torch.Tensor]:
        """The sums, which get noise, rounded to the parameters' dtypes; those in `products` as these give them."""
        for place, (left, right) in products.items():
            self._multiply(self._rounded[place], left, right, source, std)
        for block in self._beside(tuple(products)) if products else self._blocks:
            # By parts, which are still in the cache when they are rounded.
            for exact, rounded in zip(*(torch.split(values, CHUNK) for values in block), strict=True):
                rounded.copy_(source.perturb_(exact, std))
        return self._rounded

    def _multiply(
        self, rounded: torch.Tensor, left: torch.Tensor, right: torch.Tensor, source: GaussianSource, std: float
    ) -> None:
        """`rounded` (out, in) <- the product (out, in) with noise, some rows at a time, which stay in the cache."""
        width = right.shape[1]
        rows = max(1, CHUNK // width)
        if self._spare.numel() < rows * width:
            self._spare = torch.empty(rows * width, dtype=torch.float64)
        for part, into in zip(torch.split(left, rows), torch.split(rounded, rows), strict=True):
            exact = self._spare[: into.numel()].view(into.shape)
            into.copy_(source.perturb_(torch.mm(part, right, out=exact), std))

    def _beside(self, places: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The parts of the one block that belong to no parameter of `places`."""
        if places not in self._apart:
            ((exact, rounded),) = self._blocks
            found, start, end = [], 0, 0
            for place, sums in enumerate(self.exact):
                if place in places:
                    found.append(slice(start, end))
                    start = end + sums.numel()
                end += sums.numel()
            found.append(slice(start, end))
            self._apart[places] = [(exact[part], rounded[part]) for part in found if part.stop > part.start]
        return self._apart[places]


@contextmanager
def _threads_for(size: int) -> Iterator[int]:
    """Of how many rows chunks of at most `size` are to be a multiple. One thread where those are too many.

    Several threads share the rows of a product out, and each goes another way with few of them: measured with 2 to 8
    threads, with less than 4 rows for each.
    """
    threads = torch.get_num_threads()
    if threads == 1 or size >= 2 * COMPANY * threads:
        yield COMPANY if threads == 1 else 2 * COMPANY * threads
        return
    torch.set_num_threads(1)
    try:
        yield COMPANY
    finally:
        torch.set_num_threads(threads)


def _starts(units: torch.Tensor, count: int) -> Indices | None:
    """Where each unit's rows begin, and how many rows there are; None where each has one."""
    if units.shape != (count,) or units.is_floating_point():
        raise PrivacyError(f"{count} rows, and {tuple(units.shape)} {units.dtype} that say whose they are")
    starts = starts_of(units.cpu().numpy())
    return None if len(starts) == count + 1 else starts


def _whole_units(starts: Indices, start: int, size: int) -> int:
    """Where a chunk ends that begins with a unit at row `start` and has whole units of at most `size` rows together, or
    one unit that has more."""
    first = int(np.searchsorted(starts, start))
    last = int(np.searchsorted(starts, start + size, side="right")) - 1
    return int(starts[max(last, first + 1)])


def _segments(starts: Indices, start: int, end: int, padding: int, device: torch.device) -> Segments | None:
    """The units in the rows from `start` to `end`, padded; None where each has one row."""
    inside = starts[np.searchsorted(starts, start) : np.searchsorted(starts, end) + 1]
    return None if len(inside) == end - start + 1 else Segments(np.diff(inside), padding, device)


def _whole(size: int, company: int) -> int:
    """How many examples a chunk has, so that all chunks are filled up alike: a multiple of `company`, or one."""
    return max(size - size % company, company) if size > 1 else 1


def _in_company(
    inputs: torch.Tensor, targets: torch.Tensor, size: int, company: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A chunk of at most `size` examples, filled up with its last one, and how many of them are padding at its end.

    How many rows there are decides which way matrix products go, and each rounds otherwise. Were it another way only
    where an example was not sampled, that one would move the others' gradients; and with weights that leave little but
    rounding, turn them. Where chunks have one example each, all are alone.
    """
    padding = -inputs.shape[0] % company
    if padding == 0 or size == 1:
        return inputs, targets, 0
    return filled(inputs, padding), filled(targets, padding), padding
