"""Where a value of a site comes from, as a type: what was worked out from data says what may become of it.

    Released    a function of noised values alone: it leaves as it is, at any time, and so does all that is made of it
    Bounded     of the data, and one unit moves it by at most a known sensitivity: it leaves with noise made for that
    Raw         of the data: it is bounded and noised now, or refused
    Permitted   of the data, and leaves without noise by a named clause of the site's policy, which says so

A site wraps whatever it computes in one of them, and the last thing before a message is made of it (`leaving`) takes
`Released` and `Permitted` alone, the latter only where the policy has the clause. mypy holds the one, the other is
checked when it runs: no code between the data and the wire can forget which kind it holds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from fedclaw.errors import PrivacyError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
U = TypeVar("U")

Clause = Literal[
    "allow_training_without_privacy", "trust_server_noise", "metrics_without_noise", "allow_metrics_of_own_models"
]
"""Of a site's policy, under which something leaves without noise of the site's or all sites' own."""


@dataclass(frozen=True)
class Released(Generic[T_co]):
    """A function of noised values alone."""

    value: T_co

    def then(self, make: Callable[[T_co], U]) -> "Released[U]":
        """What `make`, which looks at nothing else of the data, makes of it: post-processing."""
        return Released(make(self.value))

    def scaled(self, factor: float, make: Callable[[T_co], U]) -> "Released[U]":
        """The same, for what brings two values at most `factor` times further apart."""
        return self.then(make)


@dataclass(frozen=True)
class Raw(Generic[T_co]):
    """Of the data, with no bound on what one unit does to it."""

    value: T_co

    def then(self, make: Callable[[T_co], U]) -> "Raw[U]":
        """What `make` makes of it."""
        return Raw(make(self.value))

    def scaled(self, factor: float, make: Callable[[T_co], U]) -> "Raw[U]":
        """The same, for what brings two values at most `factor` times further apart."""
        return self.then(make)


@dataclass(frozen=True)
class Bounded(Generic[T_co]):
    """Of the data; in L2 norm over all of its numbers, one unit moves it by at most `sensitivity`."""

    value: T_co
    sensitivity: float

    def then(self, make: Callable[[T_co], U]) -> Raw[U]:
        """What `make` makes of it; how far one unit moves that, nobody knows."""
        return Raw(make(self.value))

    def scaled(self, factor: float, make: Callable[[T_co], U]) -> "Bounded[U]":
        """What `make` makes of it, which brings two values at most `factor` times further apart."""
        return Bounded(make(self.value), self.sensitivity * factor)


@dataclass(frozen=True)
class Permitted(Generic[T_co]):
    """Of the data, and leaves without noise where the site's policy has `clause`."""

    value: T_co
    clause: Clause


Part = Released[T] | Bounded[T] | Raw[T]


def leaving(left: Released[T] | Permitted[T], policy: object) -> T:
    """What a message is made of. Raises PrivacyError for anything that the site's `policy` does not let leave."""
    if isinstance(left, Released):
        return left.value
    if isinstance(left, Permitted):
        if getattr(policy, left.clause, False):
            return left.value
        raise PrivacyError(f"what no noise covers was about to leave, and the policy has no {left.clause}")
    raise PrivacyError(f"what is {type(left).__name__.lower()} was about to leave: neither released nor permitted")
