"""What goes out to a site and what comes back: one frozen plan, one additive statistic, one receipt.

A round sends each site a `Message` whose content is

    {"arrays": ArrayRecord (global parameters), "plan": ConfigRecord {"json": Plan},
     "teacher": ArrayRecord (only when the plan distils)}

and a site that trained answers

    {"sum": ArrayRecord (weight x parameter delta; float32, or what `compression` makes of it),
     "metrics": MetricRecord {"weight", "examples"}, "receipt": ConfigRecord {"json": Receipt}}

Under secure aggregation the exchange has further stages (`fedclaw.server.secure_round`), and the trained answer has
{"masked": ArrayRecord (one flat uint32 vector)} in place of the sum.

A site that evaluated answers {"metrics": MetricRecord {"weight", "examples", name: value x weight}}.
Either answer also holds "about": ConfigRecord {"run": the run's name}, for the site's own outbound log.
Sums and weights add up, so a sum of answers is itself an answer. A site that will not take part answers with
a Flower `Error` whose code is a `RefusalCode` and whose reason is a sentence.
"""

import math
from enum import IntEnum
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, Field, JsonValue, model_validator

from fedclaw.protocol.compression import Compression, check_compression
from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.terms import SecureRequest

PLAN_VERSION = 4

MAX_ROUNDS = 100_000
MAX_STEPS = 1_000_000
MAX_EPOCHS = 10_000.0
MAX_BATCH = 10_000_000
"""Limits of a plan: one small message must not keep a site busy for ever. Its policy sets narrower ones."""

MOST_EXAMPLES = 10**12
"""At one site."""

MOST_CHARGED = 10**15
"""Steps or rounds in a receipt."""

SMALLEST_CLIP, LARGEST_CLIP = 1e-6, 1e6
"""A clipping bound lies between them, at every site: far enough from where float32 ends that no parameters and no data
bring what is clipped there."""
LARGEST_RATE = 1e3
"""Of local learning rates."""

SCORE_HISTOGRAM = "score_histogram"
"""What a policy's clause calls the histograms of scores by class; no metric by itself."""


MAX_SITES = 10_000_000
"""Sites of a federation, by anybody's word."""

MAX_SUMMED, MAX_LENGTH = 100_000, 10**10
"""Sites in one secure sum, and numbers in its vector."""
MAX_COLUMNS = 100_000
"""Of a schema; and parameters that a plan can name."""
MAX_CONSTANTS = 64 << 20
"""Characters of preprocessing constants."""
MAX_TEXT = 4096
MAX_ARGUMENTS, MAX_DEPTH = 10_000, 8
"""Characters of a text in arguments, values in them, and how deep they lie in one another."""

Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\p{C}]+$")]
"""Of a run, a federation, a strategy: it stands in ledgers, logs and pages, so it is short and on one line."""

ParameterName = Annotated[str, Field(min_length=1, max_length=512)]
"""Of a parameter in a model's state, or of a column in a schema."""

Digest = Annotated[str, Field(max_length=64)]
"""SHA-256, hexadecimal."""


def _small(arguments: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """`arguments`. Raises ValueError for such as nothing has: too many, too deep, or texts as long as books."""
    level: list[JsonValue] = [arguments]
    count = 0
    for _ in range(MAX_DEPTH):
        inner: list[JsonValue] = []
        for value in level:
            if isinstance(value, str) and len(value) > MAX_TEXT:
                raise ValueError(f"a text of {len(value)} characters; at most {MAX_TEXT} are read")
            if isinstance(value, dict):
                inner += [*value, *value.values()]
            elif isinstance(value, list):
                inner += value
        count += len(inner)
        if count > MAX_ARGUMENTS:
            raise ValueError(f"more than {MAX_ARGUMENTS} values")
        if not inner:
            return arguments
        level = inner
    raise ValueError(f"values within values more than {MAX_DEPTH} deep")


Arguments = Annotated[dict[Annotated[str, Field(max_length=64)], JsonValue], AfterValidator(_small)]
"""Of a model or a strategy, by name."""


class ModelSpec(Frozen):
    """A model by name; the workload that a site has installed builds it. Never an import path."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")
    args: Arguments = {}


class LocalTraining(Frozen):
    """What a site does between two exchanges. Exactly one of `epochs` and `steps` is set."""

    epochs: float | None = Field(default=None, gt=0, le=MAX_EPOCHS)
    steps: int | None = Field(default=None, gt=0, le=MAX_STEPS)
    batch_size: int = Field(gt=0, le=MAX_BATCH)
    """Examples per step; under differential privacy the expected number of a Poisson sample."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = Field(gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("set exactly one of epochs and steps")
        return self

    def local_steps(self, examples: int) -> int:
        """Optimiser steps of one round on a site with `examples` training examples (at least 1)."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        per_epoch = -(-examples // self.batch_size)
        return max(1, round(self.epochs * per_epoch))


class PrivacyRequest(Frozen):
    """Example-level (epsilon, delta) that the whole run may cost a site, and the clipping bound.

    The site itself calibrates the noise: only it knows its sampling rate.
    """

    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    max_grad_norm: float = Field(gt=0)


class AdaptiveClip(Frozen):
    """A clipping bound that follows a quantile of the updates' norms (Andrew, Thakkar, McMahan, Ramaswamy 2021).

    Each site adds +1/2 or -1/2 to a count, whether its norm is within the bound or not; the server adds noise of
    deviation `count_noise` to the count and moves the bound: C <- C exp(-learning_rate (share within - quantile)).
    """

    quantile: float = Field(default=0.5, gt=0, lt=1)
    learning_rate: float = Field(default=0.2, gt=0)
    count_noise: float = Field(gt=0)


Unit = Literal["example", "site"]
"""Whose presence a guarantee hides."""


class SumNoiseTerms(Frozen):
    """Who brings noise on the sum over the sites, for whom, and the (epsilon, delta) that it keeps over a whole run."""

    unit: Unit
    noise_by: Literal["server", "sites"]
    """The server, which everybody then trusts to add it; or every site its share, inside secure aggregation."""
    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)


class CentralRequest(SumNoiseTerms):
    """Noise on the sum over the sites, as conf/central/*.yaml asks for it: (epsilon, delta) of the whole run.

    Unit `site`: each site's parameter delta is clipped to the L2 norm `clip`. Neighbouring: one site's contribution is
    replaced by zero; who takes part and on how many examples is public. Unit `example`: each site takes one step
    on a Poisson sample with the rate `sample_rate`, each example's gradient clipped to `clip`, without noise of its
    own; the sum over the sites is one DP-SGD step on the pooled data. Neighbouring: add or remove one example.
    """

    clip: float = Field(gt=0)
    sample_rate: float = Field(default=1.0, gt=0, le=1)
    """Unit `example`: the rate at which each site samples examples. Unit `site`: that at which sites are asked."""
    adaptive: AdaptiveClip | None = None


class CentralPrivacy(CentralRequest):
    """Noise on the sum, calibrated to what was asked for."""

    noise_multiplier: float = Field(gt=0)
    """Standard deviation of the noise in the sum over the sum's sensitivity."""
    expected_sites: float | None = Field(default=None, gt=0)
    """Unit `site` with a rate below 1: connected sites x rate, which the sum is divided by whoever was asked."""


class SecureAggregation(Frozen):
    """One session of secure aggregation (Bell et al. 2020): what every site of the cohort has to agree on."""

    session: str = Field(pattern=r"^[0-9a-f]{32}$")
    """Fresh for each attempt: nothing of one session is of use in another."""
    sites: tuple[Name, ...] = Field(min_length=2, max_length=MAX_SUMMED)
    """The cohort, by certified name."""
    threshold: int = Field(ge=2, le=MAX_SUMMED)
    """Shares that recover a secret."""
    neighbours: int = Field(ge=1, le=MAX_SUMMED)
    """Sites that each site shares its secrets with."""
    minimum: int = Field(ge=2, le=MAX_SUMMED)
    """Survivors below which nothing is unmasked."""
    length: int = Field(ge=1, le=MAX_LENGTH)
    """Numbers in the vector that is summed."""
    step: float = Field(gt=0)
    """What one integer stands for."""
    value_range: float | None = Field(default=None, gt=0)
    """Without noise by the sites: a coordinate of weight x delta beyond it is cut off."""
    largest_weight: float | None = Field(default=None, gt=0)
    """Without noise by the sites: a site with a larger weight takes no part."""
    content: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    """SHA-256 of the parameters (and a teacher's) that all sites begin with: whoever gets others takes no part, for a
    server could make a sum of one by giving the rest parameters that nothing comes of."""
    tolerated: int = Field(default=0, ge=0, le=MAX_SUMMED)
    """Drop-outs after which the noise of the others is still enough."""
    colluding: int = Field(default=0, ge=0, le=MAX_SUMMED)
    """Sites whose noise is not counted on."""

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.tolerated < len(self.sites) - self.minimum:
            raise ValueError("a sum may be opened with fewer sites than its noise is enough for: tolerated is too low")
        return self


class Distillation(Frozen):
    """Knowledge distillation from a teacher (Hinton, Vinyals, Dean 2015, section 2).

    loss = weight * T^2 * KL(teacher_T || student_T) + (1 - weight) * workload loss
    """

    teacher: ModelSpec
    temperature: float = Field(default=2.0, gt=0)
    weight: float = Field(default=0.7, ge=0, le=1)


Weighting = Literal["examples", "uniform", "capped"]
"""A site counts by its examples, by one, or by its examples up to a cap."""


def weight_of(examples: int, weighting: Weighting, cap: int | None) -> float:
    """What a site with that many examples counts by; `cap` is that of weighting `capped`."""
    if weighting == "uniform":
        return 1.0
    return float(examples if cap is None else min(examples, cap))


class SharedTerms(Frozen):
    """What a run's settings, its record and the plan of each round say in the same words."""

    rounds: int = Field(ge=1, le=MAX_ROUNDS)
    training: LocalTraining
    privacy: PrivacyRequest | None
    compression: Compression | None = None
    """How updates are compressed on their way back."""
    weighting: Weighting = "examples"
    """What a site's update counts by in the mean. Either way the answer says how many examples the site has."""
    weight_cap: int | None = Field(default=None, ge=1)
    """The largest weight, when `weighting` is `capped`."""
    metrics: tuple[Name, ...] = Field(default=(), max_length=64)
    """Those of the task (`fedclaw.learning.tasks`) that are asked for; a site refuses one that its task has not."""
    score_bins: int | None = Field(default=None, ge=2, le=4096)
    """Bins of the histograms of scores that the AUROC over all sites is made of, where a site's policy shares them,
    fewer where they come with noise, which each bin adds; None: they are not asked for."""


class Terms(SharedTerms):
    """What is asked of the sites in every round of a run: the fields that its record and its plans share."""

    federation: Name
    run: Name
    workload: Name
    model: ModelSpec
    central: CentralPrivacy | None = None
    secure: SecureRequest | SecureAggregation | None = None
    distillation: Distillation | None = None
    personal: tuple[ParameterName, ...] = Field(default=(), max_length=MAX_COLUMNS)
    """Parameters that never leave the sites: each uses its own in the place of what is sent. A site takes no others for
    its own than the strategy says of the model."""
    preprocessing: str | None = Field(default=None, max_length=MAX_CONSTANTS)
    """The constants that all sites prepare their inputs with, for a schema that takes the federation's: canonical JSON,
    made from a differentially private release of statistics."""

    @property
    def hidden(self) -> bool | None:
        """Whether updates leave under secure aggregation; None: not known."""
        return self.secure is not None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_compression(self.compression, central=self.central is not None, secure=self.hidden)
        return self


class Plan(Terms):
    """The frozen context of one round. Its JSON is deterministic, so a resumed server asks the same question."""

    version: int = PLAN_VERSION
    round: int = Field(ge=0, le=MAX_ROUNDS)
    cohort: int = Field(ge=1, le=MAX_SITES)
    """Number of sites asked in this round, by the server's own word: a site cannot count the others."""
    schema_digest: Digest
    strategy: Name
    strategy_fields: dict[Name, float] = Field(default={}, max_length=64)
    """What the strategy's client half needs, by name."""
    strategy_settings: Arguments = {}
    """The strategy's settings: what it refuses, and which parameters it leaves at the sites, follows from them."""
    secure: SecureAggregation | None = None

    @property
    def hidden(self) -> bool | None:
        """None without a session: a site is not asked to train (but to evaluate), or finds no session and refuses."""
        return True if self.secure is not None else None

    def weight(self, examples: int) -> float:
        """What a site with that many examples counts by."""
        return weight_of(examples, self.weighting, self.weight_cap)


NO_LEDGER = "simulated"
"""In the place of a ledger's head, where clients are simulated and have none."""

Head = Annotated[str, Field(max_length=64, pattern=rf"^([0-9a-f]{{64}}|{NO_LEDGER})$")]
"""Of a site's ledger: SHA-256, hexadecimal."""

Epsilon = Annotated[float, Field(ge=0, le=1e15)]
"""What was spent, or is left."""

Trust = Literal["nobody", "aggregation", "server", "everybody"]
"""Whom a guarantee needs to be honest: nobody but the site itself (local noise), enough of the other sites (distributed
noise inside secure aggregation), the server (its noise); `everybody`: there is no noise. From the least to the most."""


class CentralReceipt(SumNoiseTerms):
    """The noise on the sum that the site's answer went into, by the server's plan: (epsilon, delta) of the run.

    Its unit may be the whole site, while the ledger, and every other figure of the receipt, counts examples.
    """


class Spent(Frozen):
    """What was spent on a data set, as a site's ledger has it."""

    delta: float = Field(ge=0, lt=1)
    epsilon_lifetime: Epsilon | None
    """Spent on this data set by all runs; None: unbounded."""
    ledger_head: Head


class BudgetSpent(Spent):
    """The same with what this run spent, and what is left."""

    epsilon_run: Epsilon | None
    """Spent by this run so far; None: unbounded (trained without privacy)."""
    epsilon_left: Epsilon | None
    """Budget minus lifetime; None: the data set has no budget or it was spent without bound."""

    @staticmethod
    def figures(run: float, lifetime: float, budget: float | None) -> dict[str, Any]:
        """The epsilons of a ledger that says `run` and `lifetime`, which may be infinite; `budget` None: no limit."""
        bounded = math.isfinite(lifetime)
        return {
            "epsilon_run": run if math.isfinite(run) else None,
            "epsilon_lifetime": lifetime if bounded else None,
            "epsilon_left": max(0.0, budget - lifetime) if bounded and budget is not None else None,
        }


class TrainingCost(Spent):
    """What training cost a site, as receipts and a statement say it. All figures are for the unit example."""

    mechanism: Literal["dp-sgd", "central", "distributed", "none", "metrics"]
    """Whose noise the ledger charged; `metrics`: the site's own on an evaluation, charged to its test data."""
    trust: Trust = "nobody"
    """Who has to be honest for the figures to hold."""
    secure_aggregation: bool = False
    """Whether the server saw nothing but sums."""
    central: CentralReceipt | None = None
    """Noise on the sum, by the server's plan, with its own unit."""
    sampler: Literal["poisson", "shuffle"]
    accountant: Literal["pld", "rdp", "none"]
    sample_rate: float = Field(ge=0, le=1)
    steps: int = Field(ge=0, le=MOST_CHARGED)
    noise_multiplier: float = Field(ge=0)
    max_grad_norm: float = Field(ge=0)
    rounds: int = Field(ge=0, le=MOST_CHARGED)
    """Rounds of this run that the ledger holds, interrupted ones included."""
    ledger_losses: int = Field(default=0, ge=0, le=MOST_CHARGED)
    """How often the ledger, or its newest entries, was lost and the site went on at its operator's word: what had been
    spent by then is in no figure here."""


class Receipt(TrainingCost, BudgetSpent):
    """What one round cost a site, as its ledger has it."""

    def after(self, before: "Receipt") -> "Receipt":
        """What is told of a site that said `before` earlier in the same run: of each figure the worse one.

        A ledger only grows, so a figure that falls is a mistake or a lie, and what was unbounded once stays so. The
        ledger's head is that of the receipt whose figures stand: it is what they can be checked against.
        """
        told: dict[str, object] = {
            "epsilon_run": _larger(before.epsilon_run, self.epsilon_run),
            "epsilon_lifetime": _larger(before.epsilon_lifetime, self.epsilon_lifetime),
            "epsilon_left": self._less_left(before),
            "delta": max(before.delta, self.delta),
            "rounds": max(before.rounds, self.rounds),
            "ledger_losses": max(before.ledger_losses, self.ledger_losses),
            "secure_aggregation": before.secure_aggregation and self.secure_aggregation,
        }
        trusts = get_args(Trust)
        if trusts.index(before.trust) > trusts.index(self.trust):
            kept = ("mechanism", "trust", "accountant", "sample_rate", "noise_multiplier")
            told |= {name: getattr(before, name) for name in kept}
        if self.is_better_than(before):
            told["ledger_head"] = before.ledger_head
        return self.model_copy(update=told)

    def is_better_than(self, before: "Receipt") -> bool:
        """Whether less is said to be spent, or in fewer rounds, than `before` says: no ledger says that."""
        return (
            _larger(before.epsilon_run, self.epsilon_run) != self.epsilon_run
            or _larger(before.epsilon_lifetime, self.epsilon_lifetime) != self.epsilon_lifetime
            or before.rounds > self.rounds
        )

    def _less_left(self, before: "Receipt") -> float | None:
        """The smaller rest of the budget; None where there is no budget or it was spent without bound."""
        if _larger(before.epsilon_lifetime, self.epsilon_lifetime) is None:
            return None
        return min((item.epsilon_left for item in (before, self) if item.epsilon_left is not None), default=None)


def _larger(before: float | None, now: float | None) -> float | None:
    """The larger epsilon; None is unbounded."""
    return None if before is None or now is None else max(before, now)


class RefusalCode(IntEnum):
    """Why a site will not take part; the codes lie outside Flower's own."""

    MALFORMED = 2000
    FEDERATION = 2001
    WORKLOAD = 2002
    SCHEMA = 2003
    MODEL = 2004
    STRATEGY = 2005
    PRIVACY_REQUIRED = 2006
    EPSILON = 2007
    BUDGET = 2008
    COHORT = 2009
    LOCAL_STEPS = 2010
    METRICS = 2011
    UPDATE_SIZE = 2012
    SECURE_AGGREGATION = 2013
    FREQUENCY = 2014
    STATISTICS = 2015
    SLOW = 2016
    """Said by the server in the place of a site whose answer came too slowly."""
    FAILED = 2099
    """The site tried and failed; the reason is in its own log, not on the wire."""


class Refusal(Exception):
    """A typed no from a site, with its reason. Raised at the site, sent as a Flower `Error`."""

    def __init__(self, code: RefusalCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
