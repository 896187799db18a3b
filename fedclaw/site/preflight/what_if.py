"""What would happen if a server asked for a run: whether the site lets it in, what it would cost, what would be left.

The question is put to the site's own service, as a server would put it, and answered by the code that answers servers,
up to where training would begin: policy, combinations, budgets, agreements, the ledger's content. The ledger is a copy
in memory, so nothing is charged. It is for a run with this site's own noise (or none), of the workload's default model.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from flwr.app import Message, MessageType

from fedclaw.errors import FedClawError
from fedclaw.learning.registry import strategy_class
from fedclaw.privacy.accounting import NoiseEvent
from fedclaw.protocol.message_identity import assume_server_identity
from fedclaw.protocol.plan import Plan
from fedclaw.protocol.questions import Outgoing, question, questions
from fedclaw.protocol.refusal import Refusal
from fedclaw.protocol.terms import LocalTraining, PrivacyRequest
from fedclaw.site.journal.history import History
from fedclaw.site.policy.policy import DEFAULT_DELTA
from fedclaw.site.preflight.check import Checked
from fedclaw.site.preflight.question import Question
from fedclaw.site.service import SiteService

_CONSTANTS = "those that the federation agreed on"


def what_if(checked: Checked, asked: Question) -> list[str]:
    """The answer, in sentences."""
    if checked.findings.failure is not None:
        return [f"Such a run would be refused: the client does not start ({checked.findings.failure})."]
    site = checked.service
    site.federation = site.federation or _any_federation(site)
    if site.workload.schema.needs_constants:
        # What a release of statistics would bring; it changes no figure here.
        site.preprocessing = _CONSTANTS
    spent = _spent(checked)
    try:
        plan = _plan(site, asked)
        mechanism = site.begin(_message(site, plan))
    except (Refusal, FedClawError) as refusal:
        # The operator may know the figures, which do not leave.
        cause = f" ({refusal.__cause__})" if isinstance(refusal.__cause__, FedClawError) else ""
        return [f"Such a run would be refused: {refusal}{cause}."]
    if mechanism is None:
        return ["Such a run would be accepted, and spend the data set's budget without bound."]
    return [*_cost(checked, plan, mechanism, spent), *_delta(site, asked)]


def _message(site: SiteService, plan: Plan) -> Message:
    """The first question of such a run."""
    strategy = strategy_class(plan.strategy)
    model = site.workload.build(plan.model)
    parameters = {name: value.detach().numpy().copy() for name, value in model.named_parameters()}
    shared = {name: value for name, value in parameters.items() if name not in plan.personal}
    told = {kind: {name: np.zeros_like(value) for name, value in shared.items()} for kind in strategy.broadcast_kinds}
    assume_server_identity(1)
    return questions([1], plan.round, MessageType.TRAIN, question(plan, Outgoing(parameters, broadcast=told)), 1.0)[0]


def _plan(site: SiteService, asked: Question) -> Plan:
    privacy = None
    if asked.epsilon is not None:
        delta = site.policy.delta if asked.delta is None else asked.delta
        privacy = PrivacyRequest(epsilon=asked.epsilon, delta=delta, max_grad_norm=1.0)
    name = asked.strategy_name or site.policy.strategies[0]
    strategy = strategy_class(name)()
    spec = site.workload.default_model()
    return Plan(
        federation=site.federation,
        run="a run that nobody has asked for",
        round=1,
        rounds=asked.rounds,
        cohort=asked.cohort or site.policy.minimum_cohort,
        workload=site.workload.name,
        schema_digest=site.schema_digest,
        model=spec,
        strategy=name,
        strategy_fields=dict(strategy.client_fields()),
        strategy_settings=strategy.model_dump(mode="json"),
        personal=tuple(sorted(strategy.personal(site.shell(spec)))),
        training=LocalTraining(
            # steps= alone is enough: epochs has a default on the command line.
            epochs=asked.epochs if asked.steps is None else None,
            steps=asked.steps,
            batch_size=asked.batch_size,
            learning_rate=0.1,
        ),
        privacy=privacy,
        preprocessing=site.preprocessing,
    )


def _any_federation(site: SiteService) -> str:
    """Before enrolment: one that the policy allows."""
    combined = [rule.federation for rule in site.policy.combinations or ()]
    return next(iter([*combined, *(site.policy.federations or ())]), "some federation")


def _spent(checked: Checked) -> History:
    """What is charged to the data set now."""
    history = History()
    if checked.journal is not None:
        history.include(checked.journal.index.lifetimes.get(checked.settings.data_set, History()))
    return history


def _delta(site: SiteService, asked: Question) -> list[str]:
    if asked.epsilon is None or asked.delta is not None or site.policy.delta == DEFAULT_DELTA:
        return []
    return [
        f"This is at the policy's delta, {site.policy.delta:g}; a server that is told nothing else asks for "
        f"{DEFAULT_DELTA:g}" + (", which is refused here." if site.policy.delta < DEFAULT_DELTA else ".")
    ]


def _cost(checked: Checked, plan: Plan, one_round: NoiseEvent, history: History) -> list[str]:
    policy = checked.service.policy

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
    # Only where the policy allows part of a run: else it was refused as a whole.
    said.insert(
        0, f"Such a run would be accepted for {most} of its {plan.rounds} rounds; then the budget is not enough."
    )
    return said


def _times(one_round: NoiseEvent, rounds: int) -> NoiseEvent:
    return replace(one_round, steps=one_round.steps * rounds)


def _most(fits: Callable[[int], bool], rounds: int) -> int:
    """The largest number of rounds, below `rounds`, that fits; what they cost together only grows."""
    low, high = 0, rounds
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
