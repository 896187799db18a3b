"""nginx with ModSecurity and the OWASP rules, configured as deploy/nginx has it, before a server that remembers."""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.serve.proxies.certificates import NODE_NAME, Certificates, make_certificates
from tests.serve.proxies.conversation import (
    GRPC_METHOD,
    PATIENCE,
    Proxy,
    beside_slow_clients,
    eventually,
    grpc_standing_in,
    not_passed,
    not_stopped,
    not_stopped_over_http2,
    statuses,
    through_grpc,
    wait_for,
)
from tests.serve.proxies.requests import HOSTILE, HOSTILE_HTTP2, LEGITIMATE, get, post
from tests.serve.proxies.standin import Node, standing_in

CONFIGURATION = Path(__file__).parents[3] / "deploy" / "nginx"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
MODULE = Path("/usr/lib/nginx/modules/ngx_http_modsecurity_module.so")
RULES = Path("/usr/share/modsecurity-crs/rules")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        NGINX is None or not MODULE.exists() or not RULES.exists(),
        reason="nginx, libnginx-mod-http-modsecurity and modsecurity-crs are not installed",
    ),
]


MADE_GOOD = {"pseudo header at the end"}
"""What RFC 9113 calls malformed and nginx reads as it was meant; it writes the request anew for the node."""


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def node(certificates: Certificates) -> Iterator[Node]:
    with standing_in(certificates) as started:
        yield started


def configured(
    text: str, directory: Path, certificates: Certificates, nodes: tuple[str, str], ports: tuple[int, int]
) -> str:
    """The shipped file, with this machine's addresses and paths in the places of the examples."""
    places = {
        "10.0.0.1:8443": nodes[0],
        "10.0.0.1:8444": nodes[1],
        "listen 443": f"listen 127.0.0.1:{ports[0]}",
        "listen 8444": f"listen 127.0.0.1:{ports[1]}",
        "/etc/nginx/fedclaw/proxy.pem": str(certificates.proxy),
        "/etc/nginx/fedclaw/nodes-ca.crt": str(certificates.ca),
        "/etc/nginx/fedclaw/modsecurity.conf": str(directory / "modsecurity.conf"),
        "/var/log/nginx/fedclaw.log": str(directory / "access.log"),
        "/var/log/nginx/fedclaw-error.log": str(directory / "server.log"),
        "client_max_body_size 16m": "client_max_body_size 1m",
    }
    text = re.sub(r"^ +server 10\.0\.0\.2.*\n", "", text, flags=re.M)
    for shipped, here in places.items():
        assert shipped in text, shipped
        text = text.replace(shipped, here)
    return text


Changes = Callable[[str], str]


@contextmanager
def running(
    directory: Path,
    certificates: Certificates,
    node: Node,
    grpc_address: str = "127.0.0.1:1",
    server: Changes = str,
    rules: Changes = str,
) -> Iterator[Proxy]:
    """nginx with the shipped files, until the end of the block; `server` and `rules` change what is in them."""
    port, grpc_port = free_port(), free_port()
    shipped = (CONFIGURATION / "fedclaw.conf").read_text()
    here = configured(shipped, directory, certificates, (node.address, grpc_address), (port, grpc_port))
    (directory / "fedclaw.conf").write_text(server(here))
    (directory / "modsecurity.conf").write_text(rules((CONFIGURATION / "modsecurity.conf").read_text()))
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "\n".join(f"{kind}_temp_path {directory}/{kind};" for kind in kinds)
    (directory / "nginx.conf").write_text(
        f"load_module {MODULE};\ndaemon off;\nuser root;\nworker_processes 1;\npid {directory}/pid;\n"
        f"error_log {directory}/error.log error;\nevents {{ worker_connections 1024; }}\n"
        f"http {{\n{places}\ninclude {directory}/fedclaw.conf;\n}}\n"
    )
    with (directory / "stderr").open("w") as said:
        process = subprocess.Popen([str(NGINX), "-c", directory / "nginx.conf"], stderr=said)
    try:
        yield Proxy(port, certificates.ca, grpc_port)
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def proxy(certificates: Certificates, node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with running(tmp_path_factory.mktemp("nginx"), certificates, node) as started:
        wait_for(started)
        yield started


def test_hostile_requests_are_stopped(proxy: Proxy, node: Node):
    assert len(HOSTILE) + len(HOSTILE_HTTP2) - len(MADE_GOOD) >= 50
    assert not_stopped(proxy, node) == []
    assert not_stopped_over_http2(proxy, node, HOSTILE_HTTP2.keys() - MADE_GOOD) == []


def test_what_nginx_makes_good_comes_to_the_node_as_one_request(proxy: Proxy, node: Node):
    assert len(not_stopped_over_http2(proxy, node, MADE_GOOD)) == len(MADE_GOOD)
    assert [(one.method, one.target) for one in node.arrived] == [("GET", "/v2")]


def test_legitimate_requests_pass_as_they_are(proxy: Proxy, node: Node):
    assert len(LEGITIMATE) >= 50
    assert not_passed(proxy, node) == []


def _without(text: str, rule: str) -> str:
    """The rules without one, which is a comment and a directive of one line, continued."""
    changed = re.sub(rf'SecRule (?:(?!\nSec)[\s\S])*?"id:{rule},[^"]*"', "", text)
    assert changed != text
    return changed


IN_A_BODY = (
    "body: SQL",
    "body: SQL that is always true",
    "body: script",
    "body: Log4Shell",
    "body: file",
    "body: shell",
)


def test_the_owasp_rules_read_the_rows_of_a_table(certificates: Certificates, node: Node, tmp_path: Path):
    """Without the rule of our own, which stops the same: the rule set is at work, and not only loaded."""
    with running(tmp_path, certificates, node, rules=lambda text: _without(text, "10020")) as proxy:
        wait_for(proxy)
        assert not_stopped(proxy, node, IN_A_BODY) == []
        unread = "body: Log4Shell in a tensor"
        assert not_stopped(proxy, node, [unread]) != []  # what rule 10020 is for


def test_a_flood_of_requests_is_stopped(certificates: Certificates, node: Node, tmp_path: Path):
    def slower(text: str) -> str:
        return text.replace("rate=1000r/s", "rate=1r/s").replace("burst=2000", "burst=10")

    with running(tmp_path, certificates, node, server=slower) as proxy:
        wait_for(proxy)
        node.arrived.clear()
        found = statuses(proxy, 60, get("/v2"))
        assert len(node.arrived) == found.count(200) <= 30
        assert found.count(429) == 60 - found.count(200)


def test_who_has_many_requests_under_way_waits_for_their_answers(
    certificates: Certificates, node: Node, tmp_path: Path
):
    def fewer(text: str) -> str:
        return text.replace("fedclaw_connections 200", "fedclaw_connections 5")

    with running(tmp_path, certificates, node, server=fewer) as proxy, ThreadPoolExecutor(5) as pool:
        wait_for(proxy)
        node.arrived.clear()
        node.free.clear()
        under_way = [pool.submit(proxy.status, get("/v2/models/busy"), PATIENCE) for _ in range(5)]
        try:
            eventually(lambda: len(node.arrived) == 5, "five are let through")
            assert proxy.status(get("/v2")) == 429
        finally:
            node.free.set()
        assert [one.result() for one in under_way] == [200] * 5
        eventually(lambda: proxy.status(get("/v2")) == 200, "those that were answered still count")


def test_slow_clients_are_let_go_while_others_are_answered(proxy: Proxy, node: Node):
    """nginx waits 5 s for a header and for 10 s of silence in a body; until it is whole, nothing is at the node."""
    told, quick = beside_slow_clients(proxy, node)
    assert quick == [200] * 20
    assert told <= {408, 0}


def test_one_that_dies_is_not_missed(certificates: Certificates, node: Node, tmp_path: Path):
    with ExitStack() as other:
        dying = other.enter_context(standing_in(certificates))

        def two(text: str) -> str:
            line = f"    server {node.address} max_fails=1 fail_timeout=2s;\n"
            assert line in text
            return text.replace(line, line + line.replace(node.address, dying.address), 1)

        with running(tmp_path, certificates, node, server=two) as proxy:
            wait_for(proxy)
            asked = [LEGITIMATE[case] for case in ("JSON", "feedback", "CSV")] * 10
            assert {proxy.ask(request)[0] for request in asked} == {200}
            assert node.arrived
            assert dying.arrived
            other.close()
            assert [proxy.ask(request)[0] for request in asked] == [200] * 30


@pytest.mark.parametrize("wrong", ["name", "authority"])
def test_what_is_no_node_of_ours_is_not_asked(wrong: str, certificates: Certificates, node: Node, tmp_path: Path):
    (tmp_path / "other").mkdir()
    stranger = make_certificates(tmp_path / "other")

    def other(text: str) -> str:
        return text.replace(
            *((NODE_NAME, "another.example.org") if wrong == "name" else (str(certificates.ca), str(stranger.ca)))
        )

    with running(tmp_path, certificates, node, server=other) as proxy:
        node.arrived.clear()
        eventually(lambda: _status_or_0(proxy) == 502, "it asks whoever is there")
        assert node.arrived == []


def _status_or_0(proxy: Proxy) -> int:
    with suppress(OSError):
        return proxy.status(get("/v2"))
    return 0


def test_grpc_passes_and_nothing_else_at_its_port(certificates: Certificates, node: Node, tmp_path: Path):
    with grpc_standing_in(certificates) as (address, asked), running(tmp_path, certificates, node, address) as proxy:
        wait_for(proxy)
        assert through_grpc(proxy) == []
        assert asked == [GRPC_METHOD]


def test_neither_a_token_nor_a_patients_data_is_logged(certificates: Certificates, node: Node, tmp_path: Path):
    with running(tmp_path, certificates, node) as proxy:
        wait_for(proxy)
        for sent in (
            post("/predict?identifiers=patient_4711", b'{"rows": [{"ward": "Muster"}]}'),
            post("/predict", b'{"rows": [{"ward": "Muster\' UNION SELECT password FROM users -- "}]}'),
        ):
            proxy.status(sent)
    said = "".join(path.read_text() for path in tmp_path.iterdir() if path.suffix == ".log" or path.name == "stderr")
    assert "/predict" in said
    assert not [secret for secret in ("4711", "Muster", "Bearer", "eyJ") if secret in said]
