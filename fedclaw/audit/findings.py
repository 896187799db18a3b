"""What an audit is asked for, and what it found: bounds next to claims, and which of them exceed."""

from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import Field

from fedclaw.protocol.frozen import Frozen, fields_of


class AuditOptions(Frozen):
    """How thorough an audit is: more of each gives tighter bounds and takes longer."""

    canaries: int = Field(default=200, ge=8)
    """Canaries of the one-run audit, over all sites."""
    examples: int = Field(default=300, ge=1)
    """At most so many of each site's own examples are used in the attacked run, each included by the toss of a coin."""
    rows_together: int = Field(default=1, ge=1)
    """Rows of a canary, all alike, which are in or out together. Above 1, where the unit is an example: what is left
    for a person with so many rows, whom the claim does not cover; then only the whole run is attacked."""
    attacked_rounds: int | None = Field(default=5, ge=1)
    """Rounds of the attacked run, at most; null: as many as the configuration has."""
    trials: int = Field(default=1000, ge=20)
    """Releases of each probed mechanism, at most."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """The confidence with which all bounds hold simultaneously."""
    alarm: float = Field(default=1e-4, gt=0, lt=1)
    """The probability of flagging a configuration that keeps its claims."""


Kind = Literal["attack", "measurement"]
"""An attack guesses something secret. A measurement estimates noise and signal directly, assuming Gaussian noise."""


class _Checked(Frozen):
    """What was checked, and what was seen."""

    name: str
    subject: str
    """The mechanism that was checked."""
    kind: Kind
    epsilon_claimed: float | None
    """None: nothing is claimed."""
    seen: str
    fault: str
    """What is wrong if the bound exceeds the claim."""


Bound = Callable[[float], float]
"""Confidence to a lower bound on the mechanism's epsilon."""


class Finding(_Checked):
    """The result of one check: a lower bound on epsilon as a function of the confidence."""

    bound: Bound
    """Of mechanisms of the kind that the accountant assumes: its noise, however much of it there is."""
    bound_any: Bound | None = None
    """Of any mechanism whatever; it holds wherever `bound` does. None: nothing is known of others."""
    weight: int = 1
    """How much of the risk of error it is given, beside the others, set before anything is seen; 0: its bound is never
    wrong."""


class Check(_Checked):
    """A finding at the confidence of the report."""

    epsilon_lower: float
    """The lower bound at the report's confidence, of a mechanism of the kind that the accountant assumes."""
    epsilon_lower_any: float | None = None
    """The lower bound of any mechanism; None: none is known."""
    flagged: bool
    """Whether the claim is refuted, at the report's risk of a false alarm."""

    @property
    def share(self) -> float | None:
        """The lower bound as a share of the accountant's epsilon; None: nothing is claimed."""
        return self.epsilon_lower / self.epsilon_claimed if self.epsilon_claimed else None


class AuditReport(Frozen):
    """All checks. `epsilon_lower` is the best attack's bound; all bounds hold simultaneously with `confidence`."""

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

    @property
    def sharpest(self) -> Check | None:
        """The attack that shows the largest share of the epsilon that it attacks; None: nothing is claimed."""
        attacks = [check for check in self.checks if check.kind == "attack" and check.share is not None]
        return max(attacks, key=lambda check: check.share or 0.0, default=None)


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
    """The report on `findings`. The risks are split among them by weight (Bonferroni), so that they hold for all."""
    whole = max(1, sum(finding.weight for finding in findings))
    parts = ((finding, finding.weight / whole) for finding in findings)
    checks = tuple(_check(finding, 1 - (1 - confidence) * part, 1 - alarm * part) for finding, part in parts)
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
    claimed = finding.epsilon_claimed
    return Check(
        **fields_of(finding, _Checked),
        epsilon_lower=finding.bound(confidence),
        epsilon_lower_any=None if finding.bound_any is None else finding.bound_any(confidence),
        flagged=claimed is not None and finding.bound(surely) > claimed,
    )
