"""Is what a guarantee presumes true of this model and this loss? Found out from their structure and a few examples."""

import math

import torch
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator

from fedclaw.errors import PrivacyError
from fedclaw.privacy.gradients.interface import Loss

PROBE = 4
"""Examples that `check_separate` looks at."""
_SAME_LOSS = 1e-3
_SMALLEST, _LARGEST = 1e-30, 1e30
# Bounds far enough from where float32's ordinary numbers end.


def check_settings(clip: float, noise: float, expected: float) -> None:
    """Raise PrivacyError for a clipping bound, noise multiplier or expected batch size outside its range."""
    if not 0 < clip < math.inf:
        raise PrivacyError(f"max_grad_norm is a number above 0, not {clip}")
    if not 0 <= noise < math.inf:
        raise PrivacyError(f"a noise multiplier is a number of at least 0, not {noise}")
    if not 0 < expected < math.inf:
        raise PrivacyError(f"the expected batch size is a number above 0, not {expected}")
    if not _SMALLEST <= min(clip, clip / expected) <= max(clip, clip / expected) <= _LARGEST:
        raise PrivacyError(
            f"max_grad_norm {clip:g} with an expected batch of {expected:g} leaves gradients for which float32 has no "
            "numbers that are fine enough"
        )


def check_model(model: torch.nn.Module) -> None:
    """Raise PrivacyError for a model with layers that mix examples or keep statistics (batch normalisation)."""
    errors = [*ModuleValidator.validate(model, strict=False), *GradSampleModule.validate(module=model, strict=False)]
    if errors:
        first = " ".join(str(errors[0]).split())
        raise PrivacyError(
            f"the model cannot be trained with per-example privacy: {first:.300}; use layers that treat examples "
            "separately and keep no statistics, such as GroupNorm instead of BatchNorm"
        )


def check_separate(model: torch.nn.Module, loss: Loss, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    """Raise PrivacyError if two or more examples (B, *D), targets (B, ...) can be seen to influence one another."""
    if inputs.is_floating_point():
        _check_rows(model, inputs)
    with torch.no_grad():
        _check_mean(loss, inputs, model(inputs), targets)


def _check_rows(model: torch.nn.Module, inputs: torch.Tensor) -> None:
    probe = inputs.detach().clone().requires_grad_()
    with torch.enable_grad():
        first = model(probe)[0]
    if not first.requires_grad:
        return
    (influence,) = torch.autograd.grad(first.sum(), probe, allow_unused=True)
    # Where a weight is infinite, nothing times it is NaN; that is no influence.
    if influence is not None and bool(influence[1:].nan_to_num(0.0).count_nonzero()):
        raise PrivacyError(
            "the model's output for one example depends on other examples of the batch; such a model cannot be "
            "trained with per-example privacy"
        )


def _check_mean(loss: Loss, inputs: torch.Tensor, outputs: torch.Tensor, targets: torch.Tensor) -> None:
    count, head = len(inputs), len(inputs) // 3 or 1
    whole = float(loss(inputs, outputs, targets))
    parts = head * float(loss(inputs[:head], outputs[:head], targets[:head]))
    parts += (count - head) * float(loss(inputs[head:], outputs[head:], targets[head:]))
    if not (math.isfinite(whole) and math.isfinite(parts)):
        return
    if abs(whole * count - parts) > _SAME_LOSS * max(count, abs(parts)):
        raise PrivacyError(
            "the loss of a batch is not the mean of its examples' losses (weighted by class or summed, perhaps); "
            "clipping would not bound what one example can do"
        )
