"""What a token has to say for each action.

| scope | allows |
| --- | --- |
| `predict:MODEL` | ask the model, read its metadata |
| `feedback:MODEL` | say how an answer of the model turned out |
| `admin:read` | see versions, decisions, statistics and metrics |
| `admin:publish` | publish a version |
| `admin:route` | change which version answers |

`*` stands for every model, or every admin action.
"""

import re
from collections.abc import Iterable
from typing import Literal

from fedclaw.serve.names import NAME
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.requests import Principal
from fedclaw.serve.security.tokens import challenge

Action = Literal["predict", "feedback", "admin"]

_KNOWN = re.compile(rf"(predict|feedback):(\*|{NAME})|admin:(\*|read|publish|route)")
FORBIDDEN = "The token does not allow this"


def require(principal: Principal, action: Action, what: str) -> None:
    """Raises ServeRefusal `forbidden` unless the principal has the scope `action:what`.

    Call it before anything is looked up. The refusal is the same whether `what` exists or not, so who lacks the scope
    does not learn which models there are. Only who has it may be told `not_found`.
    """
    if not principal.may(action, what):
        raise ServeRefusal("forbidden", FORBIDDEN, challenge=challenge("insufficient_scope", FORBIDDEN))


def is_known_scope(text: str) -> bool:
    """Whether a node asks for it anywhere; a token may hold others, which other services ask for."""
    return _KNOWN.fullmatch(text) is not None


def visible(principal: Principal, models: Iterable[str]) -> list[str]:
    """Those of `models` that the principal may ask, in order: what a list of models shows."""
    return [model for model in models if principal.may("predict", model)]
