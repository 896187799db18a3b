"""Requests that a proxy has to stop, and requests that it has to let through, as bytes on the wire."""

import gzip
import json
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.serve.proxies import http2

MOST_BODY = 1 << 20
"""Bytes that the proxies of these tests let through."""
INFER = "/v2/models/heart/infer"
_ROW = b'{"rows": [{"age": 63, "ward": "surgery"}]}'
_TOKEN = "authorization: Bearer eyJhbGciOiJFUzI1NiJ9.e30.c2ln"


def get(
    target: str, *headers: str, version: str = "HTTP/1.1", method: str = "GET", host: str = "host: node-front"
) -> bytes:
    return "\r\n".join([f"{method} {target} {version}", *filter(None, [host]), *headers, "", ""]).encode("latin-1")


def post(target: str, body: bytes, *headers: str, content: str = "application/json", method: str = "POST") -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "host: node-front", _TOKEN, f"content-type: {content}"]
    lines += [f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def framed(*headers: str, body: bytes = b"") -> bytes:
    """A POST whose length is said by `headers` alone."""
    lines = [f"POST {INFER} HTTP/1.1", "host: node-front", "content-type: application/json", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


_HIDDEN = b"GET /v2/models/hidden HTTP/1.1\r\nhost: node-front\r\n\r\n"
_BEHIND = b"0\r\n\r\n" + _HIDDEN
_CHUNKED = b"2\r\n{}\r\n0\r\n\r\n"

HOSTILE: dict[str, bytes] = {
    # Request smuggling (CWE-444): two readings of where a request ends.
    "smuggling: length and chunks": framed(
        "content-length: 5", "transfer-encoding: chunked", body=b"0\r\n\r\n" + _HIDDEN
    ),
    "smuggling: chunks and length": framed(
        "transfer-encoding: chunked", "content-length: 5", body=b"0\r\n\r\n" + _HIDDEN
    ),
    "smuggling: unknown coding": framed(
        "transfer-encoding: xchunked", "content-length: 5", body=b"0\r\n\r\n" + _HIDDEN
    ),
    "smuggling: space before the colon": framed("transfer-encoding : chunked", "content-length: 5", body=_CHUNKED),
    "smuggling: tab in the coding": framed("transfer-encoding:\tchunked", "content-length: 5", body=_CHUNKED),
    "smuggling: two codings": framed("transfer-encoding: chunked, identity", body=_CHUNKED),
    "smuggling: coding twice": framed("transfer-encoding: chunked", "transfer-encoding: identity", body=_CHUNKED),
    "smuggling: folded header": framed("transfer-encoding:", " chunked", "content-length: 5", body=_CHUNKED),
    "smuggling: two lengths": framed("content-length: 2", "content-length: 7", body=b"{}" + _HIDDEN),
    "smuggling: list of lengths": framed("content-length: 2, 7", body=b"{}" + _HIDDEN),
    "smuggling: negative length": framed("content-length: -1", body=_HIDDEN),
    "smuggling: signed length": framed("content-length: +2", body=b"{}"),
    "smuggling: hexadecimal length": framed("content-length: 0x2", body=b"{}"),
    "smuggling: bad chunk": framed("transfer-encoding: chunked", body=b"zz\r\n{}\r\n0\r\n\r\n"),
    "smuggling: body of a GET": get("/v2", f"content-length: {len(_HIDDEN)}") + _HIDDEN,
    # What no parser should take.
    "malformed: NUL in a header": get("/v2", "fedclaw-key: a\0b"),
    "malformed: carriage return in a header": get("/v2", "fedclaw-key: a\rtransfer-encoding: chunked"),
    "malformed: header without a colon": get("/v2", "no colon here"),
    "malformed: space in a header's name": get("/v2", "fedclaw key: a"),
    "malformed: no host": get("/v2", host=""),
    "malformed: two hosts": get("/v2", "host: another"),
    "malformed: host with a path": get("/v2", host="host: node-front/../x"),
    "malformed: HTTP/0.9": b"GET /v2\r\n",
    "malformed: HTTP/3.7": get("/v2", version="HTTP/3.7"),
    "malformed: no version": b"GET /v2 \r\n\r\n",
    "malformed: no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    # Paths.
    "path: parents": get("/../../../../etc/passwd"),
    "path: parents inside": get("/v2/models/../../admin/models"),
    "path: encoded parents": get("/v2/models/%2e%2e/%2e%2e/admin/models"),
    "path: encoded slash": get("/v2/models/..%2f..%2fadmin"),
    "path: encoded twice": get("/v2/models/%252e%252e/admin"),
    "path: overlong UTF-8": get("/v2/models/%c0%ae%c0%ae/admin"),
    "path: backslash": get("/v2/models/..\\..\\admin"),
    "path: parameter": get("/v2/models/..;/..;/admin"),
    "path: NUL": get("/v2/models/heart%00.json"),
    "path: double slash": get("//v2//models/heart"),
    "path: line break": get("/v2%0d%0aset-cookie:%20a=b"),
    "path: whole URL": get("http://169.254.169.254/v2"),
    "path: admin": get("/admin/models"),
    "path: metrics": get("/metrics"),
    "path: repository": get("/.git/config"),
    "path: backup": get("/v2/models/heart/infer.bak"),
    "path: long": get("/v2/models/" + "a" * 30_000),
    # Injection, in a query.
    "query: SQL": get("/v2/models/heart?id=1%27%20UNION%20SELECT%20password%20FROM%20users--"),
    "query: SQL in a known field": post("/predict?delimiter=%27%20OR%201=1--", _ROW),
    "query: script": get("/docs?next=%3Cscript%3Ealert(1)%3C/script%3E"),
    "query: Log4Shell": post("/predict?identifiers=$%7Bjndi:ldap://127.0.0.1/a%7D", _ROW),
    "query: file": get("/openapi.json?file=../../../../etc/passwd"),
    "query: line break": post("/predict?identifiers=a%0d%0aset-cookie:b", _ROW),
    # Injection, in a header.
    "header: Log4Shell": get("/v2", "user-agent: ${jndi:ldap://127.0.0.1:1389/a}"),
    "header: Log4Shell in disguise": get("/v2", "x-api-version: ${${lower:j}ndi:ldap://127.0.0.1/a}"),
    "header: script": get("/v2", "referer: http://a/<script>alert(1)</script>"),
    "header: SQL": post(INFER, b"{}", "fedclaw-key: 1' OR '1'='1' UNION SELECT password FROM users --"),
    "header: Shellshock": get("/v2", "user-agent: () { :;}; /bin/bash -c 'id'"),
    # Injection, in a body.
    "body: Log4Shell": post("/predict", b'{"rows": [{"ward": "${jndi:ldap://127.0.0.1/a}"}]}'),
    "body: script": post("/predict", b'{"rows": [{"ward": "<script>alert(document.cookie)</script>"}]}'),
    "body: SQL": post("/predict", b'{"rows": [{"ward": "x\' UNION SELECT password FROM users -- "}]}'),
    "body: SQL that is always true": post("/predict", b'{"rows": [{"ward": "\' OR 1=1 -- "}]}'),
    "body: file": post("/predict", b'{"rows": [{"ward": "../../../../etc/passwd"}]}'),
    "body: shell": post("/predict", b'{"rows": [{"ward": "; /bin/bash -c \'cat /etc/shadow\'"}]}'),
    "body: Log4Shell in a table": post("/predict", b"age,ward\n63,${jndi:ldap://127.0.0.1/a}\n", content="text/csv"),
    "body: Log4Shell in a tensor": post(
        INFER, b'{"inputs":[{"name":"ward","datatype":"BYTES","shape":[1],"data":["${jndi:ldap://127.0.0.1/a}"]}]}'
    ),
    # Methods.
    "method: TRACE": get("/v2", method="TRACE"),
    "method: CONNECT": get("127.0.0.1:22", method="CONNECT"),
    "method: DELETE": get("/v2/models/heart", method="DELETE"),
    "method: PUT": post("/v2/models/heart/infer", b"{}", method="PUT"),
    "method: PROPFIND": get("/v2", "depth: 1", method="PROPFIND"),
    "method: unknown": get("/v2", method="JEFF"),
    "method: small letters": get("/v2", method="get"),
    "method: GET with an effect": get(INFER),
    "method: POST of what is read": post("/v2/health/ready", b"{}"),
    "method: in a header": post("/v2/models/heart", b"{}", "x-http-method-override: DELETE"),
    # Content.
    "content: web page": post(INFER, b"<html></html>", content="text/html"),
    "content: XML with an entity": post(
        "/predict", b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>', content="application/xml"
    ),
    "content: form": post("/predict", b"a=1&b=2", content="application/x-www-form-urlencoded"),
    "content: files": post("/predict", b"--x\r\n\r\n\r\n--x--\r\n", content="multipart/form-data; boundary=x"),
    "content: bomb": post(INFER, gzip.compress(bytes(1 << 20)), "content-encoding: gzip"),
    "content: none": framed("content-length: 2", body=b"{}").replace(b"content-type: application/json\r\n", b""),
    # Sizes.
    "size: announced": framed("content-length: 10737418240", body=b"{"),
    "size: sent": post(INFER, bytes(MOST_BODY + 1), content="application/octet-stream"),
    "size: chunks without end": framed("transfer-encoding: chunked", body=b"10000\r\n" + bytes(0x10000) + b"\r\n"),
    "size: 200 headers": get("/v2", *(f"x-{number}: a" for number in range(200))),
    "size: a large header": get("/v2", "cookie: " + "a" * 40_000),
    # Another protocol behind the proxy's back.
    "upgrade: HTTP/2 in the clear": get(
        "/v2", "connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMA"
    ),
    "upgrade: web socket": get("/v2", "connection: Upgrade", "upgrade: websocket", "sec-websocket-version: 13"),
    "upgrade: header taken away": post(INFER, b"{}", "connection: close, authorization"),
}
"""By what it tries."""

_AS_USUAL = [(":method", "GET"), (":scheme", "https"), (":authority", "node-front")]
_POSTED = [(":method", "POST"), *_AS_USUAL[1:], (":path", INFER), ("content-type", "application/json")]


def _asked(path: str, *more: tuple[str, str]) -> bytes:
    return http2.request([*_AS_USUAL, (":path", path), *more])


HOSTILE_HTTP2: dict[str, bytes] = {
    "parents": _asked("/v2/models/../../admin"),
    "admin": _asked("/admin/models"),
    "line break in the path": _asked("/v2 HTTP/1.1\r\nhost: x\r\n\r\nGET /v2/models/hidden"),
    "line break in a header": _asked("/v2", ("fedclaw-key", "a\r\ntransfer-encoding: chunked")),
    "NUL in a header": _asked("/v2", ("fedclaw-key", "a\0b")),
    "chunks": http2.request([*_POSTED, ("transfer-encoding", "chunked")], b"0\r\n\r\n" + _HIDDEN),
    "shorter than it says": http2.request([*_POSTED, ("content-length", "900")], b"{}"),
    "longer than it says": http2.request([*_POSTED, ("content-length", "2")], b"{}" + _HIDDEN),
    "connection": _asked("/v2", ("connection", "keep-alive, authorization")),
    "capital letters": _asked("/v2", ("Fedclaw-Key", "a")),
    "two paths": _asked("/v2", (":path", "/admin")),
    "no path": http2.request(_AS_USUAL),
    "pseudo header at the end": http2.request([*_AS_USUAL, ("fedclaw-key", "a"), (":path", "/v2")]),
    "unknown pseudo header": _asked("/v2", (":admin", "yes")),
    "Log4Shell": _asked("/v2", ("user-agent", "${jndi:ldap://127.0.0.1/a}")),
    "large header": _asked("/v2", *((f"x-{number}", "a" * 8000) for number in range(1))) * 0
    + http2.frame(http2.HEADERS, http2.END_STREAM, 1, http2.block([*_AS_USUAL, (":path", "/v2")]))
    + b"".join(http2.frame(http2.CONTINUATION, 0, 1, http2.block([(f"x-{n}", "a" * 8000)])) for n in range(20)),
    "web page": http2.request([*_POSTED[:-1], ("content-type", "text/html"), ("content-length", "2")], b"{}"),
    "TRACE": http2.request([(":method", "TRACE"), *_AS_USUAL[1:], (":path", "/v2")]),
}
"""The same over HTTP/2, and what only that has; each on a connection of its own."""


@dataclass(frozen=True)
class Legitimate:
    """A request as a client of a node sends it."""

    method: str
    target: str
    body: bytes | None = field(default=None, repr=False)
    headers: dict[str, str] = field(default_factory=dict)


def _json(target: str, value: object, **headers: str) -> Legitimate:
    return _posted(target, json.dumps(value).encode(), "application/json", **headers)


def _posted(target: str, body: bytes, content: str, **headers: str) -> Legitimate:
    given = {"content-type": content, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return Legitimate("POST", target, body, given)


def _tensor(name: str, data: Sequence[object], datatype: str = "FP32") -> dict[str, object]:
    return {"name": name, "datatype": datatype, "shape": [len(data), 1], "data": list(data)}


def _binary(data: bytes, target: str = INFER) -> Legitimate:
    """Open Inference Protocol with one binary tensor behind the JSON."""
    tensor = {"name": "x", "datatype": "UINT8", "shape": [1, len(data)], "parameters": {"binary_data_size": len(data)}}
    header = json.dumps({"inputs": [tensor]}).encode()
    return _posted(target, header + data, "application/octet-stream", inference_header_content_length=str(len(header)))


_CHANCE = random.Random(14)
_ODD = (
    "O'Brien",
    "SELECT",
    "<5 mmol",
    "a & b",
    "drop-off",
    "1=1",
    "100%",
    "50 % or more",
    "union",
    "script",
    "--",
    "#3",
)
_ODDER = (
    "{not known}",
    "C:\\ward\\2",
    "a;b",
    "(left)",
    "$5",
    "Müller-Lüdenscheidt",
    "東京",
    "on",
    "or",
    "and 1",
    "insert",
    "*",
)

LEGITIMATE: dict[str, Legitimate] = {
    "live": Legitimate("GET", "/v2/health/live"),
    "ready": Legitimate("GET", "/v2/health/ready"),
    "server": Legitimate("GET", "/v2"),
    "server, with a slash": Legitimate("GET", "/v2/"),
    "model": Legitimate("GET", "/v2/models/heart"),
    "model of a long name": Legitimate("GET", f"/v2/models/heart-2.{'x' * 56}"),
    "version": Legitimate("GET", "/v2/models/heart/versions/0123456789ab"),
    "model, ready": Legitimate("GET", "/v2/models/heart/ready"),
    "version, ready": Legitimate("GET", "/v2/models/heart/versions/v1.2/ready"),
    "API": Legitimate("GET", "/openapi.json"),
    "page": Legitimate("GET", "/docs", headers={"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}),
    "JSON": _json(INFER, {"inputs": [_tensor("age", [63.0, 51.5])]}),
    "JSON to a version": _json("/v2/models/heart/versions/v1/infer", {"inputs": [_tensor("age", [63.0])]}),
    "JSON, many columns": _json(INFER, {"inputs": [_tensor(f"column_{n}", [n / 7]) for n in range(60)]}),
    "JSON, an image": _json(INFER, {"inputs": [_tensor("x", [n / 255 for n in range(3072)])]}),
    "JSON, text": _json(INFER, {"inputs": [_tensor("ward", ["surgery", "O'Brien", "SELECT"], "BYTES")]}),
    "JSON, missing": _json(INFER, {"id": "42", "inputs": [_tensor("age", [None, 3.5])]}),
    "JSON, binary answer": _json(INFER, {"parameters": {"binary_data_output": True}, "inputs": [_tensor("age", [1])]}),
    "JSON, key": _json(INFER, {"inputs": [_tensor("age", [63.0])]}, fedclaw_key="patient-4711/ä"),
    "JSON, deadline": _json(INFER, {"inputs": [_tensor("age", [63.0])]}, fedclaw_deadline_ms="250"),
    "JSON, trace": _json(
        INFER, {"inputs": [_tensor("age", [1])]}, traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    ),
    "JSON, charset": _posted(INFER, b'{"inputs": []}', "application/json; charset=utf-8"),
    "binary, all bytes": _binary(bytes(range(256)) * 16),
    "binary, zeros": _binary(bytes(4096)),
    "binary, noise": _binary(_CHANCE.randbytes(200_000)),
    "binary, large": _binary(_CHANCE.randbytes(MOST_BODY - 1000)),
    "binary, floats": _binary(struct.pack("<1024f", *(_CHANCE.gauss(0, 1) for _ in range(1024)))),
    "binary, not a number": _binary(struct.pack("<64f", *[float("nan"), float("inf"), -0.0, 1e-45] * 16)),
    "binary, like a script": _binary(b"<script>alert(1)</script>${jndi:ldap://a}' OR 1=1 --"),
    "binary, like a request": _binary(_HIDDEN),
    "binary, line breaks": _binary(b"\r\n\r\n0\r\n\r\n" * 100),
    "binary, to a version": _binary(b"\xff\xfe\x00", "/v2/models/heart/versions/v1/infer"),
    "rows": _json("/predict", {"rows": [{"age": 63, "ward": "surgery"}]}),
    "rows of a model": _json("/predict/heart", {"rows": [{"age": 63, "ward": "surgery"}]}),
    "one row": _json("/predict", {"age": 63, "sex": "female", "smoker": False, "comment": None}),
    "columns": _json("/predict", {"columns": {"age": list(range(200)), "ward": ["surgery"] * 200}}),
    **{f"rows, odd text {n}": _json("/predict", {"rows": [{"ward": text}]}) for n, text in enumerate(_ODD)},
    "rows, odder text": _json("/predict", {"rows": [{"ward": text} for text in _ODDER]}),
    "rows, a sentence": _json(
        "/predict", {"rows": [{"note": "Select a diet; drop salt, update weekly. Pain on exertion (left) or at rest?"}]}
    ),
    "rows, names with spaces": _json("/predict", {"rows": [{"blood pressure [mmHg]": 120, "CRP <5 mg/l": "yes"}]}),
    "CSV": _posted("/predict", b"age,ward\n63,surgery\n", "text/csv"),
    "CSV, quotes": _posted("/predict", b'age,ward\r\n63,"O\'Brien, ""the"" ward; 2nd"\r\n', "text/csv"),
    "CSV, umlauts": _posted(
        "/predict", "alter;station\n63;Gynäkologie, Südflügel\n".encode(), "text/csv; charset=utf-8"
    ),
    "CSV, another alphabet": _posted(
        "/predict?encoding=windows-1252&delimiter=%3B&decimal=,", "alter;größe\n63;1,82\n".encode("cp1252"), "text/csv"
    ),
    "CSV, tabs": _posted("/predict?delimiter=%09&title_lines=1", b"of 2026\nage\tward\n63\tsurgery\n", "text/csv"),
    "CSV, identifiers": _posted("/predict?identifiers=patient_id,Fall%20Nr.,gr%C3%B6%C3%9Fe", b"age\n63\n", "text/csv"),
    "CSV, answered as CSV": _posted("/predict", b"age\n63\n", "text/csv", accept="text/csv"),
    "CSV, large": _posted("/predict", b"age,ward\n" + b"63,surgery\n" * 20_000, "text/csv"),
    "Parquet": _posted("/predict", b"PAR1" + _CHANCE.randbytes(3000) + b"PAR1", "application/vnd.apache.parquet"),
    "arrays": _posted("/predict", b"PK\x03\x04" + _CHANCE.randbytes(3000), "application/x-npz"),
    "image": _posted("/predict", b"\x89PNG\r\n\x1a\n" + _CHANCE.randbytes(3000), "image/png"),
    "photograph": _posted("/predict", b"\xff\xd8\xff\xe0" + _CHANCE.randbytes(3000), "image/jpeg"),
    "feedback": _json("/feedback", {"receipt": "v1.kZ3-_x" * 20, "label": "ill", "satisfaction": 4}),
    "feedback, words": _json("/feedback", {"receipt": "v1.kZ3-_x" * 20, "label": "it's <5% likely & mild"}),
}
"""By what it is."""
