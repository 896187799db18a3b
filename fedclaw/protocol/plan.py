"""What goes out to a site and what comes back: one frozen plan, one additive statistic, one receipt.

A round sends each site a `Message` whose content is

    {"arrays": ArrayRecord (global parameters), "plan": ConfigRecord {"json": Plan},
     "teacher": ArrayRecord (only when the plan distils)}

and a site that trained answers

    {"sum": ArrayRecord (weight x parameter delta; float32, or what `compression` makes of it),
     "metrics": MetricRecord {"weight", "examples"}, "receipt": ConfigRecord {"json": Receipt}}

Under secure aggregation the exchange has further stages (`fedclaw.server.exchange`), and the trained answer has
{"masked": ArrayRecord (one flat uint32 vector)} in place of the sum.

A site that evaluated answers {"metrics": MetricRecord {"weight", "examples", name: value x weight}}.
Either answer also holds "about": ConfigRecord {"run": the run's name}, for the site's own outbound log.
Sums and weights add up, so a sum of answers is itself an answer. A site that will not take part answers with
a Flower `Error` whose code is a `RefusalCode` and whose reason is a sentence.
"""

from pydantic import Field

from fedclaw.protocol.limits import MAX_ROUNDS, MAX_SITES, Arguments, Digest, Name
from fedclaw.protocol.terms import SecureAggregation, Terms, weight_of

PLAN_VERSION = 4


class Plan(Terms):
    """The frozen context of one round. Its JSON is deterministic, so a resumed server asks the same question."""

    version: int = PLAN_VERSION
    round: int = Field(ge=0, le=MAX_ROUNDS)
    cohort: int = Field(ge=1, le=MAX_SITES)
    """Number of sites asked in this round, by the server's own word: a site cannot count the others."""
    schema_digest: Digest
    strategy: Name
    strategy_fields: dict[Name, float] = Field(default={}, max_length=64)
    """What the strategy's client half needs, by name."""
    strategy_settings: Arguments = {}
    """The strategy's settings: what it refuses, and which parameters it leaves at the sites, follows from them."""
    secure: SecureAggregation | None = None

    @property
    def hidden(self) -> bool | None:
        """None without a session: a site is not asked to train (but to evaluate), or finds no session and refuses."""
        return True if self.secure is not None else None

    def weight(self, examples: int) -> float:
        """What a site with that many examples counts by."""
        return weight_of(examples, self.weighting, self.weight_cap)
