"""Who is not let in, and what is not taken, each with one clear line."""

import socket
import ssl
import subprocess
import threading
from pathlib import Path

import grpc
import pytest

from fedclaw import __version__
from fedclaw.errors import ConnectionRefused
from fedclaw.identity import provisioning
from fedclaw.identity.seal import Binding
from fedclaw.identity.site_home import SiteKeys
from fedclaw.protocol.message_identity import envelope_of
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.transport.grpc import frames
from fedclaw.transport.grpc.message_codec import encode
from fedclaw.transport.grpc.protocol import PROTOCOL_VERSION
from fedclaw.transport.grpc.protocol import link_pb2 as pb
from fedclaw.transport.grpc.site_connection import SiteConnection


def dial(port: int, ca: bytes, key: bytes | None = None, certificate: bytes | None = None) -> grpc.StatusCode:
    """Open the stream as a peer with these credentials and say hello; the status it ends with."""
    credentials = grpc.ssl_channel_credentials(ca, key, certificate)
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials, frames.channel_options()) as channel:
        call = channel.stream_stream(frames.PATH)(iter([frames.hello(PROTOCOL_VERSION, "test").SerializeToString()]))
        with pytest.raises(grpc.RpcError) as failure:
            next(call)
    return failure.value.code()


def handshake(port: int, keys: SiteKeys, directory: Path, version: str) -> str:
    """What openssl says of a handshake with that version of TLS."""
    for name, content in (("key", keys.tls().key), ("crt", keys.tls().certificate), ("ca", keys.tls().ca)):
        (directory / name).write_bytes(content)
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", version, "-alpn", "h2", "-CAfile", "ca"]
    done = subprocess.run(
        [*command, "-cert", "crt", "-key", "key"],
        cwd=directory,
        input=b"",
        capture_output=True,
        timeout=20,
        check=False,
    )
    return (done.stdout + done.stderr).decode(errors="replace")


def test_no_client_certificate(kit):
    grid = kit.grid()
    assert dial(grid.port, kit.federation.site("site-a").tls().ca) == grpc.StatusCode.UNAVAILABLE
    assert list(grid.get_node_ids()) == []


def test_a_certificate_of_another_ca(kit, tmp_path):
    stranger = type(kit.federation)(tmp_path).site("site-a").tls()
    grid = kit.grid()
    own = kit.federation.site("site-a").tls()
    assert dial(grid.port, own.ca, stranger.key, stranger.certificate) == grpc.StatusCode.UNAVAILABLE
    assert list(grid.get_node_ids()) == []


def test_the_servers_certificate_is_not_a_sites(kit):
    grid = kit.grid()
    server = kit.federation.home.tls()
    assert dial(grid.port, server.ca, server.key, server.certificate) == grpc.StatusCode.UNAVAILABLE


def test_a_sites_certificate_is_not_a_servers(kit, caplog):
    impostor = kit.federation.site("site-b").tls()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for name, content in (("i.key", impostor.key), ("i.crt", impostor.certificate)):
        (kit.scratch / name).write_bytes(content)
    context.load_cert_chain(kit.scratch / "i.crt", kit.scratch / "i.key")
    context.set_alpn_protocols(["h2"])
    seen = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            try:
                with listener.accept()[0] as connection:
                    context.wrap_socket(connection, server_side=True).recv(1)
            except OSError:
                pass
            seen.set()

        threading.Thread(target=serve, daemon=True).start()
        running = kit.link("site-a", listener.getsockname()[1])
        assert seen.wait(20)
        kit.until(lambda: "next attempt" in caplog.text, "the site has given up on the impostor")
        assert not running.link.connected
        running.stop()


def test_tls_1_2_is_refused_and_1_3_works(kit, tmp_path):
    grid = kit.grid()
    keys = kit.federation.site("site-a")
    old, new = (handshake(grid.port, keys, tmp_path, version) for version in ("-tls1_2", "-tls1_3"))
    assert "TLSv1.3" in new
    assert "Verify return code: 0" in new
    assert "Cipher is (NONE)" in old


def test_plaintext_is_refused(kit):
    grid = kit.grid()
    with grpc.insecure_channel(f"127.0.0.1:{grid.port}", frames.channel_options()) as channel:
        call = channel.stream_stream(frames.PATH)(iter([frames.hello(PROTOCOL_VERSION, "test").SerializeToString()]))
        with pytest.raises(grpc.RpcError) as failure:
            next(call)
    assert failure.value.code() == grpc.StatusCode.UNAVAILABLE


def test_a_revoked_site_is_refused_at_connect(kit, caplog):
    kit.federation.site("site-r1")
    kit.federation.revoke("site-r1")
    grid = kit.grid()
    error = kit.link("site-r1", grid.port).ended()
    assert isinstance(error, ConnectionRefused)
    assert "the certificate of site 'site-r1' is revoked" in str(error)
    assert "is revoked" in caplog.text


def test_a_site_that_is_revoked_while_connected_is_dropped_and_not_waited_for(kit):
    grid = kit.grid()
    echo = kit.Echo()
    echo.gate.clear()
    running = kit.link("site-r2", grid.port, echo)
    grid.wait_for_sites(1, 20)
    replies = grid.send_and_receive([kit.message("site-r2")], timeout=60)
    echo.working.wait(10)

    kit.federation.revoke("site-r2")

    assert list(replies) == []
    error = running.ended()
    assert isinstance(error, ConnectionRefused)
    assert "is revoked" in str(error)
    kit.until(lambda: list(grid.get_node_ids()) == [], "the site is gone")


def test_a_damaged_revocation_list_lets_nobody_in(tmp_path, kit):
    federation = type(kit.federation)(tmp_path)
    keys = federation.site("site-a")
    kit.federation = federation
    grid = kit.grid()
    (tmp_path / "federation" / "revoked.crl").write_text("nothing")
    raw = kit.raw("site-a", grid.port)
    raw.say(frames.hello(PROTOCOL_VERSION, "test"))
    assert next(iter(raw.responses)).refuse.reason == pb.REASON_UNAVAILABLE
    assert keys.site_name == "site-a"


@pytest.mark.parametrize(("version", "software"), [(99, "from the future"), (1, "fedclaw 0.1.0")])
def test_another_protocol_version_is_refused_by_name_and_version(kit, version, software):
    """Version 1 was spoken at 437d1ac: its plans are others, which neither end would read."""
    grid = kit.grid()
    raw = kit.raw("site-a", grid.port)
    raw.say(frames.hello(version, software))
    refusal = next(iter(raw.responses)).refuse
    assert refusal.reason == pb.REASON_VERSION
    assert f"site 'site-a' protocol {version} ({software})" in refusal.text
    assert f"this server speaks protocol {PROTOCOL_VERSION} (fedclaw {__version__})" in refusal.text


@pytest.mark.parametrize(
    "frames",
    [
        [b"\xff\xff not protobuf"],
        [frames.accept("x", 0)],
        [frames.hello(PROTOCOL_VERSION, "test"), frames.hello(PROTOCOL_VERSION, "test")],
        [frames.hello(PROTOCOL_VERSION, "test"), b"\x3a\x05"],
    ],
    ids=["garbage", "no hello", "two hellos", "cut off chunk"],
)
def test_a_peer_that_breaks_the_protocol_is_hung_up_on_and_nobody_else(kit, frames):
    grid = kit.grid()
    kit.link("site-b", grid.port)
    grid.wait_for_sites(1, 20)
    raw = kit.raw("site-a", grid.port)
    for frame in frames:
        raw.say(frame)
    refusals = [frame.refuse for frame in raw.responses if frame.WhichOneof("body") == "refuse"]
    assert [refusal.reason for refusal in refusals] == [pb.REASON_PROTOCOL]
    assert len(list(grid.send_and_receive([kit.message("site-b")], timeout=20))) == 1


def test_a_frame_above_grpcs_limit_ends_only_that_stream(kit):
    grid = kit.grid()
    kit.link("site-b", grid.port)
    grid.wait_for_sites(1, 20)
    tls = kit.federation.site("site-a").tls()
    credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)
    with grpc.secure_channel(f"127.0.0.1:{grid.port}", credentials) as channel:
        call = channel.stream_stream(frames.PATH)(
            iter([frames.hello(PROTOCOL_VERSION, "t").SerializeToString(), bytes(3 << 20)])
        )
        with pytest.raises(grpc.RpcError) as failure:
            list(call)
    assert failure.value.code() in {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED}
    assert len(list(grid.send_and_receive([kit.message("site-b")], timeout=20))) == 1


class Forger:
    """Answers a task by hand, as a site that does not play by the rules."""

    def __init__(self, kit, grid, name="site-a", **options):
        self.kit, self.raw, self.keys = kit, kit.raw(name, grid.port), kit.federation.site(name)
        self.raw.enter()

    def take_task(self) -> pb.Offer:
        offer = self.raw.hear("offer").offer
        self.raw.say(frames.done(offer.transfer_id))
        return offer

    def sealed(self, body: bytes, task: pb.Offer, **changed):
        envelope = task.envelope
        fields = {
            "federation": "clinics",
            "run_id": envelope.run_id,
            "group_id": envelope.group_id,
            "message_id": envelope.message_id,
            "site": self.keys.site_name,
        }
        sealed = self.keys.sealer().seal([body], Binding(**{**fields, **changed}))
        return sealed.header, b"".join(sealed.segments), sealed.plain_size

    def offer(self, task: pb.Offer, header: bytes, size: int, plain_size: int) -> None:
        envelope = pb.Envelope()
        envelope.CopyFrom(task.envelope)
        envelope.reply_to_message_id = task.transfer_id
        self.raw.say(
            pb.Frame(
                offer=pb.Offer(
                    transfer_id=task.transfer_id,
                    envelope=envelope,
                    size=size,
                    plain_size=plain_size,
                    stamp=b"stamp",
                    seal_header=header,
                )
            )
        )

    def refusal(self) -> pb.Refuse:
        for frame in self.raw.responses:
            if frame.WhichOneof("body") == "refuse":
                return frame.refuse
        raise AssertionError("no refusal")


@pytest.fixture
def forged(kit):
    """A grid that has asked a forger and an honest site."""
    grid = kit.grid()
    kit.link("site-b", grid.port)
    forger = Forger(kit, grid)
    assert len(grid.wait_for_sites(2, 20)) == 2
    replies = grid.send_and_receive([kit.message("site-a"), kit.message("site-b")], timeout=20)
    return forger, grid, replies


def outcome(grid, replies):
    """The error in the forger's place, after checking that the honest site was not disturbed."""
    found = {grid.site_name(reply.metadata.src_node_id): reply for reply in replies}
    assert found["site-b"].has_content()
    return found["site-a"].error


@pytest.mark.parametrize(
    "changed",
    [{"group_id": "0"}, {"run_id": 12}, {"site": "site-c"}, {"message_id": "another"}, {"federation": "others"}],
    ids=lambda changed: next(iter(changed)),
)
def test_a_reply_sealed_for_another_place_is_refused(forged, changed):
    forger, grid, replies = forged
    task = forger.take_task()
    header, body, plain = forger.sealed(b"x" * 100, task, **changed)
    forger.offer(task, header, len(body), plain)
    assert forger.refusal().reason == pb.REASON_SEAL
    error = outcome(grid, replies)
    assert error.code == RefusalCode.MALFORMED
    assert "does not open" in error.reason


def test_a_replayed_reply_is_refused(kit):
    grid = kit.grid()
    forger = Forger(kit, grid)
    grid.wait_for_sites(1, 20)
    honest = grid.send_and_receive([kit.message("site-a", group="1")], timeout=20)
    task = forger.take_task()
    content = b"".join(encode(kit.content()).parts)
    recorded = forger.sealed(content, task)
    forger.offer(task, recorded[0], len(recorded[1]), recorded[2])
    forger.raw.hear("accept")
    forger.raw.say(frames.encode_chunk(task.transfer_id, 0, [recorded[1]]))
    forger.raw.hear("done")
    assert next(honest).has_content()

    later = grid.send_and_receive([kit.message("site-a", group="2")], timeout=20)
    forger.offer(forger.take_task(), recorded[0], len(recorded[1]), recorded[2])

    assert forger.refusal().reason == pb.REASON_SEAL
    assert next(later).error.code == RefusalCode.MALFORMED


def test_a_duplicate_reply_is_confirmed_and_delivered_once(kit):
    grid = kit.grid()
    forger = Forger(kit, grid)
    grid.wait_for_sites(1, 20)
    replies = grid.send_and_receive([kit.message("site-a")], timeout=20)
    task = forger.take_task()
    header, body, plain = forger.sealed(b"".join(encode(kit.content()).parts), task)
    forger.offer(task, header, len(body), plain)
    forger.raw.hear("accept")
    forger.raw.say(frames.encode_chunk(task.transfer_id, 0, [body]))
    assert forger.raw.hear("done").done.transfer_id == task.transfer_id

    forger.offer(task, header, len(body), plain)

    assert forger.raw.hear("done").done.transfer_id == task.transfer_id
    assert len(list(replies)) == 1


def test_a_tampered_segment_is_refused(forged):
    forger, grid, replies = forged
    task = forger.take_task()
    header, body, plain = forger.sealed(b"x" * 100, task)
    forger.offer(task, header, len(body), plain)
    forger.raw.hear("accept")
    forger.raw.say(frames.encode_chunk(task.transfer_id, 0, [body[:-1] + bytes([body[-1] ^ 1])]))
    assert forger.refusal().reason == pb.REASON_SEAL
    assert outcome(grid, replies).code == RefusalCode.MALFORMED


def test_a_well_sealed_reply_that_is_nonsense_is_refused(forged):
    forger, grid, replies = forged
    task = forger.take_task()
    header, body, plain = forger.sealed(b"nonsense" * 20, task)
    forger.offer(task, header, len(body), plain)
    forger.raw.hear("accept")
    forger.raw.say(frames.encode_chunk(task.transfer_id, 0, [body]))
    assert forger.refusal().reason == pb.REASON_MALFORMED
    assert "not a FedClaw message" in outcome(grid, replies).reason


def test_an_oversized_offer_is_refused_before_any_memory_is_taken(forged):
    forger, grid, replies = forged
    task = forger.take_task()
    plain = 1 << 50
    forger.offer(task, b"header", plain + 16 * (plain >> 20), plain)
    assert forger.refusal().reason == pb.REASON_OVERSIZED
    assert outcome(grid, replies).code == RefusalCode.UPDATE_SIZE


def test_an_offer_of_a_reply_that_was_not_asked_of_this_site_is_refused(kit):
    grid = kit.grid()
    forger = Forger(kit, grid)
    kit.federation.site("site-b")
    message = kit.message("site-b")
    grid.push_messages([message])
    task = pb.Offer(transfer_id=message.metadata.message_id, envelope=frames.envelope_to_proto(envelope_of(message)))
    header, body, plain = forger.sealed(b"x", task)
    forger.offer(task, header, len(body), plain)
    assert forger.refusal().reason == pb.REASON_NOT_ASKED


def test_a_server_of_another_federation_is_not_served(kit, tmp_path):
    other = type(kit.federation)(tmp_path)
    grid = kit.grid()
    link = SiteConnection(other.site("site-a"), kit.Echo(), tmp_path / "state", kit.QUICK, f"127.0.0.1:{grid.port}")
    stop = threading.Event()
    thread = threading.Thread(target=link.run, args=(stop,), daemon=True)
    thread.start()
    thread.join(1)
    assert not link.connected
    assert list(grid.get_node_ids()) == []
    stop.set()
    thread.join(10)
    assert provisioning.site_certificate_path(tmp_path / "federation", "site-a").exists()
