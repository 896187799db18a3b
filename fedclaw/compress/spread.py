"""How a cut is spread over the groups of a model: a path of widths from all channels to one in each part.

At common share t in (0, 1] group g keeps t^a_g of its width. `uniform` has a_g = 1: every group the same share (Liu et
al. 2019, "Rethinking the Value of Network Pruning", section 4.1, finds predefined widths no worse than found ones).
`sensitivity` has a_g below 1 where narrowing the group alone hurt more than narrowing others did, and above 1 where it
hurt less.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from fedclaw.compress.channel_groups import ChannelGroup, Widths
from fedclaw.compress.pruning_record import Narrowed

STRENGTH = 0.25
"""How much the measured sensitivity moves the shares; 0 is uniform."""
FURTHEST = 2.0
"""No group's exponent is further from 1 than by this factor: what a group alone loses says little of what is left once
all are narrow and trained again."""

Fits = Callable[[dict[str, int]], bool]
"""Whether a model of these widths is small enough."""


@dataclass(frozen=True)
class Path:
    """Widths from all to one channel in each part, a channel less at a time."""

    full: Widths
    removals: tuple[str, ...]
    """The groups that lose a channel a part, in this order."""

    def at(self, removed: int) -> dict[str, int]:
        """The widths after so many removals."""
        widths = dict(self.full)
        for name in self.removals[:removed]:
            widths[name] -= 1
        return widths

    def first(self, fits: Fits) -> int:
        """The fewest removals after which it fits; bisection.

        After all of them it must fit, and what fits must go on fitting with fewer channels.
        """
        low, high = -1, len(self.removals)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(self.at(middle)) else (middle, high)
        return high

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


def make_path(groups: Mapping[str, ChannelGroup], exponents: Mapping[str, float]) -> Path:
    """The path along which group g keeps t^exponents[g] of its width as t falls from 1."""
    events = [
        ((kept + 1) / group.width) ** (1 / exponents[name])
        for name, group in groups.items()
        for kept in range(group.width - 1, 0, -1)
    ]
    names = [name for name, group in groups.items() for _ in range(group.width - 1)]
    order = sorted(range(len(events)), key=lambda place: -events[place])
    return Path({name: group.width for name, group in groups.items()}, tuple(names[place] for place in order))


def uniform(groups: Mapping[str, ChannelGroup]) -> dict[str, float]:
    """Every group keeps the same share."""
    return dict.fromkeys(groups, 1.0)


def by_sensitivity(curves: Mapping[str, Sequence[Narrowed]]) -> dict[str, float]:
    """Exponents from the groups' mean divergence, relative to the geometric mean of all."""
    hurt = {name: fmean(point.divergence for point in points) if points else 0.0 for name, points in curves.items()}
    known = [math.log(value) for value in hurt.values() if value > 0]
    if not known:
        return dict.fromkeys(curves, 1.0)
    middle = fmean(known)
    return {name: _exponent(value, middle) for name, value in hurt.items()}


def _exponent(hurt: float, middle: float) -> float:
    if hurt <= 0:
        return FURTHEST
    return min(FURTHEST, max(1 / FURTHEST, math.exp(-STRENGTH * (math.log(hurt) - middle))))
