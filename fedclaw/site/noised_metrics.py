"""Evaluation metrics with noise: what one test example can add to a sum is bounded, so the sum can be private.

Released is the vector of the permitted sums over the test set: correct answers (one example adds 0 or 1), losses
divided by the bound that each is cut off at (one example adds something in [0, 1]), and histograms of scores by class
(one example adds 1 to one cell of each). Adding or removing one of the test examples moves k sums and histograms by at
most sqrt(k) in L2 norm, so N(0, (noise multiplier)^2 k) in each makes it one
Gaussian mechanism (Dwork, Roth 2014, appendix A), which the ledger accounts as such on the test data, NAME/test.
Neighbouring: one test example more or less, while their number is public: it is sent as it is.
"""

import json
import math
from collections.abc import Callable

import torch

from fedclaw.errors import LedgerError, PrivacyError
from fedclaw.learning.pooled import Doubles
from fedclaw.privacy.accounting import NoiseEvent, calibrate
from fedclaw.privacy.noise import GaussianSource
from fedclaw.protocol.plan import Plan, Receipt, Refusal, RefusalCode
from fedclaw.site.journal.ledger import Ledger, Reservation
from fedclaw.site.policy.policy import DataSetBudget, Policy
from fedclaw.site.privacy_budget import Account, Asking, Due, check_affordable, reserve
from fedclaw.site.site import Site

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits, targets) -> mean loss of a batch."""


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
    policy: Policy, wanted: tuple[str, ...], logits: torch.Tensor, targets: torch.Tensor, loss: Loss
) -> dict[str, float]:
    """For each metric that is `wanted` (of NOISED_METRICS) the sum of what the test examples add, each in [0, 1].

    logits (N, C), targets (N,). A loss is in units of the bound that it is cut off at.
    """
    sums = {}
    for name in wanted:
        if name == "accuracy":
            sums[name] = float((logits.argmax(dim=1) == targets).sum())
        else:
            sums[name] = _bounded_loss(policy.metrics_loss_bound, logits, targets, loss)
    return sums


def _bounded_loss(bound: float, logits: torch.Tensor, targets: torch.Tensor, loss: Loss) -> float:
    # One by one, whatever the workload's loss is: its mean over several would not say what one of them adds.
    alone = torch.func.vmap(lambda logit, target: loss(logit[None], target[None]))(logits, targets)
    return float(alone.double().nan_to_num(nan=bound, posinf=bound).clamp(0.0, bound).sum() / bound)


def deviation_of(policy: Policy, sums: int, histograms: int = 0) -> float:
    """Of the noise in each number, where so many sums and histograms of scores leave together.

    One example moves each sum by at most 1 and one cell of each histogram by 1, so all of them together by at most the
    root of how many there are.
    """
    return metrics_mechanism(policy).noise_multiplier * math.sqrt(sums + histograms)


def noised_histograms(histograms: Doubles, deviation: float, source: GaussianSource) -> Doubles:
    """Histograms (classes, 2, B) with noise, as they may leave. Not cut off at 0, which would add up over the cells."""
    (values,) = source.add_([torch.from_numpy(histograms)], deviation)
    return values.numpy()


def noised(
    policy: Policy, sums: dict[str, float], examples: int, source: GaussianSource, histograms: int = 0
) -> dict[str, float]:
    """What may leave of `bounded_sums` over so many examples: the same sums with noise, losses in their own unit.

    `histograms` is how many of scores leave beside them. Each sum is rounded to float32 and cut off at what it can be
    without noise, which costs nothing: it is done to the noised value.
    """
    if not sums:
        return {}
    deviation = deviation_of(policy, len(sums), histograms)
    (values,) = source.add_([torch.tensor(list(sums.values()), dtype=torch.float64)], deviation)
    return {
        name: min(max(value, 0.0), float(examples)) * (policy.metrics_loss_bound if name == "loss" else 1.0)
        for name, value in zip(sums, values.to(torch.float32).tolist(), strict=True)
    }


def _budget(policy: Policy) -> DataSetBudget:
    return policy.metrics_budget or DataSetBudget(epsilon=None)
