"""A federated algorithm: the server's step and the client's correction, in one class.

The server half is a torch optimiser on the pseudo-gradient (Reddi et al. 2021, "Adaptive Federated Optimization",
section 3): the weighted mean of the sites' parameter deltas, with its sign turned. The client half corrects
the gradient of a local step and may add to what leaves; it sees parameters only, never data, so that it is
post-processing under differential privacy (`RoundContext.loss` is the exception, and says so).

What an algorithm remembers is explicit. The server's memory (`server_state`) is in the run's checkpoints, a site's
(`client_state`) in the site's own directory. A strategy's instances hold settings alone.
Both are grouped by kind: SCAFFOLD's server keeps the kind "control", and so does each of its sites.

Legend: n updates, d numbers in one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import PluginError, Reason, Setting
from fedclaw.privacy.provenance import Part, Raw
from fedclaw.protocol.arrays import Arrays, Shapes, shapes_of
from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.terms import LocalTraining

if TYPE_CHECKING:
    import torch

    from fedclaw.protocol.terms import RoundRules, Terms

PERSONAL = "personal"
"""The kind of a site's state that holds parameters which it uses in place of the ones that are sent."""


@dataclass(frozen=True)
class StepContext:
    """What a correction knows besides the parameters; tensors in the parameters' order, on their device.

    Where clients are trained many at a time, the parameters and `state` have one row a client, and `start` and
    `broadcast`, which all clients share, are broadcast over the rows.
    """

    fields: Mapping[str, float]
    """What `Strategy.client_fields` sent."""
    start: "Sequence[torch.Tensor]"
    """The global parameters that the round began with."""
    broadcast: "Mapping[str, Sequence[torch.Tensor]]" = field(default_factory=dict)
    """By kind, what the server broadcast of its state."""
    state: "Mapping[str, Sequence[torch.Tensor]]" = field(default_factory=dict)
    """By kind (`Strategy.client_state`), what this site has kept; zeros the first time."""
    step: int = 0
    steps: int = 1
    """This local step, from 0, and how many there are in the round."""
    learning_rate: float = 0.0
    """The local optimiser's."""
    personal: Sequence[bool] = ()
    """Whether each parameter is one that never leaves the site."""


@dataclass(frozen=True)
class RoundContext:
    """What the end of a round knows; arrays by parameter name."""

    fields: Mapping[str, float]
    training: LocalTraining
    steps: int
    """Local steps that were taken."""
    loss: Callable[[], float]
    """The mean loss of the round's global parameters over the site's training data, worked out when it is called.

    No noise covers it: a strategy that calls it says so (`Strategy.uses_training_loss`), and does not run with
    differential privacy. Raises PluginError for one that does not say so.
    """
    broadcast: Mapping[str, Arrays] = field(default_factory=dict)
    state: Mapping[str, Arrays] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientUpdate:
    """What a site's round comes to, by the strategy: what is summed, and what stays."""

    delta: Arrays
    """By parameter name; takes the place of parameters - start."""
    extras: Arrays = field(default_factory=dict)
    """Further arrays that are weighted and summed as the delta is, by the names that `Strategy.extras` gives."""
    state: Mapping[str, Arrays] = field(default_factory=dict)
    """By kind (`Strategy.client_state`), what the site keeps from now on; a kind that is left out stays as it was."""


@dataclass(frozen=True)
class Participation:
    """How much of the federation the mean of a round stands for."""

    weight: float
    """Of the sites in the mean, together."""
    total_weight: float
    """Of all the sites there are; those that have never answered are taken to be as heavy as the others are on average.
    Exact as soon as every site has answered once."""

    @classmethod
    def of(cls, weight: float, answered: int, connected: int, known: Collection[float]) -> "Participation":
        """Of a mean of `answered` sites, when `connected` are there and those of the weights `known` ever answered."""
        heard, number = (sum(known), len(known)) if len(known) >= answered else (weight, answered)
        return cls(weight, heard * max(1.0, connected / number) if number else weight)

    @property
    def share(self) -> float:
        """Of the whole federation's weight; with equal weights the paper's |S| / N."""
        return self.weight / self.total_weight if self.total_weight else 0.0


class Strategy(Frozen, ABC):
    """Settings and both halves of one federated algorithm; the settings are the class's fields.

    What it uses of the data beyond clipped and noised gradients it declares: `uses_training_loss`, `personal_model`,
    `client_state`, `extras`, `personal`. By that, server and site decide whether it may run under the noise that is
    asked for (`fedclaw.learning.compatibility`), and a site holds it to that (`checked_client_update`).
    """

    name: ClassVar[str]
    needs_single_updates: ClassVar[bool] = False
    """True if the server half must see every update by itself (Krum, median): excludes secure aggregation."""
    client_state: ClassVar[tuple[str, ...]] = ()
    """Kinds of state that a site keeps, each with the parameters' names and shapes; not `PERSONAL`."""
    broadcast_kinds: ClassVar[tuple[str, ...]] = ()
    """Kinds of the server's state that `broadcast` sends to the sites, whose half cannot do without them; each with the
    parameters' names and shapes."""
    elementwise: ClassVar[bool] = True
    """True if `correct_gradients` treats each number by itself, so it can take many clients' parameters at once."""
    personal_model: ClassVar[bool] = False
    """True if each site also trains a whole model of its own (Ditto), which it is then evaluated with.

    It is trained without noise whatever privacy the run has: it never leaves."""
    uses_training_loss: ClassVar[bool] = False
    """True if what `client_update` returns depends on `RoundContext.loss` (q-FedAvg): excludes differential privacy."""

    # The server's half

    @abstractmethod
    def server_optimizer(self, parameters: "Sequence[torch.Tensor]") -> "torch.optim.Optimizer":
        """The optimiser that moves the global parameters along the pseudo-gradient in their `.grad`."""

    def client_fields(self) -> Mapping[str, float]:
        """What travels to the sites in the plan."""
        return {}

    def byzantine_tolerance(self, sites: int) -> int:
        """Hostile sites among `sites` that answer whose result stays within what the honest ones allow; 0: no promise.

        Within: finite, and no longer than a constant, which depends on `sites` alone, times the longest honest update
        (or, where a bound or a centre is set, times that). A test holds every strategy that is installed to it.
        """
        return 0

    def server_state(self, parameters: Mapping[str, NDArray[np.float32]]) -> dict[str, Arrays]:
        """By kind, what the server remembers when a run begins with `parameters`; arrays by parameter name."""
        return {}

    def broadcast(self, state: Mapping[str, Arrays]) -> Mapping[str, Arrays]:
        """What of the server's state goes to the sites with a question to train, by kind."""
        return {}

    def aggregate(self, mean: Arrays, state: dict[str, Arrays], participation: Participation) -> Arrays:
        """The delta (by parameter name) that the optimiser steps along, from the weighted mean of what the sites sent.

        `mean` holds their deltas and extras. May change `mean` and `state` in place.
        """
        return mean

    def robust_aggregate(
        self, updates: NDArray[np.float32], weights: NDArray[np.float64], state: Mapping[str, Arrays]
    ) -> NDArray[np.float32]:
        """The update (d,) that stands for all `updates` (n, d), whose weights (n,) are positive.

        Called in place of the weighted mean if `needs_single_updates`. The arrays of the server's `state`,
        one after the other, are in the order of the d numbers; only `aggregate` changes them.
        Raises UpdateError when n is too small.
        """
        raise PluginError(f"strategy {self.name!r} needs single updates and does not say what it does with them")

    def select_clients(self, number: int, connected: Sequence[int], seed: int) -> Sequence[int] | None:
        """The nodes that round `number` asks, of those `connected` (sorted); None: as the run's rules sample them."""
        return None

    def refuse(self, terms: "Terms", model: "torch.nn.Module") -> str | None:
        """Why a run under `terms` with `model` cannot be right, as a sentence's end; None: it can.

        Asked by the server at the run's start, and by each site of every question to train before it pays. Of `model`
        names and shapes count: at a site it may hold no numbers.
        """
        return None

    def refuse_rules(self, rules: "RoundRules") -> str | None:
        """Why the strategy cannot do with rounds that count by `rules`, as a sentence's end; None: it can.

        Asked by the server alone: a site is not told the rules, and they touch nothing at it.
        """
        return None

    def personal(self, model: "torch.nn.Module") -> frozenset[str]:
        """Names of the parameters of `model` that never leave the sites."""
        return frozenset()

    # Both

    @classmethod
    def extras(cls, parameters: Mapping[str, NDArray[np.float32]]) -> Arrays:
        """Zeros of the names and shapes that `client_update` adds to an update of `parameters`.

        Each name begins with "~".
        """
        return {}

    # The site's half

    @classmethod
    def check_fields(cls, fields: Mapping[str, float]) -> None:
        """Look at what `client_fields` sent, before a site pays for anything.

        Raises KeyError if `fields` lacks something and ValueError if a value is impossible.
        """

    @classmethod
    def correct_gradients(cls, parameters: "Sequence[torch.Tensor]", context: StepContext) -> None:
        """Change the parameters' `.grad` in place, after clipping and noise and before the local step."""

    @classmethod
    def correct_personal_gradients(cls, parameters: "Sequence[torch.Tensor]", context: StepContext) -> None:
        """The same for a step of the site's own model, where there is one (`personal_model`); `start` is the global."""

    @classmethod
    def client_update(cls, delta: Arrays, context: RoundContext) -> ClientUpdate:
        """What leaves of `delta` (parameters - start, by name, may be changed in place), and what the site keeps.

        Called by `checked_client_update` alone. Not called with noise on the sum for the unit example, which covers the
        step as it is.
        """
        return ClientUpdate(delta)


class Buffered(Strategy, ABC):
    """A strategy that steps as soon as some of the sites have answered (`fedclaw.server.round_training`)."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Answers that make a step."""

    @property
    @abstractmethod
    def oldest(self) -> int:
        """Steps by which an answer may be late and still count."""

    @abstractmethod
    def discount(self, staleness: int) -> float:
        """What an answer counts by, beside its weight, that is `staleness` steps late: positive, 1 for none."""

    def select_clients(self, number: int, connected: Sequence[int], seed: int) -> Sequence[int] | None:
        """Everybody: who is at work already is not asked again."""
        return connected

    def refuse_rules(self, rules: "RoundRules") -> str | None:
        """Fewer sites than make a step."""
        if rules.minimum >= self.size:
            return None
        return Reason(
            f"steps on {self.size} answers, so a run needs as many sites: ", Setting("sites.minimum", self.size)
        )


def client_update_of(
    strategy: "type[Strategy]", delta: Part[Arrays], context: RoundContext, *, released: bool
) -> "Part[ClientUpdate]":
    """`strategy.client_update` of the round's `delta`, as `checked_client_update` holds it, and where that comes from.

    `released`: whether the state in `context` is a function of noised values alone. What is made of one clipped step,
    or of the training loss, has no bound.
    """
    if not is_overridden(strategy, "client_update"):
        return delta.scaled(1.0, ClientUpdate)
    looked: list[float] = []

    def loss() -> float:
        looked.append(context.loss())
        return looked[-1]

    made = delta.then(lambda arrays: checked_client_update(strategy, arrays, replace(context, loss=loss)))
    return Raw(made.value) if looked or not released else made


def checked_client_update(strategy: type[Strategy], delta: Arrays, context: RoundContext) -> ClientUpdate:
    """`strategy.client_update`, held to what its class declares. Raises PluginError before anything leaves or is kept.

    Nothing else that a strategy could return has been looked at: not by what bounds it, nor by what adds it up.
    """
    shapes = shapes_of(delta)
    extras = shapes_of(strategy.extras({name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}))
    if not strategy.uses_training_loss:
        context = replace(context, loss=lambda: _undeclared_loss(strategy))
    finished = strategy.client_update(delta, context)
    _require(strategy, "delta", finished.delta, shapes)
    _require(strategy, "extras", finished.extras, extras)
    for kind, arrays in finished.state.items():
        if kind not in strategy.client_state:
            raise PluginError(f"strategy {strategy.name!r} keeps {kind!r}, which it does not declare (client_state)")
        _require(strategy, f"state {kind!r}", arrays, shapes)
    return finished


def _undeclared_loss(strategy: type[Strategy]) -> NoReturn:
    raise PluginError(f"strategy {strategy.name!r} asks for the training loss and does not declare uses_training_loss")


def _require(strategy: type[Strategy], what: str, arrays: Arrays, expected: Shapes) -> None:
    found = shapes_of(arrays)
    if found != expected or any(array.dtype != np.float32 for array in arrays.values()):
        odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise PluginError(
            f"strategy {strategy.name!r}: the {what} that client_update returned is not float32 of the names and "
            f"shapes that it declares{': ' + ', '.join(odd[:5]) if odd else ''}"
        )


def is_overridden(strategy: type[Strategy], method: str) -> bool:
    """Whether the strategy does more in `method` than the base class, which does nothing."""
    own, base = getattr(strategy, method), getattr(Strategy, method)
    return getattr(own, "__func__", own) is not getattr(base, "__func__", base)


def as_arrays(state: Mapping[str, Arrays], kind: str, like: Mapping[str, NDArray[Any]]) -> Arrays:
    """The arrays of one kind of `state`; zeros of the shapes of `like` where there are none yet."""
    found = state.get(kind)
    return found if found is not None else {name: np.zeros_like(array) for name, array in like.items()}
