"""A whole run of the configuration, with units that are in it or not by the toss of a coin, and how they show.

A unit is what the guarantee protects: an example, or a person with all of its rows. Two kinds are tossed for: planted
canaries (inputs from the schema alone, labels at random, so that nothing but memory explains a small loss) and the
sites' own. The run is the real one: the server's loop, the sites' code, their noise. Each site states the number of
all units that were tossed for, in or out, so that no coin shows in a number: this is add or remove as it is written,
and zero out as well, since a unit that is replaced by nothing adds nothing and leaves the number as it was. What the
adversary sees of it depends on whom the guarantee trusts: with noise of the site's own, every answer of every site;
with noise on the mean, every global model.

The one-run audit guesses the canaries' coins: the best scores were in, the worst were not (`fedclaw.audit.one_run`).
The membership inference attack asks the same of the sites' own units, by their loss (Yeom, Giacomelli,
Fredrikson, Jha 2018, "Privacy Risk in Machine Learning"), compared with the initial model's, so that an example that
is easy for everybody does not count as known (the idea of Carlini et al. 2022, "Membership Inference Attacks From First
Principles", with one reference).

Legend: U units that were tossed for, N rows of all of them, d trainable parameters.
"""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from flwr.app import Message, MessageType
from numpy.typing import NDArray
from scipy import stats

from fedclaw.audit.bounds import attack_bound, least_rate
from fedclaw.audit.findings import Bound, Finding
from fedclaw.audit.one_run import NoiseFamily, family_bound, guesses_of, one_run_bound
from fedclaw.audit.subject import Subject, coins, flat, gradient, rows_of
from fedclaw.errors import PrivacyError
from fedclaw.learning.workload import Table, Workload, load_parameters
from fedclaw.privacy.accounting import NoiseEvent
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.mechanisms.sum_noise import SumNoise
from fedclaw.protocol.arrays import Arrays, unpack
from fedclaw.protocol.messages import ARRAYS, METRICS, SUM, WEIGHT
from fedclaw.server.run_directory import RunDirectory, RunRecord
from fedclaw.server.session import initial_parameters
from fedclaw.transport.base import SiteHandler
from fedclaw.transport.in_process import simulate

_GRID = np.logspace(-6, 6, 25)
# Noise over signal, in units of the mean square of a gradient.
_COORDINATES = 1 << 13
# Of the gradients that the adversary looks at: memory is units x coordinates.

Observer = Callable[[Arrays, NDArray[np.float64] | None], None]
"""(global parameters, the site's delta (d,), or None where it left under a mask) of one round."""


@dataclass(frozen=True)
class Tossed:
    """Units at one site: `table` (N rows), which were in (U,), and which were planted (U,)."""

    table: Table
    present: NDArray[np.bool_]
    planted: NDArray[np.bool_]
    hidden: bool = False
    """Whether a guarantee for rows is attacked by units of several: the site does not know whose its rows are, which
    are alike."""

    @property
    def stated(self) -> int:
        """The number that the site states, of rows or persons, which no coin moves."""
        return len(self.table) if self.hidden else self.table.units

    @property
    def owners(self) -> NDArray[np.int64]:
        """Whose each row is, (N,)."""
        return np.arange(len(self.table)) if self.table.persons is None else self.table.persons

    def training(self) -> Table:
        """What the site trains on."""
        chosen = self.table.take(self.present[self.owners])
        return Table(chosen.inputs, chosen.targets) if self.hidden else chosen


@dataclass(frozen=True)
class Shown:
    """How the units of all sites show after the run; larger scores are for being in it."""

    family: NoiseFamily | None
    """The mechanism that the accountant assumes of the run, whatever the amount of its noise; None: no noise."""
    present: NDArray[np.bool_]
    planted: NDArray[np.bool_]
    by_loss: NDArray[np.float64]
    """The initial model's loss minus the final model's, (U,)."""
    by_gradient: NDArray[np.float64]
    """How much of what the adversary saw move the unit's gradient explains, summed over the rounds, (U,)."""


@dataclass(frozen=True)
class Tap:
    """A site whose answers are listened to. Implements `fedclaw.transport.base.SiteHandler`."""

    site: SiteHandler
    observer: Observer

    def answer(self, message: Message) -> Message:
        """The site's answer. Raises PrivacyError when it is a refusal: there is nothing to audit then."""
        reply = self.site.answer(message)
        if message.metadata.message_type == MessageType.TRAIN:
            if reply.has_error():
                raise PrivacyError(f"the configuration cannot be audited: a site declined: {reply.error.reason}")
            parameters = unpack(message.content.array_records[ARRAYS])
            self.observer(parameters, _delta(reply, parameters))
        return reply

    def release(self, message: Message, reply: Message, size: int, digest: str) -> None:
        """Passed on to the site."""
        self.site.release(message, reply, size, digest)


def _delta(reply: Message, parameters: Arrays) -> NDArray[np.float64] | None:
    if SUM not in reply.content.array_records:
        return None
    weight = reply.content.metric_records[METRICS][WEIGHT]
    assert isinstance(weight, int | float)
    return flat(unpack(reply.content.array_records[SUM]), parameters) / weight


def toss(
    subject: Subject, canaries: int, examples: int, generator: np.random.Generator, rows_together: int = 1
) -> dict[str, Tossed]:
    """`canaries` dealt out to the sites, and up to `examples` units of each site's own, each in or out by a coin.

    Above 1, a canary has `rows_together` rows, all alike, at sites where the unit is an example.
    """
    tossed = {}
    shares = np.array_split(np.arange(canaries), len(subject.sites))
    for share, (name, site) in zip(shares, subject.sites.items(), strict=True):
        train = site.data.train
        own = train.take(_rows_of_units(train, generator.permutation(train.units)[:examples]))
        hidden = rows_together > 1
        each = rows_together if hidden else rows_of(train.unit)
        count = len(share) * each
        made = len(share) if hidden else count
        copies = np.repeat(np.arange(made), count // max(1, made))
        table = Table(
            np.concatenate([site.workload.schema.synthetic_inputs(made, generator)[copies], own.inputs]),
            np.concatenate([site.workload.task.random_targets(made, generator)[copies], own.targets]),
        )
        if own.persons is not None or hidden:
            owned = np.arange(len(own)) if own.persons is None else own.persons
            owners = np.concatenate([np.arange(count) // each, len(share) + owned])
            table = table.owned_by(owners, [str(owner) for owner in range(len(share) + own.units)])
        tossed[name] = Tossed(table, coins(table.units), np.arange(table.units) < len(share), hidden)
    return tossed


def _rows_of_units(table: Table, units: NDArray[np.int64]) -> NDArray[np.int64]:
    """All rows of these units, the rows of examples in the units' order."""
    return units if table.persons is None else np.flatnonzero(np.isin(table.persons, units))


def attacked_run(subject: Subject, tossed: Mapping[str, Tossed], rounds: int) -> Shown:
    """Run `rounds` rounds of the configuration on what was tossed, and score every unit."""
    settings = subject.settings.model_copy(update={"rounds": rounds})
    if not settings.central:
        # Noise of the site's own trusts nobody: the adversary sees every answer, as without secure aggregation.
        settings = settings.model_copy(update={"secure": None})
    record = subject.record(settings)
    adversary = _Adversary(next(iter(subject.sites.values())).workload, record)
    everybody = _together(list(tossed.values()))
    sums = {name: np.zeros(item.table.units) for name, item in tossed.items()}
    models: list[Arrays] = []
    first_site = next(iter(tossed))

    def listening(name: str) -> Observer:
        def observe(parameters: Arrays, moved: NDArray[np.float64] | None) -> None:
            if not record.central and moved is not None:
                sums[name] += adversary.contributions(parameters, moved, tossed[name])
            elif name == first_site:
                models.append({key: array.copy() for key, array in parameters.items()})

        return observe

    taps = {
        name: Tap(subject.dressed(name, item.training(), item.stated), listening(name)) for name, item in tossed.items()
    }
    with tempfile.TemporaryDirectory() as root:
        final = simulate(RunDirectory.create(Path(root) / record.run, record), taps).parameters
    by_gradient = np.concatenate(list(sums.values()))
    for before, after in pairwise([*models, final]):
        moved = flat(after, before) - flat(before, before)
        by_gradient += adversary.contributions(before, moved, everybody)
    gained = adversary.losses(initial_parameters(record), everybody) - adversary.losses(final, everybody)
    # What becomes of several rows is no mechanism of the kind that is accounted for one.
    family = None if everybody.hidden else _accounted(record, [item.stated for item in tossed.values()])
    return Shown(family, everybody.present, everybody.planted, gained, by_gradient)


def _together(tossed: Sequence[Tossed]) -> Tossed:
    """The units of several sites, one site after another."""
    table = Table(
        np.concatenate([item.table.inputs for item in tossed]),
        np.concatenate([item.table.targets for item in tossed]),
    )
    if tossed[0].table.persons is not None:
        before = np.cumsum([0, *(item.table.units for item in tossed)])
        owners = np.concatenate([start + item.owners for start, item in zip(before[:-1], tossed, strict=True)])
        table = table.owned_by(owners, [str(owner) for owner in range(int(before[-1]))])
    return Tossed(
        table,
        np.concatenate([item.present for item in tossed]),
        np.concatenate([item.planted for item in tossed]),
        tossed[0].hidden,
    )


def _accounted(record: RunRecord, stated: Sequence[int]) -> NoiseFamily | None:
    """What the ledgers of sites that state so many units book for the whole run; None: no noise."""
    mechanism = mechanism_of(record)
    if isinstance(mechanism, SumNoise):
        # Shares of the noise add up to it in a session alone.
        events: set[NoiseEvent | None] = {mechanism.event(mechanism.request.noise_multiplier)}
    else:
        events = {mechanism.charge(units, trust_server_noise=True).mechanism for units in stated}
    booked = [replace(event, steps=event.steps * record.rounds) for event in events if event is not None]
    return NoiseFamily(tuple(booked)) if len(booked) == len(events) else None


class _Adversary:
    """Somebody with a copy of the model, the clipping bound, and every unit that was tossed for."""

    def __init__(self, workload: Workload, record: RunRecord) -> None:
        self._workload = workload
        self._model = workload.build(record.model)
        mechanism = mechanism_of(record)
        self._clip = mechanism.clip if mechanism.is_sampled else math.inf
        numbers = sum(parameter.numel() for parameter in self._model.parameters())
        chosen = np.random.default_rng(0).permutation(numbers)[:_COORDINATES]
        self._coordinates = np.sort(chosen)

    def losses(self, parameters: Arrays, tossed: Tossed) -> NDArray[np.float64]:
        """The mean loss of each unit's rows, each by itself, (U,)."""
        load_parameters(self._model, parameters)
        with torch.no_grad():
            logits = self._model(torch.from_numpy(tossed.table.inputs))
            targets = torch.from_numpy(tossed.table.targets)
            each = [self._workload.loss(logits[i : i + 1], targets[i : i + 1]) for i in range(len(targets))]
        sums = np.bincount(tossed.owners, torch.stack(each).double().numpy())
        return np.asarray(sums / np.bincount(tossed.owners))

    def contributions(self, parameters: Arrays, moved: NDArray[np.float64], tossed: Tossed) -> NDArray[np.float64]:
        """How much of what moved (d,) each unit explains, (U,), to first order: by gradients at `parameters`."""
        load_parameters(self._model, parameters)
        gradients = np.empty((tossed.table.units, len(self._coordinates)))
        order, counts = np.argsort(tossed.owners, kind="stable"), np.bincount(tossed.owners)
        for unit, rows in enumerate(np.split(order, np.cumsum(counts)[:-1])):
            alike = len(rows) if tossed.hidden else 1
            gradients[unit] = alike * self._pull(tossed.table, rows[:1] if tossed.hidden else rows)
        return contributions(gradients, moved[self._coordinates])

    def _pull(self, table: Table, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Where the sum of these rows' losses pulls the chosen coordinates, clipped as a whole."""
        pull = len(rows) * gradient(self._workload, self._model, table.inputs[rows], table.targets[rows])
        norm = float(np.linalg.norm(pull))
        return np.asarray(-pull[self._coordinates] * min(1.0, self._clip / norm if norm else 1.0))


def contributions(gradients: NDArray[np.float64], moved: NDArray[np.float64]) -> NDArray[np.float64]:
    """The most plausible multiple of each gradient in `moved`, (E,), but for a constant; gradients (E, d), moved (d,).

    Model: moved = sum of (c + b_i) x gradient_i + noise, with b_i and the noise normal and their ratio unknown. The
    common c is taken out by least squares, the ratio chosen by marginal likelihood, the b_i are then those of a ridge
    regression. Only gradients and update go in, so the choice cannot favour what the coins were.
    """
    common = gradients.sum(axis=0)
    square = float(common @ common)
    rest = moved - (float(moved @ common) / square) * common if square else moved
    scale = float((gradients**2).sum()) / len(gradients)
    if not (scale and np.any(rest)):
        return np.zeros(len(gradients))
    values, vectors = np.linalg.eigh(gradients @ gradients.T / scale)
    values = np.maximum(values, 0.0)
    along = vectors.T @ (gradients @ rest) / np.sqrt(scale)
    best = max(_GRID, key=lambda ratio: _likelihood(ratio, values, along, rest))
    return np.asarray(vectors @ (along / (values + best)) / np.sqrt(scale))


def _likelihood(
    ratio: float, values: NDArray[np.float64], along: NDArray[np.float64], rest: NDArray[np.float64]
) -> float:
    """Logarithm, but for a constant, with the best scale: by the matrix inversion lemma in the examples' space."""
    left = max(float(rest @ rest - (along**2 / (values + ratio)).sum()), np.finfo(float).tiny)
    return -float(np.log1p(values / ratio).sum()) - len(rest) * float(np.log(left))


_FALSE_ALARMS = 0.01
_FEWEST = 20
_CONFIDENCE = 0.95
# Of the intervals that are only shown.


@dataclass(frozen=True)
class AuditedClaim:
    """What a run claims for single units of the sites' data; `epsilon` None: nothing."""

    label: str
    epsilon: float | None
    delta: float


def one_run(
    claim: AuditedClaim,
    family: NoiseFamily | None,
    scores: NDArray[np.float64],
    present: NDArray[np.bool_],
    how: str,
    weight: int = 1,
) -> Finding:
    """The one-run audit of canaries with these scores, (m,). `how` names what the scores are based on."""
    count, order = len(scores), np.argsort(scores)
    tried = guesses_of(count)
    right = int(present[order[count - tried // 2 :]].sum() + (~present[order[: tried // 2]]).sum())

    def any_bound(confidence: float) -> float:
        return one_run_bound(count, tried, right, claim.delta, confidence)

    def bound(confidence: float) -> float:
        assert family is not None
        return family_bound(family, count, tried, right, claim.delta, confidence)

    chosen: Bound = any_bound if family is None else bound
    return Finding(
        name=f"one run, {how}",
        subject=claim.label,
        kind="attack",
        epsilon_claimed=claim.epsilon,
        bound=chosen,
        bound_any=any_bound,
        weight=weight,
        seen=f"{right} of {tried} guesses about {count} canaries right",
        fault="too many of the planted canaries can be told from those that were left out",
    )


def membership(
    claim: AuditedClaim,
    scores: NDArray[np.float64],
    present: NDArray[np.bool_],
    generator: np.random.Generator,
    how: str,
) -> Finding | None:
    """The membership inference attack on units with these scores, (U,); None if there are too few.

    The threshold is chosen on one half and counted on the other. The rates' bounds take the units of one run to be
    independent trials; the one-run audit does without that.
    """
    half = np.zeros(len(scores), np.bool_)
    half[generator.permutation(len(scores))[: len(scores) // 2]] = True
    sides = [scores[chosen & inside] for chosen in (half, ~half) for inside in (present, ~present)]
    if min(len(side) for side in sides) < _FEWEST:
        return None
    threshold = _best_threshold(sides[0], sides[1], claim.delta)
    hits, alarms = int((sides[2] > threshold).sum()), int((sides[3] > threshold).sum())

    def bound(confidence: float) -> float:
        return attack_bound(hits, len(sides[2]), alarms, len(sides[3]), claim.delta, confidence)

    return Finding(
        name=f"membership inference, {how}",
        subject=claim.label,
        kind="attack",
        epsilon_claimed=claim.epsilon,
        bound=bound,
        bound_any=bound,
        seen=_curve(scores[present], scores[~present]),
        fault=f"training examples can be told from others by their {how}",
    )


def auc(members: NDArray[np.float64], others: NDArray[np.float64]) -> tuple[float, float]:
    """The probability that a member has the larger score, ties counted half, and its standard error.

    The error is that of Hanley, McNeil 1982 ("The Meaning and Use of the Area under a ROC Curve").
    """
    ranks = stats.rankdata(np.concatenate([members, others]))
    a, b = len(members), len(others)
    area = (float(ranks[:a].sum()) - a * (a + 1) / 2) / (a * b)
    one, two = area / (2 - area), 2 * area**2 / (1 + area)
    variance = (area * (1 - area) + (a - 1) * (one - area**2) + (b - 1) * (two - area**2)) / (a * b)
    return area, math.sqrt(max(0.0, variance))


def _best_threshold(members: NDArray[np.float64], others: NDArray[np.float64], delta: float) -> float:
    candidates = np.quantile(np.concatenate([members, others]), np.linspace(0.02, 0.98, 49))

    def value(threshold: float) -> float:
        hits, alarms = int((members > threshold).sum()), int((others > threshold).sum())
        return attack_bound(hits, len(members), alarms, len(others), delta, _CONFIDENCE)

    return float(max(candidates, key=value))


def _curve(members: NDArray[np.float64], others: NDArray[np.float64]) -> str:
    area, error = auc(members, others)
    threshold = float(np.quantile(others, 1 - _FALSE_ALARMS, method="higher"))
    hits = int((members > threshold).sum())
    sure = 1 - (1 - _CONFIDENCE) / 2
    low, high = least_rate(len(members), hits, sure), 1 - least_rate(len(members), len(members) - hits, sure)
    return (
        f"AUC {area:.3f} +- {error:.3f}; {hits / len(members):.1%} of the members found at {_FALSE_ALARMS:.0%} false "
        f"alarms (95%: {low:.1%} to {high:.1%})"
    )
