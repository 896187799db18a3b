"""One mechanism at a time, on blank data with or without a canary: what leaves is noise, and the canary if present.

A probe runs the configuration's code under the conditions in which its guarantee is tight: one step, every unit in the
batch, all data blank except one canary that reaches the clipping bound: an example, or a person with several. Where a
site declares how many units it has (add or remove), the canary is there or is left out, and the number stays; else
(zero out) a blank takes its place. The audited code calibrates the noise to the epsilon that the run claims. What
leaves is divided by the mechanism's sensitivity, which is computed here a second time from its definition: the canary
then moves it by 1 in a known direction, and the noise must have the deviation that epsilon requires.

Legend: d trainable parameters.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedclaw.audit.subject import Canary, Subject, ask, flat, make_canary, unspent
from fedclaw.errors import PrivacyError
from fedclaw.learning import postprocess
from fedclaw.privacy.accounting import calibrate
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.mechanisms.sum_noise import SumNoise
from fedclaw.protocol.arrays import shapes_of
from fedclaw.protocol.terms import LocalTraining, Plan
from fedclaw.server.run_directory import RunRecord
from fedclaw.server.session import initial_parameters
from fedclaw.server.settings import RunSettings
from fedclaw.server.training import TrainingQuestion
from fedclaw.site.service import SiteService

UNITS = 4
"""Units of a probed site, where their number does not matter."""

MOST_COMPARED = 8
"""Sites whose noises are compared with one another, each pair by itself."""

_RATE = 1.0
# The learning rate of a probe: it cancels out.


class Probe(ABC):
    """A mechanism with one bit of input: whether the canary is present."""

    label: str
    """Whose noise it is, in words."""
    epsilon: float
    delta: float
    counted: float = 1.0
    """The share of the released noise's variance that the claim relies on; there may be more than it needs."""
    shares: int = 1
    """Parties that each bring a part of the noise."""
    canary: Canary

    @property
    def direction(self) -> NDArray[np.float64]:
        """Where the canary moves the release to, (d,), of length 1."""
        return self.canary.direction

    @abstractmethod
    def release(self, present: bool) -> NDArray[np.float64]:
        """What the adversary sees, (d,), in units of the sensitivity, with or without the canary."""

    @abstractmethod
    def told(self, present: bool) -> Mapping[str, object]:
        """What leaves beside it, by site: the number of units and the receipt, but for the ledger's head."""

    def echoes(self) -> Mapping[str, NDArray[np.float64]]:
        """Releases without a canary, by where they come from, whose noises must not resemble one another."""
        return {f"mean {number}": self.release(False) for number in (1, 2)}


@dataclass
class LocalProbe(Probe):
    """DP-SGD at one site; unit: an example, or a person."""

    record: RunRecord
    site: SiteService
    others: Mapping[str, SiteService]
    """All sites without the canary, for what sites must not have in common."""
    canary: Canary

    def __post_init__(self) -> None:
        asked = self.record.privacy
        if asked is None:
            raise PrivacyError("there is no local noise to probe")
        self.label = f"local noise, {self.site.name}, unit one {self.canary.unit}"
        self.epsilon, self.delta = asked.epsilon, asked.delta
        self._clip = asked.max_grad_norm
        self._blank = self.others[self.site.name]

    def release(self, present: bool) -> NDArray[np.float64]:
        """The answer of the site."""
        return self._answer(self.site if present else self._blank)

    def told(self, present: bool) -> Mapping[str, object]:
        """See Probe."""
        return _beside(self._ask(self.site if present else self._blank))

    def echoes(self) -> Mapping[str, NDArray[np.float64]]:
        """Two answers to the same question of every site, or of the first MOST_COMPARED."""
        asked = list(self.others.items())[:MOST_COMPARED]
        first = {f"{name}, answer 1": self._answer(site) for name, site in asked}
        return first | {f"{name}, answer 2": self._answer(site) for name, site in asked}

    def _answer(self, site: SiteService) -> NDArray[np.float64]:
        update = self._ask(site).read()
        # delta = -rate (clipped sum + noise) / stated number; one unit adds `clip` to the sum.
        return flat(update.arrays, self.canary.parameters) / update.weight * (UNITS / (_RATE * self._clip))

    def _ask(self, site: SiteService) -> TrainingQuestion:
        return ask({site.name: unspent(site)}, self.record, self.canary.parameters)[0]


@dataclass
class CentralProbe(Probe):
    """Noise on the mean over the sites; the canary is at the heaviest site, or is that site."""

    record: RunRecord
    sites: Mapping[str, SiteService]
    """All sites without the canary."""
    heavy: SiteService
    """The heaviest of them, with the canary."""
    canary: Canary

    def __post_init__(self) -> None:
        mechanism = _sum_noise(self.record)
        unit = "one site" if mechanism.clips_updates else f"one {self.canary.unit}"
        by = "the sites' noise" if mechanism.shares_noise else "the server's noise"
        self.label = f"{by} on the mean, unit {unit}, canary at {self.heavy.name}"
        self.epsilon, self.delta = mechanism.request.epsilon, mechanism.request.delta
        self._scale = sensitivity(self.record, [site.examples for site in self.sites.values()])

    def release(self, present: bool) -> NDArray[np.float64]:
        """The mean that the server's optimiser sees."""
        trained, plan = self._ask(present)
        if plan.secure is not None:
            honest = len(self.sites) - plan.secure.tolerated - plan.secure.colluding
            self.counted, self.shares = honest / len(self.sites), len(self.sites)
        mean = postprocess.at_server(trained.read(), plan, shapes_of(self.canary.parameters))
        return flat(mean.arrays, self.canary.parameters) / self._scale

    def told(self, present: bool) -> Mapping[str, object]:
        """See Probe."""
        return _beside(self._ask(present)[0])

    def _ask(self, present: bool) -> tuple[TrainingQuestion, Plan]:
        sites = {**self.sites, self.heavy.name: self.heavy} if present else self.sites
        return ask({name: unspent(site) for name, site in sites.items()}, self.record, self.canary.parameters)


def probes(subject: Subject, generator: np.random.Generator) -> list[Probe]:
    """A probe for each mechanism of the configuration whose guarantee can be probed."""
    found: list[Probe] = []
    if subject.settings.privacy is not None:
        found.append(local_probe(subject, _heaviest(subject), generator))
    if subject.settings.central is not None:
        found.append(central_probe(subject, generator))
    return found


def local_probe(subject: Subject, name: str, generator: np.random.Generator) -> LocalProbe:
    """A probe of the local noise at the site called `name`."""
    record = subject.record(_one_step(subject.settings, {"central": None, "secure": None}))
    assert record.privacy is not None
    canary = _canary(subject, record, record.privacy.max_grad_norm, generator)
    blanks = {other: _without(subject, other, canary, UNITS) for other in subject.sites}
    return LocalProbe(record, _with(subject, name, canary, UNITS, 1), blanks, canary)


def central_probe(subject: Subject, generator: np.random.Generator) -> CentralProbe:
    """A probe of the noise on the mean; the server's is added to the same sum with secure aggregation or without."""
    asked = subject.settings.central
    assert asked is not None
    # Everybody asked and everything sampled: the sample rate is then 1, and the calibration knows it.
    changed: dict[str, object] = {"privacy": None, "central": asked.model_copy(update={"sample_rate": 1.0})}
    if not mechanism_of(subject.record()).shares_noise:
        changed["secure"] = None
    record = subject.record(_one_step(subject.settings, changed))
    mechanism = _sum_noise(record)
    canary = _canary(subject, record, mechanism.clip, generator)
    name, whole = _heaviest(subject), mechanism.clips_updates
    own_size = whole and record.weighting != "uniform"
    sizes = {other: site.examples if own_size else UNITS for other, site in subject.sites.items()}
    blanks = {other: _without(subject, other, canary, size) for other, size in sizes.items()}
    loud = _with(subject, name, canary, sizes[name], sizes[name] if whole else 1)
    return CentralProbe(record, blanks, loud, canary)


def _with(subject: Subject, name: str, canary: Canary, count: int, present: int) -> SiteService:
    """The site with `count` units, of which so many are the canary's."""
    return subject.dressed(name, canary.units(count, present), _declared(subject, name, count))


def _without(subject: Subject, name: str, canary: Canary, count: int) -> SiteService:
    """The same with nothing in the canary's place: a blank, or no unit where their number is declared."""
    declared = _declared(subject, name, count)
    return subject.dressed(name, canary.units(count - (declared is not None), 0), declared)


def _declared(subject: Subject, name: str, count: int) -> int | None:
    return count if subject.relation(name) == "add-or-remove" else None


def sensitivity(record: RunRecord, examples: list[int]) -> float:
    """How far one unit may move the mean over sites that state so many `examples` each, by the mechanism's definition.

    Deliberately not the code that makes the noise: it is what that code is compared with.
    """
    mechanism = _sum_noise(record)
    central = mechanism.request
    if mechanism.takes_one_step:
        return record.training.learning_rate * central.clip / (central.sample_rate * sum(examples))
    weights = {
        "examples": examples,
        "uniform": [1] * len(examples),
        "capped": [min(count, record.weight_cap or count) for count in examples],
    }[record.weighting]
    return central.clip * max(weights) / sum(weights)


def guaranteed(epsilon: float, delta: float) -> float:
    """The deviation of noise, in units of the sensitivity, with which one step keeps (epsilon, delta)."""
    return calibrate(epsilon, delta, 1.0, 1)


def _beside(trained: TrainingQuestion) -> Mapping[str, object]:
    return {
        name: answer.model_dump(mode="json", exclude={"receipt": {"ledger_head"}})
        for name, answer in trained.besides.items()
    }


def _one_step(settings: RunSettings, changed: Mapping[str, object]) -> RunSettings:
    training = LocalTraining(steps=1, batch_size=UNITS, learning_rate=_RATE)
    # What compresses an update comes after the noise, or leaves numbers out: the whole update tells more.
    return settings.model_copy(update={"rounds": 1, "training": training, "compression": None, **changed})


def _canary(subject: Subject, record: RunRecord, clip: float, generator: np.random.Generator) -> Canary:
    workload = next(iter(subject.sites.values())).workload
    return make_canary(workload, record.model, initial_parameters(record), clip, generator)


def _heaviest(subject: Subject) -> str:
    return max(subject.sites, key=lambda name: subject.sites[name].examples)


def _sum_noise(record: RunRecord) -> SumNoise:
    mechanism = mechanism_of(record)
    if not isinstance(mechanism, SumNoise):
        raise PrivacyError("there is no noise on the mean to probe")
    return mechanism
