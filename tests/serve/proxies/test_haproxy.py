"""The configuration that is written for HAProxy, in a real one, before servers that remember what came through."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from fedclaw.cli import compose_settings
from fedclaw.errors import UsageError
from fedclaw.serve.proxies.haproxy import HaproxySettings, ProxyLimits, configuration, haproxy
from tests.ports import free_port
from tests.serve.proxies import http2
from tests.serve.proxies.certificates import NODE_NAME, Certificates, make_certificates
from tests.serve.proxies.conversation import (
    GRPC_METHOD,
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
from tests.serve.proxies.requests import HOSTILE, HOSTILE_HTTP2, INFER, LEGITIMATE, MOST_BODY, get, post
from tests.serve.proxies.standin import Node, standing_in

HAPROXY = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
real = pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed")

GENEROUS = ProxyLimits(
    body_bytes=MOST_BODY,
    connections=10_000,
    connections_per_second=10_000,
    requests_per_second=10_000,
    token_requests_per_second=10_000,
    errors_per_second=10_000,
)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def settings_for(certificates: Certificates, *nodes: str, **changes: Any) -> HaproxySettings:
    given: dict[str, Any] = {
        "nodes": nodes,
        "node_ca": str(certificates.ca),
        "node_name": NODE_NAME,
        "certificate": str(certificates.proxy),
        "bind": f"127.0.0.1:{free_port()}",
        "grpc_bind": f"127.0.0.1:{free_port()}",
        "user": None,
        "limits": GENEROUS,
    }
    return HaproxySettings(**{**given, **changes})


@contextmanager
def running(settings: HaproxySettings, directory: Path, certificates: Certificates) -> Iterator[Proxy]:
    """HAProxy with that configuration, until the end of the block."""
    path = directory / "haproxy.cfg"
    path.write_text(configuration(settings))
    with (directory / "log").open("w") as log:
        process = subprocess.Popen([str(HAPROXY), "-db", "-f", path], stdout=log, stderr=log)
        ports = [int(address.rpartition(":")[2]) for address in (settings.bind, settings.grpc_bind)]
        try:
            yield Proxy(ports[0], certificates.ca, ports[1])
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def node(certificates: Certificates) -> Iterator[Node]:
    with standing_in(certificates) as started:
        yield started


@pytest.fixture
def proxy(certificates: Certificates, node: Node, tmp_path: Path) -> Iterator[Proxy]:
    with running(settings_for(certificates, node.address), tmp_path, certificates) as started:
        wait_for(started)
        node.arrived.clear()
        yield started


@real
def test_hostile_requests_are_stopped(proxy: Proxy, node: Node):
    assert len(HOSTILE) + len(HOSTILE_HTTP2) >= 50
    assert not_stopped(proxy, node) == []
    assert not_stopped_over_http2(proxy, node) == []


@real
def test_legitimate_requests_pass_as_they_are(proxy: Proxy, node: Node):
    assert len(LEGITIMATE) >= 50
    assert not_passed(proxy, node) == []


@real
def test_a_legitimate_request_over_http2_passes(proxy: Proxy, node: Node):
    """Otherwise those over HTTP/2 might be stopped for being written by hand."""
    fields = [(":method", "POST"), (":scheme", "https"), (":authority", "node-front"), (":path", INFER)]
    fields += [("content-type", "application/json"), ("content-length", "14"), ("fedclaw-key", "a")]
    with proxy.connect("h2") as connection:
        connection.sendall(http2.opening() + http2.request(fields, b'{"inputs": []}'))
        came = http2.frames(connection)
    assert came[-1][0] == http2.DATA
    assert b"digest" in came[-1][3]
    assert [(one.target, one.body) for one in node.arrived] == [(INFER, b'{"inputs": []}')]
    assert node.arrived[0].headers["fedclaw-key"] == "a"


@real
def test_whom_it_is_for_is_the_proxys_word(proxy: Proxy, node: Node):
    """A client's word on where it comes from is replaced, and hop-by-hop headers end at the proxy."""
    status = proxy.status(get("/v2", "x-forwarded-for: 10.0.0.1", "forwarded: for=10.0.0.1", "x-real-ip: 10.0.0.1"))
    (came,) = node.arrived
    assert status == 200
    assert came.headers["x-forwarded-for"] == "127.0.0.1"
    assert not came.headers.keys() & {"forwarded", "x-real-ip"}


@real
def test_a_refusal_is_json_as_a_nodes_own_is(proxy: Proxy):
    with proxy.connect() as connection:
        connection.sendall(get("/admin/models", "connection: close"))
        answer = b""
        while part := connection.recv(65536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b" 404 " in head.split(b"\r\n")[0]
    assert json.loads(body) == {"error": "there is nothing at this path", "code": "not_found"}
    assert b"haproxy" not in answer.lower()


@real
@pytest.mark.slow
def test_a_flood_of_requests_is_stopped(certificates: Certificates, node: Node, tmp_path: Path):
    limits = GENEROUS.model_copy(update={"requests_per_second": 2})
    with running(settings_for(certificates, node.address, limits=limits), tmp_path, certificates) as proxy:
        wait_for(proxy)
        node.arrived.clear()
        found = statuses(proxy, 60, get("/v2"))
        assert len(node.arrived) == found.count(200) <= 20
        assert found.count(429) == 60 - found.count(200)


@real
@pytest.mark.slow
def test_a_flood_with_one_token_leaves_the_others_alone(certificates: Certificates, node: Node, tmp_path: Path):
    limits = GENEROUS.model_copy(update={"token_requests_per_second": 2})
    with running(settings_for(certificates, node.address, limits=limits), tmp_path, certificates) as proxy:
        wait_for(proxy)
        loud = statuses(proxy, 40, get("/v2", "authorization: Bearer loud"))
        assert loud.count(429) == 20
        assert proxy.status(get("/v2", "authorization: Bearer quiet")) == 200


@real
@pytest.mark.slow
def test_who_is_refused_all_the_time_is_shut_out(certificates: Certificates, node: Node, tmp_path: Path):
    limits = GENEROUS.model_copy(update={"errors_per_second": 1})
    with running(settings_for(certificates, node.address, limits=limits), tmp_path, certificates) as proxy:
        wait_for(proxy)
        assert 429 in statuses(proxy, 30, get("/wp-login.php"))
        assert proxy.status(get("/v2")) == 429


@real
@pytest.mark.slow
def test_a_flood_of_connections_is_stopped(certificates: Certificates, node: Node, tmp_path: Path):
    limits = GENEROUS.model_copy(update={"connections": 20})
    with running(settings_for(certificates, node.address, limits=limits), tmp_path, certificates) as proxy:
        wait_for(proxy)
        held, refused = [], 0
        try:
            for _ in range(40):
                try:
                    held.append(proxy.connect())
                except OSError:
                    refused += 1
            assert (len(held), refused) == (20, 20)
        finally:
            for connection in held:
                connection.close()
        eventually(lambda: _answers(proxy), "those that are gone still count")


def _answers(proxy: Proxy) -> bool:
    with suppress(OSError):
        return proxy.status(get("/v2/health/live")) == 200
    return False


@real
@pytest.mark.slow
def test_streams_that_are_reset_at_once_leave_the_node_alone(proxy: Proxy, node: Node):
    """CVE-2023-44487: requests that are taken back as fast as they are made."""
    fields = [(":method", "GET"), (":scheme", "https"), (":authority", "node-front"), (":path", "/v2/models/heart")]
    burst = b"".join(
        http2.request(fields, stream=stream) + http2.frame(http2.RST_STREAM, 0, stream, bytes((0, 0, 0, 8)))
        for stream in range(1, 4001, 2)
    )
    with proxy.connect("h2", timeout=5.0) as connection:
        with suppress(OSError):
            connection.sendall(http2.opening() + burst)
        http2.frames(connection, most=20)
    assert len(node.arrived) < 200
    assert proxy.status(get("/v2")) == 200


@real
@pytest.mark.slow
def test_slow_clients_are_let_go_while_others_are_answered(proxy: Proxy, node: Node):
    told, quick = beside_slow_clients(proxy, node)
    assert quick == [200] * 20
    assert told <= {408, 0}


@real
@pytest.mark.slow
def test_both_nodes_answer_and_one_that_dies_is_not_missed(certificates: Certificates, tmp_path: Path):
    with ExitStack() as stack:
        nodes = [stack.enter_context(standing_in(certificates))]
        other = ExitStack()
        nodes.append(other.enter_context(standing_in(certificates)))
        settings = settings_for(certificates, *(node.address for node in nodes))
        proxy = stack.enter_context(running(settings, tmp_path, certificates))
        wait_for(proxy)
        eventually(
            lambda: all(node.arrived or not proxy.ask(LEGITIMATE["JSON"]) for node in nodes), "one is never asked"
        )
        other.close()
        found = [
            proxy.ask(request)[0] for request in [LEGITIMATE["JSON"], LEGITIMATE["feedback"], LEGITIMATE["CSV"]] * 10
        ]
        assert found == [200] * 30


@real
@pytest.mark.slow
def test_without_a_node_it_says_so(certificates: Certificates, tmp_path: Path):
    settings = settings_for(certificates, f"127.0.0.1:{free_port()}")
    with running(settings, tmp_path, certificates) as proxy:
        eventually(lambda: _status_or_0(proxy) == 503, "it does not say that no node is ready")


def _status_or_0(proxy: Proxy) -> int:
    with suppress(OSError):
        return proxy.status(get("/v2"))
    return 0


@real
@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["name", "authority"])
def test_what_is_no_node_of_ours_is_not_asked(wrong: str, certificates: Certificates, node: Node, tmp_path: Path):
    (tmp_path / "other").mkdir()
    stranger = make_certificates(tmp_path / "other")
    changes = {"node_name": "another.example.org"} if wrong == "name" else {"node_ca": str(stranger.ca)}
    with running(settings_for(certificates, node.address, **changes), tmp_path, certificates) as proxy:
        eventually(lambda: _status_or_0(proxy) == 503, "it asks whoever is there")
        assert proxy.status(post(INFER, b"{}")) == 503
        assert node.arrived == []


@real
def test_grpc_passes_and_nothing_else_at_its_port(certificates: Certificates, node: Node, tmp_path: Path):
    with grpc_standing_in(certificates) as (address, asked):
        settings = settings_for(certificates, node.address, grpc_nodes=(address,))
        with running(settings, tmp_path, certificates) as proxy:
            wait_for(proxy)
            assert through_grpc(proxy) == []
            assert asked == [GRPC_METHOD]


@real
def test_every_configuration_is_one_to_haproxy(certificates: Certificates, tmp_path: Path):
    for number, changes in enumerate(
        (
            {"grpc_nodes": ("10.0.0.1:8444", "[fd00::2]:8444"), "user": "haproxy"},
            {"client_ca": str(certificates.ca), "names": ("heart.example.org", "ecg.example.org")},
            {"bind": "*:443", "nodes": ("127.0.0.1:1", "localhost:2"), "plaintext": True, "node_ca": None},
        )
    ):
        settings = settings_for(certificates, **{"nodes": ("10.0.0.1:8443", "[fd00::2]:8443"), **changes})
        path = tmp_path / f"{number}.cfg"
        path.write_text(configuration(settings))
        done = subprocess.run([str(HAPROXY), "-c", "-f", path], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "[WARNING]" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nodes": ("10.0.0.1:8443\n    server evil 10.6.6.6:1",)}, "HOST:PORT"),
        ({"nodes": ("10.0.0.1:8443 weight 256",)}, "HOST:PORT"),
        ({"nodes": ("*:8443",)}, "HOST:PORT"),
        ({"nodes": ("10.0.0.1:99999",)}, "HOST:PORT"),
        ({"nodes": ()}, "at least 1"),
        ({"nodes": ("10.0.0.1:1", "10.0.0.1:1")}, "twice"),
        ({"grpc_nodes": ("10.0.0.1:1", "10.0.0.2:1")}, "as many"),
        ({"certificate": "/etc/ssl/proxy.pem verify none"}, "absolute path"),
        ({"certificate": "proxy.pem"}, "absolute path"),
        ({"node_name": "a verify none"}, "host name"),
        ({"node_ca": None}, "node_ca="),
        ({"node_name": None}, "node_name="),
        ({"plaintext": True}, "own machine"),
        ({"names": ("a } || { always_true",)}, "host name"),
        ({"user": "root"}, "haproxy"),
        ({"bind": "*:443 ssl crt /x"}, "HOST:PORT"),
    ],
)
def test_a_setting_is_no_line_of_the_configuration(changes: dict[str, Any], said: str):
    given = {"nodes": ("10.0.0.1:8443",), "certificate": "/etc/p.pem", "node_ca": "/etc/ca.crt", "node_name": "node"}
    with pytest.raises(ValueError, match=said):
        HaproxySettings(**{**given, **changes})


def test_it_is_written_once_and_said_otherwise(tmp_path: Path):
    words = [
        "nodes=['10.0.0.1:8443','10.0.0.2:8443']",
        "certificate=/etc/p.pem",
        "node_ca=/etc/ca.crt",
        "node_name=node",
    ]
    said: list[str] = []
    haproxy(compose_settings("serve_haproxy", words, HaproxySettings), said.append)
    assert said[0].startswith("# Written by")
    assert "server node-2 10.0.0.2:8443 ssl verify required ca-file /etc/ca.crt verifyhost node" in said[0]
    settings = compose_settings("serve_haproxy", [*words, f"output={tmp_path / 'haproxy.cfg'}"], HaproxySettings)
    haproxy(settings, said.append)
    assert (tmp_path / "haproxy.cfg").read_text() == said[0]
    with pytest.raises(UsageError, match="exists"):
        haproxy(settings, said.append)
