"""A site without a server: what it says of that, and how soon it is back."""

import logging

import pytest

from fedclaw.transport.grpc.limits import Limits
from fedclaw.transport.grpc.site_connection import SiteConnection
from tests.ports import free_port

LOGGER = "fedclaw.transport.grpc.site_connection"


@pytest.fixture
def tries(monkeypatch):
    """How often sites have tried to connect."""
    made = []
    connect = SiteConnection._connect_once

    def counting(self, stop):
        made.append(1)
        return connect(self, stop)

    monkeypatch.setattr(SiteConnection, "_connect_once", counting)
    return made


def lines(caplog, level):
    return [record.getMessage() for record in caplog.records if record.name == LOGGER and record.levelno == level]


def failed_tries(kit, tries, count=4):
    begun = len(tries)
    kit.until(lambda: len(tries) > begun + count, "the site has tried again")


def test_a_run_that_has_finished_is_no_warning_and_the_next_one_is_joined(kit, tries, caplog):
    caplog.set_level(logging.INFO)
    port = free_port()
    grid = kit.grid(address=f"127.0.0.1:{port}")
    site = kit.link("site-a", port)
    kit.until(lambda: site.link.connected, "the site is there")
    grid.__exit__(None, None, None)
    failed_tries(kit, tries)
    assert not lines(caplog, logging.WARNING)
    assert sum("run finished" in line for line in lines(caplog, logging.INFO)) == 1
    assert kit.grid(address=f"127.0.0.1:{port}").wait_for_sites(1, 20) == ("site-a",)


def test_a_server_that_is_gone_is_told_of_once_until_it_is_back(kit, tries, caplog):
    caplog.set_level(logging.INFO)
    port = free_port()
    kit.link("site-a", port)  # which tries before there is a server, too
    for losses in (1, 2):
        grid = kit.grid(address=f"127.0.0.1:{port}")
        assert grid.wait_for_sites(1, 20) == ("site-a",)
        grid.__exit__(RuntimeError, RuntimeError("the run could not go on"), None)
        failed_tries(kit, tries)
        said = lines(caplog, logging.WARNING)
        assert losses <= sum("nobody listens there" in line for line in said) <= losses + 1, said
        assert not [line for line in lines(caplog, logging.INFO) if "run finished" in line]


def test_no_site_waits_longer_than_ten_seconds(kit):
    keys = kit.federation.site("site-a")
    link = SiteConnection(keys, kit.Echo(), kit.scratch / "state", Limits())
    assert max(link._delay(failures) for failures in range(17) for _ in range(50)) <= 10
    assert len({link._delay(16) for _ in range(20)}) > 1, "sites do not come back in the same instant"
