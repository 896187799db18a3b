"""What a site would do if its client were started now: for `python -m fedclaw.client site=… check`.

Everything is read and nothing is written, and nobody is connected to. What keeps the client from starting is found
out of the same files by the same checks, but told together, after what the policy allows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fedclaw.errors import FedClawError, UsageError
from fedclaw.identity import pki
from fedclaw.identity.descriptor import DESCRIPTOR_FILE, load_descriptor
from fedclaw.identity.site_home import SITE_CERTIFICATE, SITE_KEY, SiteKeys, renew_advice
from fedclaw.learning.registry import STRATEGIES, WORKLOADS, installed
from fedclaw.protocol.refusal import Refusal
from fedclaw.site.directory import open_service
from fedclaw.site.journal.history import Budget, Index
from fedclaw.site.journal.ledger import Ledger
from fedclaw.site.journal.outbound import OutboundLog
from fedclaw.site.journal.reconciliation import (
    SiteJournal,
    agreements,
    check,
    check_journal,
    check_mark,
    losses,
    open_journal,
)
from fedclaw.site.journal.spending import DataSetSpending
from fedclaw.site.layout import ledger_file, outbound_file
from fedclaw.site.policy.policy import TEST, Policy
from fedclaw.site.policy.sentences import sentences
from fedclaw.site.rate_limit import charge_times, check_frequency, evaluation_times, is_limited
from fedclaw.site.service import SiteService
from fedclaw.site.settings import SiteSettings, require_name
from fedclaw.site.shared_rows import note


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
            findings.facts.append(f"{what}: there is none, so this site does not evaluate")
        else:
            findings.facts += [f"{what}: {note}" for note in service.workload.schema.notes(table)]


def _contradictions(policy: Policy, service: SiteService, federation: str | None, findings: Findings) -> None:
    """What the policy and the rest of the site's directory do not agree on."""
    warn = findings.warnings.append
    for name in unknown_names(policy):
        warn(f"nothing that is called {name!r} is installed here: a typing error?")
    if service.workload.name not in policy.workloads:
        warn(f"the policy does not allow this site's own workload, {service.workload.name}: nothing can run")
    if federation is not None and not allows_federation(policy, federation):
        warn(f"the policy does not allow the federation that this site is enrolled in, {federation}: nothing can run")
    examples, test = len(service.data.train), service.data.test
    if policy.delta * examples >= 1:
        warn(f"delta {policy.delta:g} is not below one over the number of training examples; it protects nobody")
    if test is not None and len(test) < policy.minimum_test_examples:
        warn("the test data has fewer examples than minimum_test_examples: no metrics leave")
    task = service.workload.task
    if policy.metrics and not set(policy.shared_metrics) & {*task.metrics, *task.CLAUSES}:
        warn(f"the policy lets no metric of a {task.name} task leave; it has {', '.join(task.metrics)}")
    if test is not None and (told := note(policy, service.shared_test_rows, len(test))):
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
    name, content = service.ledger.data_set, service.data.fingerprint
    owner = index.owners.get(content, name)
    if owner != name:
        raise UsageError(
            f"the training data has been charged as the data set {owner!r}, so its budget cannot begin again as "
            f"{name!r}; write data.name: {owner} into site.yaml"
        )
    service.ledger.close()
    service.ledger = Ledger.copied(ledger_file(root), name, content)
    if index.contents.get(name, content) != content:
        findings.facts.append(f"data set {name}: its content has changed since it was last charged; the budget goes on")


def _next_round(policy: Policy, journal: SiteJournal, findings: Findings) -> None:
    try:
        check_frequency(policy, charge_times(journal.entries, journal.settings.data_set))
        if policy.metrics_epsilon is None:
            check_frequency(policy, evaluation_times(journal.outbound))
    except Refusal as refusal:
        findings.warnings.append(f"a round would be refused now: {refusal.reason}")
