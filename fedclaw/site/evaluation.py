"""How a site answers an evaluation: the metrics that its policy lets leave, weighted by its test examples.

With noise, what one test example can add to a sum is bounded, so the sum can be private.

Released is the vector of the permitted sums over the test set, each with its sensitivity (`fedclaw.learning.tasks`):
losses divided by the bound that each is cut off at, correct answers, errors by the target's range (one example adds at
most 1 to each of these), histograms of scores by class (one example adds 1 to one cell of each). One test example
there or not moves the whole vector by at most the L2 norm s of those sensitivities, so N(0, (noise multiplier
x s)^2) in each makes it one Gaussian mechanism (Dwork, Roth 2014, appendix A), which the ledger accounts as such on the
test data, NAME/test.
Unit: a test example, or a person where the data knows them: a person adds, and counts for, as many examples as the
schema's `rows_per_person`, its first ones, over again in turn where it has fewer; so the number of examples is made by
that of persons, and a person moves the vector by so many times s.
Relation: zero-out, while the number of units is public, which is sent as it is; where the operator has declared one,
that is what is sent, and the relation is add-or-remove (`fedclaw.privacy.claims`): then metrics leave with noise alone,
since sums without it tell how many there are.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from flwr.app import ConfigRecord, MessageType, MetricRecord

from fedclaw.errors import DataError, LedgerError, PrivacyError
from fedclaw.learning.tasks.base import LOSS, BoundedSum, Sums, Task
from fedclaw.learning.tasks.means import MOST_LOSS
from fedclaw.learning.workload import Workload, doubles
from fedclaw.privacy.mechanisms.local_noise import Doubles, OwnNoise
from fedclaw.privacy.noise import GaussianSource
from fedclaw.privacy.provenance import Bounded, Part, Permitted, Raw, Released
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
from fedclaw.protocol.receipt import Receipt
from fedclaw.protocol.refusal import Refusal, RefusalCode
from fedclaw.protocol.terms import Plan
from fedclaw.site.device import one_by_one
from fedclaw.site.journal.ledger import Budget, Ledger
from fedclaw.site.pipeline import PlanAnswer, ReplyRecords
from fedclaw.site.policy.checks import permitted_metrics
from fedclaw.site.policy.policy import TEST, Policy
from fedclaw.site.privacy_budget import Account, Asking, Due, check_affordable, check_evaluation
from fedclaw.site.site import Site, is_prepared, prepare, sent_arrays
from fedclaw.site.strategy_client import personal_parameters

EVALUATION_BATCH = 4096

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(outputs, targets) -> mean loss of a batch."""

BoundedSums = Mapping[str, BoundedSum]
"""Of the test examples, by name."""


@dataclass
class EvaluationAnswer(PlanAnswer[Sums | BoundedSums, Sums]):
    """Metrics of parameters on the site's test data, as the sums that they are made of (`fedclaw.learning.tasks`).

    Where the policy has them noised they are paid for, on the test data, and leave within a bound; else they leave as
    they are, if it names `metrics` and no `metrics_epsilon`, and the outbound log tells how often there was one.
    """

    kind: ClassVar[str] = MessageType.EVALUATE
    masked: ClassVar[bool] = False

    @property
    def _is_noised(self) -> bool:
        return self.site.policy.metrics_epsilon is not None and bool(self._wanted or self._bins)

    def prepare(self) -> Due | None:
        """See Answering."""
        site, plan = self.site, self.asked
        if site.data.test is None:
            raise Refusal(RefusalCode.METRICS, "this site holds no test data, so it does not evaluate")
        self._examples = site.test_examples
        self._wanted, self._bins = permitted(site.policy, site.workload.task, plan, site.test_units)
        parameters = personal_parameters(site, plan, sent_arrays(self.content, ARRAYS))
        self._model = site.model(plan.model, parameters).eval()
        due = due_for_metrics(site, self.asking) if self._is_noised else None
        if due is None:
            self._check_exact()
        elif not is_prepared(site, plan.preprocessing):
            check_affordable(site, due)
        prepare(site, plan.preprocessing)
        return due

    def _check_exact(self) -> None:
        """Raise Refusal unless metrics may leave as they are, now."""
        if self.site.data.public_test_examples is not None and (self._wanted or self._bins):
            raise Refusal(
                RefusalCode.METRICS,
                "this site's number of test examples is declared (public_test_examples), and metrics without noise "
                "would tell the true one; they leave with noise alone, and its policy sets no metrics_epsilon",
            )
        if not self.site.is_tested_on_held_out_data:
            raise Refusal(
                RefusalCode.METRICS,
                "this site's test data is not held out from its training data, so its metrics do not leave as they are",
            )
        check_evaluation(self.site.policy, self.site.outbound)

    def answer(self, charge: str) -> Part[Sums | BoundedSums]:
        """See Answering."""
        site, wanted, bins = self.site, self._wanted, self._bins
        if not wanted and not bins:
            return Released(Sums())
        if not self._is_noised:
            return Raw(exact_sums(site.workload, wanted, bins, *_outputs(site, self._model)))
        inputs, targets = site.on_device("test")
        outputs = one_by_one(self._model, inputs)
        sums = bounded_sums(site.policy, site.workload, wanted, bins, outputs, targets)
        return bounded_together(sums, site.examples_of_test_unit)

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
        return {RECEIPT: ConfigRecord({JSON: metrics_receipt(self.site, self.asking).model_dump_json()})}


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


def _outputs(site: Site, model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = site.on_device("test")
    with torch.no_grad():
        return torch.cat([model(part) for part in torch.split(inputs, EVALUATION_BATCH)]), targets


def metrics_mechanism(policy: Policy) -> OwnNoise:
    """One evaluation's noise. Raises Refusal when none makes it cost so little."""
    assert policy.metrics_epsilon is not None
    try:
        return OwnNoise.calibrated(policy.metrics_epsilon, policy.budget_of(TEST).delta)
    except PrivacyError as error:
        raise Refusal(
            RefusalCode.METRICS, "this site's policy allows metrics so little that no noise is enough"
        ) from error


def due_for_metrics(site: Site, asking: Asking) -> Due:
    """What one evaluation is charged to the test data. Raises Refusal."""
    event = metrics_mechanism(site.policy).event
    return Due(asking, event, _account(site), asking.remaining(site.policy, "metrics"))


def metrics_receipt(site: Site, asking: Asking) -> Receipt:
    """What an evaluation cost that was just charged."""
    account, event = _account(site), metrics_mechanism(site.policy).event
    assert site.data.test is not None
    return Receipt(
        mechanism="metrics",
        unit=site.data.test.unit,
        relation=site.test_relation,
        sampler="poisson",
        accountant="pld",
        sample_rate=event.sample_rate,
        steps=event.steps,
        noise_multiplier=event.noise_multiplier,
        max_grad_norm=0.0,
        **account.figures(asking, account.budget.delta),
    )


def _account(site: Site) -> Account:
    """That of the test data; of the training data, where the test data holds rows of it."""
    if not site.is_tested_on_held_out_data:
        return Account.training(site)
    if site.test_ledger is None:
        raise LedgerError("metrics are to be noised, and the test data has no ledger")
    budget = site.policy.budget_of(TEST)
    return Account(site.test_ledger, Budget(budget.epsilon, budget.delta))


def charged_ledger(site: Site, receipt: str) -> Ledger:
    """The ledger that an answer with this receipt (JSON) was charged to: a message's name may stand in either."""
    noised = json.loads(receipt).get("mechanism") == "metrics"
    return _account(site).ledger if noised and site.test_ledger is not None else site.ledger


def bounded_sums(
    policy: Policy,
    workload: Workload,
    wanted: Sequence[str],
    bins: int | None,
    outputs: torch.Tensor,
    targets: torch.Tensor,
) -> dict[str, BoundedSum]:
    """What the test examples add up to, before noise: the task's bounded sums, and that of the loss if it is `wanted`.

    outputs (N, K), targets (N,). A loss is in units of the bound that the policy has it cut off at.
    """
    bound = policy.metrics_loss_bound
    found = workload.task.bounded(wanted, bins, doubles(outputs), targets.detach().cpu().numpy(), bound)
    if LOSS in wanted:
        found[LOSS] = BoundedSum(np.array(_bounded_loss(bound, outputs, targets, workload.loss)), unit=bound)
    return found


def _bounded_loss(bound: float, outputs: torch.Tensor, targets: torch.Tensor, loss: Loss) -> float:
    if not len(targets):
        return 0.0
    # One by one, whatever the workload's loss is: its mean over several would not say what one of them adds.
    alone = torch.func.vmap(lambda output, target: loss(output[None], target[None]))(outputs, targets)
    return float(alone.double().nan_to_num(nan=bound, posinf=bound).clamp(0.0, bound).sum() / bound)


def bounded_together(sums: BoundedSums, examples_of_unit: int = 1) -> Bounded[BoundedSums]:
    """All of them as one vector: their sensitivities add up in L2, and count for each example of a unit."""
    return Bounded(sums, examples_of_unit * math.sqrt(sum(own.sensitivity**2 for own in sums.values())))


def noised(policy: Policy, sums: Part[BoundedSums], examples: int, source: GaussianSource) -> Released[Sums]:
    """What may leave of bounded sums over so many examples: the same with noise, each number in its own unit.

    All are rounded to float32, so that their last bits tell little of what the noise was added to, and a number is cut
    off at what it can be without noise; neither costs anything, as it is done to the noised value. An array is not cut
    off: cell by cell it would add up to more than there is. Raises PrivacyError for sums without a bound.
    """
    mechanism, own = metrics_mechanism(policy), sums.value
    vector = sums.scaled(1.0, lambda found: _flat(found))
    deviation = mechanism.deviation(sums.sensitivity) if isinstance(sums, Bounded) else 0.0
    return mechanism.let_out(vector, source).then(lambda values: _named(values, own, examples, deviation))


def _flat(sums: BoundedSums) -> Doubles:
    return np.concatenate([np.zeros(0), *(own.values.astype(np.float64).reshape(-1) for own in sums.values())])


def _named(vector: Doubles, sums: BoundedSums, examples: int, deviation: float) -> Sums:
    numbers: dict[str, float] = {}
    arrays: dict[str, Doubles] = {}
    ends = np.cumsum([own.values.size for own in sums.values()])
    rounded = vector.astype(np.float32).astype(np.float64)
    for (name, own), values in zip(sums.items(), np.split(rounded, ends[:-1]) if sums else [], strict=True):
        if own.values.ndim:
            arrays[name] = values.reshape(own.values.shape)
        else:
            numbers[name] = min(max(float(values[0]), own.least * examples), own.most * examples) * own.unit
    return Sums(numbers, arrays=arrays, deviation=deviation, noised=True)
