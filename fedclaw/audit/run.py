"""One audit from its settings to its report."""

import logging
import secrets
import time
from collections.abc import Iterator, Mapping

import numpy as np

from fedclaw.audit.findings import AuditOptions, AuditReport, Finding, conclude
from fedclaw.audit.mechanism import enough_trials, examine, run_trials
from fedclaw.audit.probe import probes
from fedclaw.audit.subject import Subject
from fedclaw.audit.training_run import AuditedClaim, attacked_run, membership, one_run, toss
from fedclaw.errors import UsageError
from fedclaw.privacy.claims import Claim
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.mechanisms.mechanism import Mechanism
from fedclaw.progress import quieter
from fedclaw.protocol.terms import DataUnit, Relation
from fedclaw.server.settings import RunSettings
from fedclaw.site.device import set_threads
from fedclaw.site.service import SiteService

log = logging.getLogger(__name__)

_NO_CLAIM_DELTA = 1e-5
_WEIGHT = 4
# Of the attack that sees most, beside the others.


def audit_run(
    settings: RunSettings, sites: Mapping[str, SiteService], options: AuditOptions | None = None
) -> AuditReport:
    """Attack and measure what `settings` claim, at `sites`. Raises UsageError or PrivacyError if that cannot be done.

    The sites' ledgers, policies and logs are neither read nor written. What the attacks find out is made from the
    sites' data without noise: a report on real data stays where the data is.
    """
    # What sites and the server tell their operators of each round is of no interest in thousands of them.
    with quieter(logging.ERROR, "fedclaw.site", "fedclaw.server"):
        return _audit(Subject(settings, sites), options or AuditOptions())


def _audit(subject: Subject, chosen: AuditOptions) -> AuditReport:
    began = time.monotonic()
    generator = np.random.default_rng(secrets.randbits(128))
    mechanism = mechanism_of(subject.record())
    claim, asked = claim_of(mechanism, subject.unit), mechanism.guarantee(trust_server_noise=True)
    findings: list[Finding] = []
    if chosen.rows_together == 1:
        findings = probe_mechanisms(subject, chosen, generator)
    else:
        claim = _beyond(claim, subject, chosen.rows_together)
    notes = _notes(subject, chosen, claim is not None)
    if claim is not None:
        findings += attack_run(subject, claim, chosen, generator)
    return conclude(
        findings,
        epsilon=asked.epsilon if asked else None,
        delta=asked.delta if asked else _NO_CLAIM_DELTA,
        confidence=chosen.confidence,
        alarm=chosen.alarm,
        notes=notes,
        seconds=time.monotonic() - began,
    )


def claim_of(mechanism: Mechanism, unit: DataUnit = "example") -> AuditedClaim | None:
    """What a whole run claims for single units of a site's data; None if its unit is a site."""
    asked = mechanism.guarantee(trust_server_noise=True)
    if asked is None:
        return AuditedClaim("the run, no privacy claimed", None, _NO_CLAIM_DELTA)
    if not (mechanism.noises_steps or mechanism.takes_one_step):
        return None
    noise = "local noise" if mechanism.noises_steps else "noise on the mean"
    return AuditedClaim(f"the run, {noise}, unit one {unit}", asked.epsilon, asked.delta)


def _beyond(claim: AuditedClaim | None, subject: Subject, rows: int) -> AuditedClaim:
    """What a run whose unit is an example claims for a person of so many rows: nothing. Raises UsageError."""
    if claim is None or claim.epsilon is None or subject.unit != "example":
        raise UsageError(
            f"rows_together={rows}: it attacks a guarantee for rows, and there is none here; leave it out (1)"
        )
    return AuditedClaim(f"{claim.label}, by persons of {rows} rows", None, claim.delta)


def probe_mechanisms(subject: Subject, options: AuditOptions, generator: np.random.Generator) -> list[Finding]:
    """What each mechanism of the configuration lets through by itself. Raises PrivacyError."""
    findings: list[Finding] = []
    for probe in probes(subject, generator):
        # The risks are shared out when all checks are there: about a tenth is left to each, a quarter to guesses.
        count = enough_trials(probe, options.alarm / 10, (1 - options.confidence) / 4, options.trials)
        log.info("probing, %d releases: %s", count, probe.label)
        findings += examine(probe, run_trials(probe, count))
    return findings


def attack_run(
    subject: Subject, claim: AuditedClaim, options: AuditOptions, generator: np.random.Generator
) -> list[Finding]:
    """What a whole run of the configuration tells about single units of the sites' data. Raises PrivacyError."""
    rounds = min(subject.settings.rounds, options.attacked_rounds or subject.settings.rounds)
    tossed = toss(subject, options.canaries, options.examples, generator, options.rows_together)
    log.info("attacking a run of %d rounds with %d canaries", rounds, options.canaries)
    set_threads(0)
    shown = attacked_run(subject, tossed, rounds)
    planted, own = shown.planted, ~shown.planted
    present, family = shown.present[planted], shown.family
    found = [
        one_run(claim, family, shown.by_gradient[planted], present, "gradients", _WEIGHT),
        one_run(claim, family, shown.by_loss[planted], present, "loss"),
    ]
    if options.rows_together > 1:
        return found
    for scores, how in ((shown.by_loss, "loss"), (shown.by_gradient, "gradients")):
        attack = membership(claim, scores[own], shown.present[own], generator, how)
        found += [attack] if attack is not None else []
    return found


def _notes(subject: Subject, options: AuditOptions, attacked: bool) -> tuple[str, ...]:
    settings = subject.settings
    notes = list(_attacked(subject)) if options.rows_together == 1 else []
    if options.rows_together > 1:
        notes.append(
            f"The canaries are persons with {options.rows_together} rows each, all alike. The guarantee is for one row "
            "and does not cover them: a bound above its epsilon is no fault, and says what it is worth to them."
        )
    if not attacked:
        notes.append(
            "The unit is a site, of which there are few: whole runs were not attacked, the mechanism was probed with a "
            "whole site as the canary."
        )
    elif options.attacked_rounds is not None and options.attacked_rounds < settings.rounds:
        notes.append(
            f"The attacked run had {options.attacked_rounds} of {settings.rounds} rounds, with the noise that keeps so "
            "many within the same epsilon."
        )
    return tuple(notes)


def _attacked(subject: Subject) -> Iterator[str]:
    """What is promised, and so what was attacked, in the words of every document."""
    mechanism = mechanism_of(subject.record())
    if mechanism.guarantee(trust_server_noise=True) is None:
        return
    if mechanism.clips_updates and not mechanism.noises_steps:
        yield f"Attacked: {Claim('site', 'zero-out').protects}"
        return
    by_relation: dict[Relation, list[str]] = {}
    for name in subject.sites:
        by_relation.setdefault(subject.relation(name), []).append(name)
    for relation, names in by_relation.items():
        where = f" ({', '.join(names)})" if len(by_relation) > 1 else ""
        yield f"Attacked{where}: {Claim(subject.unit, relation).protects}"
