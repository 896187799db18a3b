"""How a site answers an evaluation: the metrics that its policy lets leave, weighted by its test examples."""

import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedclaw.federation.exchange import ARRAYS, EXAMPLES, JSON, METRICS, RECEIPT, WEIGHT
from fedclaw.federation.plan import Plan, Refusal, RefusalCode
from fedclaw.privacy.policy_checks import permitted_metrics
from fedclaw.site.charging import ABOUT, CHARGE, Asking
from fedclaw.site.client_half import personal_parameters
from fedclaw.site.data import is_prepared, prepare
from fedclaw.site.frequency import check_evaluation
from fedclaw.site.noised_metrics import bounded_sums, check_payable, noised, pay_for_metrics
from fedclaw.site.outbound import OutboundLog
from fedclaw.site.site import Site, sent_arrays
from fedclaw.workload import Table

EVALUATION_BATCH = 4096


def answer_evaluation(
    site: Site, plan: Plan, content: RecordDict, asking: Asking, outbound: OutboundLog | None = None
) -> RecordDict:
    """Metrics x weight of the parameters in `content` on the site's test data. Raises Refusal.

    Where the policy has metrics noised they are paid for first, as `asking` names the question, and a receipt goes with
    them; else `outbound` tells how often there was one.
    """
    test = site.data.test
    if test is None:
        raise Refusal(RefusalCode.METRICS, "this site holds no test data, so it does not evaluate")
    wanted = permitted_metrics(site.policy, plan.metrics, len(test))
    parameters = personal_parameters(site, plan, sent_arrays(content, ARRAYS))
    model = site.model(plan.model, parameters).eval()
    noise = site.policy.metrics_epsilon is not None and bool(wanted)
    if not noise:
        check_evaluation(site.policy, outbound)
    elif not is_prepared(site, plan.preprocessing):
        check_payable(site, plan, asking)
    prepare(site, plan.preprocessing)
    test = site.data.test or test
    if noise:
        charge, receipt = pay_for_metrics(site, plan, asking)
        logits, targets = _logits(site, model, test)
        sums = bounded_sums(site.policy, wanted, logits, targets, site.workload.loss)
        answer = _answer(test, noised(site.policy, sums, len(test), site.source))
        answer[RECEIPT] = ConfigRecord({JSON: receipt.model_dump_json()})
        answer[ABOUT] = ConfigRecord({CHARGE: charge.hash})
        return answer
    values = site.workload.evaluate(*_logits(site, model, test))
    return _answer(test, {name: values[name] * len(test) for name in wanted if name in values})


def _answer(test: Table, sums: dict[str, float]) -> RecordDict:
    return RecordDict({METRICS: MetricRecord({WEIGHT: float(len(test)), EXAMPLES: len(test), **sums})})


def _logits(site: Site, model: torch.nn.Module, test: Table) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = site.on_device("test", test)
    with torch.no_grad():
        return torch.cat([model(part) for part in torch.split(inputs, EVALUATION_BATCH)]), targets
