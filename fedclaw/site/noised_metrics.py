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
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch

from fedclaw.errors import LedgerError, PrivacyError
from fedclaw.learning.tasks.base import LOSS, BoundedSum, Sums
from fedclaw.learning.workload import Workload, doubles
from fedclaw.privacy.accounting import NoiseEvent, calibrate
from fedclaw.privacy.noise import GaussianSource
from fedclaw.protocol.plan import Plan, Receipt, Refusal, RefusalCode
from fedclaw.site.journal.ledger import Ledger, Reservation
from fedclaw.site.policy.policy import DataSetBudget, Policy
from fedclaw.site.privacy_budget import Account, Asking, Due, check_affordable, reserve
from fedclaw.site.site import Site

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(outputs, targets) -> mean loss of a batch."""


def metrics_mechanism(policy: Policy) -> NoiseEvent:
    """One evaluation, as the ledger counts it. Raises Refusal when no noise makes it cost so little."""
    assert policy.metrics_epsilon is not None
    try:
        noise = calibrate(policy.metrics_epsilon, _budget(policy).delta, 1.0, 1)
    except PrivacyError as error:
        raise Refusal(
            RefusalCode.METRICS, "this site's policy allows metrics so little that no noise is enough"
        ) from error
    return NoiseEvent(sample_rate=1.0, noise_multiplier=noise, steps=1)


def check_payable(site: Site, plan: Plan, asking: Asking) -> None:
    """Raise the Refusal that `pay_for_metrics` would, and charge nothing."""
    check_affordable(site, _due(site, plan, asking))


def pay_for_metrics(site: Site, plan: Plan, asking: Asking) -> tuple[Reservation, Receipt]:
    """Charge one evaluation to the test data, durably, before it is done, and say what it cost. Raises Refusal."""
    due, mechanism = _due(site, plan, asking), metrics_mechanism(site.policy)
    budget, ledger = due.account.budget, due.account.ledger
    charge = reserve(site, due)
    run = ledger.spent(budget.delta, run=plan.run, federation=plan.federation)
    return charge, Receipt(
        mechanism="metrics",
        sampler="poisson",
        accountant="pld",
        sample_rate=mechanism.sample_rate,
        steps=mechanism.steps,
        noise_multiplier=mechanism.noise_multiplier,
        max_grad_norm=0.0,
        delta=budget.delta,
        rounds=ledger.rounds(plan.run, plan.federation),
        **Receipt.figures(run, ledger.spent(budget.delta), budget.epsilon),
        ledger_head=ledger.head(),
        ledger_losses=ledger.losses(),
    )


def _due(site: Site, plan: Plan, asking: Asking) -> Due:
    return Due.of_plan(site, plan, asking, metrics_mechanism(site.policy), _account(site), "metrics")


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


def deviation_of(policy: Policy, sums: Iterable[BoundedSum]) -> float:
    """Of the noise in each number of these sums, where they leave together: their sensitivities add up in L2."""
    return metrics_mechanism(policy).noise_multiplier * math.sqrt(sum(own.sensitivity**2 for own in sums))


def noised(policy: Policy, sums: Mapping[str, BoundedSum], examples: int, source: GaussianSource) -> Sums:
    """What may leave of bounded sums over so many examples: the same with noise, each number in its own unit.

    A number is rounded to float32 and cut off at what it can be without noise, which costs nothing: it is done to the
    noised value. An array is not: cut off cell by cell it would add up to more than there is.
    """
    if not sums:
        return Sums(noised=True)
    deviation = deviation_of(policy, sums.values())
    values = source.add_([torch.from_numpy(own.values.astype(np.float64)) for own in sums.values()], deviation)
    numbers, arrays = {}, {}
    for (name, own), value in zip(sums.items(), values, strict=True):
        if own.values.ndim:
            arrays[name] = value.numpy()
        else:
            number = value.to(torch.float32).item()
            numbers[name] = min(max(number, own.least * examples), own.most * examples) * own.unit
    return Sums(numbers, arrays=arrays, deviation=deviation, noised=True)


def _budget(policy: Policy) -> DataSetBudget:
    return policy.metrics_budget or DataSetBudget(epsilon=None)
