"""Ports for processes that a test starts."""

import random
import socket
from contextlib import suppress

_RANGE = range(20_000, 32_000)
"""Below what a system deals out by itself, so that nobody is given one of these between its choice and its use."""
_claims: list[socket.socket] = []


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens, and which no other test gets, in this process or beside it."""
    for port in random.Random().sample(_RANGE, len(_RANGE)):
        claim = socket.socket(socket.AF_UNIX)
        with suppress(OSError), socket.socket() as probe:
            # A name without a file, which goes with this process.
            claim.bind(f"\0fedclaw-test-port-{port}")
            probe.bind(("127.0.0.1", port))
            _claims.append(claim)
            return port
        claim.close()
    raise OSError(f"no port of {_RANGE} is free")
