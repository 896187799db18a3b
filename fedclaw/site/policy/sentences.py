"""What a policy allows, in plain sentences, for the operator who is responsible for it."""

from fedclaw.learning.tasks.base import Task
from fedclaw.learning.tasks.installed import can_be_noised, told_with
from fedclaw.site.policy.policy import TEST, Combination, DataSetBudget, Policy, listed


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
        f"{_budget(policy.budget_of(TEST))} for ever. Their number of examples is sent as it is."
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
