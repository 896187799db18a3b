"""A large weight that clients begin with together, and what plain steps have taken off it since, as factors.

A step of plain SGD takes outer products off a weight: with x the rows of inputs that a client has seen and g the
gradients of their outputs, W_t = W_0 - rate sum g x^T. A client of a cohort sees few rows in a round, so a product with
W_t costs less as one with W_0, which is one for all clients and stays in the cache, less one with the factors g and x:
no client's weight is ever read, written or even there. It is the same number but for rounding.

Legend: K clients, R rows that a client has seen, N rows of a step.
"""

from collections.abc import Sequence

import torch

from fedclaw.learning.stacked.layout import Packing, Segment


class FactoredWeight:
    """Weights W_k = start - changes_k^T inputs_k (out, in) of K clients: inputs (K, R, in), changes (K, R, out)."""

    def __init__(self, start: torch.Tensor, clients: int, rows: int) -> None:
        """All begin with `start` (out, in); none sees more than `rows` rows until it begins again."""
        self._inputs = start.new_empty(clients, rows, start.shape[1])
        self._changes = start.new_empty(clients, rows, start.shape[0])
        self.begin(start, clients)

    def takes(self, clients: int, rows: int) -> bool:
        """Whether it can begin again with so many."""
        return clients <= self._inputs.shape[0] and rows <= self._inputs.shape[1]

    def begin(self, start: torch.Tensor, clients: int) -> None:
        """Forget what was seen: fresh memory is slow, so it is kept."""
        self._start = start
        self._seen = 0
        self._seen_by = [0] * clients

    def forward(self, inputs: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        """x W_k^T (N, out) of inputs (N, in)."""
        return self._multiply(inputs, self._start.t(), segments, self._inputs, self._changes)

    def backward(self, gradient: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        """g W_k (N, in) of gradients (N, out)."""
        return self._multiply(gradient, self._start, segments, self._changes, self._inputs)

    def descend(self, inputs: torch.Tensor, changes: torch.Tensor, packing: Packing) -> None:
        """Take a step's changes^T inputs off the weights: (N, in), and (N, out) gradients times the rate."""
        seen, end = self._seen, self._seen + max(segment.size for segment in packing.segments)
        for kept, rows in ((self._inputs, inputs), (self._changes, changes)):
            if packing.even is None:
                kept[: packing.clients, seen:end] = 0.0
            for segment in packing.segments:
                kept[segment.own, seen : seen + segment.size] = segment.of(rows)
        self._seen = end
        self._seen_by[: packing.clients] = [end] * packing.clients

    def change(self, weights: torch.Tensor) -> torch.Tensor:
        """The sum over the clients of weights (K,) times W_k - start: (out, in)."""
        kept = list(zip(self._changes, self._inputs, self._seen_by, weights, strict=False))
        changes = torch.cat([own[:seen] * -weight for own, _, seen, weight in kept])
        return changes.t() @ torch.cat([own[:seen] for _, own, seen, _ in kept])

    def write(self, weights: torch.Tensor) -> None:
        """W_k to weights (K, out, in)."""
        for weight, own, inputs, seen in zip(weights, self._changes, self._inputs, self._seen_by, strict=False):
            torch.addmm(self._start, own[:seen].t(), inputs[:seen], alpha=-1.0, out=weight)

    def _multiply(
        self,
        rows: torch.Tensor,
        start: torch.Tensor,
        segments: Sequence[Segment],
        left: torch.Tensor,
        right: torch.Tensor,
    ) -> torch.Tensor:
        """rows start - (rows left_k^T) right_k, for each row by its client: (N, n), (n, m), (K, R, n), (K, R, m)."""
        found = torch.mm(rows, start)
        if self._seen:
            for segment in segments:
                shares = torch.bmm(segment.of(rows), left[segment.own, : self._seen].transpose(1, 2))
                segment.of(found).baddbmm_(shares, right[segment.own, : self._seen], alpha=-1.0)
        return found
