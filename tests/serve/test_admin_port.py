"""The admin port beside its routes: what it keeps of the bundles that it took."""

import asyncio
import shutil
from typing import Any

import orjson
from starlette.applications import Starlette

from fedclaw.serve import control
from fedclaw.serve.control import UNNEEDED_SECONDS, AdminPort
from fedclaw.serve.home import NodeHome, trust_of
from fedclaw.serve.security.tokens import NoAuthentication
from fedclaw.serve.settings import NodeSettings, TlsSettings, TokenSettings
from fedclaw.serve.state.store import StateStore
from fedclaw.serve.supervisor import Launch, Ports


def admin_port(tmp_path, bundle, home) -> tuple[AdminPort, NodeSettings]:
    node = NodeHome.make(tmp_path / "node")
    settings = NodeSettings(
        bundle=bundle,
        ca=home.root / "ca.crt",
        state=node.root,
        tls=TlsSettings(disabled=True),
        tokens=TokenSettings(disabled=True),
        federation=None,
        crl=None,
        expired="accept",
    )
    unused: Any = None
    store = StateStore.open(node.database(None))
    everybody = NoAuthentication("127.0.0.1")
    return AdminPort(Launch(settings, Ports(1, None, 2), 0), store, everybody, unused, unused), settings


def upload(app: Starlette, *pieces: bytes | None) -> tuple[int, Any]:
    """Status and answer of an upload; None: the client goes away."""
    sent: list[Any] = []
    messages = iter(pieces)

    async def receive() -> Any:
        piece = next(messages)
        if piece is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": piece, "more_body": piece != b""}

    async def send(message: Any) -> None:
        sent.append(message)

    path = "/admin/models/heart/versions"
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "client": ("127.0.0.1", 1)}
    asyncio.run(app({**scope, "headers": [(b"content-type", b"application/x-tar")]}, receive, send))
    return sent[0]["status"], orjson.loads(sent[1]["body"])


def test_an_upload_leaves_room_for_the_audit_log(tmp_path, table_bundle, home, monkeypatch):
    port, _ = admin_port(tmp_path, table_bundle, home)
    free = shutil.disk_usage(tmp_path).free
    monkeypatch.setattr(control, "LEAST_FREE", free - (64 << 20))
    status, answer = upload(port.app, *[bytes(8 << 20)] * 8, b"")
    assert (status, answer["code"]) == (503, "unavailable")
    assert not list((tmp_path / "node").glob(".incoming.*"))
    port.store.close()


def test_an_upload_that_is_broken_off_is_no_fault_of_the_node(tmp_path, table_bundle, home, caplog):
    port, _ = admin_port(tmp_path, table_bundle, home)
    assert upload(port.app, b"a piece", None)[0] == 400
    assert "the admin port failed" not in caplog.text
    assert not list((tmp_path / "node").glob(".incoming.*"))
    port.store.close()


def test_a_bundle_that_no_version_has_any_more_is_removed_after_a_while(tmp_path, table_bundle, image_bundle, home):
    port, settings = admin_port(tmp_path, table_bundle, home)
    kept, left = (port.bundles.put(bundle, trust_of(settings)) for bundle in (table_bundle, image_bundle))
    for version, digest in (("v1", kept), ("v2", left)):
        port.catalogue.add("heart", version, digest, "run", "ann")
    port.tidy(0.0)
    port.catalogue.remove("heart", "v2")
    port.tidy(1.0)
    port.tidy(UNNEEDED_SECONDS)
    assert set(port.bundles.digests()) == {kept, left}
    port.catalogue.add("heart", "again", left, "run", "ann")
    port.tidy(UNNEEDED_SECONDS + 2.0)
    port.catalogue.remove("heart", "again")
    port.tidy(UNNEEDED_SECONDS + 3.0)
    assert set(port.bundles.digests()) == {kept, left}
    port.tidy(2 * UNNEEDED_SECONDS + 3.0)
    assert port.bundles.digests() == (kept,)
    port.store.close()
