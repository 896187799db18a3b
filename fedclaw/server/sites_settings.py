"""Which sites a run waits for, and how many of them make a round, as a command says it."""

from pydantic import Field

from fedclaw.errors import UsageError
from fedclaw.protocol.frozen import fields_of
from fedclaw.protocol.terms import RoundRules


class SitesSettings(RoundRules):
    """conf/server.yaml, conf/flower_app.yaml and conf/ray.yaml: sites."""

    wait_for: int | None = Field(default=None, ge=1)
    wait: float = Field(default=600, gt=0)
    new_cohort: bool = False

    def rules(self) -> RoundRules:
        """Those of a new run. Raises UsageError where something makes sense for an interrupted one alone."""
        if self.new_cohort:
            raise UsageError("sites.new_cohort=true goes with resume=: a new run has no round in flight")
        return RoundRules(**fields_of(self, RoundRules))
