"""Figures that are means over examples, as a server adds them up, and what the sites' own figures spread by."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fedclaw.errors import UpdateError

MOST_LOSS = 1e6
"""Mean loss of an example: a model that is worse is none, and such a figure would be the whole mean."""
ROUNDED = 1 + 1e-6
"""What rounding may add to a sum, relative."""


def check_mean(name: str, total: float, examples: int, most: float | None) -> None:
    """Raise UpdateError unless a figure of at least 0, and at most `most` (None: MOST_LOSS), adds up to `total`."""
    most = MOST_LOSS if most is None else most
    if not 0 <= total <= most * examples * ROUNDED:
        raise UpdateError(f"the answer's {name} of {total / examples:.4g} is not within 0 and {most:g}")


@dataclass
class Means:
    """By metric, the sum of figure x examples over the sites that sent it, and each site's own figure."""

    sums: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    values: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    """Each site's own figure and its examples, where it has cases for it."""

    def add(self, name: str, total: float, examples: int, listed: bool = True) -> None:
        """One site's figure x examples; it stands among the sites' own if `listed`."""
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.weights[name] = self.weights.get(name, 0.0) + examples
        if listed:
            self.note(name, total / examples, examples)

    def note(self, name: str, value: float, examples: int) -> None:
        """One site's own figure."""
        self.values.setdefault(name, []).append((value, examples))

    def mean(self, name: str) -> float | None:
        """The example-weighted mean; None if no site sent the figure."""
        return self.sums[name] / self.weights[name] if name in self.sums else None

    def weight(self, name: str) -> float:
        """Examples of the sites that sent the figure."""
        return self.weights.get(name, 0.0)

    def over_sites(self, without: Sequence[str]) -> dict[str, dict[str, float]]:
        """Mean, spread and number of the sites' own figures, by metric."""
        found = {}
        for name, own in self.values.items():
            if name in without:
                continue
            values, examples = np.array([value for value, _ in own]), np.array([count for _, count in own], float)
            mean = float(np.average(values, weights=examples))
            spread = float(np.sqrt(np.average(np.square(values - mean), weights=examples)))
            found[name] = {"mean": mean, "spread": spread, "sites": len(own)}
        return found
