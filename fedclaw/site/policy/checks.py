"""A server's question against the policy of the site that it is asked: the first clause that it breaks is told."""

import logging
from collections.abc import Collection, Iterable

from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.secure_aggregation.parameters import Topology, is_enough
from fedclaw.protocol.refusal import Refusal, RefusalCode
from fedclaw.protocol.statistics import STATISTICS_VERSION, StatisticsRequest
from fedclaw.protocol.terms import Plan, SecureAggregation
from fedclaw.site.policy.policy import MAX_PRIVATE_STEPS, Policy, listed

log = logging.getLogger(__name__)

BYTES_PER_PARAMETER = 4


def check_plan(policy: Policy, plan: Plan, examples: int, parameters: int) -> None:
    """Raise a typed Refusal for the first clause of `policy` that `plan` breaks, when it asks for training.

    `policy` is that of the data set (`Policy.serving`), `examples` the number of training examples here, `parameters`
    that of the model's parameters. Whether the budget that is left is enough is the ledger's question, which metrics
    leave that of `permitted_metrics`.
    """
    check_request(policy, plan)
    if policy.require_secure_aggregation and plan.secure is None:
        raise Refusal(
            RefusalCode.SECURE_AGGREGATION,
            "an update in the clear was asked for; this site requires secure aggregation",
        )
    _check_privacy(policy, plan, examples)
    _check_steps(policy, plan, examples)
    check_size(policy, parameters)


def permitted_metrics(
    policy: Policy, asked: tuple[str, ...], examples: int | None = None, known: Collection[str] | None = None
) -> tuple[str, ...]:
    """Those of `asked` that may leave, in that order, from a test set of `examples` (None: not checked).

    `known` are the names of the task's metrics, None: of any. Raises a Refusal with code METRICS if none is left of one
    or more.
    """
    if asked and examples is not None and examples < policy.minimum_test_examples:
        raise Refusal(
            RefusalCode.METRICS,
            f"this site shares metrics of at least {policy.minimum_test_examples} test examples, and it has fewer",
        )
    shared = tuple(name for name in policy.shared_metrics if known is None or name in known)
    permitted = tuple(name for name in asked if name in shared)
    if asked and not permitted:
        raise Refusal(
            RefusalCode.METRICS,
            f"metrics {', '.join(asked)} were asked for; this site shares {listed(shared, 'none')}",
        )
    return permitted


def check_request(policy: Policy, plan: Plan) -> None:
    """Raise a Refusal for what holds for whatever is asked: numbers to compute with, who may ask for what, the cohort,
    whose noise counts."""
    mechanism = mechanism_of(plan)
    if reason := mechanism.out_of_range():
        raise Refusal(RefusalCode.MALFORMED, reason)
    _check_who(policy, plan.federation, plan.workload, plan.strategy)
    _check_cohort(policy, plan.cohort)
    if plan.secure is not None:
        check_session(policy, plan.secure, noised=mechanism.shares_noise)


def check_statistics(policy: Policy, request: StatisticsRequest, examples: int) -> None:
    """Raise a typed Refusal for the first clause of `policy` that `request` breaks; see `check_plan`."""
    if request.version != STATISTICS_VERSION:
        raise Refusal(
            RefusalCode.MALFORMED,
            f"version {request.version} of a request for statistics was sent; this site speaks {STATISTICS_VERSION}",
        )
    _check_who(policy, request.federation, request.workload)
    if policy.statistics is None:
        raise Refusal(RefusalCode.STATISTICS, "statistics were asked for; this site's policy does not allow them")
    if request.scores is not None and not policy.statistics.scores:
        raise Refusal(
            RefusalCode.STATISTICS,
            "how a model scores the training rows was asked for; this site's policy does not say statistics: scores",
        )
    if request.survival is not None and not policy.statistics.survival:
        raise Refusal(
            RefusalCode.STATISTICS,
            "survival curves of the training rows were asked for; this site's policy does not say statistics: survival",
        )
    if policy.require_secure_aggregation and request.secure is None:
        raise Refusal(
            RefusalCode.SECURE_AGGREGATION,
            "statistics with this site's own noise were asked for, in the clear; this site requires secure aggregation",
        )
    _check_cohort(policy, request.cohort)
    if request.secure is not None:
        check_session(policy, request.secure, noised=True)
    limits = ((policy.statistics.epsilon, "release"), (policy.epsilon_per_run, "run"), (policy.epsilon, "data set"))
    check_guarantee(policy, "statistics at epsilon", request.epsilon, request.delta, examples, limits)


def _require(code: RefusalCode, what: str, asked: str, allowed: tuple[str, ...]) -> None:
    if asked not in allowed:
        raise Refusal(code, f"{what} {asked!r} was asked for; this site allows {listed(allowed, 'none')}")


def _check_who(policy: Policy, federation: str, workload: str, strategy: str | None = None) -> None:
    """Who may ask for what; statistics have no strategy, whose place is then not looked at."""
    if policy.federations is not None:
        _require(RefusalCode.FEDERATION, "federation", federation, policy.federations)
    _require(RefusalCode.WORKLOAD, "workload", workload, policy.workloads)
    if strategy is not None:
        _require(RefusalCode.STRATEGY, "strategy", strategy, policy.strategies)
    if policy.combinations is None:
        return
    federations = tuple(dict.fromkeys(rule.federation for rule in policy.combinations))
    _require(RefusalCode.FEDERATION, "federation", federation, federations)
    rules = [
        rule
        for rule in policy.combinations
        if rule.federation == federation and workload in (rule.workloads or policy.workloads)
    ]
    if not rules:
        raise Refusal(
            RefusalCode.WORKLOAD,
            f"workload {workload!r} was asked for by federation {federation!r}, to which this site does not allow it",
        )
    strategies = tuple(dict.fromkeys(name for rule in rules for name in rule.strategies or policy.strategies))
    if strategy is not None and strategy not in strategies:
        raise Refusal(
            RefusalCode.STRATEGY,
            f"strategy {strategy!r} was asked for; to federation {federation!r} this site allows "
            f"{listed(strategies, 'none')} with workload {workload!r}",
        )


def _check_cohort(policy: Policy, cohort: int) -> None:
    if cohort < policy.minimum_cohort:
        raise Refusal(
            RefusalCode.COHORT,
            f"a round of {cohort} site(s) was asked for; this site takes part in rounds of at least "
            f"{policy.minimum_cohort}",
        )


def verified_cohort(secure: SecureAggregation) -> int:
    """The sites in a sum that a site can be sure of, itself included.

    It unmasks nothing before `threshold` sites have signed, by certificates that it has checked, that they are in the
    sum. Beyond its neighbours it knows names alone, which the server could have made up.
    """
    return min(len(set(secure.sites)), secure.neighbours + 1, secure.threshold, secure.minimum)


def _check_privacy(policy: Policy, plan: Plan, examples: int) -> None:
    """The noise that counts has to keep the limits, whosever it is; a guarantee for the unit site, which covers all
    of its examples, holds for each of them as well."""
    asked = mechanism_of(plan).guarantee(trust_server_noise=policy.trust_server_noise)
    if asked is None:
        if not policy.allow_training_without_privacy:
            raise Refusal(RefusalCode.PRIVACY_REQUIRED, _without_privacy(plan))
        return
    limits = ((policy.epsilon_per_run, "run"), (policy.epsilon, "data set"))
    check_guarantee(policy, "epsilon", asked.epsilon, asked.delta, examples, limits)


def check_guarantee(
    policy: Policy,
    what: str,
    epsilon: float,
    delta: float,
    examples: int,
    limits: Iterable[tuple[float | None, str]],
) -> None:
    """Raise a Refusal for an (epsilon, delta) beyond one of `limits` (each with what it is per) or that means nothing.

    `what` names the epsilon in the reason.
    """
    for limit, name in limits:
        if limit is not None and epsilon > limit:
            raise Refusal(
                RefusalCode.EPSILON,
                f"{what} {epsilon:g} was asked for; this site allows at most {limit:g} per {name}",
            )
    if delta > policy.delta:
        raise Refusal(RefusalCode.EPSILON, f"delta {delta:g} was asked for; this site allows at most {policy.delta:g}")
    if delta * examples >= 1:
        # Publishing one example picked at random is (0, 1/n)-private: such a delta promises nothing. The reason
        # leaves the site, so it does not say how many examples there are.
        raise Refusal(
            RefusalCode.EPSILON,
            f"delta {delta:g} was asked for; it must be below one over the number of examples here, since a "
            "larger one would allow single examples to be published",
        )


def check_session(policy: Policy, secure: SecureAggregation, *, noised: bool) -> None:
    """Raise a Refusal for a secure sum that hides among too few, counts on more honest sites than the policy does, or
    is not safe at all.

    What the server may choose of it is checked here, by the rule that an honest server chooses by. `noised`: each site
    brings a share of the noise and counts on the others', for which only the complete graph will do.
    """
    if (verified := verified_cohort(secure)) < policy.minimum_cohort:
        raise Refusal(
            RefusalCode.COHORT,
            f"secure aggregation in which a site is sure of {verified} participants (threshold {secure.threshold}, of "
            f"{len(set(secure.sites))} named, minimum {secure.minimum}) was asked for; this site has to be sure of at "
            f"least {policy.minimum_cohort}",
        )
    sites = len(secure.sites)
    topology = Topology(secure.neighbours, secure.threshold)
    if not is_enough(topology, sites, secure.tolerated, secure.colluding, complete=noised):
        raise Refusal(
            RefusalCode.SECURE_AGGREGATION,
            f"a secure sum over {sites} sites with {secure.neighbours} neighbours and threshold {secure.threshold} was "
            f"asked for; against {secure.colluding} sites in league with the server that is not enough",
        )
    wary = policy.dishonest_sites(sites)
    if secure.colluding < wary:
        raise Refusal(
            RefusalCode.SECURE_AGGREGATION,
            f"noise was asked for that is enough if at most {secure.colluding} of {sites} sites are dishonest; this "
            f"site asks for enough with {wary}",
        )


def _without_privacy(plan: Plan) -> str:
    if plan.central is not None:
        return (
            "noise by the server alone was asked for, which this site does not trust; it requires differential "
            "privacy that does not depend on the server"
        )
    return "training without differential privacy was asked for; this site requires it"


def _check_steps(policy: Policy, plan: Plan, examples: int) -> None:
    """The reasons leave the site: they do not say how many steps the epochs asked for are here, which tells n."""
    steps = plan.training.local_steps(examples)
    log.debug("%s are %d local steps here", _length(plan), steps)
    if policy.max_local_steps is not None and steps > policy.max_local_steps:
        raise Refusal(
            RefusalCode.LOCAL_STEPS,
            f"{_length(plan)} in a round were asked for; this site allows at most {policy.max_local_steps} local steps",
        )
    if plan.privacy is not None and steps * plan.rounds > MAX_PRIVATE_STEPS:
        raise Refusal(
            RefusalCode.LOCAL_STEPS,
            f"{_length(plan)} in each of {plan.rounds} rounds were asked for; a private run takes at most "
            f"{MAX_PRIVATE_STEPS} local steps in all its rounds",
        )


def _length(plan: Plan) -> str:
    asked = plan.training
    if asked.steps is not None:
        return f"{asked.steps} local steps"
    return f"{asked.epochs:g} epochs in batches of {asked.batch_size}"


def check_size(policy: Policy, parameters: int) -> None:
    """Raise a Refusal for a model of more than `max_update_mb`, whatever it is sent for."""
    if policy.max_update_mb is None:
        return
    megabytes = parameters * BYTES_PER_PARAMETER / 1e6
    if megabytes > policy.max_update_mb:
        raise Refusal(
            RefusalCode.UPDATE_SIZE,
            f"a model of {megabytes:.4g} MB was sent; this site allows at most {policy.max_update_mb:g} MB",
        )
