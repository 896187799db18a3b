"""How many processors this process may use, on every system."""

import os


def usable() -> int:
    """Processors that the system lets this process run on; where it does not tell (macOS), all of the machine's."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
