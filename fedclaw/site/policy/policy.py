"""What a site allows, whatever a server asks: the `policy` section of site.yaml.

Every clause is checked before anything is trained or evaluated (`fedclaw.site.policy.checks`), and a breach is
answered with a typed refusal that says what was asked and what is allowed. How often a server may ask is checked
against the site's books (`fedclaw.site.privacy_budget`); what is left of a budget is the ledger's question.
`sentences` says in words what a policy allows, for the operator who is responsible for it.
"""

import math
from typing import Annotated, Self

from pydantic import Field, model_validator

from fedclaw.learning.tasks.base import Task
from fedclaw.learning.tasks.installed import can_be_noised, metrics_and_clauses, shared_by_default, told_with, unknown
from fedclaw.learning.tasks.means import MOST_LOSS
from fedclaw.protocol.frozen import Written

SAFE_METRICS = shared_by_default()
"""The metrics that leave by default, of whatever task (`Task.SHARED`): one test example moves each by little, as it is
made of sums over the whole test set to which each example adds something bounded. `loss` is not among them: it is
unbounded, one confidently wrong example can dominate it, and it is the signal that membership inference uses. Without
`metrics_epsilon` none of them is noised: over many rounds they do tell about the test set, so keep the test set apart
from training data and do not let it be tiny (`minimum_test_examples`)."""

TEST = "/test"
"""What is put behind a data set's name for the name of its test data in the ledger. No data set's own name has a /."""

MAX_PRIVATE_STEPS = 1_000_000
"""Most steps of a private run in all its rounds, whatever a policy allows: the noise is calibrated for all of them
together before the first, and what that takes grows with their number (seconds at this one)."""

DEFAULT_DELTA = 1e-5
"""The delta that a policy allows, and that a server asks for, unless told otherwise: below one over the examples of any
site of up to 100,000. A test holds conf/ to it."""

DataSetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}(/test)?$")]


class DataSetBudget(Written):
    """The most that may ever be spent on one data set."""

    epsilon: float | None = Field(gt=0)
    """null: no limit."""
    delta: float = Field(default=DEFAULT_DELTA, gt=0, lt=1)


class StatisticsAllowance(Written):
    """That statistics of the training data may be asked for, and the most that one release of them may cost."""

    epsilon: float = Field(gt=0)
    scores: bool = False
    """Whether that may also be a histogram of how a model that the server sends scores the training rows, by label."""
    survival: bool = False
    """Whether that may also be how many rows were followed how long, by group, for survival curves."""


class Combination(Written):
    """A federation, with which strategies and workloads it may ask."""

    federation: str
    strategies: tuple[str, ...] | None = None
    """null: all that the policy's own list has."""
    workloads: tuple[str, ...] | None = None


class Policy(Written):
    """The site's rules. A field that is left out has the cautious default; unknown fields are an error."""

    workloads: tuple[str, ...] = Field(min_length=1)
    """Workloads that may run here, by name (for example tabular)."""
    strategies: tuple[str, ...] = Field(min_length=1)
    """Strategies whose client half may run here, by name (for example fedavg, fedprox)."""
    federations: tuple[str, ...] | None = None
    """Federations that may ask, by name; null: any whose descriptor this site holds."""
    combinations: tuple[Combination, ...] | None = None
    """Which federation may ask with which strategies and workloads, within the three lists above; a federation that
    is in none of them may not ask at all. null: every combination of the lists."""

    epsilon: float | None = Field(gt=0)
    """Budget of each data set for its whole life, over all runs and federations; null: no limit. Under one (epsilon,
    delta), what anybody learns from the site's training is at most e^epsilon times likelier with any one example in
    the data, or any one person whom the schema names, than with nothing in that place, but for a chance of delta.

    A data set is what site.yaml names (`data.name`), not the bytes of its file: most people in tonight's export were
    in yesterday's too, and a changed byte must not give their budget back. The ledger notes the SHA-256 of the content
    with each charge, so that an auditor sees when it changed. Data on other people gets another name, which is the
    operator's decision and responsibility; the very same content under another name is refused."""
    delta: float = Field(default=DEFAULT_DELTA, gt=0, lt=1)
    """The delta of the budget, and the largest delta that a run may ask for. Keep it well below 1 / examples."""
    budgets: dict[DataSetName, DataSetBudget] = {}
    """Budgets of single data sets by name, in place of `epsilon` and `delta`, both together; NAME/test is NAME's
    test data (see `metrics_epsilon`). A budget that is lowered counts at once, with all that was spent before."""
    epsilon_per_run: float | None = Field(default=None, gt=0)
    """The largest epsilon that one run may ask for, and spend in all its rounds; null: whatever the budget allows."""

    allow_part_of_a_run: bool = False
    """Whether a run may begin here though what is left of the budget does not pay it to its end. Otherwise a run is
    agreed to as a whole before its first charge, or refused, and what is still to come of it is kept free of others."""
    agreement_days: float = Field(default=7.0, gt=0, le=365)
    """A run that has been agreed to and asks for no round in so many days is agreed to no more: what it has not spent
    is free again."""

    allow_training_without_privacy: bool = False
    """Whether a run may train without differential privacy. It spends the data set's budget without bound, so it
    goes together with epsilon: null only."""
    trust_server_noise: bool = False
    """Whether noise that the server adds to the sum counts as differential privacy here. The server then sees this
    site's update before there is any noise on it, but for secure aggregation, and nobody else can tell whether it
    adds any; without this, such a run counts as training without privacy."""
    assumed_dishonest: float = Field(default=0.0, ge=0, le=1)
    """Under distributed noise, the share of the other sites whose noise must not be counted, because they might leave
    it out or tell it to the server: a plan that counts on more of them is refused. At 0 everybody's noise may count, at
    1 this site's own alone."""
    allow_data_dependent_preprocessing: bool = False
    """Whether a private run may use a schema that standardises by this site's own statistics (`standardise: site`).
    They stay here, but the model is trained on what they made of the data, and epsilon does not cover that."""

    require_secure_aggregation: bool = False
    """Whether an update leaves only under secure aggregation, where the server sees nothing but the sum. Evaluation
    metrics leave by themselves either way."""
    minimum_cohort: int = Field(default=2, ge=1)
    """Fewest sites in a round, so that this site's answer is not the only one in a sum. Under secure aggregation
    the site verifies it: so many sites, this one among them, have signed with certificates of the federation that they
    are in the sum, before it helps to unmask it. Otherwise, and for evaluation, it is the server's word: it guards
    against an honest server's mistake, not a dishonest one; what bounds the latter is epsilon."""

    max_local_steps: int | None = Field(default=10_000, ge=1)
    """Most optimiser steps in one round; null: what a plan may ask for, a million. A private run may take
    MAX_PRIVATE_STEPS in all its rounds together."""
    max_update_mb: float | None = Field(default=1024.0, gt=0)
    """Largest model that a server may send, and so the largest update that may leave in one round, in megabytes (10^6
    bytes) of float32; holds for evaluation and for the teacher of a distillation too. null: no limit."""
    rounds_per_day: int | None = Field(default=None, ge=1)
    """Most rounds in any 24 hours, over all runs and federations; null: no limit. Counted by the site's books, so a
    restart changes nothing: every charge to the data set is one, and, apart from those, every evaluation that was
    answered. The same question asked again, whose answer never left, is not another."""
    minimum_seconds_between_rounds: float = Field(default=0.0, ge=0)
    """Least time between the beginnings of two rounds, counted in the same way. A clock that is set back stands
    still, for this, until it has caught up."""

    statistics: StatisticsAllowance | None = None
    """Whether a server may ask for statistics of the training data (counts, means, variances, quantiles, missing rates,
    label counts), which leave with noise of this site's own and are charged to the same budget as training; null: it
    may not. The delta of a release, the cohort, who may ask and how often are bounded as they are for training."""

    metrics: tuple[str, ...] = SAFE_METRICS
    """Evaluation metrics that may leave; see SAFE_METRICS for why loss is not among them by default. With precision,
    recall or f1 leave the counts by class that it is made of, so that the ratio can be taken over all sites' examples:
    they follow from the metrics and the number of examples anyway. `score_histogram` lets the histograms of scores
    leave that the AUROC over all sites is made of; they tell more than a figure does, so they are a clause of their
    own, not there by default."""
    allow_metrics_of_own_models: bool = False
    """Whether metrics may leave of a model that is this site's own, in whole or in part, and was trained without noise:
    Ditto's, and what FedPer, FedRep or FedBN leave here when the noise is on the sum. They tell about the training
    data, not the test data alone, and neither epsilon nor metrics_epsilon counts that. Where training without privacy
    is allowed, they may."""
    minimum_test_examples: int = Field(default=10, ge=1)
    """Metrics of a smaller test set stay here: with a handful of examples they tell about single ones."""
    maximum_shared_test_rows: float = Field(default=0.0, ge=0, le=1)
    """Share of the test rows that may have the values and the label of a training row. With more, metrics leave with
    noise alone (`metrics_epsilon`), charged to the training data: what they tell, they tell of training examples. Raise
    it where different people have the same row, as in a table of few categories."""
    metrics_epsilon: float | None = Field(default=None, gt=0)
    """What one evaluation may cost each test example: with it, metrics leave with Gaussian noise, those alone
    whose sums have a bound for one example (`Task.NOISED`), and the cost is charged to the test data (NAME/test) in the
    site's ledger. null: as they are. The number of test examples is sent as it is, or as it is declared, either way;
    where it is declared, metrics without noise stay here."""
    metrics_budget: DataSetBudget | None = None
    """Budget of the test data for its whole life; `metrics_epsilon` needs one, and it has no other use."""
    metrics_loss_bound: float = Field(default=5.0, gt=0, le=MOST_LOSS)
    """With `metrics_epsilon`: what a single example's loss is cut off at, which is what it can move the sum by. At most
    what a server takes for a mean loss: it would throw away a larger one, and the site would have paid for nothing."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if strange := sorted(unknown(self.metrics)):
            raise ValueError(f"metrics: unknown {', '.join(strange)}; known are {', '.join(metrics_and_clauses())}")
        training = [self.epsilon, *(own.epsilon for name, own in self.budgets.items() if not name.endswith(TEST))]
        if self.allow_training_without_privacy and training != [None] * len(training):
            raise ValueError(
                "allow_training_without_privacy spends without bound; it needs epsilon: null, in budgets too, or set "
                "it to false"
            )
        if self.epsilon is not None and self.epsilon_per_run is not None and self.epsilon_per_run > self.epsilon:
            raise ValueError(f"epsilon_per_run {self.epsilon_per_run:g} is larger than the budget, {self.epsilon:g}")
        self._check_combinations()
        self._check_metrics_budget()
        return self

    def _check_combinations(self) -> None:
        for rule in self.combinations or ():
            lists = (
                ("federations", (rule.federation,), self.federations),
                ("strategies", rule.strategies or (), self.strategies),
                ("workloads", rule.workloads or (), self.workloads),
            )
            for field, named, allowed in lists:
                if allowed is not None and (beyond := [name for name in named if name not in allowed]):
                    raise ValueError(f"combinations: {beyond[0]!r} is not in {field}; a combination only narrows it")

    def _check_metrics_budget(self) -> None:
        if self.metrics_epsilon is None:
            if self.metrics_budget or any(name.endswith(TEST) for name in self.budgets):
                raise ValueError("a budget for test data goes with metrics_epsilon: metrics without noise have no cost")
            return
        if self.metrics_budget is None:
            raise ValueError("metrics_epsilon needs metrics_budget: {epsilon: …, delta: …} for all evaluations")
        if self.metrics_budget.epsilon is not None and self.metrics_epsilon > self.metrics_budget.epsilon:
            raise ValueError(
                f"metrics_epsilon {self.metrics_epsilon:g} is larger than metrics_budget, "
                f"{self.metrics_budget.epsilon:g}"
            )

    def budget_of(self, data_set: str) -> DataSetBudget:
        """The budget of a data set, or of NAME/test, by its name in the ledger."""
        if (own := self.budgets.get(data_set)) is not None:
            return own
        if data_set.endswith(TEST):
            return self.metrics_budget or DataSetBudget(epsilon=None)
        return DataSetBudget(epsilon=self.epsilon, delta=self.delta)

    def serving(self, data_set: str) -> Self:
        """This policy with the budgets of `data_set` and of its test data in the place of the general ones."""
        training, test = self.budget_of(data_set), self.budget_of(data_set + TEST)
        return self.model_copy(
            update={
                "epsilon": training.epsilon,
                "delta": training.delta,
                "metrics_budget": None if self.metrics_epsilon is None else test,
            }
        )

    def dishonest_sites(self, sites: int) -> int:
        """Of `sites` that add a share of the noise, this one among them, how many must not be counted on."""
        return math.ceil(round(self.assumed_dishonest * (sites - 1), 9))

    @property
    def shared_metrics(self) -> tuple[str, ...]:
        """The metrics that may leave: of those that are named, under noise, the ones that can be noised."""
        return tuple(name for name in self.metrics if self.metrics_epsilon is None or can_be_noised(name))

    @property
    def metrics_without_noise(self) -> bool:
        """Whether metrics leave as they are: some are named, and no noise is asked for."""
        return bool(self.metrics) and self.metrics_epsilon is None


def permissive(workload: str, strategy: str, delta: float) -> Policy:
    """What makes no difference: for clients that are simulated, and for an audit, from which nothing leaves."""
    return Policy(
        workloads=(workload,),
        strategies=(strategy,),
        epsilon=None,
        delta=delta,
        allow_training_without_privacy=True,
        trust_server_noise=True,
        allow_data_dependent_preprocessing=True,
        minimum_cohort=1,
        max_local_steps=None,
        max_update_mb=None,
        metrics=metrics_and_clauses(),
        minimum_test_examples=1,
    )


def listed(names: tuple[str, ...] | None, otherwise: str) -> str:
    """Names in a row, or `otherwise` if there are none."""
    return ", ".join(names) if names else otherwise


def sentences(policy: Policy, data_set: str | None = None, task: Task | None = None) -> list[str]:
    """One sentence for each clause of `policy`; with `data_set` the budget is that data set's own, with `task` the
    metrics are those that it has."""
    own = policy if data_set is None else policy.serving(data_set)
    which = "Each data set" if data_set is None else f"The data set {data_set}"
    return [
        *_who(policy),
        f"{which} may be trained on {_budget(own.budget_of(data_set or ''))}, counted over all runs and federations, "
        "for ever.",
        f"One run may ask for {_limit('epsilon ', own.epsilon_per_run, 'whatever the budget allows')}, "
        f"at a delta of at most {own.delta:g} and below one over the number of examples.",
        "A run may begin though what is left of the budget does not pay it to its end."
        if policy.allow_part_of_a_run
        else "A run is agreed to as a whole, beside all unfinished ones, or refused before its first round; an "
        f"agreement expires {policy.agreement_days:g} days after the last round.",
        *_privacy(policy),
        *_together(policy),
        f"A round may take {_limit('', policy.max_local_steps, 'any number of')} local steps.",
        f"A model or an update may have {_limit('', policy.max_update_mb, 'any number of')} megabytes.",
        _frequency(policy),
        _statistics(policy),
        *_metrics(own, task),
    ]


def _who(policy: Policy) -> list[str]:
    said = [
        f"Workloads that may run here: {', '.join(policy.workloads)}.",
        f"Strategies that may run here: {', '.join(policy.strategies)}.",
        f"Federations that may ask: {listed(policy.federations, 'any whose descriptor this site holds')}.",
    ]
    if policy.combinations is not None:
        said.append(f"Of these, only: {'; '.join(map(_combination, policy.combinations)) or 'nothing at all'}.")
    return said


def _combination(rule: Combination) -> str:
    return (
        f"federation {rule.federation} with {listed(rule.strategies, 'every strategy')} on "
        f"{listed(rule.workloads, 'every workload')}"
    )


def _budget(budget: DataSetBudget) -> str:
    return "without limit" if budget.epsilon is None else f"up to epsilon {budget.epsilon:g} at delta {budget.delta:g}"


def _privacy(policy: Policy) -> list[str]:
    said = [
        "Training WITHOUT differential privacy is allowed."
        if policy.allow_training_without_privacy
        else "Training without differential privacy is refused.",
        "Noise that the server adds counts as differential privacy: nobody but the server can tell whether it adds any."
        if policy.trust_server_noise
        else "Noise that the server adds does not count as differential privacy.",
        f"Of noise that all sites add together, {_counted(policy)} may count.",
    ]
    if policy.allow_data_dependent_preprocessing:
        said.append("Private runs may standardise by this site's own statistics, which epsilon does NOT cover.")
    return said


def _counted(policy: Policy) -> str:
    if policy.assumed_dishonest == 0:
        return "every site's share"
    if policy.assumed_dishonest == 1:
        return "this site's share alone"
    return f"this site's share and {1 - policy.assumed_dishonest:.0%} of the others'"


def _together(policy: Policy) -> list[str]:
    fewest = f"{policy.minimum_cohort} site{'s' * (policy.minimum_cohort != 1)}"
    return [
        "An update leaves under secure aggregation only: the server sees nothing but the sum."
        if policy.require_secure_aggregation
        else "An update may leave without secure aggregation: the server then sees it by itself.",
        f"A round must ask at least {fewest}: verified by their certificates under secure aggregation, else by the "
        "server's own word.",
    ]


def _frequency(policy: Policy) -> str:
    limits = []
    if policy.rounds_per_day is not None:
        limits.append(f"at most {policy.rounds_per_day} in 24 hours")
    if policy.minimum_seconds_between_rounds:
        limits.append(f"at least {policy.minimum_seconds_between_rounds:g} seconds apart")
    return f"Rounds may come {', '.join(limits) or 'as often as the server asks'}."


def _statistics(policy: Policy) -> str:
    if policy.statistics is None:
        return "Statistics of the training data are refused."
    return (
        "Statistics of the training data (counts, means, variances, quantiles, missing rates, label counts) leave with "
        f"noise added here: each release may cost at most epsilon {policy.statistics.epsilon:g} of the same budget."
        + (" So may a histogram of how a model scores the training rows." if policy.statistics.scores else "")
        + (" So may how long rows were followed, for survival curves." if policy.statistics.survival else "")
    )


def _metrics(policy: Policy, task: Task | None) -> list[str]:
    named = tuple(name for name in policy.metrics if task is None or name in (*task.METRICS, *task.CLAUSES))
    shared = tuple(name for name in named if name in policy.shared_metrics)
    said = [
        f"Metrics that may leave: {listed(shared, 'none')}, of a test set of at least "
        f"{policy.minimum_test_examples} examples."
    ]
    if policy.allow_metrics_of_own_models or policy.allow_training_without_privacy:
        said.append(
            "They may be of a model of this site's own that was trained without noise, which no epsilon covers."
        )
    said.append(
        f"Of test rows that are training rows, {policy.maximum_shared_test_rows:.4g} of all may be taken for held out; "
        "with more, metrics stay here, or are charged to the training data where they leave with noise."
    )
    if policy.metrics_epsilon is None:
        if sums := told_with(shared) if task is None else task.told_with(shared):
            said.append(
                f"With them leave the sums that they are made of ({', '.join(sums)}), so that each can be "
                "worked out over all sites' test examples."
            )
        said.append(
            "They leave as they are, without noise: over many rounds they tell about the test set, and no budget "
            "counts it."
        )
        return said
    said.append(
        f"They leave with noise: each evaluation costs the test data epsilon {policy.metrics_epsilon:g}, "
        f"{_budget(policy.budget_of(TEST))} for ever. Their number of examples is sent as it is, or as site.yaml "
        "declares it."
    )
    if "loss" in shared:
        said.append(f"A single example's loss counts for at most {policy.metrics_loss_bound:g}.")
    unbounded = tuple(name for name in named if not can_be_noised(name))
    if unbounded:
        said.append(
            f"Not sent, since what one example can move them by has no known bound to noise them by: "
            f"{', '.join(unbounded)}."
        )
    return said


def _limit(unit: str, value: float | None, otherwise: str) -> str:
    return otherwise if value is None else f"at most {unit}{value:g}"
