"""A configuration for HAProxy (2.6, Debian's) in front of nodes: what is no request to a node does not reach one.

    floods       connections, requests and errors are counted by address, requests also by token: 429, or no connection
    slow         a header has 5 s, the first 16 KB of a body 10 s, and no silence is longer than 15 s: 408
    oversized    64 headers, 15 KB of them; a body says its length, and that is at most limits.body_bytes: 411, 413
    malformed    what HAProxy's own strict parser refuses; a Transfer-Encoding, a Content-Encoding, an Upgrade, a header
                 that is there twice or that Connection takes away: 400
    tricks       methods, paths, queries and types of content are those that a node has, to the letter: 404, 405, 415
    probes       what scanners send to other software, in a header or in a text body: 403

It asks each node four times a second whether it is ready. A request whose connection failed, or that a dying node left
without an answer, is asked again at another node: inference changes nothing, and feedback is credited once.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from fedclaw.errors import UsageError
from fedclaw.files import write_atomic
from fedclaw.protocol.frozen import Frozen
from fedclaw.serve.names import NAME
from fedclaw.serve.settings import is_loopback

PERIOD = 10
"""Seconds over which rates are counted."""
ASKED = rf"^/(v2/?|v2/health/(live|ready)|v2/models/{NAME}(/versions/{NAME})?(/ready)?|openapi\.json|docs)$"
SENT = rf"^/(v2/models/{NAME}(/versions/{NAME})?/infer|predict(/{NAME})?|feedback)$"
QUERY = (
    "^((delimiter|decimal|encoding|title_lines|identifiers)="
    "([A-Za-z0-9_.,;:|~+-]|%(09|2[0-689A-Fa-f]|3[ABab]|7[Cc]|[89A-Fa-f][0-9A-Fa-f]))*(&|$))+$"
)
"""How a table is written, and its identifiers: letters of every script, no quotes, brackets or control characters."""
CONTENT = (
    "^(application/(json|octet-stream|vnd\\.apache\\.parquet|x-npz)|text/csv|image/(png|jpeg))"
    '( *; *charset="?[A-Za-z0-9-]{1,20}"?)?$'
)
TEXT = "^(application/json|text/csv)"
PROBE = (
    r"\$\{(jndi|env|sys|java|lower|upper|date|::)|<(script|iframe|svg|img)[\s/>]|javascript:|\bon(error|load)\s*="
    r"|\bunion\s+(all\s+)?select\s|[\x27\x22]\s*(or|and)\s+[\x27\x22]?\d+[\x27\x22]?\s*=\s*[\x27\x22]?\d"
    r"|;\s*(drop\s+table|delete\s+from|insert\s+into)\s|\b(sleep|benchmark|pg_sleep)\s*\(\s*\d|\.\./\.\./"
    r"|/etc/(passwd|shadow)\b|\(\)\s*\{.*;\s*\}|<!(doctype|entity)\b|\b(cmd\.exe|/bin/(ba)?sh)\b|\{\{.{0,40}\}\}"
)
"""What no table has, and scanners send to whatever answers. A node would make nothing of it."""
ONCE = ("authorization", "content-type", "content-length", "host", "fedclaw-key", "fedclaw-deadline-ms")
CONTROL = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)"
"""In a header, for which HAProxy does not look itself."""
HOST = "^([A-Za-z0-9.-]{1,255}|\\[[0-9A-Fa-f:.]{2,45}\\])(:[0-9]{1,5})?$"
GRPC_PATH = "^/inference\\.GRPCInferenceService/[A-Za-z]{1,40}$"

_ADDRESS = re.compile(r"(\*|\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?):([0-9]{1,5})")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?")
_PATH = re.compile(r"(/[A-Za-z0-9._@+-]+)+")


def _address(text: str) -> str:
    found = _ADDRESS.fullmatch(text)
    if found is None or not 0 < int(found[3]) < 1 << 16:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return text


def _node(text: str) -> str:
    if text.startswith("*"):
        raise ValueError(f"{text!r} is not HOST:PORT of a node")
    return _address(text)


def _path(text: str) -> str:
    if _PATH.fullmatch(text) is None:
        raise ValueError(f"{text!r} is not an absolute path of letters, digits and ._@+-")
    return text


def _name(text: str) -> str:
    if _NAME.fullmatch(text) is None:
        raise ValueError(f"{text!r} is not a host name")
    return text


Address = Annotated[str, AfterValidator(_address)]
NodeAddress = Annotated[str, AfterValidator(_node)]
ProxyPath = Annotated[str, AfterValidator(_path)]
"""A file at the machine of the proxy: nothing here can look at it."""
HostName = Annotated[str, AfterValidator(_name)]


class ProxyLimits(Frozen):
    """What one address, or one token, may cost."""

    body_bytes: int = Field(default=16 << 20, ge=1024)
    connections: int = Field(default=200, ge=1)
    connections_per_second: int = Field(default=50, ge=1)
    requests_per_second: int = Field(default=1000, ge=1)
    token_requests_per_second: int = Field(default=1000, ge=1)
    errors_per_second: int = Field(default=20, ge=1)


class HaproxySettings(Frozen):
    """conf/serve_haproxy.yaml, checked. Nothing in it can end a line of the configuration or begin a word."""

    nodes: tuple[NodeAddress, ...] = Field(min_length=1)
    grpc_nodes: tuple[NodeAddress, ...] = ()
    node_ca: ProxyPath | None = None
    node_name: HostName | None = None
    plaintext: bool = False
    certificate: ProxyPath
    client_ca: ProxyPath | None = None
    names: tuple[HostName, ...] = ()
    bind: Address = "*:443"
    grpc_bind: Address = "*:8444"
    user: Literal["haproxy"] | None = "haproxy"
    limits: ProxyLimits = ProxyLimits()
    output: Path | None = None

    @field_validator("nodes", "grpc_nodes", "names", mode="before")
    @classmethod
    def _one_or_several(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) else given

    @model_validator(mode="after")
    def _whole(self) -> "HaproxySettings":
        if self.grpc_nodes and len(self.grpc_nodes) != len(self.nodes):
            raise ValueError("grpc_nodes has as many addresses as nodes, in the same order")
        if len({*self.nodes, *self.grpc_nodes}) != len(self.nodes) + len(self.grpc_nodes):
            raise ValueError("an address is there twice")
        if self.plaintext:
            self._require_loopback()
        elif self.node_ca is None or self.node_name is None:
            raise ValueError(
                "give node_ca= and node_name=, a DNS name that every node's certificate is for, so that the proxy "
                "knows a node; or, for nodes on its own machine, plaintext=true"
            )
        return self

    def _require_loopback(self) -> None:
        far = [one for one in (*self.nodes, *self.grpc_nodes) if not is_loopback(one.rpartition(":")[0].strip("[]"))]
        if far:
            raise ValueError(f"plaintext=true is only for nodes on the proxy's own machine, and {far[0]} is not there")


def haproxy(settings: HaproxySettings, say: Callable[[str], None]) -> None:
    """Write the configuration, or say it. Raises UsageError where there is a file already."""
    text = configuration(settings)
    if settings.output is None:
        say(text)
        return
    if settings.output.exists():
        raise UsageError(f"output={settings.output} exists; remove it, or name another file")
    write_atomic(settings.output, text.encode())
    say(f"{settings.output}: check it with haproxy -c -f {settings.output}")


def configuration(settings: HaproxySettings) -> str:
    """The whole of haproxy.cfg."""
    parts = [_global(settings), _DEFAULTS, _tables(), _frontend(settings), _backend(settings)]
    if settings.grpc_nodes:
        parts += [_grpc_frontend(settings), _grpc_backend(settings)]
    return "\n".join(parts)


def _error(code: str, message: str) -> str:
    return f'content-type application/json string \'{{"error":"{message}","code":"{code}"}}\''


def _refuse(status: int, code: str, message: str, condition: str, headers: str = "") -> str:
    return f"    http-request deny status {status} {_error(code, message)}{headers} {condition}"


def _global(settings: HaproxySettings) -> str:
    confined = (
        f"    user {settings.user}\n    group {settings.user}\n    chroot /var/lib/haproxy\n" if settings.user else ""
    )
    return f"""# Written by python -m fedclaw.serve haproxy.
global
    log stdout format raw daemon info
    maxconn 4000
{confined}    ssl-default-bind-options ssl-min-ver TLSv1.3 no-tls-tickets
    ssl-default-server-options ssl-min-ver TLSv1.3
    tune.ssl.default-dh-param 2048
    tune.bufsize 16384
    tune.maxrewrite 1024
    tune.http.maxhdr 64
    tune.h2.max-concurrent-streams 100
"""


_DEFAULTS = "\n".join(
    [
        "defaults",
        "    mode http",
        "    log global",
        # No query and no header: neither an identifier nor a token is written down.
        '    log-format "%ci:%cp [%tr] %ft %b/%s %TR/%Tw/%Tc/%Tr/%Ta %ST %B %tsc %ac/%fc/%bc/%sc/%rc/%sq/%bq %HM %HP"',
        "    option dontlognull",
        "    timeout connect 2s",
        "    timeout client 15s",
        "    timeout client-fin 5s",
        "    timeout server 60s",
        "    timeout queue 5s",
        "    timeout http-request 5s",
        "    timeout http-keep-alive 60s",
        "    timeout tunnel 1s",
        "    retries 2",
        "    option redispatch 1",
        "    retry-on conn-failure empty-response",
        *(
            f"    http-error status {status} {_error(code, message)}"
            for status, code, message in (
                (400, "bad_request", "this is no request that the proxy can read"),
                (408, "bad_request", "the request took too long to come"),
                (500, "internal", "the proxy failed"),
                (502, "unavailable", "no node has answered"),
                (503, "unavailable", "no node is ready"),
                (504, "deadline_exceeded", "no node has answered in time"),
            )
        ),
        "",
    ]
)


def _tables() -> str:
    counted = ",".join(
        ["conn_cur", *(f"{rate}({PERIOD}s)" for rate in ("conn_rate", "http_req_rate", "http_err_rate"))]
    )
    return f"""backend per_source
    stick-table type ipv6 size 200k expire 60s store {counted}

backend per_token
    stick-table type binary len 32 size 200k expire 60s store http_req_rate({PERIOD}s)
"""


def _listen(settings: HaproxySettings, address: str, protocols: str) -> list[str]:
    known = f" ca-file {settings.client_ca} verify required" if settings.client_ca else ""
    limits = settings.limits
    return [
        f"    bind {address} ssl crt {settings.certificate} alpn {protocols}{known}",
        "    tcp-request connection track-sc0 src table per_source",
        f"    tcp-request connection reject if {{ sc0_conn_cur gt {limits.connections} }}",
        f"    tcp-request connection reject if {{ sc0_conn_rate gt {limits.connections_per_second * PERIOD} }}",
    ]


def _floods(settings: HaproxySettings) -> Iterator[str]:
    limits, later = settings.limits, " hdr retry-after 1"
    token = "req.hdr(authorization),sha2(256)"  # noqa: S105
    yield f"    http-request track-sc1 {token} table per_token if {{ req.hdr(authorization) -m found }}"
    for counter, most in (
        ("sc0_http_req_rate", limits.requests_per_second),
        ("sc0_http_err_rate", limits.errors_per_second),
        ("sc1_http_req_rate", limits.token_requests_per_second),
    ):
        condition = f"if {{ {counter} gt {most * PERIOD} }}"
        yield _refuse(429, "too_many_requests", "too many requests; come again later", condition, later)


def _malformed(names: Sequence[str]) -> Iterator[str]:
    """Of both protocols."""
    bad = "bad_request"
    yield _refuse(505, bad, "this is no version of HTTP that is spoken here", "unless { req.ver 1.0 1.1 2.0 }")
    yield _refuse(400, bad, "whom this is for is no name", f"unless {{ req.hdr(host) -m reg '{HOST}' }}")
    yield _refuse(400, bad, "a header holds control characters", f"if {{ req.hdrs -m reg '{CONTROL}' }}")
    yield _refuse(400, bad, "a header is there more than once", " || ".join(_twice()))
    yield _refuse(400, bad, "a header holds what no client of a node sends", f"if {{ req.hdrs -m reg -i '{PROBE}' }}")
    yield _refuse(400, bad, "this header is not taken", "if { req.hdr(upgrade) -m found }")
    yield _refuse(400, bad, "this header is not taken", "if { req.hdr(content-encoding) -m found }")
    connection = "if { req.hdr(connection) -m found } !{ req.fhdr(connection) -m reg -i '^(close|keep-alive)$' }"
    yield _refuse(400, bad, "this header is not taken", connection)
    if names:
        yield _refuse(
            421, bad, "nobody of this name is here", f"unless {{ req.hdr(host),host_only -m str -i {' '.join(names)} }}"
        )
    yield "    http-request del-header ^(x-forwarded-|forwarded$|x-real-ip$|via$) -m reg"


def _twice() -> Iterator[str]:
    first, *others = (f"{{ req.fhdr_cnt({name}) gt 1 }}" for name in ONCE)
    yield f"if {first}"
    yield from others


def _frontend(settings: HaproxySettings) -> str:
    most = settings.limits.body_bytes
    rules = [
        "frontend requests",
        *_listen(settings, settings.bind, "h2,http/1.1"),
        "    option forwardfor",
        f"    acl asks path -m reg '{ASKED}'",
        f"    acl sends path -m reg '{SENT}'",
        "    acl whole_url url_beg /",
        *_floods(settings),
        # HTTP/2 has no other form of a target than HAProxy makes of it.
        _refuse(400, "bad_request", "the target is a path", "if !whole_url !{ req.ver 2.0 }"),
        *_malformed(settings.names),
        _refuse(400, "bad_request", "a body says its length", "if { req.hdr(transfer-encoding) -m found }"),
        _refuse(404, "not_found", "there is nothing at this path", "if !asks !sends"),
        _refuse(405, "method_not_allowed", "this is asked with GET", "if asks !{ method GET }", " hdr allow GET"),
        _refuse(405, "method_not_allowed", "this is asked with POST", "if sends !{ method POST }", " hdr allow POST"),
        _refuse(400, "bad_request", "this path has no query", "if { query -m len gt 0 } !{ path_beg /predict }"),
        _refuse(
            400,
            "bad_request",
            "the query is none of a table",
            f"if {{ query -m len gt 0 }} !{{ query -m reg '{QUERY}' }}",
        ),
        _refuse(400, "bad_request", "this is asked without a body", "if asks { req.body_size gt 0 }"),
        _refuse(411, "bad_request", "a body says its length", "if sends !{ req.hdr(content-length) -m found }"),
        _refuse(413, "too_large", f"a body has at most {most} bytes", f"if {{ req.body_size gt {most} }}"),
        _refuse(
            413, "too_large", f"a body has at most {most} bytes", f"if {{ req.hdr(content-length) -m int gt {most} }}"
        ),
        _refuse(
            415,
            "unsupported_media_type",
            "no node reads this type of content",
            f"if sends !{{ req.fhdr(content-type) -m reg -i '{CONTENT}' }}",
        ),
        "    http-request wait-for-body time 10s if sends",
        _refuse(
            403,
            "forbidden",
            "this is no table",
            f"if sends {{ req.fhdr(content-type) -m reg -i '{TEXT}' }} {{ req.body -m reg -i '{PROBE}' }}",
        ),
        "    http-response del-header server",
        "    http-response set-header strict-transport-security max-age=31536000",
        "    default_backend nodes",
        "",
    ]
    return "\n".join(rules)


def _servers(settings: HaproxySettings, addresses: Sequence[str], protocol: str) -> Iterator[str]:
    """Each node, whose HTTP port says whether it is ready."""
    alpn, name = "h2" if protocol == "h2" else "http/1.1", settings.node_name
    known = f" ssl verify required ca-file {settings.node_ca} verifyhost {name} sni str({name}) alpn {alpn}"
    check = f" check-ssl check-sni {name} check-alpn http/1.1"
    if settings.plaintext:
        known = check = ""
    for number, (address, asked) in enumerate(zip(addresses, settings.nodes, strict=True), 1):
        host, _, port = asked.rpartition(":")
        where = f" addr {host} port {port} check-proto h1" if protocol == "h2" else ""
        spoken = " proto h2" if protocol == "h2" else ""
        yield f"    server node-{number} {address}{known}{spoken} check{where}{check}"


def _backend(
    settings: HaproxySettings, name: str = "nodes", addresses: Sequence[str] = (), protocol: str = "h1"
) -> str:
    return "\n".join(
        [
            f"backend {name}",
            "    balance leastconn",
            "    option httpchk",
            "    http-check send meth GET uri /v2/health/ready ver HTTP/1.1 hdr host localhost",
            "    http-check expect status 200",
            # One that is not ready any more goes on answering what it has begun; one that is gone is seen at once.
            "    default-server inter 250ms fastinter 100ms downinter 500ms fall 2 rise 1",
            "    default-server observe layer4 error-limit 1 on-error mark-down",
            *_servers(settings, addresses or settings.nodes, protocol),
            "",
        ]
    )


def _grpc_frontend(settings: HaproxySettings) -> str:
    rules = [
        "frontend grpc_requests",
        *_listen(settings, settings.grpc_bind, "h2"),
        *_floods(settings),
        *_malformed(settings.names),
        _refuse(405, "method_not_allowed", "this is asked with POST", "if !{ method POST }"),
        _refuse(404, "not_found", "there is nothing at this path", f"if !{{ path -m reg '{GRPC_PATH}' }}"),
        _refuse(400, "bad_request", "this path has no query", "if { query -m len gt 0 }"),
        _refuse(
            415,
            "unsupported_media_type",
            "this port is for gRPC",
            "if !{ req.fhdr(content-type) -m beg application/grpc }",
        ),
        "    http-response del-header server",
        "    default_backend grpc_nodes",
        "",
    ]
    return "\n".join(rules)


def _grpc_backend(settings: HaproxySettings) -> str:
    return _backend(settings, "grpc_nodes", settings.grpc_nodes, "h2")
