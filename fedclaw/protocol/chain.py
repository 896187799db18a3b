"""Hash chains over JSON entries: what the privacy ledger and the outbound log have in common.

The hash of entry i is SHA-256(hash of entry i-1 || canonical JSON of entry i); the first entry follows `GENESIS`.
Changing, removing or reordering an entry changes every later hash. Removing entries from the end leaves a valid,
shorter chain: only a copy of a later head, kept elsewhere, shows that (a site's receipts carry its ledger's head
to the coordinator for this reason).
"""

import hashlib
import json
from collections.abc import Mapping

from pydantic import JsonValue

GENESIS = hashlib.sha256(b"fedclaw chain 1").hexdigest()
"""What the first entry of every chain follows."""


def canonical(entry: Mapping[str, JsonValue]) -> str:
    """The one JSON text of `entry`: sorted keys, no spaces, ASCII. Raises ValueError for NaN and infinities."""
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def link(previous: str, text: str) -> str:
    """The hexadecimal hash of the entry with canonical JSON `text` that follows the hash `previous`."""
    return hashlib.sha256(bytes.fromhex(previous) + text.encode("ascii", "backslashreplace")).hexdigest()
