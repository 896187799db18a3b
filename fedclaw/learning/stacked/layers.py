"""The stacked form of a layer."""

from torch import nn

from fedclaw.learning.stacked.convolution import StackedConvolution
from fedclaw.learning.stacked.normalisation import StackedNormalisation
from fedclaw.learning.stacked.product import StackedLinear
from fedclaw.learning.stacked.stack import Stack, StackedLayer


def stacked(module: nn.Module, places: tuple[int, ...], stack: Stack) -> StackedLayer | None:
    """That of a layer whose parameters stand at `places`; None if there is none."""
    # The very classes: a subclass may do something else.
    if type(module) is nn.Linear:
        return StackedLinear(module, places, stack)
    if type(module) is nn.Conv2d:
        plain = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return StackedConvolution(module, places, stack) if plain else None
    if type(module) is nn.GroupNorm or type(module) is nn.LayerNorm:
        return StackedNormalisation(module, places, stack)
    return None
