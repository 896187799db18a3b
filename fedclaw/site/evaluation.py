"""How a site answers an evaluation: the metrics that its policy lets leave, weighted by its test examples."""

import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedclaw.errors import DataError
from fedclaw.learning.tasks.base import Sums, Task
from fedclaw.learning.workload import Table, Workload, doubles
from fedclaw.protocol.arrays import pack_wire
from fedclaw.protocol.messages import (
    ABOUT,
    ARRAYS,
    CHARGE,
    EXAMPLES,
    JSON,
    METRICS,
    RECEIPT,
    SCORE_NOISE,
    SCORES,
    WEIGHT,
)
from fedclaw.protocol.plan import Plan, Refusal, RefusalCode
from fedclaw.site.data import is_prepared, prepare
from fedclaw.site.journal.outbound import OutboundLog
from fedclaw.site.noised_metrics import bounded_sums, check_payable, noised, pay_for_metrics
from fedclaw.site.outputs import one_by_one
from fedclaw.site.policy.checks import permitted_metrics
from fedclaw.site.policy.policy import Policy
from fedclaw.site.privacy_budget import Asking
from fedclaw.site.rate_limit import check_evaluation
from fedclaw.site.site import Site, sent_arrays
from fedclaw.site.strategy_client import personal_parameters

EVALUATION_BATCH = 4096


def answer_evaluation(
    site: Site, plan: Plan, content: RecordDict, asking: Asking, outbound: OutboundLog | None = None
) -> RecordDict:
    """Metrics x weight of the parameters in `content` on the site's test data. Raises Refusal.

    Where the policy has metrics noised they are paid for first, as `asking` names the question, and a receipt goes with
    them; else `outbound` tells how often there was one. What leaves are the sums that the task's metrics are made of
    (`fedclaw.learning.tasks`).
    """
    test = site.data.test
    if test is None:
        raise Refusal(RefusalCode.METRICS, "this site holds no test data, so it does not evaluate")
    wanted, bins = _permitted(site, plan, len(test))
    parameters = personal_parameters(site, plan, sent_arrays(content, ARRAYS))
    model = site.model(plan.model, parameters).eval()
    noise = site.policy.metrics_epsilon is not None and bool(wanted or bins)
    if not noise and not site.is_tested_on_held_out_data:
        raise Refusal(
            RefusalCode.METRICS,
            "this site's test data is not held out from its training data, so its metrics do not leave as they are",
        )
    if not noise:
        check_evaluation(site.policy, outbound)
    elif not is_prepared(site, plan.preprocessing):
        check_payable(site, plan, asking)
    prepare(site, plan.preprocessing)
    test = site.data.test or test
    if noise:
        charge, receipt = pay_for_metrics(site, plan, asking)
        inputs, targets = site.on_device("test", test)
        bounded = bounded_sums(site.policy, site.workload, wanted, bins, one_by_one(model, inputs), targets)
        answer = _answer(test, noised(site.policy, bounded, len(test), site.source))
        answer[RECEIPT] = ConfigRecord({JSON: receipt.model_dump_json()})
        answer[ABOUT] = ConfigRecord({CHARGE: charge.hash})
        return answer
    return _answer(test, exact_sums(site.workload, wanted, bins, *_outputs(site, model, test)))


def exact_sums(
    workload: Workload, wanted: tuple[str, ...], bins: int | None, outputs: torch.Tensor, targets: torch.Tensor
) -> Sums:
    """What leaves as it is, of outputs (N, K) and targets (N,), for the metrics `wanted`."""
    own = workload.evaluate(outputs, targets)
    return workload.task.sums(wanted, bins, own, doubles(outputs), targets.detach().cpu().numpy())


def _permitted(site: Site, plan: Plan, examples: int) -> tuple[tuple[str, ...], int | None]:
    """`permitted`, by the site's policy and task."""
    return permitted(site.policy, site.workload.task, plan, examples)


def permitted(policy: Policy, task: Task, plan: Plan, examples: int) -> tuple[tuple[str, ...], int | None]:
    """The metrics that may leave, and the bins of the histograms of scores if these may. Raises Refusal if nothing, or
    for a metric that the task does not have."""
    asked = tuple(name for name in plan.metrics if name not in task.CLAUSES)
    try:
        task.check_metrics(asked)
    except DataError as error:
        raise Refusal(RefusalCode.METRICS, f"{error}; the plan asks for another task's") from error
    known = (*task.metrics, *task.CLAUSES)
    clauses = tuple(name for name in task.CLAUSES if name in policy.shared_metrics)
    bins = plan.score_bins if clauses and task.tally((), plan.score_bins).arrays else None
    if bins and not set(asked) & set(policy.shared_metrics):
        return permitted_metrics(policy, clauses, examples, known)[len(clauses) :], bins
    return permitted_metrics(policy, asked, examples, known), bins


def _answer(test: Table, sums: Sums) -> RecordDict:
    record = MetricRecord({WEIGHT: float(len(test)), EXAMPLES: len(test), **sums.numbers})
    record.update({name: list(values) for name, values in sums.lists.items()})
    answer = RecordDict({METRICS: record})
    if sums.arrays:
        answer[SCORES] = pack_wire(dict(sums.arrays))
        record[SCORE_NOISE] = sums.deviation
    return answer


def _outputs(site: Site, model: torch.nn.Module, test: Table) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = site.on_device("test", test)
    with torch.no_grad():
        return torch.cat([model(part) for part in torch.split(inputs, EVALUATION_BATCH)]), targets
