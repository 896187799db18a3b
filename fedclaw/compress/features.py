"""Imitating what a teacher sees, not only what it says: the loss on hidden features.

The student's features before the output layer go through a linear projection, which is trained beside the student, and
are compared with the teacher's (Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", section 2.2, equation 3). The
squared difference is divided by the variance of the teacher's features, so that one weight fits every model.

Legend: N inputs, K outputs, S and T features of student and teacher, D input shape without the batch.
"""

import torch
from torch import nn

from fedclaw.compress.channel_groups import output_layer

SMALLEST_VARIANCE = 1e-8


class FeatureLoss:
    """Compares a student's features with a teacher's; `projection` is to be trained with the student."""

    def __init__(self, teacher: nn.Module, student: nn.Module, inputs: torch.Tensor, seed: int) -> None:
        """`inputs` (N, *D) show which layer is the last one, and how many features come before it."""
        self._teacher = teacher
        self._layers = {model: _name_of(model, output_layer(model, inputs[:1])) for model in (teacher, student)}
        self._of_student = self._layers[student]
        with torch.no_grad():
            wide, narrow = (_seen(model, self._layers[model], inputs[:1])[1] for model in (teacher, student))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.projection = nn.Linear(narrow.shape[1], wide.shape[1]).to(inputs.device)

    def __call__(self, student: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs (N, K) of a student of the same layers, and the loss on its features."""
        with torch.no_grad():
            _, wanted = _seen(self._teacher, self._layers[self._teacher], inputs)
        outputs, features = _seen(student, self._of_student, inputs)
        spread = wanted.var(dim=0, unbiased=False).mean().clamp(min=SMALLEST_VARIANCE)
        return outputs, (self.projection(features) - wanted).square().mean() / spread


def _name_of(model: nn.Module, layer: nn.Module) -> str:
    names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
    return names[id(layer)]


def _seen(model: nn.Module, layer: str, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs (N, K), and what the layer of that name got, flat: (N, features)."""
    found: list[torch.Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, given: found.append(given[0]))
    try:
        outputs: torch.Tensor = model(inputs)
    finally:
        hook.remove()
    return outputs, found[-1].flatten(1)
