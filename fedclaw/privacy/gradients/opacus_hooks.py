"""Per-example gradients by Opacus' hooks: takes the most models, and is what the other engines are tested against."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from opacus.grad_sample import GradSampleModule

from fedclaw.privacy.gradients.interface import Clip, ClippedSums, Loss, Products, add_clipped
from fedclaw.privacy.gradients.segments import Segments

# Opacus' hooks sit on the first layer too, whose inputs need no gradient; that is meant.
warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients are computed")

_LEFT_BEHIND = ("activations", "max_batch_len")
# What Opacus leaves on modules when a backward pass was broken off.


class OpacusHooks(ClippedSums):
    """See ClippedSums."""

    name = "opacus"

    def __init__(self, model: torch.nn.Module, loss: Loss, clip: Clip) -> None:
        super().__init__(model, loss, clip)
        self._hooked: GradSampleModule | None = GradSampleModule(model, batch_first=True, loss_reduction="sum")

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
        assert self._hooked is not None
        try:
            loss = self._loss(inputs, self._hooked(inputs), targets)
            # Times the number of examples, the gradient of the mean is that of the examples' own losses: not a share of
            # it by their number, which would round otherwise with each more.
            loss.backward(loss.new_full((), len(inputs)))  # type: ignore[no-untyped-call]
            used, samples = [], []
            for total, parameter in zip(totals, self._parameters, strict=True):
                sample: torch.Tensor | None = getattr(parameter, "grad_sample", None)
                # A parameter that the model did not use has none: its sum stays as it is, and gets its noise.
                if sample is not None:
                    used.append(total)
                    samples.append(sample.to(parameter.dtype))
                elif fresh:
                    total.zero_()
            add_clipped(used, samples, self._clip, fresh=fresh, padding=padding, units=units)
        finally:
            self._hooked.set_grad_sample_to_none()
            for parameter in self._parameters:
                parameter.grad = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """See ClippedSums."""
        assert self._hooked is not None
        self._hooked.disable_hooks()
        try:
            yield
        finally:
            self._hooked.enable_hooks()

    def close(self) -> None:
        """See ClippedSums."""
        if self._hooked is not None:
            for module in self._hooked.to_standard_module().modules():
                for name in _LEFT_BEHIND:
                    module.__dict__.pop(name, None)
            self._hooked = None
