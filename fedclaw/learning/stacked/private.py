"""DP-SGD steps (Abadi et al. 2016, algorithm 1) of simulated clients: the guarantee is that of `fedclaw.privacy.steps`.

One client at a time it is that very code. Many at once, one backward pass gives every layer's inputs and output
gradients for all clients' examples; each example's own gradient follows by the rules of `fedclaw.privacy.gradients`, is
clipped, summed by client, noised by the client's own deviation and divided by the client's expected batch. Of a person
with several examples it is the sum of their gradients that is clipped.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedclaw.errors import PrivacyError
from fedclaw.learning.stacked.engines import BatchedModel, NotStackable
from fedclaw.learning.stacked.layout import Packing, Rows
from fedclaw.learning.stacked.stack import StackedLayer, StackedLinear
from fedclaw.privacy.accounting import NoiseEvent
from fedclaw.privacy.gradients.interface import LARGEST_NORM, NORM_MARGIN, check_model, without_overflow
from fedclaw.privacy.gradients.layers import LayerRule, rule_for
from fedclaw.privacy.gradients.segments import Segments
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.noise import GaussianSource
from fedclaw.protocol.terms import Plan


@dataclass(frozen=True)
class ClientSampling:
    """How one client samples and noises: Poisson `rate`, noise multiplier, L2 `bound` of a unit's gradient."""

    rate: float
    noise: float
    bound: float
    examples: int
    """Of units."""
    source: GaussianSource

    @classmethod
    def of(cls, plan: Plan, mechanism: NoiseEvent | None, examples: int, source: GaussianSource) -> "ClientSampling":
        """What `plan` asks of a client with so many examples, which is charged `mechanism`. Raises PrivacyError."""
        steps = mechanism_of(plan).sampling(examples, mechanism)
        if steps is None:
            raise PrivacyError("steps without samples were asked for as private ones")
        return cls(steps.rate, steps.noise_multiplier, steps.clip, examples, source)

    @property
    def expected(self) -> float:
        """Expected batch size."""
        return self.rate * self.examples

    def batches(self, units: Rows, steps: int) -> list[Rows]:
        """Poisson samples of `units`."""
        return [units[self.source.bernoulli(len(units), self.rate)] for _ in range(steps)]


class PrivateStep:
    """Noised gradients of many clients at once."""

    def __init__(self, engine: BatchedModel) -> None:
        """Raises NotStackable for a layer without a rule, PrivacyError for a model that mixes examples."""
        check_model(engine.model)
        self._engine = engine
        self._rules: dict[int, LayerRule] = {}
        for layer in engine.layers:
            rule = rule_for(layer.module)
            if rule is None:
                raise NotStackable(f"a {type(layer.module).__name__} has no rule for the gradients of single examples")
            self._rules[id(layer)] = rule

    def gradients(
        self,
        packing: Packing,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        gradients: torch.Tensor,
        samplings: Sequence[ClientSampling],
        persons: torch.Tensor | None = None,
    ) -> None:
        """Write the first k clients' noised gradients to rows (k, D); inputs (N, *D), targets (N, ...).

        `persons` (N,): whose each row is, those of a client's person one after another; None: each is a unit.
        """
        count = packing.clients
        views = self._engine.layout.views(gradients[:count])
        if len(inputs):
            self._sum(packing, inputs, targets, views, samplings, _segments(packing, persons))
        else:
            gradients[:count].zero_()
        for row, sampling in zip(gradients[:count], samplings[:count], strict=True):
            if sampling.noise:
                sampling.source.perturb_(row, sampling.noise * sampling.bound / sampling.expected)

    def _sum(
        self,
        packing: Packing,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        views: Sequence[torch.Tensor],
        samplings: Sequence[ClientSampling],
        units: Segments | None,
    ) -> None:
        """Clipped gradients, summed by client and divided by the expected batch."""
        records = self._engine.recorded(packing, inputs, targets)
        with torch.no_grad():
            rows = [self._rows(layer, seen.detach(), back) for layer, seen, back in records]
            rows = [part.to(torch.float64) if units is None else units.sums(part) for part in rows]
            norms = torch.stack([torch.linalg.vector_norm(part, dim=1) for part in rows]).norm(2, dim=0)
            factors = self._factors(packing, norms, samplings, units)
            for (layer, _, _), part in zip(records, rows, strict=True):
                spread = torch.func.vmap(self._rules[id(layer)].spread)(factors @ without_overflow(part, norms))
                for place, values in zip(layer.places, spread, strict=True):
                    views[place].copy_(values.reshape(views[place].shape))

    def _rows(self, layer: StackedLayer, inputs: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """(N, numbers of the layer): each example's gradient."""
        if inputs.dim() == 2 and isinstance(layer, StackedLinear):
            inputs, gradient = inputs[:, None], gradient[:, None]
        return self._rules[id(layer)].rows(inputs, gradient)

    def _factors(
        self, packing: Packing, norms: torch.Tensor, samplings: Sequence[ClientSampling], units: Segments | None
    ) -> torch.Tensor:
        """(k, U), float64: what each unit's gradient counts by in each client's sum."""
        owner, counts = packing.client_of_row, packing.weights > 0
        if units is not None:
            owner, counts = owner[units.first_rows], counts[units.first_rows]
        bounds = norms.new_tensor([sampling.bound / NORM_MARGIN for sampling in samplings])[owner]
        scales = norms.new_tensor([1 / sampling.expected for sampling in samplings])[owner]
        own = torch.div(bounds, norms).clamp_(max=1.0).mul_(scales)
        own = torch.where((norms <= LARGEST_NORM) & counts, own, 0.0)
        factors = norms.new_zeros(packing.clients, len(norms))
        factors[owner, torch.arange(len(norms), device=norms.device)] = own
        return factors


def _segments(packing: Packing, persons: torch.Tensor | None) -> Segments | None:
    """Whose the rows of a step are; None: each is a unit. A row that only fills up, a copy of another, is nobody's."""
    if persons is None:
        return None
    clients, fills = packing.client_of_row.cpu().numpy(), packing.weights.cpu().numpy() == 0
    owners = persons.cpu().numpy()
    begins = fills.copy()
    begins[:1] = True
    begins[1:] |= (owners[1:] != owners[:-1]) | (clients[1:] != clients[:-1])
    return Segments(np.diff(np.append(np.flatnonzero(begins), len(begins))), device=packing.rows.device)
