"""What a coordinator gets out of a site, on two data sets that differ in one unit, all earlier noise held fixed.

The unit is an example, or a person with several, who is replaced by one with another number of other examples.

Two sites get the same messages. The first records each noised value; the second is given those same values in the place
of its own (`Coupled`), whatever its own would have been before the noise, and both draw the same random numbers for all
else. So what the coordinator has seen so far is the same, and what the two still say differently no noise has covered.
Neighbouring: the one example is in every sample that is drawn (present), or in none of them, and is then another one
wherever the site goes through all of its data, with the first batch. Where the number of examples is declared
(`removed`), it is not there at all then: the data has one row less.

Of each answer: every value that was noised at the site moves, before the noise, by at most the sensitivity that the
noise was made for, by the receipt; a value whose noise others add (`on the sum`) by at most what theirs is made for;
and everything else is the same to the last bit, the reason of a refusal too.
"""

import itertools
import json
import secrets
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from numpy.typing import NDArray
from torch import nn

from fedclaw.learning.postprocess import template
from fedclaw.learning.registry import STRATEGIES, installed, strategy_class
from fedclaw.learning.tasks.base import Task
from fedclaw.learning.tasks.regression import Regression
from fedclaw.learning.workload import Table
from fedclaw.privacy.mechanisms.sum_noise import WITHIN
from fedclaw.privacy.noise import GaussianSource
from fedclaw.privacy.provenance import Part, Permitted, Released
from fedclaw.privacy.secure_aggregation import Sessions, Signer, Verifier, local_identities
from fedclaw.protocol.arrays import Update, pack
from fedclaw.protocol.message_identity import assume_server_identity
from fedclaw.protocol.messages import ABOUT, ARRAYS, BROADCAST, CHARGE, JSON, KEYS, METRICS, PLAN, RECEIPT, SUM
from fedclaw.protocol.questions import questions
from fedclaw.protocol.records import hash_of
from fedclaw.protocol.refusal import Refusal, RefusalCode
from fedclaw.protocol.terms import PLAN_VERSION, ModelSpec, Plan
from fedclaw.site import pipeline
from fedclaw.site.privacy_budget import Asking
from fedclaw.site.secure import SecureIdentity
from fedclaw.site.service import SiteService
from fedclaw.site.training import TrainingAnswer
from tests.least_squares import FEDERATION, service
from tests.small_nets import SmallNets

EXAMPLES, INPUTS = 12, 3
RUN = "run-1"
SLACK = 1 + 1e-5
"""For float32."""

Arrays = Mapping[str, NDArray[Any]]


class Nets(SmallNets):
    """A body, a normalisation and a head: something for every strategy to leave at a site."""

    def build(self, spec: ModelSpec) -> nn.Module:
        layers = {
            "body": nn.Linear(INPUTS, INPUTS, bias=False),
            "norm": nn.LayerNorm(INPUTS),
            "head": nn.Linear(INPUTS, 2),
        }
        return nn.Sequential(OrderedDict(layers))


class Numbers(Nets):
    """The same for a number in the place of two classes."""

    @property
    def task(self) -> Task:
        return Regression("y", minimum=-1.0, maximum=2.0, kind="huber")

    def build(self, spec: ModelSpec) -> nn.Module:
        built = super().build(spec)
        built.head = nn.Linear(INPUTS, 1)
        return built


TASKS: Mapping[str, type[Nets]] = {"classes": Nets, "number": Numbers}
METRICS_OF = {"classes": ("loss", "accuracy"), "number": ("loss", "rmse", "mae")}


@dataclass(frozen=True)
class Noised:
    """One value before and after the noise of deviation `std`."""

    before: NDArray[np.float64]
    after: torch.Tensor
    std: float


class Coupled(GaussianSource):
    """Noise that makes the values of an earlier site of its own ones, where there was one."""

    def __init__(self, *, present: bool, of: Sequence[Noised] = (), removed: bool = False) -> None:
        super().__init__(insecure_fixed_key_for_tests=bytes(32))
        self._present = present
        self._removed = removed
        self._earlier = iter(of)
        self._shuffles = itertools.count()
        self.noised: list[Noised] = []

    def perturb_(self, values: torch.Tensor, std: float) -> torch.Tensor:
        if std == 0:
            # Others are to add the noise.
            return super().perturb_(values, std)
        before = values.detach().double().numpy().copy()
        super().perturb_(values, std)
        if not self._present:
            earlier = next(self._earlier, None)
            assert earlier is not None, "more is noised without the example than with it"
            assert earlier.std == std, "how much noise there is depends on the example"
            values.copy_(earlier.after)
        self.noised.append(Noised(before, values.clone(), std))
        return values

    def bernoulli(self, count: int, q: float) -> NDArray[np.bool_]:
        if self._removed:
            # As many words of the stream as beside the example, so that what is drawn after them is the same.
            return super().bernoulli(count + 1, q)[1:]
        mask = super().bernoulli(count, q)
        mask[0] = self._present
        return mask

    def permutation(self, count: int) -> NDArray[np.int64]:
        # However many rows there are, what is drawn after it is the same.
        order = np.random.default_rng(next(self._shuffles)).permutation(count + self._removed)
        if self._removed:
            return order[order != 0] - 1
        return np.concatenate([[0], order[order != 0]])


@dataclass(frozen=True)
class Asked:
    """One message of a hostile coordinator; the plan is no more than JSON until the site reads it."""

    strategy: str
    mechanism: str
    kind: str = "train"
    weighting: str = "examples"
    personal: str = "honest"
    """honest, or head, none, all: whatever the strategy says."""
    compression: str = "none"
    rate: float = 0.5
    round: int | None = None
    """None: as many as there were messages before, and one."""
    amplify: float = 1.0
    """What the strategy's fields are multiplied by."""
    task: str = "classes"
    """What the site's data and the model are of; the same in all that is asked of one site."""
    unit: str = "example"
    """What differs, example or person; the same too."""

    def __str__(self) -> str:
        return " ".join(
            [self.kind, self.strategy, self.mechanism, self.weighting]
            + [f"personal={self.personal}"] * (self.personal != "honest")
            + [f"compression={self.compression}"] * (self.compression != "none")
            + [f"rate={self.rate:g}"] * (self.rate != 0.5)
            + [f"fields x {self.amplify:g}"] * (self.amplify != 1)
            + [f"round={self.round}"] * (self.round is not None)
            + [f"task={self.task}"] * (self.task != "classes")
            + [f"unit={self.unit}"] * (self.unit != "example")
        )


ON_THE_SUM = {
    "example-server": ("example", "server"),
    "example-sites": ("example", "sites"),
    "site-server": ("site", "server"),
    "site-sites": ("site", "sites"),
    "both": ("site", "server"),
}
LOCAL = ("local", "local-secure", "both")
MECHANISMS = ("none", "local", "local-secure", *ON_THE_SUM)
"""`both`: the site's own noise, and the server's on the sum."""
WEIGHTINGS = ("examples", "uniform", "capped")
CLIP, RATE_OF_SAMPLES, MULTIPLIER = 0.7, 0.5, 2.0
COMPRESSIONS: Mapping[str, Any] = {
    "none": None,
    "topk": {"method": "topk", "fraction": 0.3, "feedback": True},
    "powersgd": {"method": "powersgd", "rank": 1},
    "int8": {"method": "int8"},
    "randk": {"method": "randk", "fraction": 0.5, "feedback": False},
}


def strategies() -> list[str]:
    """All that are installed, whoever's they are."""
    return sorted(installed(STRATEGIES))


@cache
def parameters_of(task: str = "classes") -> Arrays:
    """What a run begins with."""
    torch.manual_seed(5)
    built = TASKS[task](INPUTS).build(ModelSpec(name="net"))
    return {name: parameter.detach().numpy().copy() for name, parameter in built.named_parameters()}


@cache
def _fields(strategy: str) -> Mapping[str, float]:
    return dict(strategy_class(strategy)().client_fields())


@cache
def _personal(strategy: str) -> tuple[str, ...]:
    return tuple(sorted(strategy_class(strategy)().personal(Nets(INPUTS).build(ModelSpec(name="net")))))


def plan_of(asked: Asked, site: SiteService, number: int) -> dict[str, Any]:
    """The plan, as JSON has it."""
    one = asked.mechanism.startswith("example")
    central = None
    if asked.mechanism in ON_THE_SUM:
        unit, noise_by = ON_THE_SUM[asked.mechanism]
        rate = RATE_OF_SAMPLES if one else 1.0
        central = {"unit": unit, "noise_by": noise_by, "epsilon": 3.0, "delta": 1e-5, "clip": CLIP}
        central |= {"noise_multiplier": MULTIPLIER, "sample_rate": rate}
    names = {"head": ("head.weight", "head.bias"), "none": (), "all": tuple(parameters_of(asked.task))}
    return {
        "version": PLAN_VERSION,
        "federation": FEDERATION,
        "run": RUN,
        "round": number if asked.round is None else asked.round,
        "rounds": 4,
        "cohort": 3,
        "workload": Nets.name,
        "schema_digest": site.schema_digest,
        "model": {"name": "net"},
        "strategy": asked.strategy,
        "strategy_fields": {name: value * asked.amplify for name, value in _fields(asked.strategy).items()},
        "training": {"steps": 1 if one else 2, "batch_size": 4, "learning_rate": asked.rate},
        "privacy": {"epsilon": 4.0, "delta": 1e-5, "max_grad_norm": CLIP} if asked.mechanism in LOCAL else None,
        "central": central,
        "secure": _session(asked),
        "compression": COMPRESSIONS[asked.compression],
        "weighting": asked.weighting,
        "weight_cap": 5 if asked.weighting == "capped" else None,
        "metrics": METRICS_OF[asked.task],
        "personal": names.get(asked.personal, _personal(asked.strategy)),
    }


def _session(asked: Asked) -> dict[str, Any] | None:
    by_sites = asked.mechanism.endswith("-sites")
    if asked.kind == "evaluate" or not (by_sites or asked.mechanism == "local-secure"):
        return None
    size = sum(array.size for array in parameters_of(asked.task).values())
    range_of = {} if by_sites else {"value_range": 100.0, "largest_weight": 100.0}
    fields = {"session": secrets.token_hex(16), "sites": ("a", "b", "c"), "threshold": 2, "neighbours": 2, "minimum": 3}
    return {**fields, "length": size, "step": 2.0**-20, **range_of}


@dataclass(frozen=True)
class Left:
    """What left a site in answer to one message."""

    refused: tuple[RefusalCode, str] | None = None
    on_the_sum: Arrays = field(default_factory=dict)
    """Values that wait for the noise of others."""
    bound: float = 0.0
    """How far one example may move them, in L2 norm together."""
    noised: Sequence[Noised] = ()
    multiplier: float = 0.0
    """By the receipt: what the site's own noise is, over its sensitivity."""
    rest: Mapping[str, Any] = field(default_factory=dict)
    kept: Mapping[str, Arrays] = field(default_factory=dict)
    """What the site keeps and says to be covered."""


def open_site(
    source: Coupled, *, present: bool, task: str = "classes", unit: str = "example", declared: int | None = None
) -> SiteService:
    """A site whose policy wants differential privacy, with or without the unit: another one is in its place, or none if
    the number of units is `declared`."""
    assume_server_identity(1)
    generator = np.random.default_rng(11)
    inputs = generator.normal(size=(2, EXAMPLES, INPUTS)).astype(np.float32)
    targets = (np.arange(EXAMPLES) % 2).astype(TASKS[task](INPUTS).task.target_dtype)
    inputs[0, 0] = (4.0, -3.0, 5.0) if present else (-1.0, 0.5, 0.2)
    train = Table(inputs[0], targets if present else np.concatenate([targets[1:2], targets[1:]]))
    if unit == "person":
        train = _of_persons(train, present=present)
    if declared is not None and not present:
        train = train.take(np.arange(EXAMPLES) > 0 if train.persons is None else train.persons > 0)
    rules = {"allow_training_without_privacy": False, "trust_server_noise": True, "epsilon": None, "delta": 1e-5}
    site = service("a", TASKS[task](INPUTS), train, test=Table(inputs[1], targets), **rules)
    site.policy = site.policy.model_copy(update={"strategies": tuple(strategies())})
    site.data = replace(site.data, public_examples=declared)
    site.source = source
    signer, verifier = _identity()
    site.secure = SecureIdentity(signer, verifier, Sessions())
    return site


def _of_persons(people: Table, *, present: bool) -> Table:
    """The table's rows as persons, who have one to three rows like it each; the first has four, or is another one."""
    sizes = [4 if present else 1, *(1 + number % 3 for number in range(1, len(people)))]
    owners = np.repeat(np.arange(len(people)), sizes)
    own = [np.random.default_rng(number).normal(size=(size, INPUTS)) for number, size in enumerate(sizes)]
    inputs = people.inputs[owners] + 0.3 * np.concatenate(own).astype(np.float32)
    return Table(inputs, people.targets[owners]).owned_by(owners, list(map(str, range(len(people)))))


@cache
def _identity() -> tuple[Signer, Verifier]:
    identities, verifier = local_identities(FEDERATION, ["a", "b", "c"])
    return identities["a"], verifier


def question_of(asked: Asked, site: SiteService, number: int, kind: str) -> Message:
    """The message, with the coordinator's own parameters and whatever state of the server's a strategy might want."""
    generator = np.random.default_rng(number)
    moved = {
        n: a + generator.normal(size=a.shape).astype(np.float32) / 10 for n, a in parameters_of(asked.task).items()
    }
    sent = {f"control/{n}": 0.1 * a for n, a in moved.items() if n not in _personal(asked.strategy)}
    content = RecordDict({ARRAYS: pack(moved), BROADCAST: pack(sent)})
    plan = plan_of(asked, site, number)
    if plan["secure"] is not None:
        plan["secure"] |= {"content": hash_of(content.array_records).hexdigest(), "length": _length(plan, moved)}
    content[PLAN] = ConfigRecord({JSON: json.dumps(plan)})
    return questions([7], number, kind, content, 100.0)[0]


def _length(plan: Mapping[str, Any], parameters: Arrays) -> int:
    """Numbers of an update, as a site works them out; of a plan that nobody can read, of one with all parameters."""
    try:
        return sum(array.size for array in template(parameters, Plan.model_validate_json(json.dumps(plan))).values())
    except ValueError:
        return sum(array.size for array in parameters.values())


def left_of(site: SiteService, asked: Asked, number: int) -> Left:
    """Ask `site`, and let the answer leave."""
    source = site.source
    assert isinstance(source, Coupled)
    first = len(source.noised)
    message = question_of(asked, site, number, asked.kind)
    if asked.kind == "train" and _session(asked) is not None:
        return _under_masks(site, asked, number, message)
    reply = site.answer(message)
    site.release(message, reply, 10, "00" * 32)
    if reply.has_error():
        return Left((RefusalCode(reply.error.code), reply.error.reason))
    arrays = _arrays_of(reply) if SUM in reply.content.array_records else {}
    return _left(site, asked, arrays, reply.content, source.noised[first:])


def _arrays_of(reply: Message) -> Arrays:
    """The arrays that left, in whatever form."""
    return {name: array.numpy() for name, array in reply.content.array_records[SUM].items()}


@dataclass
class Watched(TrainingAnswer):
    """What goes into a secure sum, before the integers and the noise that other sites' shares make enough."""

    seen: list[Arrays] = field(default_factory=list)

    def encode(self, contribution: Part[Update]) -> Released[Any] | Permitted[Any]:
        self.seen.append({name: array.copy() for name, array in contribution.value.arrays.items()})
        return super().encode(contribution)


def _under_masks(site: SiteService, asked: Asked, number: int, message: Message) -> Left:
    """Where only a sum is ever seen: what this site would put into it, if it takes part."""
    source = site.source
    assert isinstance(source, Coupled)
    first = len(source.noised)
    joined = site.answer(question_of(asked, site, number, KEYS))
    if joined.has_error():
        return Left((RefusalCode(joined.error.code), joined.error.reason))
    plan = Plan.model_validate_json(str(message.content.config_records[PLAN][JSON]))
    seen: list[Arrays] = []
    training = Watched(site, Asking(message, plan.federation, plan.run, plan.round, plan.rounds), plan, seen=seen)
    try:
        content = pipeline.answer(training, lambda _: {})
    except Refusal as refusal:
        return Left((refusal.code, refusal.reason))
    site.states.commit(FEDERATION, RUN, str(content.config_records[ABOUT][CHARGE]))
    return _left(site, asked, seen[0], content, source.noised[first:])


def _left(site: SiteService, asked: Asked, arrays: Arrays, content: RecordDict, noised: Sequence[Noised]) -> Left:
    receipt = json.loads(str(content.config_records[RECEIPT][JSON])) if RECEIPT in content.config_records else {}
    receipt.pop("ledger_head", None)
    # A hash of the site's whole book, where each charge stands under a name of its own.
    rest: dict[str, Any] = {"metrics": dict(content.metric_records[METRICS]), "receipt": receipt}
    waits = asked.kind == "train" and asked.mechanism in ON_THE_SUM and asked.mechanism not in LOCAL
    bound = 0.0
    if waits:
        unit, _ = ON_THE_SUM[asked.mechanism]
        weight = {"examples": EXAMPLES, "uniform": 1, "capped": 5}[asked.weighting]
        made_for = asked.rate * CLIP / RATE_OF_SAMPLES if unit == "example" else CLIP * weight
        # Unit site: an example may move a clipped update by twice the bound, and the receipt says half of the noise.
        bound = made_for * MULTIPLIER / receipt["noise_multiplier"]
    else:
        rest["arrays"] = arrays
    found = site.states.find(FEDERATION, RUN)
    kept: dict[str, Arrays] = {}
    if found is not None and found.made is not None and found.made.local:
        kept = {kind: a for kind, a in found.after.items() if found.made.covers(kind)}
    return Left(
        on_the_sum=arrays if waits else {},
        bound=bound,
        noised=noised,
        multiplier=receipt.get("noise_multiplier", 0.0),
        rest=rest,
        kept=kept,
    )


def complaints(asked: Sequence[Asked], before: Sequence[Asked] = (), *, declared: int | None = None) -> Iterator[str]:
    """What is wrong with what leaves in answer to `asked`, one sentence each.

    `before` is what was asked while the policy still allowed training without privacy, which no promise covers. With a
    number of examples that is `declared` the one example is there or not, else another one is in its place.
    """
    with_it, task, unit = Coupled(present=True), asked[0].task, asked[0].unit
    here = open_site(with_it, present=True, task=task, unit=unit, declared=declared)
    seen = _all(here, asked, before)
    without = Coupled(present=False, of=with_it.noised, removed=declared is not None)
    there = open_site(without, present=False, task=task, unit=unit, declared=declared)
    for question, one, other in zip(asked, seen, _all(there, asked, before), strict=True):
        for complaint in _compared(one, other):
            yield f"{' | '.join(map(str, [*before, *asked]))}: at {question}: {complaint}"


def _all(site: SiteService, asked: Sequence[Asked], before: Sequence[Asked]) -> list[Left]:
    wary = site.policy
    site.policy = wary.model_copy(update={"allow_training_without_privacy": True})
    for number, question in enumerate(before, 1):
        left_of(site, question, number)
    site.policy = wary
    return [left_of(site, question, number) for number, question in enumerate(asked, 1 + len(before))]


def _compared(one: Left, other: Left) -> Iterator[str]:
    if one.refused or other.refused:
        if one.refused != other.refused:
            yield f"refused by one alone, or for another reason: {one.refused} / {other.refused}"
        elif one.refused and one.refused[0] is RefusalCode.FAILED:
            yield "the site failed at it"
        return
    if len(one.noised) != len(other.noised):
        yield "how many values are noised depends on the example"
    for mine, theirs in zip(one.noised, other.noised, strict=False):
        moved = float(np.linalg.norm(mine.before - theirs.before))
        if not moved <= mine.std / one.multiplier * SLACK:
            yield f"a noised value moved by {moved * one.multiplier / mine.std:.3f} of what its noise was made for"
    yield from _summed(one, other)
    yield from (f"{what} tells of the example" for what in _differing(one.rest, other.rest))
    yield from (f"the state {what}, kept as covered, tells of it" for what in _differing(one.kept, other.kept))


def _summed(one: Left, other: Left) -> Iterator[str]:
    if one.on_the_sum.keys() != other.on_the_sum.keys():
        yield "what is sent depends on the example"
        return
    parts = [(one.on_the_sum[name], other.on_the_sum[name]) for name in one.on_the_sum if name != WITHIN]
    moved = float(np.sqrt(sum(float(np.sum((a.astype(np.float64) - b) ** 2)) for a, b in parts)))
    if not moved <= one.bound * SLACK:
        yield f"what is to be noised moved by {moved / one.bound:.3f} of what that noise is made for"


def _differing(one: Mapping[str, Any], other: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for name in sorted({*one, *other}):
        mine, theirs = one.get(name), other.get(name)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            yield from _differing(mine, theirs, f"{path}{name}.")
        elif not (np.array_equal(mine, theirs) if isinstance(mine, np.ndarray) else mine == theirs):
            yield path + name
