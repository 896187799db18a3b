"""How a site answers an evaluation: the metrics that its policy lets leave, weighted by its test examples."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedclaw.errors import DataError
from fedclaw.learning.tasks.base import LOSS, Sums, Task
from fedclaw.learning.tasks.means import MOST_LOSS
from fedclaw.learning.workload import Table, Workload, doubles
from fedclaw.privacy.provenance import Part, Permitted, Raw, Released
from fedclaw.protocol.arrays import pack_wire
from fedclaw.protocol.messages import (
    ARRAYS,
    EXAMPLES,
    JSON,
    METRICS,
    RECEIPT,
    SCORE_NOISE,
    SCORES,
    WEIGHT,
)
from fedclaw.protocol.plan import Plan
from fedclaw.protocol.refusal import Refusal, RefusalCode
from fedclaw.site.data import is_prepared, prepare
from fedclaw.site.journal.outbound import OutboundLog
from fedclaw.site.noised_metrics import (
    BoundedSums,
    bounded_sums,
    bounded_together,
    due_for_metrics,
    metrics_receipt,
    noised,
)
from fedclaw.site.outputs import one_by_one
from fedclaw.site.pipeline import Answering, ReplyRecords
from fedclaw.site.policy.checks import permitted_metrics
from fedclaw.site.policy.policy import Policy
from fedclaw.site.privacy_budget import Asking, Due, check_affordable
from fedclaw.site.rate_limit import check_evaluation
from fedclaw.site.site import Site, sent_arrays
from fedclaw.site.strategy_client import personal_parameters

EVALUATION_BATCH = 4096


@dataclass
class EvaluationAnswer(Answering[Sums | BoundedSums, Sums]):
    """Metrics of parameters on the site's test data, as the sums that they are made of (`fedclaw.learning.tasks`).

    Where the policy has them noised they are paid for, on the test data, and leave within a bound; else they leave as
    they are, if it names `metrics` and no `metrics_epsilon`, and `outbound` tells how often there was one.
    """

    site: Site
    plan: Plan
    content: RecordDict
    asking: Asking
    outbound: OutboundLog | None = None
    masked: ClassVar[bool] = False
    _model: torch.nn.Module = field(init=False, repr=False)
    _wanted: tuple[str, ...] = field(init=False, repr=False)
    _bins: int | None = field(init=False, repr=False)
    _examples: int = field(init=False, repr=False)

    @property
    def _is_noised(self) -> bool:
        return self.site.policy.metrics_epsilon is not None and bool(self._wanted or self._bins)

    def prepare(self) -> Due | None:
        """See Answering."""
        site, plan = self.site, self.plan
        if site.data.test is None:
            raise Refusal(RefusalCode.METRICS, "this site holds no test data, so it does not evaluate")
        self._examples = len(site.data.test)
        self._wanted, self._bins = _permitted(site, plan, self._examples)
        parameters = personal_parameters(site, plan, sent_arrays(self.content, ARRAYS))
        self._model = site.model(plan.model, parameters).eval()
        due = due_for_metrics(site, plan, self.asking) if self._is_noised else None
        if due is None:
            self._check_exact()
        elif not is_prepared(site, plan.preprocessing):
            check_affordable(site, due)
        prepare(site, plan.preprocessing)
        return due

    def _check_exact(self) -> None:
        """Raise Refusal unless metrics may leave as they are, now."""
        if not self.site.is_tested_on_held_out_data:
            raise Refusal(
                RefusalCode.METRICS,
                "this site's test data is not held out from its training data, so its metrics do not leave as they are",
            )
        check_evaluation(self.site.policy, self.outbound)

    def answer(self, charge: str) -> Part[Sums | BoundedSums]:
        """See Answering."""
        site, wanted, bins = self.site, self._wanted, self._bins
        assert site.data.test is not None
        if not wanted and not bins:
            return Released(Sums())
        if not self._is_noised:
            return Raw(exact_sums(site.workload, wanted, bins, *_outputs(site, self._model, site.data.test)))
        inputs, targets = site.on_device("test", site.data.test)
        outputs = one_by_one(self._model, inputs)
        return bounded_together(bounded_sums(site.policy, site.workload, wanted, bins, outputs, targets))

    def let_out(self, contribution: Part[Sums | BoundedSums]) -> Released[Sums] | Permitted[Sums]:
        """See Answering."""
        found = contribution.value
        if isinstance(found, Sums):
            return Released(found) if isinstance(contribution, Released) else Permitted(found, "metrics_without_noise")
        sums = contribution.scaled(1.0, lambda _: found)
        return noised(self.site.policy, sums, self._examples, self.site.source)

    def pack(self, left: Sums) -> ReplyRecords:
        """See Answering."""
        record = MetricRecord({WEIGHT: float(self._examples), EXAMPLES: self._examples, **left.numbers})
        record.update({name: list(values) for name, values in left.lists.items()})
        if not left.arrays:
            return {METRICS: record}
        record[SCORE_NOISE] = left.deviation
        return {METRICS: record, SCORES: pack_wire(dict(left.arrays))}

    def beside(self) -> ReplyRecords:
        """See Answering."""
        if not self._is_noised:
            return {}
        return {RECEIPT: ConfigRecord({JSON: metrics_receipt(self.site, self.plan).model_dump_json()})}


def exact_sums(
    workload: Workload, wanted: tuple[str, ...], bins: int | None, outputs: torch.Tensor, targets: torch.Tensor
) -> Sums:
    """What leaves as it is, of outputs (N, K) and targets (N,), for the metrics `wanted`.

    A mean loss beyond MOST_LOSS, which no server takes, is told as MOST_LOSS: the other figures of a model that has
    diverged are worth having.
    """
    own = workload.evaluate(outputs, targets)
    if own.get(LOSS, 0.0) > MOST_LOSS:
        own = {**own, LOSS: MOST_LOSS}
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


def _outputs(site: Site, model: torch.nn.Module, test: Table) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = site.on_device("test", test)
    with torch.no_grad():
        return torch.cat([model(part) for part in torch.split(inputs, EVALUATION_BATCH)]), targets
