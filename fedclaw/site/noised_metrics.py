"""Evaluation metrics with noise: what one test example can add to a sum is bounded, so the sum can be private.

Released is the vector of the permitted sums over the test set, each with its sensitivity (`fedclaw.learning.tasks`):
losses divided by the bound that each is cut off at, correct answers, errors by the target's range (one example adds at
most 1 to each of these), histograms of scores by class (one example adds 1 to one cell of each). Adding or removing one
of the test examples moves the whole vector by at most the L2 norm s of those sensitivities, so N(0, (noise multiplier
x s)^2) in each makes it one Gaussian mechanism (Dwork, Roth 2014, appendix A), which the ledger accounts as such on the
test data, NAME/test.
Neighbouring: one test example more or less, while their number is public: it is sent as it is.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from fedclaw.errors import LedgerError, PrivacyError
from fedclaw.learning.tasks.base import LOSS, BoundedSum, Sums
from fedclaw.learning.workload import Workload, doubles
from fedclaw.privacy.mechanisms.local_noise import Doubles, OwnNoise
from fedclaw.privacy.noise import GaussianSource
from fedclaw.privacy.provenance import Bounded, Part, Released
from fedclaw.protocol.plan import Plan
from fedclaw.protocol.receipt import Receipt
from fedclaw.protocol.refusal import Refusal, RefusalCode
from fedclaw.site.journal.ledger import Ledger
from fedclaw.site.policy.policy import DataSetBudget, Policy
from fedclaw.site.privacy_budget import Account, Asking, Due
from fedclaw.site.site import Site

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(outputs, targets) -> mean loss of a batch."""

BoundedSums = Mapping[str, BoundedSum]
"""Of the test examples, by name."""


def metrics_mechanism(policy: Policy) -> OwnNoise:
    """One evaluation's noise. Raises Refusal when none makes it cost so little."""
    assert policy.metrics_epsilon is not None
    try:
        return OwnNoise.calibrated(policy.metrics_epsilon, _budget(policy).delta)
    except PrivacyError as error:
        raise Refusal(
            RefusalCode.METRICS, "this site's policy allows metrics so little that no noise is enough"
        ) from error


def due_for_metrics(site: Site, plan: Plan, asking: Asking) -> Due:
    """What one evaluation is charged to the test data. Raises Refusal."""
    return Due.of_plan(site, plan, asking, metrics_mechanism(site.policy).event, _account(site), "metrics")


def metrics_receipt(site: Site, plan: Plan) -> Receipt:
    """What an evaluation cost that was just charged."""
    account, event = _account(site), metrics_mechanism(site.policy).event
    budget, ledger = account.budget, account.ledger
    run = ledger.spent(budget.delta, run=plan.run, federation=plan.federation)
    return Receipt(
        mechanism="metrics",
        sampler="poisson",
        accountant="pld",
        sample_rate=event.sample_rate,
        steps=event.steps,
        noise_multiplier=event.noise_multiplier,
        max_grad_norm=0.0,
        delta=budget.delta,
        rounds=ledger.rounds(plan.run, plan.federation),
        **Receipt.figures(run, ledger.spent(budget.delta), budget.epsilon),
        ledger_head=ledger.head(),
        ledger_losses=ledger.losses(),
    )


def _account(site: Site) -> Account:
    """That of the test data; of the training data, where the test data holds rows of it."""
    if not site.is_tested_on_held_out_data:
        return Account.training(site)
    if site.test_ledger is None:
        raise LedgerError("metrics are to be noised, and the test data has no ledger")
    budget = _budget(site.policy)
    return Account(site.test_ledger, budget.epsilon, budget.delta)


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
    # One by one, whatever the workload's loss is: its mean over several would not say what one of them adds.
    alone = torch.func.vmap(lambda output, target: loss(output[None], target[None]))(outputs, targets)
    return float(alone.double().nan_to_num(nan=bound, posinf=bound).clamp(0.0, bound).sum() / bound)


def bounded_together(sums: BoundedSums) -> Bounded[BoundedSums]:
    """All of them as one vector: their sensitivities add up in L2."""
    return Bounded(sums, math.sqrt(sum(own.sensitivity**2 for own in sums.values())))


def noised(policy: Policy, sums: Part[BoundedSums], examples: int, source: GaussianSource) -> Released[Sums]:
    """What may leave of bounded sums over so many examples: the same with noise, each number in its own unit.

    A number is rounded to float32 and cut off at what it can be without noise, which costs nothing: it is done to the
    noised value. An array is not: cut off cell by cell it would add up to more than there is. Raises PrivacyError for
    sums without a bound.
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
    for (name, own), values in zip(sums.items(), np.split(vector, ends[:-1]) if sums else [], strict=True):
        if own.values.ndim:
            arrays[name] = values.reshape(own.values.shape)
        else:
            numbers[name] = min(max(float(np.float32(values[0])), own.least * examples), own.most * examples) * own.unit
    return Sums(numbers, arrays=arrays, deviation=deviation, noised=True)


def _budget(policy: Policy) -> DataSetBudget:
    return policy.metrics_budget or DataSetBudget(epsilon=None)
