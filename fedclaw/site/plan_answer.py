"""What training and evaluation have in common: a plan asks for them, and is read and admitted the same way."""

from typing import ClassVar

from flwr.app import RecordDict
from pydantic import BaseModel, Field, ValidationError

from fedclaw import __version__
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.protocol.frozen import explain
from fedclaw.protocol.messages import JSON, PLAN
from fedclaw.protocol.plan import PLAN_VERSION, Plan
from fedclaw.protocol.refusal import Refusal, RefusalCode
from fedclaw.site.data import check_constants
from fedclaw.site.pipeline import A, Answering, L
from fedclaw.site.policy.checks import check_request


class PlanAnswer(Answering[A, L]):
    """An answer to a plan."""

    asked: Plan
    record: ClassVar[str] = PLAN

    @classmethod
    def read(cls, content: RecordDict) -> Plan:
        """The plan. Raises Refusal, of one of another version before anything else of it is read."""
        try:
            text = str(content.config_records[PLAN][JSON])
            _check_version(text)
            plan = Plan.model_validate_json(text)
        except (KeyError, ValueError) as error:
            reason = explain(error) if isinstance(error, ValidationError) else f"the message lacks {error}"
            raise Refusal(RefusalCode.MALFORMED, f"the plan cannot be read: {reason}") from error
        if wrong := mechanism_of(plan).contradiction():
            raise Refusal(RefusalCode.MALFORMED, f"the plan cannot be read: {wrong}")
        return plan

    def admit(self) -> None:
        """See Answering."""
        check_request(self.site.policy, self.asked)
        check_constants(self.site, self.asked.preprocessing)


class _Version(BaseModel):
    """All that is read of a plan before its version is known to be this one."""

    version: int = Field(default=0, ge=0, le=10**6)


def _check_version(plan: str) -> None:
    version = _Version.model_validate_json(plan).version
    if version != PLAN_VERSION:
        raise Refusal(
            RefusalCode.MALFORMED,
            f"plan version {version} is asked for; this site speaks {PLAN_VERSION} (fedclaw {__version__}): install "
            "the same version at the server and its sites",
        )
