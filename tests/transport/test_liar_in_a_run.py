"""A run over gRPC of which one site in four sends junk: three honest ones finish it, and the liar is asked once."""

import threading
from contextlib import ExitStack, suppress

import grpc
import pytest

from fedclaw.identity import provisioning
from fedclaw.identity.site_home import SiteKeys
from fedclaw.protocol.message_identity import assume_server_identity, number_of
from fedclaw.server.coordinator import run_rounds
from fedclaw.server.session import initial_parameters
from fedclaw.transport.grpc.grid import GrpcGrid
from fedclaw.transport.grpc.limits import Limits
from tests.transport.federations import FEDERATION, _linked, begin, config_of, deal
from tests.transport.grpc.conftest import RawSite
from tests.transport.grpc.uploader import Uploader

MIB = 1 << 20


class Liar:
    """Offers `size` bytes in answer to whatever it is asked, and sends a piece every `pause` seconds."""

    def __init__(self, keys: SiteKeys, port: int, size: int, pause: float) -> None:
        self.site = Uploader(RawSite(keys, port), keys)
        self.asked: list[str] = []
        self._size, self._pause = size, pause
        self._stop = threading.Event()
        threading.Thread(target=self._lie, daemon=True).start()

    def _lie(self) -> None:
        with suppress(grpc.RpcError):
            for frame in self.site.raw.responses:
                kind = frame.WhichOneof("body")
                if kind == "offer":
                    self.asked.append(frame.offer.envelope.message_type)
                    self.site.reply(frame.offer, self._size)
                elif kind == "accept":
                    threading.Thread(target=self._trickle, daemon=True).start()

    def _trickle(self) -> None:
        for number in range(self.site.sealed.count):
            self.site.send(number, 1)
            if self._stop.wait(self._pause):
                return

    def close(self) -> None:
        self._stop.set()
        self.site.raw.close()


@pytest.mark.parametrize(
    ("size", "pause", "deadline"),
    [
        pytest.param(200_000_000, 8.0, 60, id="200 MB for a model of 124 bytes: refused by its offer"),
        pytest.param(4 * MIB, 2.0, 5, id="within the bound, too slowly: given up at the deadline"),
    ],
)
def test_a_run_goes_to_its_end_without_the_liar_who_is_asked_once_and_named(tmp_path, caplog, size, pause, deadline):
    sites = deal(tmp_path)
    home = provisioning.initialise(tmp_path / "federation", FEDERATION, "127.0.0.1:9443")
    for path in (*sites, tmp_path / "site-liar"):
        request = provisioning.request_site(path, tmp_path / "federation" / "federation.json", path.name)
        provisioning.accept(path, provisioning.approve(tmp_path / "federation", request))
    settings = f"sites.fraction=1 sites.deadline={deadline} sites.attempts=1 seed=1"
    directory = begin(config_of(tmp_path, "run", settings))
    run_id = number_of("run")
    assume_server_identity(run_id)
    limits = Limits(heartbeat=1.0, missed_heartbeats=200)
    with GrpcGrid(home, address="127.0.0.1:0", run_id=run_id, limits=limits) as grid, ExitStack() as open_things:
        for site in sites:
            open_things.enter_context(_linked(site, grid.port))
        liar = Liar(SiteKeys.open(tmp_path / "site-liar"), grid.port, size, pause)
        open_things.callback(liar.close)
        assert len(grid.wait_for_sites(4, 30)) == 4
        run_rounds(grid, directory, initial_parameters(directory.record()))
    lines = directory.read_metrics()
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert all(sorted(line["answered"]) == sorted(site.name for site in sites) for line in lines)
    assert list(lines[0]["declined"]) == ["site-liar"]
    assert all(not line["silent"] and not line["declined"] for line in lines[1:])
    assert liar.asked == ["train"]
    assert "site-liar is not asked again in this run" in caplog.text
