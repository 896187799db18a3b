"""Local normalisation: for sites whose inputs are on different scales.

Li, Jiang, Zhang, Kamp, Dou 2021, "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization",
Algorithm 1 (https://arxiv.org/abs/2102.07623).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fedclaw.learning.strategy import Strategy

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fedclaw.protocol.terms import Terms


class FedBN(Strategy):
    """FedAvg in which the parameters of normalisation layers never leave the sites.

    For feature shift: the same labels seen through other scanners, kits or units. Each site is evaluated with its own
    scales and shifts; what the server keeps of them is what the run began with, so its model is of no use by itself.

    The paper's layers are batch normalisation, and keep each site's running statistics too. FedClaw's models hold no
    batch statistics (no example may change what another gives), so here it is the scale and shift of group, layer or
    instance normalisation that stay at the sites. Those see one example at a time: a shift that moves a whole example
    is normalised away at every site already, and what is left to the local parameters is less than in the paper.
    """

    name: ClassVar[str] = "fedbn"

    server_learning_rate: float = Field(default=1.0, gt=0)
    """Part of the mean delta that is taken, as in FedAvg."""

    def server_optimizer(self, parameters: "Sequence[torch.Tensor]") -> "torch.optim.Optimizer":
        """The same as FedAvg's."""
        import torch

        return torch.optim.SGD(parameters, lr=self.server_learning_rate)

    def personal(self, model: "nn.Module") -> frozenset[str]:
        """The scales and shifts of all normalisation layers."""
        from torch import nn

        # The first is the base of instance and batch normalisation.
        normalisations = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
        return frozenset(
            f"{place}.{name}" if place else name
            for place, module in model.named_modules()
            if isinstance(module, normalisations)
            for name, _ in module.named_parameters(recurse=False)
        )

    def refuse(self, terms: "Terms", model: "nn.Module") -> str | None:
        """A model that has nothing to keep at the sites, or nothing else."""
        kept = self.personal(model)
        if not kept:
            return f"keeps normalisation layers at the sites, and model {terms.model.name!r} has none with parameters"
        if len(kept) == len(dict(model.named_parameters())):
            return f"shares all but normalisation layers, and model {terms.model.name!r} has nothing else"
        return None
