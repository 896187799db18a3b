"""How a site answers an evaluation: the metrics that its policy lets leave, weighted by its test examples."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedclaw.learning.pooled import Doubles, Labels, counts_of, histogram_shape, histograms_of, needed_for
from fedclaw.learning.workload import Table
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
from fedclaw.protocol.plan import SCORE_HISTOGRAM, Plan, Refusal, RefusalCode
from fedclaw.site.data import is_prepared, prepare
from fedclaw.site.journal.outbound import OutboundLog
from fedclaw.site.noised_metrics import (
    bounded_sums,
    check_payable,
    deviation_of,
    noised,
    noised_histograms,
    pay_for_metrics,
)
from fedclaw.site.outputs import one_by_one
from fedclaw.site.policy.checks import permitted_metrics
from fedclaw.site.policy.rate_limit import check_evaluation
from fedclaw.site.privacy_budget import Asking
from fedclaw.site.site import Site, sent_arrays
from fedclaw.site.strategy_client import personal_parameters

EVALUATION_BATCH = 4096


def answer_evaluation(
    site: Site, plan: Plan, content: RecordDict, asking: Asking, outbound: OutboundLog | None = None
) -> RecordDict:
    """Metrics x weight of the parameters in `content` on the site's test data. Raises Refusal.

    Where the policy has metrics noised they are paid for first, as `asking` names the question, and a receipt goes with
    them; else `outbound` tells how often there was one. With precision, recall or f1 go the counts by class that they
    are made of; with a clause of its own, the histograms of scores (`fedclaw.learning.pooled`).
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
        logits = one_by_one(model, inputs)
        sums = bounded_sums(site.policy, wanted, logits, targets, site.workload.loss)
        scores = histograms_of(*_numbers(logits, targets), bins) if bins else None
        count = 0 if scores is None else len(scores)
        answer = _answer(test, noised(site.policy, sums, len(test), site.source, count))
        if scores is not None:
            deviation = deviation_of(site.policy, len(sums), count)
            _add_scores(answer, noised_histograms(scores, deviation, site.source), deviation)
        answer[RECEIPT] = ConfigRecord({JSON: receipt.model_dump_json()})
        answer[ABOUT] = ConfigRecord({CHARGE: charge.hash})
        return answer
    logits, targets = _logits(site, model, test)
    values = site.workload.evaluate(logits, targets)
    answer = _answer(test, {name: values[name] * len(test) for name in wanted if name in values})
    answer.metric_records[METRICS].update(counted(wanted, values, logits, targets))
    if bins:
        _add_scores(answer, histograms_of(*_numbers(logits, targets), bins), 0.0)
    return answer


def counted(
    wanted: Sequence[str], values: Mapping[str, float], logits: torch.Tensor, targets: torch.Tensor
) -> dict[str, list[int]]:
    """The counts by class that may leave with the metrics `wanted`, as far as the workload has these (`values`)."""
    needed = needed_for([name for name in wanted if name in values])
    if not needed or logits.dim() != 2:
        return {}
    scores, labels = _numbers(logits, targets)
    counts = counts_of(np.argmax(scores, axis=1), labels, scores.shape[1])
    return {name: counts[name].tolist() for name in needed}


def _permitted(site: Site, plan: Plan, examples: int) -> tuple[tuple[str, ...], int | None]:
    """The metrics that may leave, and the bins of the histograms of scores if these may. Raises Refusal if nothing."""
    shared = site.policy.shared_metrics
    shape = histogram_shape(len(site.workload.schema.labels), plan.score_bins) if plan.score_bins else None
    bins = plan.score_bins if shape and SCORE_HISTOGRAM in shared else None
    asked = tuple(name for name in plan.metrics if name != SCORE_HISTOGRAM)
    if bins and not set(asked) & set(shared):
        return permitted_metrics(site.policy, (SCORE_HISTOGRAM,), examples)[1:], bins
    return permitted_metrics(site.policy, asked, examples), bins


def _add_scores(answer: RecordDict, histograms: Doubles, deviation: float) -> None:
    answer[SCORES] = pack_wire({SCORES: histograms})
    answer.metric_records[METRICS][SCORE_NOISE] = deviation


def _numbers(logits: torch.Tensor, targets: torch.Tensor) -> tuple[Doubles, Labels]:
    return logits.detach().cpu().numpy().astype(np.float64), targets.detach().cpu().numpy().astype(np.int64)


def _answer(test: Table, sums: dict[str, float]) -> RecordDict:
    return RecordDict({METRICS: MetricRecord({WEIGHT: float(len(test)), EXAMPLES: len(test), **sums})})


def _logits(site: Site, model: torch.nn.Module, test: Table) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = site.on_device("test", test)
    with torch.no_grad():
        return torch.cat([model(part) for part in torch.split(inputs, EVALUATION_BATCH)]), targets
