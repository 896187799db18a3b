"""What an audit found: bounds next to claims, and which of them exceed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from fedclaw.protocol.frozen import Frozen

Kind = Literal["attack", "measurement"]
"""An attack guesses what it should not be able to guess. A measurement looks at the noise and the signal themselves,
and takes the noise to be Gaussian."""


@dataclass(frozen=True)
class Finding:
    """What one check saw: a lower bound on epsilon for whatever confidence is asked."""

    name: str
    subject: str
    """Which mechanism it looked at."""
    kind: Kind
    claimed: float | None
    """The epsilon claimed; None: nothing is."""
    bound: Callable[[float], float]
    """confidence -> epsilon that the mechanism has at least."""
    seen: str
    fault: str
    """What is wrong if the bound exceeds the claim."""


class Check(Frozen):
    """A finding at the confidence of the report."""

    name: str
    subject: str
    kind: Kind
    epsilon_claimed: float | None
    epsilon_lower: float
    """At least this, with the report's confidence."""
    flagged: bool
    """The claim is refuted, at the risk of a false alarm that the report names."""
    seen: str
    fault: str


class AuditReport(Frozen):
    """All checks. `epsilon_lower` is the best attack's bound; all bounds hold together with `confidence`."""

    epsilon_claimed: float | None
    epsilon_lower: float
    delta: float
    confidence: float
    alarm: float
    """The probability that a configuration that keeps its claims is flagged."""
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = Field(default=())
    seconds: float

    @property
    def flagged(self) -> tuple[Check, ...]:
        """The checks that refute a claim."""
        return tuple(check for check in self.checks if check.flagged)


def conclude(
    findings: Sequence[Finding],
    *,
    epsilon: float | None,
    delta: float,
    confidence: float,
    alarm: float,
    notes: Sequence[str] = (),
    seconds: float = 0.0,
) -> AuditReport:
    """The report on `findings`. Risks are shared out evenly among them (Bonferroni), so they hold for all together."""
    each = max(1, len(findings))
    checks = tuple(_check(finding, 1 - (1 - confidence) / each, 1 - alarm / each) for finding in findings)
    attacks = [check.epsilon_lower for check in checks if check.kind == "attack"]
    return AuditReport(
        epsilon_claimed=epsilon,
        epsilon_lower=max(attacks, default=0.0),
        delta=delta,
        confidence=confidence,
        alarm=alarm,
        checks=checks,
        notes=tuple(notes),
        seconds=round(seconds, 2),
    )


def _check(finding: Finding, confidence: float, surely: float) -> Check:
    claimed = finding.claimed
    return Check(
        name=finding.name,
        subject=finding.subject,
        kind=finding.kind,
        epsilon_claimed=claimed,
        epsilon_lower=finding.bound(confidence),
        flagged=claimed is not None and finding.bound(surely) > claimed,
        seen=finding.seen,
        fault=finding.fault,
    )
