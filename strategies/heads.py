"""What strategies share whose sites have one body together and a head each."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from fedclaw.learning.strategy import Strategy

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fedclaw.protocol.terms import Terms


class SharedBody(Strategy):
    """The head's parameters never leave the sites; the others are averaged."""

    server_learning_rate: float = Field(default=1.0, gt=0)
    """Part of the body's mean delta that is taken, as in FedAvg."""
    head: tuple[str, ...] = ()
    """Beginnings of the head's parameter names; none: the last module that has parameters."""

    def server_optimizer(self, parameters: "Sequence[torch.Tensor]") -> "torch.optim.Optimizer":
        """The same as FedAvg's."""
        import torch

        return torch.optim.SGD(parameters, lr=self.server_learning_rate)

    def personal(self, model: "nn.Module") -> frozenset[str]:
        """The head's parameters."""
        names = [name for name, _ in model.named_parameters()]
        if self.head:
            return frozenset(name for name in names if name.startswith(self.head))
        modules = [(place, module) for place, module in model.named_modules() if list(module.parameters(recurse=False))]
        if not modules:
            return frozenset()
        place, last = modules[-1]
        return frozenset(f"{place}.{name}" if place else name for name, _ in last.named_parameters(recurse=False))

    def refuse(self, terms: "Terms", model: "nn.Module") -> str | None:
        """A model that does not part into a body and a head."""
        names = [name for name, _ in model.named_parameters()]
        unknown = [start for start in self.head if not any(name.startswith(start) for name in names)]
        if unknown:
            return f"finds no parameter that begins with {', '.join(unknown)}; there are: {', '.join(names)}"
        if len(self.personal(model)) in (0, len(names)):
            return (
                f"shares a body and keeps a head at each site, and model {terms.model.name!r} does not part into both"
            )
        return None
