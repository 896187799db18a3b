"""A site's certificate that runs out while the site is connected."""

import datetime as dt
from collections.abc import Callable
from pathlib import Path

import pytest

from fedclaw.errors import ConnectionRefused
from fedclaw.identity import pki, provisioning
from fedclaw.identity.site_home import SiteKeys

DAY, MINUTE = dt.timedelta(days=1), dt.timedelta(minutes=1)


def issued(federation, site: Path, life: dt.timedelta) -> SiteKeys:
    """A site whose certificate the federation's CA issued for so long."""
    home = federation.root / "federation"
    request = provisioning.request_site(site, home / "federation.json", site.name)
    approval = provisioning.approve(home, request, days=life / DAY)
    provisioning.accept(site, approval)
    return SiteKeys.open(site)


@pytest.fixture
def brief(federation, tmp_path, request) -> SiteKeys:
    """A site whose certificate expires tomorrow, of a name of its own."""
    return issued(federation, tmp_path / f"site-{len(request.node.name)}", DAY)


@pytest.fixture
def tomorrow(monkeypatch) -> Callable[[], None]:
    """Makes it the day after tomorrow, by the clock that certificates are held to."""
    today = pki.now
    return lambda: monkeypatch.setattr(pki, "now", lambda: today() + 2 * DAY)


@pytest.fixture(scope="module")
def lapsed(federation, tmp_path_factory) -> SiteKeys:
    """A site whose certificate has expired since its process read it, by every clock."""
    today = pki.now
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pki, "now", lambda: today() - 5 * MINUTE)
        keys = issued(federation, tmp_path_factory.mktemp("lapsed") / "site-lapsed", MINUTE)
    assert expired(keys)
    return keys


def expired(keys: SiteKeys) -> bool:
    return pki.now() > keys.certificate.not_valid_after_utc


def test_a_connected_site_whose_certificate_expires_is_dropped_and_both_ends_say_why(kit, brief, tomorrow, caplog):
    grid = kit.grid()
    echo = kit.Echo()
    echo.gate.clear()
    name = brief.site_name
    running = kit.link(name, grid.port, echo, keys=brief)
    kit.link("site-a", grid.port)
    grid.wait_for_sites(2, 20)
    replies = grid.send_and_receive([kit.message(name), kit.message("site-a")], timeout=60)
    assert not expired(brief)
    tomorrow()

    error = running.ended()

    assert expired(brief)
    assert isinstance(error, ConnectionRefused)
    why = f"the certificate of site {name!r} has expired; renew it"
    assert str(error) == f"the server refused this site (expired): {why}"
    assert [record.getMessage() for record in caplog.records if "expired" in record.getMessage()] == [
        f"{name} refused: {why}"
    ]
    assert [grid.site_name(reply.metadata.src_node_id) for reply in replies] == ["site-a"], "nobody waits for it"
    kit.until(lambda: grid.wait_for_sites(1, 1) == ("site-a",), "its place is free")


def test_a_site_that_was_away_when_its_certificate_expired_stops_trying(kit, brief, tomorrow, caplog):
    running = kit.link(brief.site_name, 1, keys=brief)
    kit.until(lambda: "next attempt" in caplog.text, "it has tried in vain")
    tomorrow()
    error = running.ended()
    assert isinstance(error, ConnectionRefused)
    assert "expired on" in str(error)


def test_the_server_does_not_take_an_expired_certificate_from_a_site_that_knocks_all_the_same(kit, lapsed, caplog):
    class SlowClock(SiteKeys):
        """Keys of a site whose clock is behind: it holds another certificate for its own."""

        def tls(self):
            return lapsed.tls()

    honest = kit.federation.site("site-a")
    keys = SlowClock(honest.root, honest.descriptor, honest.certificate, honest._key)
    grid = kit.grid()
    running = kit.link("site-a", grid.port, keys=keys)
    kit.until(lambda: "next attempt" in caplog.text, "the site was refused")
    assert "does not take this site's certificate (expired by the server's clock" in caplog.text
    assert not running.link.connected
    assert list(grid.get_node_ids()) == []


def test_an_expired_site_does_not_knock_and_says_what_to_run_which_helps(kit, lapsed):
    grid = kit.grid()
    error = kit.link("site-lapsed", grid.port, keys=lapsed).ended()
    assert isinstance(error, ConnectionRefused)
    assert "\n" not in str(error)
    begin = f"the certificate of site 'site-lapsed', {lapsed.root}/keys/site.crt, expired on "
    assert str(error).startswith(begin)
    assert f"run: python -m fedclaw.provision renew site={lapsed.root}" in str(error)
    assert str(error).endswith("then start again")
    assert list(grid.get_node_ids()) == []

    federation = kit.federation.root / "federation"
    provisioning.accept(lapsed.root, provisioning.approve(federation, provisioning.renew_site(lapsed.root)))
    kit.link("site-lapsed", grid.port, keys=SiteKeys.open(lapsed.root))
    assert grid.wait_for_sites(1, 20) == ("site-lapsed",)
