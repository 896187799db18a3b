"""What a control process does to a state store now and then, so that it does not grow for ever.

| what | becomes of it |
| --- | --- |
| counts of seconds | merged into hours after `FINE_HOURS`, dropped after `COUNT_DAYS` |
| assignments of keys | dropped after `ASSIGNMENT_DAYS`: an A/B test that lasts longer assigns its first keys anew |
| feedback | dropped after `FEEDBACK_DAYS`, and not before its receipts are too old to be shown again |
| workers | forgotten a day after their last beat |
| the feedback key | followed by a new one when it is as old as receipts may be |
| documents, events, anchors | stay |

Both nodes of a pair may do it, and at the same moment: done twice is done once.
"""

import logging

from fedclaw.serve.state.audit_log import AuditLog
from fedclaw.serve.state.receipts import ReceiptKeys
from fedclaw.serve.state.store import StateStore

log = logging.getLogger("fedclaw.serve")

FINE_HOURS = 6.0
COUNT_DAYS = 90.0
ASSIGNMENT_DAYS = 180.0
FEEDBACK_DAYS = 90.0
_DAY = 86_400.0


def keep_up(store: StateStore, receipts: ReceiptKeys, *, feedback_days: float = 30.0) -> int:
    """All of the above; call it about once a minute, in a thread. Returns how many rows went. Raises
    StateUnavailable."""
    receipts.refresh()
    if receipts.age() > feedback_days * _DAY:
        receipts.rotate()
    merged = store.compact_counts(FINE_HOURS * 3600)
    return merged + store.prune(
        counts=COUNT_DAYS * _DAY,
        workers=_DAY,
        assignments=ASSIGNMENT_DAYS * _DAY,
        # A day more than receipts are good for: the database's clock is not the one that dates them.
        feedback=max(FEEDBACK_DAYS, feedback_days + 1) * _DAY,
    )


def anchor_head(audit: AuditLog, store: StateStore) -> None:
    """Tell the store the head of an audit log's chain; what is wrong with it goes to the log."""
    try:
        if not audit.anchor(store):
            log.error("the audit log %s does not reach the head that it had before: lines are gone", audit.chain)
    except Exception as error:
        log.warning("the audit log's head is not anchored for now: %s", error)
