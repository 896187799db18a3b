"""What a site's policy allows of statistics, whatever a server asks."""

from fedclaw.protocol.refusal import Refusal, RefusalCode
from fedclaw.protocol.statistics import STATISTICS_VERSION, StatisticsRequest
from fedclaw.site.policy.checks import check_guarantee, check_session
from fedclaw.site.policy.policy import Policy, listed


def check_statistics(policy: Policy, request: StatisticsRequest, examples: int) -> None:
    """Raise a typed Refusal for the first clause of `policy` that `request` breaks.

    `policy` is that of the data set (`Policy.serving`), `examples` the number of training examples here. Whether the
    budget that is left is enough is the ledger's question.
    """
    if request.version != STATISTICS_VERSION:
        raise Refusal(
            RefusalCode.MALFORMED,
            f"version {request.version} of a request for statistics was sent; this site speaks {STATISTICS_VERSION}",
        )
    _check_who(policy, request)
    if policy.statistics is None:
        raise Refusal(RefusalCode.STATISTICS, "statistics were asked for; this site's policy does not allow them")
    if request.scores is not None and not policy.statistics.scores:
        raise Refusal(
            RefusalCode.STATISTICS,
            "how a model scores the training rows was asked for; this site's policy does not say statistics: scores",
        )
    if policy.require_secure_aggregation and request.secure is None:
        raise Refusal(
            RefusalCode.SECURE_AGGREGATION,
            "statistics with this site's own noise were asked for, in the clear; this site requires secure aggregation",
        )
    if request.cohort < policy.minimum_cohort:
        raise Refusal(
            RefusalCode.COHORT,
            f"statistics of {request.cohort} site(s) were asked for; this site takes part from {policy.minimum_cohort}",
        )
    if request.secure is not None:
        check_session(policy, request.secure, noised=True)
    limits = ((policy.statistics.epsilon, "release"), (policy.epsilon_per_run, "run"), (policy.epsilon, "data set"))
    check_guarantee(policy, "statistics at epsilon", request.epsilon, request.delta, examples, limits)


def _check_who(policy: Policy, request: StatisticsRequest) -> None:
    if policy.federations is not None and request.federation not in policy.federations:
        raise Refusal(
            RefusalCode.FEDERATION,
            f"federation {request.federation!r} asked for statistics; this site allows "
            f"{listed(policy.federations, 'none')}",
        )
    if request.workload not in policy.workloads or not _combined(policy, request):
        raise Refusal(
            RefusalCode.WORKLOAD,
            f"statistics of workload {request.workload!r} were asked for by federation {request.federation!r}, to "
            "which this site does not allow it",
        )


def _combined(policy: Policy, request: StatisticsRequest) -> bool:
    """Whether some combination has this federation and workload; strategies have no part in statistics."""
    return policy.combinations is None or any(
        rule.federation == request.federation and request.workload in (rule.workloads or policy.workloads)
        for rule in policy.combinations
    )
