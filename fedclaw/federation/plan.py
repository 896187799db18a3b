"""What goes out to a site and what comes back: one frozen plan, one additive statistic, one receipt.

A round sends each site a `Message` whose content is

    {"arrays": ArrayRecord (global parameters), "plan": ConfigRecord {"json": Plan},
     "teacher": ArrayRecord (only when the plan distils)}

and a site that trained answers

    {"sum": ArrayRecord (weight x parameter delta, float32), "metrics": MetricRecord {"weight", "examples"},
     "receipt": ConfigRecord {"json": Receipt}}

A site that evaluated answers {"metrics": MetricRecord {"weight", "examples", name: value x weight}}.
Either answer also holds "about": ConfigRecord {"run": the run's name}, for the site's own outbound log.
Sums and weights add up, so a sum of answers is itself an answer. A site that will not take part answers with
a Flower `Error` whose code is a `RefusalCode` and whose reason is a sentence.
"""

from enum import IntEnum
from typing import Literal, Self

from pydantic import Field, JsonValue, model_validator

from fedclaw.frozen import Frozen

PLAN_VERSION = 1

MAX_ROUNDS = 100_000
MAX_STEPS = 1_000_000
MAX_EPOCHS = 10_000.0
MAX_BATCH = 10_000_000
"""Limits of a plan: one small message must not keep a site busy for ever. Its policy sets narrower ones."""

METRICS = ("loss", "accuracy", "precision", "recall", "f1", "auroc")
"""Names of the evaluation metrics; all but `loss` lie in [0, 1]."""


class ModelSpec(Frozen):
    """A model by name; the workload that a site has installed builds it. Never an import path."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")
    args: dict[str, JsonValue] = {}


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


class Distillation(Frozen):
    """Knowledge distillation from a teacher (Hinton, Vinyals, Dean 2015, section 2).

    loss = weight * T^2 * KL(teacher_T || student_T) + (1 - weight) * workload loss
    """

    teacher: ModelSpec
    temperature: float = Field(default=2.0, gt=0)
    weight: float = Field(default=0.7, ge=0, le=1)


class Plan(Frozen):
    """The frozen context of one round. Its JSON is deterministic, so a resumed server asks the same question."""

    version: int = PLAN_VERSION
    federation: str
    run: str
    round: int = Field(ge=0)
    rounds: int = Field(ge=1, le=MAX_ROUNDS)
    cohort: int = Field(ge=1)
    """Number of sites asked in this round, by the server's own word: a site cannot count the others."""
    workload: str
    schema_digest: str
    model: ModelSpec
    strategy: str
    strategy_fields: dict[str, float] = {}
    """What the strategy's client half needs, by name."""
    training: LocalTraining
    privacy: PrivacyRequest | None
    distillation: Distillation | None = None
    weighting: Literal["examples", "uniform"] = "examples"
    """What a site's update counts by in the mean. Either way the answer says how many examples the site has."""
    metrics: tuple[str, ...] = METRICS


class Receipt(Frozen):
    """What one round cost a site, as its ledger has it."""

    mechanism: Literal["dp-sgd", "none"]
    sampler: Literal["poisson", "shuffle"]
    accountant: Literal["pld", "none"]
    sample_rate: float = Field(ge=0, le=1)
    steps: int = Field(ge=0)
    noise_multiplier: float = Field(ge=0)
    max_grad_norm: float = Field(ge=0)
    delta: float = Field(ge=0, lt=1)
    rounds: int = Field(ge=0)
    """Rounds of this run that the ledger holds."""
    epsilon_run: float | None
    """Spent by this run so far; None: unbounded (trained without privacy)."""
    epsilon_lifetime: float | None
    """Spent on this data set by all runs; None: unbounded."""
    epsilon_left: float | None
    """Budget minus lifetime; None: the data set has no budget or it was spent without bound."""
    ledger_head: str


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
    FAILED = 2099
    """The site tried and failed; the reason is in its own log, not on the wire."""


class Refusal(Exception):
    """A typed no from a site, with its reason. Raised at the site, sent as a Flower `Error`."""

    def __init__(self, code: RefusalCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
