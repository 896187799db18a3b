"""What a run sends: bytes of updates, from the sites to the server."""

from collections.abc import Mapping
from typing import Any

BYTES_UP = "bytes_up"
_FLOAT32 = 4


def bytes_up(line: Mapping[str, Any], parameters: int) -> int:
    """Bytes that the sites' updates took in the round of this line of metrics.jsonl.

    As the line has recorded it; if it has not, what an update of `parameters` float32 numbers takes from every site
    that answered. Names, plans and seals, which do not grow with the model, are not in that.
    """
    recorded = line.get(BYTES_UP)
    return int(recorded) if recorded is not None else _FLOAT32 * parameters * len(line["answered"])
