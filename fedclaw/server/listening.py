"""Where a server may be told to listen; imports nothing heavy."""

from typing import Annotated

from pydantic import AfterValidator

_LARGEST_PORT = 65535


def check_listening(address: str) -> str:
    """`address`, if it is HOST:PORT; any interface ("0.0.0.0", "[::]") will do here. Raises ValueError."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or int(port) > _LARGEST_PORT:
        raise ValueError(f"{address!r} is not HOST:PORT with a port up to {_LARGEST_PORT}")
    return address


ListenAddress = Annotated[str, AfterValidator(check_listening)]
"""HOST:PORT, checked."""
