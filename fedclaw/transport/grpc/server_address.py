"""How a site reaches its server: at which address, under which certified name, and through which proxy."""

import os
from typing import Any
from urllib.parse import urlsplit

from fedclaw.identity.names import canonical_address, canonical_host, split_address

_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_EXEMPT = ("no_grpc_proxy", "no_proxy")
"""The environment variables that gRPC reads, in its order; lower case only."""


def channel_target(descriptor_address: str, given: str | None) -> tuple[str, list[tuple[str, Any]]]:
    """The address to connect to, and the channel options for it. Raises ValueError for a malformed address.

    At any address the server has to show a certificate of the federation's CA for the name in the descriptor.
    `given`, if there is one, replaces the descriptor's address; it need not be in the certificate.
    """
    name = canonical_host(split_address(descriptor_address)[0])
    address = canonical_address(given or descriptor_address)
    return address, [("grpc.ssl_target_name_override", name)]


def proxy_for(address: str) -> tuple[str, str] | None:
    """The proxy that gRPC uses for `address`, without user and password, and the variable that names it; or None."""
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
