"""A federated algorithm: the server's step and the client's correction, in one class.

The server half is a torch optimiser on the pseudo-gradient (Reddi et al. 2021, "Adaptive Federated Optimization",
section 3): the weighted mean of the sites' parameter deltas, with its sign turned. The client half corrects
the gradient of a local step; it sees parameters only, never data, so that it is post-processing under
differential privacy.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from fedclaw.frozen import Frozen

if TYPE_CHECKING:
    import torch


class Strategy(Frozen, ABC):
    """Settings and both halves of one federated algorithm; the settings are the class's fields."""

    name: ClassVar[str]
    needs_single_updates: ClassVar[bool] = False
    """True if the server half must see every update by itself (Krum, median): excludes secure aggregation."""

    @abstractmethod
    def server_optimizer(self, parameters: "Sequence[torch.Tensor]") -> "torch.optim.Optimizer":
        """The optimiser that moves the global parameters along the pseudo-gradient in their `.grad`."""

    def client_fields(self) -> Mapping[str, float]:
        """What travels to the sites in the plan."""
        return {}

    @classmethod
    def correct(
        cls,
        fields: Mapping[str, float],
        parameters: "Sequence[torch.Tensor]",
        start: "Sequence[torch.Tensor]",
    ) -> None:
        """Change the parameters' `.grad` in place, after clipping and noise and before the local step.

        `start` holds the global parameters that the round began with, in the same order. Raises KeyError if
        `fields` lacks what `client_fields` promises and ValueError if a value is impossible. A site calls it with no
        parameters first, so that it can refuse before it pays.
        """
