"""What would happen if a server asked for a run: whether the policy lets it in, what it would cost, what would be left.

The very checks, calibration and accounting that a real question meets, on the site's real number of examples, and
nothing is charged. It is for a run with this site's own noise (or none), of the workload's default model.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from fedclaw.federation.plan import LocalTraining, Plan, PrivacyRequest, Refusal
from fedclaw.privacy.accounting import Mechanism
from fedclaw.privacy.history import History
from fedclaw.privacy.policy_checks import check_plan
from fedclaw.site.charging import local_mechanism
from fedclaw.site.check import Checked
from fedclaw.site.question import Question
from fedclaw.site.service import SiteService


def what_if(checked: Checked, question: Question) -> list[str]:
    """The answer, in sentences."""
    site = checked.service
    plan = _plan(site, question)
    try:
        check_plan(site.policy, plan, examples=len(site.data.train), parameters=_size(site, plan))
        mechanism = local_mechanism(site, plan)
    except Refusal as refusal:
        return [f"Such a run would be refused: {refusal.reason}."]
    if mechanism is None:
        return ["Such a run would be accepted, and spend the data set's budget without bound."]
    return _cost(checked, plan, mechanism)


def _plan(site: SiteService, question: Question) -> Plan:
    privacy = None
    if question.epsilon is not None:
        delta = site.policy.delta if question.delta is None else question.delta
        privacy = PrivacyRequest(epsilon=question.epsilon, delta=delta, max_grad_norm=1.0)
    return Plan(
        federation=site.federation or _any_federation(site),
        run="a run that nobody has asked for",
        round=1,
        rounds=question.rounds,
        cohort=question.cohort or site.policy.minimum_cohort,
        workload=site.workload.name,
        schema_digest=site.schema_digest,
        model=site.workload.default_model(),
        strategy=question.strategy_name or site.policy.strategies[0],
        training=LocalTraining(
            # steps= alone is enough: epochs has a default on the command line.
            epochs=question.epochs if question.steps is None else None,
            steps=question.steps,
            batch_size=question.batch_size,
            learning_rate=0.1,
        ),
        privacy=privacy,
    )


def _any_federation(site: SiteService) -> str:
    """Before enrolment: one that the policy allows."""
    combined = [rule.federation for rule in site.policy.combinations or ()]
    return next(iter([*combined, *(site.policy.federations or ())]), "some federation")


def _size(site: SiteService, plan: Plan) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in site.workload.build(plan.model).parameters())


def _cost(checked: Checked, plan: Plan, one_round: Mechanism) -> list[str]:
    policy = checked.service.policy
    spent = checked.books.index.lifetimes.get(checked.settings.data_set) if checked.books else None
    history = spent or History()

    def after(rounds: int) -> float:
        return history.epsilon(policy.delta, also=(_times(one_round, rounds),))

    def by_run(rounds: int) -> float:
        return History().epsilon(policy.delta, also=(_times(one_round, rounds),))

    def fits(rounds: int) -> bool:
        within = policy.epsilon is None or after(rounds) <= policy.epsilon
        return within and (policy.epsilon_per_run is None or by_run(rounds) <= policy.epsilon_per_run)

    said = [
        f"Each of its {plan.rounds} rounds would take {one_round.steps} steps here at sample rate "
        f"{one_round.sample_rate:.4g} with noise multiplier {one_round.noise_multiplier:.3f}."
    ]
    if fits(plan.rounds):
        total = after(plan.rounds)
        left = "" if policy.epsilon is None else f", and {max(0.0, policy.epsilon - total):.3f} would be left"
        spent_in_all = "without bound" if math.isinf(total) else f"epsilon {total:.3f}"
        said.insert(0, f"Such a run would be accepted. It would cost at most epsilon {by_run(plan.rounds):.3f}.")
        said.append(f"After it, {spent_in_all} would be spent on the data set in all{left}.")
        return said
    most = _most(fits, plan.rounds)
    said.insert(
        0,
        "Such a run would be refused in its first round: the budget that is left is not enough."
        if most == 0
        else f"Such a run would be accepted for {most} of its {plan.rounds} rounds; then the budget is not enough.",
    )
    return said


def _times(one_round: Mechanism, rounds: int) -> Mechanism:
    return replace(one_round, steps=one_round.steps * rounds)


def _most(fits: Callable[[int], bool], rounds: int) -> int:
    """The largest number of rounds, below `rounds`, that fits; what they cost together only grows."""
    low, high = 0, rounds
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
