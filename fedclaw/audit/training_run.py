"""A whole run of the configuration, with examples that are in it or not by the toss of a coin, and how they show.

Two kinds of examples are tossed for: planted canaries (inputs from the schema alone, labels at random, so that nothing
but memory explains a small loss) and the sites' own examples. The run is the real one: the server's loop, the sites'
code, their noise. What the adversary sees of it depends on whom the guarantee trusts: with noise of the site's own,
every answer of every site; with noise on the mean, every global model.

The one-run audit guesses the canaries' coins: the best scores were in, the worst were not (Steinke, Nasr, Jagielski
2023). The membership inference attack asks the same of the sites' own examples, by their loss (Yeom, Giacomelli,
Fredrikson, Jha 2018, "Privacy Risk in Machine Learning"), compared with the initial model's, so that an example that
is easy for everybody does not count as known (the idea of Carlini et al. 2022, "Membership Inference Attacks From First
Principles", with one reference).

Legend: E examples that were tossed for, d trainable parameters.
"""

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from flwr.app import Message, MessageType
from numpy.typing import NDArray
from scipy import stats

from fedclaw.audit.bounds import attack_bound, least_rate, one_run_bound
from fedclaw.audit.findings import Finding
from fedclaw.audit.subject import Subject, coins, flat, gradient
from fedclaw.errors import PrivacyError
from fedclaw.learning.workload import Table, Workload, load_parameters
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.protocol.arrays import Arrays, unpack
from fedclaw.protocol.messages import ARRAYS, METRICS, SUM, WEIGHT
from fedclaw.server.run_directory import RunDirectory, RunRecord
from fedclaw.server.session import initial_parameters
from fedclaw.transport.base import SiteHandler
from fedclaw.transport.in_process import simulate

_GRID = np.logspace(-6, 6, 25)
# Noise over signal, in units of the mean square of a gradient.
_COORDINATES = 1 << 13
# Of the gradients that the adversary looks at: memory is examples x coordinates.

Observer = Callable[[Arrays, NDArray[np.float64] | None], None]
"""(global parameters, the site's delta (d,), or None where it left under a mask) of one round."""


@dataclass(frozen=True)
class Tossed:
    """Examples at one site: `table` (E rows), which were in (E,), and which were planted (E,)."""

    table: Table
    present: NDArray[np.bool_]
    planted: NDArray[np.bool_]

    def training(self) -> Table:
        """What the site trains on."""
        return Table(self.table.inputs[self.present], self.table.targets[self.present])


@dataclass(frozen=True)
class Shown:
    """How the examples of all sites show after the run; larger scores are for being in it."""

    present: NDArray[np.bool_]
    planted: NDArray[np.bool_]
    by_loss: NDArray[np.float64]
    """The initial model's loss minus the final model's, (E,)."""
    by_gradient: NDArray[np.float64]
    """How much of what the adversary saw move the example's gradient explains, summed over the rounds, (E,)."""


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


def toss(subject: Subject, canaries: int, examples: int, generator: np.random.Generator) -> dict[str, Tossed]:
    """`canaries` dealt out to the sites, and up to `examples` of each site's own, each in or out by a coin."""
    tossed = {}
    shares = np.array_split(np.arange(canaries), len(subject.sites))
    for share, (name, site) in zip(shares, subject.sites.items(), strict=True):
        own = generator.permutation(len(site.data.train))[:examples]
        planted = site.workload.schema.synthetic_inputs(len(share), generator)
        targets = site.workload.task.random_targets(len(share), generator)
        table = Table(
            np.concatenate([planted, site.data.train.inputs[own]]),
            np.concatenate([targets, site.data.train.targets[own]]),
        )
        present = coins(len(table))
        # A site trains on something: the first row that came up tails everywhere has no say in the audit's outcome.
        if not present.any():
            present[-1] = True
        tossed[name] = Tossed(table, present, np.arange(len(table)) < len(share))
    return tossed


def attacked_run(subject: Subject, tossed: Mapping[str, Tossed], rounds: int) -> Shown:
    """Run `rounds` rounds of the configuration on what was tossed, and score every example."""
    settings = subject.settings.model_copy(update={"rounds": rounds})
    if not settings.central:
        # Noise of the site's own trusts nobody: the adversary sees every answer, as without secure aggregation.
        settings = settings.model_copy(update={"secure": None})
    record = subject.record(settings)
    adversary = _Adversary(next(iter(subject.sites.values())).workload, record)
    everybody = Tossed(
        Table(
            np.concatenate([item.table.inputs for item in tossed.values()]),
            np.concatenate([item.table.targets for item in tossed.values()]),
        ),
        np.concatenate([item.present for item in tossed.values()]),
        np.concatenate([item.planted for item in tossed.values()]),
    )
    sums = {name: np.zeros(len(item.table)) for name, item in tossed.items()}
    models: list[Arrays] = []
    first_site = next(iter(tossed))

    def listening(name: str) -> Observer:
        def observe(parameters: Arrays, moved: NDArray[np.float64] | None) -> None:
            if not record.central and moved is not None:
                sums[name] += adversary.contributions(parameters, moved, tossed[name].table)
            elif name == first_site:
                models.append({key: array.copy() for key, array in parameters.items()})

        return observe

    taps = {name: Tap(subject.dressed(name, item.training()), listening(name)) for name, item in tossed.items()}
    with tempfile.TemporaryDirectory() as root:
        final = simulate(RunDirectory.create(Path(root) / record.run, record), taps).parameters
    by_gradient = np.concatenate(list(sums.values()))
    for before, after in pairwise([*models, final]):
        moved = flat(after, before) - flat(before, before)
        by_gradient += adversary.contributions(before, moved, everybody.table)
    gained = adversary.losses(initial_parameters(record), everybody.table) - adversary.losses(final, everybody.table)
    return Shown(everybody.present, everybody.planted, gained, by_gradient)


class _Adversary:
    """Somebody with a copy of the model, the clipping bound, and every example that was tossed for."""

    def __init__(self, workload: Workload, record: RunRecord) -> None:
        self._workload = workload
        self._model = workload.build(record.model)
        mechanism = mechanism_of(record)
        self._clip = mechanism.clip if mechanism.is_sampled else math.inf
        numbers = sum(parameter.numel() for parameter in self._model.parameters())
        chosen = np.random.default_rng(0).permutation(numbers)[:_COORDINATES]
        self._coordinates = np.sort(chosen)

    def losses(self, parameters: Arrays, table: Table) -> NDArray[np.float64]:
        """The loss of each example by itself, (E,)."""
        load_parameters(self._model, parameters)
        with torch.no_grad():
            logits = self._model(torch.from_numpy(table.inputs))
            targets = torch.from_numpy(table.targets)
            each = [self._workload.loss(logits[i : i + 1], targets[i : i + 1]) for i in range(len(targets))]
        return torch.stack(each).double().numpy()

    def contributions(self, parameters: Arrays, moved: NDArray[np.float64], table: Table) -> NDArray[np.float64]:
        """How much of what moved (d,) each example explains, (E,), to first order: by gradients at `parameters`."""
        load_parameters(self._model, parameters)
        gradients = np.empty((len(table), len(self._coordinates)))
        for row in range(len(table)):
            rows = slice(row, row + 1)
            pull = gradient(self._workload, self._model, table.inputs[rows], table.targets[rows])
            norm = float(np.linalg.norm(pull))
            gradients[row] = -pull[self._coordinates] * min(1.0, self._clip / norm if norm else 1.0)
        return contributions(gradients, moved[self._coordinates])


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


_SHARES = (1 / 32, 1 / 8, 1 / 4, 1 / 2)
# Of the canaries that are guessed to be in, and as many to be out: few sure guesses or many unsure ones.
_FALSE_ALARMS = 0.01
_FEWEST = 20
_CONFIDENCE = 0.95
# Of the intervals that are only shown.


@dataclass(frozen=True)
class Claim:
    """What a run claims for single examples; `epsilon` None: nothing."""

    label: str
    epsilon: float | None
    delta: float


def one_run(claim: Claim, scores: NDArray[np.float64], present: NDArray[np.bool_], how: str) -> Finding:
    """The one-run audit of canaries with these scores, (m,). `how` names what the scores are based on."""
    count = len(scores)
    order = np.argsort(scores)
    guessed: dict[int, int] = {}
    for share in _SHARES:
        each = max(1, int(share * count))
        guessed[2 * each] = int(present[order[count - each :]].sum() + (~present[order[:each]]).sum())

    def bound(confidence: float) -> float:
        """The best of the numbers of guesses; the risk is shared out among them."""
        each = 1 - (1 - confidence) / len(guessed)
        return max(one_run_bound(count, tried, right, claim.delta, each) for tried, right in guessed.items())

    best = max(guessed, key=lambda tried: one_run_bound(count, tried, guessed[tried], claim.delta, _CONFIDENCE))
    return Finding(
        name=f"one run, {how}",
        subject=claim.label,
        kind="attack",
        epsilon_claimed=claim.epsilon,
        bound=bound,
        seen=f"{guessed[best]} of {best} guesses about {count} canaries right",
        fault="too many of the planted examples can be told from those that were left out",
    )


def membership(
    claim: Claim, scores: NDArray[np.float64], present: NDArray[np.bool_], generator: np.random.Generator, how: str
) -> Finding | None:
    """The membership inference attack on examples with these scores, (E,); None if there are too few.

    The threshold is chosen on one half and counted on the other. The rates' bounds take the examples of one run to be
    independent trials; the one-run audit does without that.
    """
    half = np.zeros(len(scores), np.bool_)
    half[generator.permutation(len(scores))[: len(scores) // 2]] = True
    sides = [scores[chosen & inside] for chosen in (half, ~half) for inside in (present, ~present)]
    if min(len(side) for side in sides) < _FEWEST:
        return None
    threshold = _best_threshold(sides[0], sides[1], claim.delta)
    hits, alarms = int((sides[2] > threshold).sum()), int((sides[3] > threshold).sum())
    return Finding(
        name=f"membership inference, {how}",
        subject=claim.label,
        kind="attack",
        epsilon_claimed=claim.epsilon,
        bound=lambda sure: attack_bound(hits, len(sides[2]), alarms, len(sides[3]), claim.delta, sure),
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
