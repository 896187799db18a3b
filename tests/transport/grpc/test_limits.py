"""What peers without a certificate, and more sites than there is room for, can cost a server: places, time, memory."""

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from fedclaw.transport.grpc import connection_limiter, frames
from fedclaw.transport.grpc.protocol import PROTOCOL_VERSION
from fedclaw.transport.grpc.protocol import link_pb2 as pb

MIB = 1 << 20
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How a client of HTTP/2 begins: the magic words and empty settings."""


def resident() -> int:
    """Bytes of memory that this process, the server's, holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def client_hello(ca: bytes) -> bytes:
    """The first flight of a TLS handshake."""
    context = ssl.create_default_context(cadata=ca.decode())
    context.set_alpn_protocols(["h2"])
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="127.0.0.1").do_handshake()
    return outgoing.read()


def is_open(peer: socket.socket) -> bool:
    """Whether the server still holds this connection."""
    peer.setblocking(False)
    try:
        while peer.recv(65536):
            pass
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def last_word(site) -> int | None:
    """The reason that a peer is given before its stream ends; None if it ends without one."""
    reason = None
    try:
        for frame in site.responses:
            reason = frame.refuse.reason
    except grpc.RpcError:
        pass
    return reason


class Crowd:
    """Peers that connect by TCP, say `first` and then nothing."""

    def __init__(self, port: int, count: int, first: bytes = b"") -> None:
        self.peers = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
        for peer in self.peers:
            peer.sendall(first)

    def held(self) -> int:
        """How many of them the server still holds."""
        return sum(map(is_open, self.peers))

    def close(self) -> None:
        for peer in self.peers:
            peer.close()


@pytest.fixture
def crowd() -> Iterator:
    made: list[Crowd] = []

    def gather(*arguments: object) -> Crowd:
        made.append(Crowd(*arguments))
        return made[-1]

    yield gather
    for one in made:
        one.close()


def limits(kit, **changed):
    return kit.QUICK.model_copy(update=changed)


@pytest.mark.parametrize("said", ["nothing", "half a hello", "a hello"])
def test_a_peer_that_does_not_finish_tls_is_dropped(kit, crowd, said):
    grid = kit.grid(limits(kit, handshake=0.5))
    whole = client_hello(kit.federation.site("site-a").tls().ca)
    first = {"nothing": b"", "half a hello": whole[:40], "a hello": whole}[said]
    peers = crowd(grid.port, 3, first)
    kit.until(lambda: peers.held() == 0, "the server has dropped them")


def test_a_site_that_finishes_tls_and_opens_no_stream_is_dropped(kit):
    grid = kit.grid(limits(kit, handshake=0.5))
    tls = kit.federation.site("site-a").tls()
    for name, content in (("key", tls.key), ("crt", tls.certificate)):
        (kit.scratch / name).write_bytes(content)
    context = ssl.create_default_context(cadata=tls.ca.decode())
    context.load_cert_chain(kit.scratch / "crt", kit.scratch / "key")
    context.set_alpn_protocols(["h2"])
    plain = socket.create_connection(("127.0.0.1", grid.port), timeout=20)
    with context.wrap_socket(plain, server_hostname="127.0.0.1") as peer:
        assert peer.version() == "TLSv1.3"
        peer.sendall(PREFACE)
        while peer.recv(4096):
            """Its settings, and its good bye."""


def test_only_so_many_connections_are_held_at_one_time(kit, crowd):
    grid = kit.grid(limits(kit, handshake=60, max_sites=1))
    peers = crowd(grid.port, 60)
    kit.until(lambda: peers.held() <= 2 + 16, "the server has hung up on those above the limit")
    assert peers.held() > 0


def test_silent_peers_do_not_keep_a_site_out_for_long(kit, crowd):
    grid = kit.grid(limits(kit, handshake=1.0, max_sites=1))
    crowd(grid.port, 60)
    kit.link("site-a", grid.port)
    assert grid.wait_for_sites(1, 20) == ("site-a",)
    assert len(list(grid.send_and_receive([kit.message("site-a")], timeout=20))) == 1


def test_six_hundred_half_open_connections_opened_again_and_again_keep_no_site_out_and_are_told_of(kit, crowd, caplog):
    """By the default limits, from one address; each that is closed comes back at once."""
    grid = kit.grid()
    hello = client_hello(kit.federation.site("site-a").tls().ca)
    peers = crowd(grid.port, 600, hello)
    stop = threading.Event()

    def again() -> None:
        while not stop.wait(0.05):
            for number, peer in enumerate(peers.peers):
                if not is_open(peer):
                    peer.close()
                    with suppress(OSError):
                        peers.peers[number] = socket.create_connection(("127.0.0.1", grid.port))
                        peers.peers[number].sendall(hello)

    thread = threading.Thread(target=again, daemon=True)
    thread.start()
    kit.until(lambda: "have not said who they are" in caplog.text, "it is told of")
    assert "from 127.0.0.1" in caplog.text
    for name in ("site-a", "site-b", "site-c"):
        kit.link(name, grid.port)
    assert len(grid.wait_for_sites(3, 20)) == 3
    assert "next attempt" not in caplog.text, "each came in at its first knock"
    assert len(list(grid.send_and_receive([kit.message("site-a")], timeout=20))) == 1
    time.sleep(3 * kit.QUICK.handshake / 10)
    assert len(grid.wait_for_sites(3, 1)) == 3, "who has said who it is stays"
    stop.set()
    thread.join()


def test_the_oldest_of_the_busiest_address_go_first(monkeypatch):
    sent_away, told = [], []
    crowd = connection_limiter.ConnectionLimiter(9443, 3, told.append)
    strangers = [connection_limiter._Unidentified(number, number, address) for number, address in enumerate("aaabba")]
    monkeypatch.setattr(crowd, "_close", lambda stranger: sent_away.append(stranger.descriptor))
    crowd._first_seen = {0: 5.0, 1: 1.0, 2: 2.0, 3: 0.0, 4: 9.0, 5: 3.0}
    crowd._close_oldest(strangers, 3, now=100.0)
    assert sent_away[:2] == [1, 2]
    assert sent_away[2] in {3, 5}, "two of each are left, and the oldest of either goes"
    assert len(told) == 1
    assert "6 connections" in told[0]
    crowd._close_oldest([connection_limiter._Unidentified(7, 0, "b")], 1, now=101.0)
    assert len(told) == 1, "once a minute"


@pytest.mark.parametrize(
    ("peer", "endpoint"),
    [
        ("ipv4:127.0.0.1:5000", ("127.0.0.1", 5000)),
        ("ipv6:%5B::1%5D:5000", ("::1", 5000)),
        ("ipv6:[::ffff:10.0.0.1]:7", ("10.0.0.1", 7)),
        ("unix:/some/where", None),
    ],
)
def test_a_peer_of_grpc_as_an_endpoint(peer, endpoint):
    assert connection_limiter.endpoint_of(peer) == endpoint


def test_streams_without_a_hello_give_up_their_places(kit):
    grid = kit.grid(limits(kit, handshake=0.5, max_sites=1))
    silent = [kit.raw("site-b", grid.port) for _ in range(12)]
    kit.link("site-a", grid.port)
    assert grid.wait_for_sites(1, 20) == ("site-a",)
    assert {last_word(site) for site in silent} <= {pb.REASON_SILENT, None}
    assert len(list(grid.send_and_receive([kit.message("site-a")], timeout=20))) == 1


def test_one_sites_streams_take_no_other_sites_place(kit):
    """However many it opens, and without a word on them."""
    grid = kit.grid(limits(kit, handshake=60, max_sites=2, missed_heartbeats=400))
    kit.raw("site-b", grid.port).enter()
    for _ in range(20):
        kit.raw("site-b", grid.port)
    kit.link("site-a", grid.port)
    kit.until(lambda: set(grid.wait_for_sites(2, 1)) == {"site-a", "site-b"}, "both have their places")
    assert len(list(grid.send_and_receive([kit.message("site-a")], timeout=20))) == 1
    kit.until(lambda: len(grid._connections._streams) <= 2 + 3, "the rest are gone")


def test_a_site_too_many_is_told_so_and_comes_in_when_another_leaves(kit, caplog):
    grid = kit.grid(limits(kit, max_sites=2))
    first = kit.link("site-a", grid.port)
    kit.link("site-b", grid.port)
    grid.wait_for_sites(2, 20)
    late = kit.link("site-late", grid.port)
    kit.until(lambda: "next attempt" in caplog.text, "the site was refused")
    assert "(unavailable): this server serves 2 sites at one time, and they are all here" in caplog.text
    assert set(grid.wait_for_sites(2, 20)) == {"site-a", "site-b"}
    assert not late.link.connected
    first.stop()
    kit.until(lambda: late.link.connected, "its turn has come")
    kit.until(lambda: set(grid.wait_for_sites(2, 20)) == {"site-b", "site-late"}, "the late site has the place")


def test_a_full_server_lets_a_site_replace_its_own_connection(kit):
    grid = kit.grid(limits(kit, max_sites=1))
    kit.raw("site-a", grid.port).enter()
    kit.raw("site-a", grid.port).enter()
    assert grid.wait_for_sites(1, 20) == ("site-a",)


def pour(peer: socket.socket, first: bytes = b"") -> int:
    """Send without end until the server hangs up; returns by how many bytes its memory grew at most."""
    before, most = resident(), 0
    try:
        peer.sendall(first)
        for _ in range(256):
            peer.sendall(bytes(MIB))
            most = max(most, resident() - before)
    except OSError:
        return max(most, resident() - before)
    raise AssertionError("the server took 256 MiB from a peer that it does not know")


@pytest.mark.parametrize("first", ["nothing", "an endless hello", "data at once", "a hello"])
def test_an_unauthenticated_flood_is_cut_off_and_takes_little_memory(kit, first):
    grid = kit.grid()
    opening = {
        "nothing": b"",
        "an endless hello": b"\x16\x03\x01\x40\x00\x01\xff\xff\xfc\x03\x03",
        "data at once": b"\x17\x03\x03\x40\x00",
        "a hello": client_hello(kit.federation.site("site-a").tls().ca),
    }[first]
    for _ in range(8):
        with socket.create_connection(("127.0.0.1", grid.port), timeout=20) as peer:
            assert pour(peer, opening) < 24 * MIB
    kit.link("site-a", grid.port)
    assert grid.wait_for_sites(1, 20) == ("site-a",)


def test_what_a_peer_without_a_certificate_sends_after_tls_is_not_kept(kit):
    """TLS 1.3 lets a client send before the server has looked at its certificate."""
    grid = kit.grid()
    context = ssl.create_default_context(cadata=kit.federation.site("site-a").tls().ca.decode())
    context.set_alpn_protocols(["h2"])
    for _ in range(4):
        plain = socket.create_connection(("127.0.0.1", grid.port), timeout=20)
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as peer:
            assert pour(peer, PREFACE) < 24 * MIB


def test_a_site_that_sends_headers_without_end_is_cut_off(kit):
    grid = kit.grid()
    tls = kit.federation.site("site-a").tls()
    credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)
    with grpc.secure_channel(f"127.0.0.1:{grid.port}", credentials) as channel:
        call = channel.stream_stream(frames.PATH)(
            iter([frames.hello(PROTOCOL_VERSION, "test").SerializeToString()]), metadata=[("x", "y" * 64 * 1024)]
        )
        with pytest.raises(grpc.RpcError) as failure:
            list(call)
    assert failure.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_stream_that_never_says_hello_is_dropped_after_the_handshake_time(kit, caplog):
    grid = kit.grid(limits(kit, handshake=0.5))
    raw = kit.raw("site-a", grid.port)
    assert last_word(raw) in {pb.REASON_SILENT, None}
    kit.until(lambda: "nothing was heard from it for 0.5 s" in caplog.text, "the server has said so")
