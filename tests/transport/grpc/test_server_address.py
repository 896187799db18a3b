"""Reaching the server: by another name or address, through a proxy, and by IPv6 however it is written."""

import socket

import pytest

from fedclaw.errors import UsageError
from fedclaw.identity import pki, provisioning
from fedclaw.identity.federation_home import FederationHome
from fedclaw.identity.names import canonical_address, check_host
from fedclaw.identity.site_home import SiteKeys
from fedclaw.transport.grpc.grid import GrpcGrid
from fedclaw.transport.grpc.site_connection import SiteConnection, channel_target, proxy_for
from tests.transport.grpc.conftest import Running


def enrolled(root, address: str, **settings) -> tuple[FederationHome, SiteKeys]:
    home = provisioning.initialise(root / "federation", "clinics", address, **settings)
    request = provisioning.request_site(root / "site-a", root / "federation" / "federation.json", "site-a")
    provisioning.accept(root / "site-a", provisioning.approve(root / "federation", request))
    return home, SiteKeys.open(root / "site-a")


def connects(kit, home, keys, listen: str, dial: str) -> bool:
    with GrpcGrid(home, address=listen, run_id=kit.RUN_ID, limits=kit.QUICK) as grid:
        link = SiteConnection(keys, kit.Echo(), kit.scratch / "state", kit.QUICK, dial.format(port=grid.port))
        running = Running(link)
        try:
            return grid.wait_for_sites(1, 10) == ("site-a",)
        finally:
            running.stop()


@pytest.mark.parametrize("address", ["203.0.113.7:9443", "fl.example.org:9443", "[2001:DB8:0:0::0:7]:9443"])
def test_a_site_reaches_the_server_by_another_address_than_the_descriptors(kit, tmp_path, address):
    home, keys = enrolled(tmp_path, address)
    assert connects(kit, home, keys, "127.0.0.1:0", "127.0.0.1:{port}")


def test_another_federations_server_is_no_server_of_ours_whatever_leads_to_it(kit, tmp_path, caplog):
    """Both name the same host; it is the CA that makes the server ours."""
    (tmp_path / "theirs").mkdir()
    theirs, _ = enrolled(tmp_path / "theirs", "203.0.113.7:9443")
    _, keys = enrolled(tmp_path, "203.0.113.7:9443")
    with GrpcGrid(theirs, address="127.0.0.1:0", run_id=kit.RUN_ID, limits=kit.QUICK) as grid:
        running = Running(SiteConnection(keys, kit.Echo(), kit.scratch / "state", kit.QUICK, f"127.0.0.1:{grid.port}"))
        kit.until(lambda: "next attempt" in caplog.text, "the site has given up on it")
        assert list(grid.get_node_ids()) == []
        running.stop()


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_ipv6_in_a_long_form_connects(kit, tmp_path):
    home, keys = enrolled(tmp_path, "[0:0:0:0:0:0:0:1]:9443")
    assert home.descriptor.address == "[::1]:9443"
    try:
        assert connects(kit, home, keys, "[::1]:0", "[0000:0::0:1]:{port}")
    except OSError:
        pytest.skip("loopback has no IPv6 here")


def test_a_certificate_is_for_all_addresses_and_stays_so_when_it_is_renewed(tmp_path):
    names = ["server.internal", "10.0.0.5:9443", "[2001:db8:0::1]", "2001:DB8::2", "FL.Example.org"]
    home, _ = enrolled(tmp_path, "fl.example.org:9443", addresses=names)

    def present() -> list[str]:
        return pki.host_names(pki.parse_certificate((home.root / "server.crt").read_bytes(), "it"))

    expected = ["fl.example.org", "server.internal", "10.0.0.5", "2001:db8::1", "2001:db8::2"]
    assert present() == expected
    provisioning.renew_federation(home.root)
    assert present() == expected
    provisioning.renew_federation(home.root, addresses=["other.internal"])
    assert present() == ["fl.example.org", "other.internal"]


@pytest.mark.parametrize("wrong", ["", "a b", "0.0.0.0", "host:99999", "[10.0.0.1]", "http://host", "::", "-", "1.2.3"])
def test_what_is_no_address_is_refused_before_anything_is_made(tmp_path, wrong):
    with pytest.raises(UsageError):
        provisioning.initialise(tmp_path / "f", "clinics", "127.0.0.1:9443", addresses=[wrong])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("FL.Example.ORG:9443", "fl.example.org:9443"),
        ("[2001:DB8:0:0:0:0:0:1]:443", "[2001:db8::1]:443"),
        ("127.0.0.1:1", "127.0.0.1:1"),
    ],
)
def test_one_way_to_write_an_address(written, canonical):
    assert canonical_address(written) == canonical
    assert check_host(written) == canonical.rpartition(":")[0].strip("[]")


def test_an_override_that_is_no_address_is_a_users_mistake(kit):
    with pytest.raises(UsageError, match="server: 'nonsense' is not HOST:PORT"):
        SiteConnection(kit.federation.site("site-a"), kit.Echo(), kit.scratch / "state", kit.QUICK, "nonsense")


@pytest.fixture
def no_proxies(monkeypatch):
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("variable", ["grpc_proxy", "https_proxy", "http_proxy"])
def test_a_proxy_at_which_nobody_answers_is_named_with_the_variable_and_the_remedy(
    kit, caplog, monkeypatch, no_proxies, variable
):
    monkeypatch.setenv(variable, "http://user:secret@127.0.0.1:9")
    kit.link("site-a", kit.grid().port)
    kit.until(lambda: "next attempt" in caplog.text, "the site has failed to connect")
    (said, *_) = [record.getMessage() for record in caplog.records if "next attempt" in record.getMessage()]
    assert "nobody listens at the proxy" in said
    assert f"the proxy http://127.0.0.1:9, because the variable {variable} is set" in said
    assert "add 127.0.0.1 to no_proxy" in said
    assert "secret" not in caplog.text
    assert "\n" not in said


def test_a_server_that_is_down_is_still_called_that_without_a_proxy(kit, caplog, no_proxies):
    kit.link("site-a", 9)
    kit.until(lambda: "next attempt" in caplog.text, "the site has failed to connect")
    assert "nobody listens there (connection refused)" in caplog.text
    assert "proxy" not in caplog.text


def test_a_host_that_is_exempt_takes_no_proxy(monkeypatch, no_proxies):
    monkeypatch.setenv("https_proxy", "proxy.example.org:3128")
    assert proxy_for("fl.example.org:1") == ("http://proxy.example.org:3128", "https_proxy")
    monkeypatch.setenv("no_proxy", "localhost, example.org")
    assert proxy_for("fl.example.org:1") is None
    assert proxy_for("fl.example.com:1") is not None


def test_the_name_that_is_checked_is_the_descriptors(no_proxies):
    assert channel_target("FL.Example.org:9443", "10.0.0.5:1") == (
        "10.0.0.5:1",
        [("grpc.ssl_target_name_override", "fl.example.org")],
    )
