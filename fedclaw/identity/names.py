"""What a federation, a site and an address may be called: names become file names, certificates and URIs."""

import ipaddress
import re

_NAME_RULE = (
    "a name is 1 to 63 lower-case letters, digits and hyphens, starts with a letter and does not end in a hyphen"
)

_NAME = re.compile("[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
_LABEL = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*", re.IGNORECASE | re.ASCII)
_PORTS = range(1, 65536)


def check_name(name: str) -> str:
    """`name`, if it may be one. Raises ValueError."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r:.80} cannot be used; {_NAME_RULE}")
    return name


def split_address(address: str) -> tuple[str, int]:
    """Host (without brackets) and port of "host:port" or "[IPv6]:port". Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()) or int(port) not in _PORTS:
        raise ValueError(f"{address!r:.80} is not HOST:PORT with a port from 1 to 65535")
    if host.startswith("[") and host.endswith("]"):
        ip = _ip_address(host[1:-1])
        if not isinstance(ip, ipaddress.IPv6Address):
            raise ValueError(f"{address!r:.80} has no IPv6 address in its brackets")
        host = host[1:-1]
    elif not _HOST.fullmatch(host) or _looks_like_a_bad_ip(host):
        raise ValueError(f"{address!r:.80} has no host name or IP address before the port (IPv6 goes in brackets)")
    if (ip := _ip_address(host)) is not None and ip.is_unspecified:
        raise ValueError(
            f"{address!r} is where to listen, not where sites connect to; give the server's name or address"
        )
    return host, int(port)


def canonical_address(address: str) -> str:
    """`address` with its host as certificates have it: lower case, IPv6 in its shortest form. Raises ValueError."""
    host, port = split_address(address)
    host = canonical_host(host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def canonical_host(host: str) -> str:
    """The one way to write a host name or IP address: what TLS compares with the certificate letter by letter."""
    ip = _ip_address(host)
    return host.lower() if ip is None else ip.compressed


def check_host(host: str) -> str:
    """A host name or IP address that the server can be reached at, in its canonical form. Raises ValueError.

    A port behind it is left away: a certificate knows none.
    """
    text = str(host)
    if _ip_address(text) is None and (text.startswith("[") or text.count(":") == 1):
        return canonical_host(split_address(text if not text.endswith("]") else f"{text}:1")[0])
    split_address(f"[{text}]:1" if ":" in text else f"{text}:1")
    return canonical_host(text)


def check_address(address: str) -> str:
    """`address`, if a site can connect to it. Raises ValueError."""
    split_address(address)
    return address


def is_loopback(host: str) -> bool:
    """Whether `host` is this very machine."""
    ip = _ip_address(host)
    return ip.is_loopback if ip is not None else host.lower() == "localhost"


def site_uri(federation: str, site: str) -> str:
    """The URI that a site's certificate is for."""
    return f"fedclaw://{federation}/site/{site}"


def _looks_like_a_bad_ip(host: str) -> bool:
    return host.rpartition(".")[2].isdigit() and _ip_address(host) is None


def _ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
