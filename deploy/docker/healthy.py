"""Exit 0 where the service of this container answers: FEDCLAW_HEALTH is https://127.0.0.1:PORT/PATH or tcp://127.0.0.1:PORT.

A port that asks for a client's certificate is asked for a connection alone, tcp. Whose certificate answers is not
looked at, for it asks nobody but itself: any other host is refused.
"""

import http.client
import os
import socket
import ssl
import sys
from ipaddress import ip_address
from urllib.parse import urlsplit

SECONDS = 4


def healthy(url: str) -> bool:
    """Whether the service behind `url` answers."""
    where = urlsplit(url)
    host, port = where.hostname or "", where.port or 0
    if where.scheme not in {"https", "http", "tcp"} or not ip_address(host).is_loopback:
        raise ValueError("FEDCLAW_HEALTH is https://127.0.0.1:PORT/PATH or tcp://127.0.0.1:PORT")
    if where.scheme == "tcp":
        socket.create_connection((host, port), SECONDS).close()
        return True
    return _status(where.scheme, host, port, where.path or "/") == http.client.OK


def _status(scheme: str, host: str, port: int, path: str) -> int:
    connection = (
        http.client.HTTPConnection(host, port, timeout=SECONDS)
        if scheme == "http"
        else http.client.HTTPSConnection(host, port, timeout=SECONDS, context=_of_itself())
    )
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def _of_itself() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


if __name__ == "__main__":
    try:
        sys.exit(0 if healthy(os.environ.get("FEDCLAW_HEALTH", "")) else 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(1)
