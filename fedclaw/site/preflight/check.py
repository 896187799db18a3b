"""What a site would do if its client were started now: for `python -m fedclaw.client site=… check`.

Everything is read and nothing is written, and nobody is connected to. What keeps the client from starting is found
out of the same files by the same checks, but told together, after what the policy allows.

`what_if` says what would happen if a server asked for a run: whether the site lets it in, what it would cost, what
would be left. The question is put to the site's own service, as a server would put it, and answered by the code that
answers servers, up to where training would begin: policy, combinations, budgets, agreements, the ledger's content. The
ledger is a copy in memory, so nothing is charged. It is for a run with this site's own noise (or none), of the
workload's default model.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from flwr.app import Message, MessageType

from fedclaw.errors import FedClawError, UsageError
from fedclaw.identity import pki
from fedclaw.identity.descriptor import DESCRIPTOR_FILE, load_descriptor
from fedclaw.identity.site_home import SITE_CERTIFICATE, SITE_KEY, SiteKeys, renew_advice
from fedclaw.learning.registry import STRATEGIES, WORKLOADS, installed, strategy_class
from fedclaw.privacy.accounting import NoiseEvent
from fedclaw.privacy.claims import Claim
from fedclaw.protocol.message_identity import assume_server_identity
from fedclaw.protocol.questions import Outgoing, question, questions
from fedclaw.protocol.refusal import Refusal
from fedclaw.protocol.terms import LocalTraining, Plan, PrivacyRequest
from fedclaw.site.directory import open_service, personal_files, site_store
from fedclaw.site.journal.history import Budget, History, Index
from fedclaw.site.journal.ledger import Ledger
from fedclaw.site.journal.outbound import OutboundLog
from fedclaw.site.journal.reconciliation import (
    SiteJournal,
    agreements,
    check,
    check_journal,
    check_mark,
    ledger_file,
    losses,
    open_journal,
    outbound_file,
)
from fedclaw.site.journal.spending import DataSetSpending
from fedclaw.site.policy.policy import DEFAULT_DELTA, TEST, Policy, sentences
from fedclaw.site.preflight.question import Question
from fedclaw.site.privacy_budget import charge_times, check_frequency, evaluation_times, is_limited
from fedclaw.site.service import SiteService
from fedclaw.site.settings import SiteSettings, require_name
from fedclaw.site.shared_rows import note_on_shared_rows

FAR_OFF = 0.1
"""Share of the true number by which a declared one may be off before its operator is told."""
_CONSTANTS = "those that the federation agreed on"


@dataclass
class Findings:
    """What was found: facts, what the policy allows, what deserves attention, and what keeps the client off."""

    facts: list[str] = field(default_factory=list)
    allowed: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    failure: FedClawError | None = None
    """The first thing that keeps the client from starting, but for a missing enrolment, which is a warning."""

    def attempt(self, part: Callable[[], None]) -> None:
        """Do `part`; if it cannot be done, go on with the rest."""
        try:
            part()
        except FedClawError as error:
            self.failure = self.failure or error


@dataclass(frozen=True)
class Checked:
    """A site as `examine` found it. `service` has a copy of the ledger; `journal` is None before the first charge."""

    settings: SiteSettings
    findings: Findings
    service: SiteService
    journal: SiteJournal | None


def examine(root: Path, settings: SiteSettings) -> Checked:
    """Find out all about the site at `root`. Raises DataError or UsageError for data that cannot be read."""
    findings = Findings()
    federation = _identity(root, settings, findings)
    service = open_service(root, settings, federation or "", durable=False)
    _data(service, findings)
    policy = settings.policy.serving(settings.data_set)
    findings.allowed += sentences(policy, settings.data_set, service.workload.task)
    _contradictions(policy, service, federation, findings)
    findings.attempt(lambda: _encryption(root, settings, findings))
    journal: list[SiteJournal] = []
    findings.attempt(lambda: _journal(root, settings, service, findings, journal))
    return Checked(settings, findings, service, journal[0] if journal else None)


def _identity(root: Path, settings: SiteSettings, findings: Findings) -> str | None:
    """The federation's name, if the site knows one."""
    federation = load_descriptor(root / DESCRIPTOR_FILE) if (root / DESCRIPTOR_FILE).exists() else None
    missing = [file for file in (DESCRIPTOR_FILE, SITE_KEY, SITE_CERTIFICATE) if not (root / file).is_file()]
    known = f"site {settings.name}" if federation is None else f"site {settings.name} of federation {federation.name}"
    findings.facts.append(known if federation is None else f"{known}, server {federation.address}")
    if missing:
        findings.warnings.append(f"not enrolled yet: no {', no '.join(missing)}; {_enrol(root, settings, missing)}")
        return None if federation is None else federation.name

    def keys() -> None:
        opened = SiteKeys.open(root)
        require_name(root, settings, opened.site_name)
        days, until = pki.days_left(opened.certificate), opened.certificate.not_valid_after_utc
        findings.facts.append(f"certificate valid until {until:%Y-%m-%d}, for {days:.0f} more days")
        if days <= pki.WARN_DAYS:
            findings.warnings.append(f"the certificate expires in {days:.0f} days; {renew_advice(root)}")

    findings.attempt(keys)
    return None if federation is None else federation.name


def _encryption(root: Path, settings: SiteSettings, findings: Findings) -> None:
    store = site_store(root, settings)
    store.check([path for path, _ in personal_files(root)])
    if store.keys is not None:
        findings.facts.append(f"what is made of the data is encrypted at rest, under the key {store.keys.id.hex()}")


def _enrol(root: Path, settings: SiteSettings, missing: list[str]) -> str:
    if DESCRIPTOR_FILE in missing or SITE_KEY in missing:
        return (
            "get federation.json from the coordinator, then run: python -m fedclaw.provision request "
            f"site={root} name={settings.name} descriptor=FILE"
        )
    return (
        "send the request to the coordinator, then run: python -m fedclaw.provision install "
        f"site={root} certificate=FILE"
    )


def _data(service: SiteService, findings: Findings) -> None:
    train, test = service.data.train, service.data.test
    findings.facts.append(
        f"{len(train)} training and {len(test) if test else 0} test examples, device {service.device}"
    )
    for what, table in {"training data": train, "test data": test}.items():
        if table is None or not len(table):
            does = ", so this site does not evaluate" if service.test_examples == 0 and table is test else ""
            findings.facts.append(f"{what}: there is none{does}")
        else:
            findings.facts += [f"{what}: {note}" for note in service.workload.schema.notes(table)]
    findings.facts.append(f"training with noise: {Claim(train.unit, service.relation).protects}")
    _declared(service, findings)


def _declared(service: SiteService, findings: Findings) -> None:
    """What the operator should know of the numbers that are declared: the true ones stay here."""
    data, test = service.data, service.data.test
    numbers = {
        "public_examples": (data.public_examples, data.train.units),
        "public_test_examples": (data.public_test_examples, 0 if test is None else test.units),
    }
    for name, (said, present) in numbers.items():
        if said is None:
            continue
        findings.facts.append(f"{name}: {said} is declared and told in the place of the true number")
        if abs(said - present) > FAR_OFF * present:
            findings.warnings.append(
                f"{name}: {said} is declared, and there are {present}: what is worked out by it is off by as much "
                "(sampling rate, batch size, weight, means of metrics), and no guarantee is. Once charged it cannot be "
                "changed; before that, change it only by what was known before the data was looked at"
            )
    if data.public_test_examples is not None and service.policy.metrics_epsilon is None:
        findings.warnings.append(
            "public_test_examples is declared and the policy sets no metrics_epsilon: no metrics leave, since without "
            "noise they would tell the true number"
        )


def _contradictions(policy: Policy, service: SiteService, federation: str | None, findings: Findings) -> None:
    """What the policy and the rest of the site's directory do not agree on."""
    warn = findings.warnings.append
    for name in unknown_names(policy):
        warn(f"nothing that is called {name!r} is installed here: a typing error?")
    if service.workload.name not in policy.workloads:
        warn(f"the policy does not allow this site's own workload, {service.workload.name}: nothing can run")
    if federation is not None and not allows_federation(policy, federation):
        warn(f"the policy does not allow the federation that this site is enrolled in, {federation}: nothing can run")
    examples, test = service.examples, service.data.test
    if policy.delta * examples >= 1:
        warn(f"delta {policy.delta:g} is not below one over the number of training examples; it protects nobody")
    if test is not None and service.test_units < policy.minimum_test_examples:
        warn(f"the test data has fewer {service.data.train.unit}s than minimum_test_examples: no metrics leave")
    task = service.workload.task
    if policy.metrics and not set(policy.shared_metrics) & {*task.metrics, *task.CLAUSES}:
        warn(f"the policy lets no metric of a {task.name} task leave; it has {', '.join(task.metrics)}")
    if test is not None and (told := note_on_shared_rows(policy, service.shared_test_rows, len(test))):
        warn(told)
    if service.workload.schema.data_dependent and not policy.allow_data_dependent_preprocessing:
        warn("the schema standardises by this site's own statistics, which the policy does not allow to private runs")


def unknown_names(policy: Policy) -> list[str]:
    """Workloads and strategies that the policy allows and that are not installed."""
    strange = set(policy.workloads) - installed(WORKLOADS) | set(policy.strategies) - installed(STRATEGIES)
    return sorted(strange)


def allows_federation(policy: Policy, federation: str) -> bool:
    """Whether that federation may ask for anything."""
    listed = policy.federations is None or federation in policy.federations
    combined = policy.combinations is None or any(rule.federation == federation for rule in policy.combinations)
    return listed and combined


def _journal(
    root: Path, settings: SiteSettings, service: SiteService, findings: Findings, opened: list[SiteJournal]
) -> None:
    """What is left of each budget. Raises LedgerError if a book is damaged, or the two do not belong together."""
    policy = settings.policy
    served = [settings.data_set, *([settings.data_set + TEST] if policy.metrics_epsilon is not None else [])]
    spent: dict[str, DataSetSpending] = {}
    if ledger_file(root).exists():
        journal = open_journal(root)
        opened.append(journal)
        check_journal(journal)
        findings.warnings += losses(journal.index)
        spent = {item.name: item for item in journal.spending().data_sets}
        findings.attempt(lambda: _copy(root, journal.index, service, findings))
    elif outbound_file(root).exists():
        with OutboundLog(outbound_file(root), read_only=True) as outbound:
            # The ledger may have been removed; then what left tells that it was there.
            check(Index(), outbound.entries())
    if not ledger_file(root).exists():
        check_mark(root, None)
    for name in served:
        budget = policy.budget_of(name)
        unspent = DataSetSpending(name, Budget(budget.epsilon, budget.delta), 0.0, (), ())
        spent.setdefault(name, unspent)
    findings.facts += [_spent(item, served=item.name in served) for item in spent.values()]
    if opened:
        findings.facts += agreements(opened[0].index)
    if opened and is_limited(policy):
        _next_round(policy, opened[0], findings)


def _spent(item: DataSetSpending, *, served: bool) -> str:
    name = item.name if served else f"{item.name} (not served now)"
    rest = ", without a limit" if item.left is None else f", {item.left:.3f} of {item.budget.epsilon:g} left"
    if not item.charges:
        return f"data set {name}: nothing spent yet{rest}"
    spent = "without bound" if math.isinf(item.epsilon) else f"epsilon {item.epsilon:.3f}"
    return (
        f"data set {name}: spent {spent} at delta {item.budget.delta:g} by {len(item.runs)} run(s) in {item.rounds} "
        f"round(s){rest}"
    )


def _copy(root: Path, index: Index, service: SiteService, findings: Findings) -> None:
    """Give the service a copy of the site's ledger. Raises what the client would that opens it."""
    name, content, data = service.ledger.data_set, service.data.fingerprint, service.data
    owner = index.owners.get(content, name)
    if owner != name:
        raise UsageError(
            f"the training data has been charged as the data set {owner!r}, so its budget cannot begin again as "
            f"{name!r}; write data.name: {owner} into site.yaml"
        )
    service.ledger.close()
    service.ledger = Ledger.copied(ledger_file(root), name, content, data.public_examples)
    service.ledger.check_declared(name, data.public_examples)
    service.ledger.check_declared(name + TEST, data.public_test_examples)
    service.ledger.check_unit(service.data.train.unit)
    if index.contents.get(name, content) != content:
        findings.facts.append(f"data set {name}: its content has changed since it was last charged; the budget goes on")


def _next_round(policy: Policy, journal: SiteJournal, findings: Findings) -> None:
    try:
        check_frequency(policy, charge_times(journal.entries, journal.settings.data_set))
        if policy.metrics_epsilon is None:
            check_frequency(policy, evaluation_times(journal.outbound))
    except Refusal as refusal:
        findings.warnings.append(f"a round would be refused now: {refusal.reason}")


def what_if(checked: Checked, asked: Question) -> list[str]:
    """The answer, in sentences."""
    if checked.findings.failure is not None:
        return [f"Such a run would be refused: the client does not start ({checked.findings.failure})."]
    site = checked.service
    site.federation = site.federation or _any_federation(site)
    if site.workload.schema.needs_constants:
        # What a release of statistics would bring; it changes no figure here.
        site.preprocessing = _CONSTANTS
    spent = _charged(checked)
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


def _charged(checked: Checked) -> History:
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
