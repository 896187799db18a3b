"""What a run asks of its sites: training, compression, privacy, secure aggregation, weighting, metrics.

Settings, record and plans share these terms (`SharedTerms`, `Terms`). The record alone says the strategy's settings and
when a round counts. Imports nothing heavy.

What goes out to a site and what comes back is one frozen `Plan`, one additive statistic, one receipt.

A round sends each site a `Message` whose content is

    {"arrays": ArrayRecord (global parameters), "plan": ConfigRecord {"json": Plan},
     "teacher": ArrayRecord (only when the plan distils)}

and a site that trained answers

    {"sum": ArrayRecord (weight x parameter delta; float32, or what `compression` makes of it),
     "metrics": MetricRecord {"weight", "examples"}, "receipt": ConfigRecord {"json": Receipt}}

Under secure aggregation the exchange has further stages (`fedclaw.server.exchange`), and the trained answer has
{"masked": ArrayRecord (one flat uint32 vector)} in place of the sum.

A site that evaluated answers {"metrics": MetricRecord {"weight", "examples", name: value x weight}}.
Either answer also holds "about": ConfigRecord {"run": the run's name}, for the site's own outbound log.
Sums and weights add up, so a sum of answers is itself an answer. A site that will not take part answers with
a Flower `Error` whose code is a `RefusalCode` and whose reason is a sentence.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from fedclaw.errors import Reason, Setting
from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.limits import (
    MAX_BATCH,
    MAX_COLUMNS,
    MAX_CONSTANTS,
    MAX_EPOCHS,
    MAX_LENGTH,
    MAX_ROUNDS,
    MAX_SITES,
    MAX_STEPS,
    MAX_SUMMED,
    Arguments,
    Digest,
    Name,
    ParameterName,
)


class HalfPrecision(Frozen):
    """Two bytes a number, rounded to the nearest: `fp16`."""

    method: Literal["fp16"]


class Quantisation(Frozen):
    """One byte a number, or half of one, rounded at random without bias: `stochastic`."""

    method: Literal["int8", "int4"]
    block: int | None = Field(default=256, ge=1, lt=1 << 31)
    """Consecutive numbers of a tensor that share a scale; null: one scale for each tensor."""


class TopK(Frozen):
    """The numbers of largest magnitude, with their positions: `topk`."""

    method: Literal["topk"]
    fraction: float = Field(default=0.05, gt=0, le=1)
    """Share of an update's numbers that is sent."""
    feedback: bool = True
    """Whether a site remembers what it did not send, and adds it to its next update."""


class RandomK(Frozen):
    """The numbers at positions drawn at random, the same at every site: `SharedPositions`."""

    method: Literal["randk"]
    fraction: float = Field(default=0.25, gt=0, le=1)
    """Share of each tensor's numbers that is sent."""
    feedback: bool = False
    """As for `topk`; without it, what is sent is scaled by 1 / fraction, so that it is right in the mean."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Which positions: they follow from it, the round and the tensor's name."""


class PowerSgd(Frozen):
    """Two thin factors of each matrix: `powersgd`."""

    method: Literal["powersgd"]
    rank: int = Field(default=2, ge=1, lt=1 << 31)
    feedback: bool = True
    """As for `topk`."""


Compression = Annotated[HalfPrecision | Quantisation | TopK | RandomK | PowerSgd, Field(discriminator="method")]
"""How updates are compressed on their way to the server."""

_UNDER_MASKS = {
    "fp16": "a masked number has four bytes whatever it was before",
    "int8": "a masked number has four bytes whatever it was before, and each site's scales are its own",
    "int4": "a masked number has four bytes whatever it was before, and each site's scales are its own",
    "topk": "each site sends other positions, which tell about its data, and masks cancel position by position",
    "powersgd": "the product of two factors is no sum of theirs",
}


def check_compression(compression: Compression | None, *, central: bool, secure: bool | None) -> None:
    """Raise ValueError, with the reason, for a compression that would break what a run promises.

    `central`: whether there is noise on the sum over the sites. `secure`: whether updates leave under secure
    aggregation; None: not known.
    """
    if compression is None:
        return
    method = compression.method
    if secure and method in _UNDER_MASKS:
        raise ValueError(
            f"compression={method} does not go with secure aggregation: {_UNDER_MASKS[method]}; take "
            "compression=randk, whose answers add up, or none"
        )
    if not central:
        return
    if not isinstance(compression, RandomK):
        raise ValueError(
            f"compression={method} does not go with noise on the sum: it comes after the clipping, and may enlarge "
            "what was clipped beyond the bound that the noise was made for; take compression=randk "
            "compression.feedback=false"
        )
    if compression.feedback:
        raise ValueError(
            "compression.feedback=true does not go with noise on the sum: what a site remembers of earlier rounds is "
            "not within this round's bound; set compression.feedback=false"
        )


SCORE_HISTOGRAM = "score_histogram"
"""What a policy's clause calls the histograms of scores by class; no metric by itself."""


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
            raise ValueError(Reason("set exactly one of ", Setting("epochs"), " and ", Setting("steps")))
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
"""Whose contribution noise on the sum hides: a unit of a site's data, or all of a site's."""

DataUnit = Literal["example", "person"]
"""What a site's ledger counts: an example, or all examples of a person where the schema says whose they are."""

Relation = Literal["zero-out", "add-or-remove"]
"""Which data sets a guarantee tells apart by little: one unit is replaced by nothing and their number, which is public,
stays; or one is there or not, and the number that is told is declared and rests on no data."""


class SumNoiseTerms(Frozen):
    """Who brings noise on the sum over the sites, for whom, and the (epsilon, delta) that it keeps over a whole run."""

    unit: Unit
    noise_by: Literal["server", "sites"]
    """The server, which everybody then trusts to add it; or every site its share, inside secure aggregation."""
    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)


class CentralRequest(SumNoiseTerms):
    """Noise on the sum over the sites, as conf/central/*.yaml asks for it: (epsilon, delta) of the whole run.

    Unit `site`: each site's parameter delta is clipped to the L2 norm `clip`. Relation: one site's contribution is
    replaced by zero; who takes part and on how many examples is public. Unit `example`: each site takes one step
    on a Poisson sample with the rate `sample_rate`, each example's gradient (or the sum of a person's) clipped to
    `clip`, without noise of its own; the sum over the sites is one DP-SGD step on the pooled data. Relation: that of
    each site's own receipts.
    """

    clip: float = Field(gt=0)
    sample_rate: float = Field(default=1.0, gt=0, le=1)
    """Unit `example`: the rate at which each site samples examples. Unit `site`: that at which sites are asked."""
    adaptive: AdaptiveClip | None = None


class CentralNoise(CentralRequest):
    """Noise on the sum, calibrated to what was asked for."""

    noise_multiplier: float = Field(gt=0)
    """Standard deviation of the noise in the sum over the sum's sensitivity."""
    expected_sites: float | None = Field(default=None, gt=0)
    """Unit `site` with a rate below 1: connected sites x rate, which the sum is divided by whoever was asked."""


class SecureRequest(Frozen):
    """conf/secure/*.yaml: secure aggregation of the updates."""

    dropouts: float = Field(default=0.2, ge=0, lt=0.5)
    """Share of a round's sites that may drop out of it and leave a sum, with all its noise."""
    corrupt: float = Field(default=0.2, ge=0, lt=0.5)
    """Share of the sites that may tell the server all they know; what the others send stays hidden."""
    value_range: float = Field(default=8.0, gt=0)
    """Without noise by the sites: a coordinate of weight x delta / largest weight beyond it is cut off."""
    largest_weight: float | None = Field(default=None, ge=1)
    """With weighting: examples, a weight that no site exceeds: it sets what one integer stands for."""


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
    central: CentralNoise | None = None
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


class StrategyRecord(Frozen):
    """A strategy by name and the settings it ran with."""

    name: str
    settings: dict[str, JsonValue] = {}


class RoundRules(Frozen):
    """When a round counts. None of these touches what a site computes or pays."""

    minimum: int = Field(default=2, ge=1)
    """Sites that must have trained for a round to count."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the connected sites asked in a round, sampled anew each time."""
    deadline: float = Field(default=600.0, gt=0)
    """Seconds that a site has to answer."""
    attempts: int = Field(default=3, ge=1)
    """How often the same question is asked before the run stops; a site that has answered pays nothing again."""


PLAN_VERSION = 4


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
