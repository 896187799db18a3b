"""How a site reaches its server: under which name, and whether a proxy stands in between."""

import os
from typing import Any
from urllib.parse import urlsplit

from fedclaw.identity.names import canonical_address, canonical_host, split_address

_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_EXEMPT = ("no_grpc_proxy", "no_proxy")
"""The variables that gRPC reads, in its order; in lower case only."""


def dialled(descriptor_address: str, given: str | None) -> tuple[str, list[tuple[str, Any]]]:
    """The address to connect to, and the channel's options for it. Raises ValueError for one that is none.

    Whatever way leads to it, the server proves that it is the federation's own, by its CA, and the one that the
    descriptor names, which is in its certificate always: `given` may be an address that is not.
    """
    name = canonical_host(split_address(descriptor_address)[0])
    address = canonical_address(given or descriptor_address)
    return address, [("grpc.ssl_target_name_override", name)]


def proxy_of(address: str) -> tuple[str, str] | None:
    """The proxy that gRPC takes on its way to `address`, and the variable that says so; no name or password of it."""
    found = next(((name, value) for name in _PROXIES if (value := os.environ.get(name))), None)
    if found is None:
        return None
    host = split_address(address)[0]
    exempt = next((value for name in _EXEMPT if (value := os.environ.get(name))), "")
    if any(host.endswith(entry) for item in exempt.split(",") if (entry := item.strip())):
        return None
    name, value = found
    parts = urlsplit(value if "://" in value else f"http://{value}")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}", name
