"""How a cut is spread over the groups of a model: a path of widths from all channels to the fewest.

Along it, group g of C_g channels keeps min(C_g, t * weight_g) of them as t falls. The weights are:

- `uniform`: C_g, so that every group keeps the same share.
- `balanced`: sqrt(C_g), so that wide groups lose more of their channels than narrow ones. A channel costs as many
  numbers as its neighbours are wide. A network narrows towards its inputs, so its narrow groups hold few parameters,
  and at the same share become the bottleneck that all else goes through.
- `sensitivity`: sqrt(C_g) * s_g, with s_g above 1 where narrowing the group alone hurt more than narrowing others did.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from fedclaw.compress.channel_groups import ChannelGroup, Widths
from fedclaw.compress.pruning_record import Narrowed, Spread

FLATTENED = 0.5
"""Exponent of a group's channels in its weight; 1 is `uniform`, 0 leaves all groups equally wide."""
STRENGTH = 0.25
"""Exponent of what narrowing the group alone cost; 0 is `balanced`."""
FURTHEST = 2.0
"""What was measured weighs a group at most by this factor, up or down: what a group alone loses says little of what is
left once all are narrow and trained again."""

Fits = Callable[[dict[str, int]], bool]
"""Whether a model of these widths is small enough."""


@dataclass(frozen=True)
class Path:
    """Widths from all channels to the fewest, a channel a part less at a time."""

    full: Widths
    removals: tuple[str, ...]
    """The groups that lose a channel a part, in this order."""

    def at(self, removed: int) -> dict[str, int]:
        """The widths after so many removals."""
        widths = dict(self.full)
        for name in self.removals[:removed]:
            widths[name] -= 1
        return widths

    def first(self, fits: Fits, stride: int = 1) -> int:
        """The fewest removals, a multiple of `stride` or all, after which it fits; bisection.

        After all of them it must fit, and what fits must go on fitting with fewer channels.
        """
        low, high = -1, -(-len(self.removals) // stride)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(self.at(middle * stride)) else (middle, high)
        return min(high * stride, len(self.removals))

    def filled(self, removed: int, fits: Fits) -> dict[str, int]:
        """The widths after so many removals, with channels given back while they fit: the last one removed first."""
        widths, closed = self.at(removed), set[str]()
        for name in reversed(self.removals[:removed]):
            wider = {**widths, name: widths[name] + 1}
            if name not in closed and fits(wider):
                widths = wider
            else:
                closed.add(name)
        return widths


def make_path(
    groups: Mapping[str, ChannelGroup], spread: Spread, sensitivity: Mapping[str, Sequence[Narrowed]]
) -> Path:
    """The path for a spread; `sensitivity` has each group's measured curve where the spread asks for it."""
    weights = _weights(groups, spread, sensitivity)
    removals = [
        (group.parts * (kept + 1) / weights[name], name)  # t at which the group goes from kept + 1 to kept
        for name, group in groups.items()
        for kept in range(group.least, group.width)
    ]
    removals.sort(key=lambda removal: removal[0], reverse=True)
    return Path({name: group.width for name, group in groups.items()}, tuple(name for _, name in removals))


def _weights(
    groups: Mapping[str, ChannelGroup], spread: Spread, sensitivity: Mapping[str, Sequence[Narrowed]]
) -> dict[str, float]:
    channels = {name: group.parts * group.width for name, group in groups.items()}
    if spread == "uniform":
        return {name: float(count) for name, count in channels.items()}
    factors = _factors(sensitivity) if spread == "sensitivity" else {}
    return {name: count**FLATTENED * factors.get(name, 1.0) for name, count in channels.items()}


def _factors(sensitivity: Mapping[str, Sequence[Narrowed]]) -> dict[str, float]:
    """From the mean divergence of each group's curve, relative to the geometric mean of all groups."""
    hurt = {name: fmean(point.divergence for point in curve) for name, curve in sensitivity.items() if curve}
    known = [math.log(value) for value in hurt.values() if value > 0]
    middle = fmean(known) if known else 0.0
    return {name: _factor(value, middle) for name, value in hurt.items()}


def _factor(hurt: float, middle: float) -> float:
    if hurt <= 0:
        return 1 / FURTHEST
    return min(FURTHEST, max(1 / FURTHEST, math.exp(STRENGTH * (math.log(hurt) - middle))))
