"""The admin port: what it keeps of the bundles that it took, whom it lets in, and what it notes."""

import asyncio
import shutil
from typing import Any

import orjson
import pytest
from starlette.applications import Starlette

from fedclaw.serve import releases
from fedclaw.serve.admin_access import MOST_CHANGES, AdminAccess
from fedclaw.serve.admin_port import UNNEEDED_SECONDS, AdminPort
from fedclaw.serve.admission import Authentication, admin_rate, audit_log_of
from fedclaw.serve.bundle_archive import MEDIA_TYPE, pack
from fedclaw.serve.home import NodeHome, trust_of
from fedclaw.serve.monitoring.metrics import NodeMetrics
from fedclaw.serve.routing.plan import BreakerPolicy, read_plan
from fedclaw.serve.security.key_sets import KeyFile, KeyKeeper
from fedclaw.serve.security.rate_limits import Allowance, FailureLimiter, Rate, RateTable
from fedclaw.serve.security.tokens import Authenticator, NoAuthentication, TokenRules
from fedclaw.serve.settings import AdminSettings, NodeSettings, ReleaseSettings, TlsSettings, TokenSettings
from fedclaw.serve.state.audit_verification import entries, verify
from fedclaw.serve.state.store import StateStore
from fedclaw.serve.supervisor import Launch, Ports
from fedclaw.serve.version_catalogue import in_memory
from tests.disks import full_after
from tests.serve.security.issuer import AUDIENCE, ISSUER, ec_key, jwk, key_set, token


def admin_port(
    tmp_path, bundle, home, authentication: Authentication | None = None, **limits: Any
) -> tuple[AdminPort, NodeSettings]:
    node = NodeHome.make(tmp_path / "node")
    settings = NodeSettings(
        bundle=bundle,
        ca=home.root / "ca.crt",
        state=node.root,
        tls=TlsSettings(disabled=True),
        tokens=TokenSettings(disabled=True),
        admin=AdminSettings(**limits),
        federation=None,
        crl=None,
        expired="accept",
    )
    unused: Any = None
    store = StateStore.open(node.database(None))
    metrics = NodeMetrics(node.metrics)
    audit = audit_log_of(settings, node, "control")
    everybody = authentication or NoAuthentication("127.0.0.1")
    access = AdminAccess(everybody, audit, metrics, admin_rate(settings))
    return AdminPort(Launch(settings, Ports(1, None, 2), 0), store, access, metrics, unused), settings


async def asked(
    app: Starlette, method: str, path: str, *pieces: bytes | None, peer: str = "127.0.0.1", **headers: str
) -> tuple[int, Any, dict[str, str]]:
    """Status, answer and headers of a request with a body in pieces; None: the client goes away."""
    sent: list[Any] = []
    messages = iter(pieces or (b"",))

    async def receive() -> Any:
        piece = next(messages)
        if piece is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": piece, "more_body": piece != b""}

    async def send(message: Any) -> None:
        sent.append(message)

    path, _, query = path.partition("?")
    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "query_string": query.encode(), "headers": named}
    await app({**scope, "client": (peer, 1)}, receive, send)
    told = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], orjson.loads(sent[1]["body"]), told


def upload(app: Starlette, *pieces: bytes | None) -> tuple[int, Any]:
    """Status and answer of an upload."""
    status, answer, _ = asyncio.run(
        asked(app, "POST", "/admin/models/heart/versions", *pieces, content_type=MEDIA_TYPE)
    )
    return status, answer


def noted(port: AdminPort) -> list[dict[str, Any]]:
    """The lines of the audit log but those that begin it."""
    return [entry for entry in entries(port.home.audit) if entry["kind"] != "begin"]


def test_an_upload_leaves_room_for_the_audit_log(tmp_path, table_bundle, home, monkeypatch):
    port, _ = admin_port(tmp_path, table_bundle, home)
    free = shutil.disk_usage(tmp_path).free
    monkeypatch.setattr("fedclaw.serve.admin_port.LEAST_FREE", free - (64 << 20))
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


@pytest.fixture
def guarded(tmp_path, table_bundle, home):
    """An admin port that tells people apart by their tokens, of whom each may ask five times at once."""
    (tmp_path / "keys.json").write_bytes(key_set(jwk(ec_key())))
    keeper = KeyKeeper(KeyFile(tmp_path / "keys.json"), ("ES256",))
    keeper.refresh()
    failures = FailureLimiter(RateTable.private(), Rate(1e-3, 3))
    people = Authenticator(TokenRules(ISSUER, AUDIENCE), keeper, failures)
    port, _ = admin_port(tmp_path, table_bundle, home, people, requests_per_second=1e-3, burst=5)
    yield port
    port.store.close()


def bearer(name: str, *scopes: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token(sub=name, scope=' '.join(scopes))}"}


@pytest.mark.anyio
async def test_who_asks_too_often_is_told_to_wait_and_nobody_else_is(guarded):
    ann, bob = bearer("ann", "admin:read"), bearer("bob", "admin:read")
    answers = [await asked(guarded.app, "GET", "/admin/models", **ann) for _ in range(7)]
    assert [status for status, _, _ in answers] == [200] * 5 + [429] * 2
    assert int(answers[-1][2]["retry-after"]) > 0
    # What it may not do is counted too: scopes are looked at afterwards.
    assert (await asked(guarded.app, "POST", "/admin/models/heart/pin", b"{}", b"", **ann))[0] == 429
    assert (await asked(guarded.app, "GET", "/admin/models", **bob))[0] == 200
    assert (await asked(guarded.app, "GET", "/admin/health"))[0] == 200


@pytest.mark.anyio
async def test_an_address_whose_tokens_are_refused_waits_and_a_good_token_from_it_does_not(guarded):
    good, bad = bearer("ann", "admin:read"), bearer("eve", "admin:read")
    bad["authorization"] = bad["authorization"][:-4] + "AAAA"
    assert (await asked(guarded.app, "GET", "/admin/models", **good))[0] == 200
    statuses = [(await asked(guarded.app, "GET", "/admin/models", **bad))[0] for _ in range(5)]
    assert statuses == [401] * 3 + [429] * 2
    assert (await asked(guarded.app, "GET", "/admin/models", **good))[0] == 200
    assert (await asked(guarded.app, "GET", "/admin/models", peer="10.0.0.2", **bad))[0] == 401


@pytest.mark.anyio
async def test_more_changes_than_the_process_can_carry_are_refused_and_reads_are_not(tmp_path, table_bundle, home):
    port, _ = admin_port(tmp_path, table_bundle, home)
    path, going, end = "/admin/models/heart/versions", asyncio.Event(), asyncio.Event()

    async def slow() -> Any:
        parts = [b"a piece", b""]

        async def receive() -> Any:
            going.set()
            await end.wait()
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

        async def send(message: Any) -> None: ...

        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "client": ("127.0.0.1", 1)}
        await port.app({**scope, "headers": [(b"content-type", MEDIA_TYPE.encode())]}, receive, send)

    uploads = []
    for _ in range(MOST_CHANGES):
        going.clear()
        uploads.append(asyncio.create_task(slow()))
        await going.wait()
    status, answer, headers = await asked(port.app, "POST", path, b"a piece", b"", content_type=MEDIA_TYPE)
    assert (status, answer["code"]) == (503, "overloaded")
    assert headers["retry-after"] == "5"
    assert (await asked(port.app, "GET", "/admin/models"))[0] == 200
    end.set()
    await asyncio.gather(*uploads)
    # No archive, but looked at.
    assert (await asked(port.app, "POST", path, b"a piece", b"", content_type=MEDIA_TYPE))[0] == 400
    port.store.close()


@pytest.mark.anyio
async def test_every_change_and_who_asked_for_it_is_in_the_audit_log_before_it_is_made(guarded, table_bundle):
    ann = bearer("ann", "admin:publish", "admin:route")
    path = "/admin/models/heart"
    given = {**ann, "content_type": MEDIA_TYPE}
    archive = b"".join(pack(table_bundle))
    status, made, _ = await asked(guarded.app, "POST", f"{path}/versions?version=v2", archive, b"", **given)
    assert status == 200, made
    seen = noted(guarded)
    assert (await asked(guarded.app, "POST", f"{path}/ab", b'{"versions": ["v2", "v3"]}', b"", **ann))[0] == 404
    assert (await asked(guarded.app, "POST", f"{path}/release", b'{"version": "no"}', b"", **ann))[0] == 404
    assert (await asked(guarded.app, "DELETE", f"{path}/versions/v2", **ann))[0] == 200
    wanted = ("kind", "principal", "action", "model", "version", "status", "code")
    assert [tuple(entry.get(name) for name in wanted) for entry in noted(guarded)] == [
        ("change", "ann", "publish", "heart", "v2", None, None),
        ("admin", "ann", "publish", "heart", "v2", 200, ""),
        ("change", "ann", "ab", "heart", "v2 v3", None, None),
        ("admin", "ann", "ab", "heart", "v2 v3", 404, "not_found"),
        ("change", "ann", "release", "heart", "no", None, None),
        ("admin", "ann", "release", "heart", "no", 404, "not_found"),
        ("change", "ann", "remove", "heart", "v2", None, None),
        ("admin", "ann", "remove", "heart", "v2", 200, ""),
    ]
    assert seen == noted(guarded)[:2]
    assert {entry["peer"] for entry in noted(guarded)} == {"127.0.0.1"}
    assert [report.faults for report in verify(guarded.home.audit)] == [()]
    events = guarded.store.events("heart")
    assert {(event.kind, event.body["by"]) for event in events} == {("published", "ann"), ("removed", "ann")}


@pytest.mark.anyio
async def test_who_read_what_and_who_was_refused_is_in_the_audit_log_but_no_flood_is(guarded):
    guarded._access._strangers = Allowance(1e-6, 2.0)
    reader = bearer("ann", "admin:read")
    await asked(guarded.app, "GET", "/admin/models/heart", **reader)
    await asked(guarded.app, "GET", "/admin/events", **reader)
    await asked(guarded.app, "POST", "/admin/models/heart/pin", b'{"version": "v1"}', b"", **reader)
    for number in range(6):
        await asked(guarded.app, "GET", "/admin/node", peer=f"10.0.0.{number}")
    for _ in range(9):
        await asked(guarded.app, "GET", "/admin/models", **reader)
    wanted = ("kind", "principal", "peer", "action", "model", "status")
    assert [tuple(entry.get(name) for name in wanted) for entry in noted(guarded)] == [
        ("admin", "ann", "127.0.0.1", "model", "heart", 404),
        ("admin", "ann", "127.0.0.1", "events", "", 200),
        ("admin", "ann", "127.0.0.1", "route", "heart", 403),
        ("admin", "", "10.0.0.0", "node", "", 401),
        ("admin", "", "10.0.0.1", "node", "", 401),
        ("admin", "ann", "127.0.0.1", "models", "", 200),
        ("admin", "ann", "127.0.0.1", "models", "", 200),
    ]


@pytest.mark.anyio
async def test_nothing_is_changed_without_its_line_and_reads_go_on(tmp_path, table_bundle, home):
    port, settings = admin_port(tmp_path, table_bundle, home)
    digest = port.bundles.put(table_bundle, trust_of(settings))
    port.catalogue.add("heart", "v1", digest, "run", "ann")
    (file,) = port.home.audit.glob("*.jsonl")
    with full_after(file.stat().st_size):
        status, answer, _ = await asked(port.app, "DELETE", "/admin/models/heart/versions/v1")
        assert (status, answer["code"]) == (503, "unavailable")
        assert (await asked(port.app, "GET", "/admin/models/heart"))[1]["versions"].keys() == {"v1"}
    assert b"fedclaw_serve_audit_missed_total 2.0" in port.metrics.render()[0]
    assert (await asked(port.app, "DELETE", "/admin/models/heart/versions/v1"))[0] == 200
    port.store.close()


def test_a_release_begins_as_the_node_is_set(tmp_path, table_bundle, home):
    port, settings = admin_port(tmp_path, table_bundle, home)
    own = {"release": ReleaseSettings(steps=(0.5, 1.0)), "breaker": BreakerPolicy(probes=2)}
    port.settings = settings.model_copy(update=own)
    digest = port.bundles.put(table_bundle, trust_of(settings))
    port.store.beat("node", "worker-1", [in_memory("heart", version, digest) for version in ("v1", "v2")])
    for version in ("v1", "v2"):
        port.catalogue.add("heart", version, digest, "run", "ann")
        begun = asked(port.app, "POST", "/admin/models/heart/release", orjson.dumps({"version": version}), b"")
        assert asyncio.run(begun)[0] == 200
    plan = read_plan(port.store, "heart").plan
    assert (plan.mode, plan.steps, plan.breaker.probes) == ("canary", (0.5, 1.0), 2)


@pytest.mark.anyio
async def test_the_same_bundle_under_the_same_name_again_is_answered_as_before_and_another_is_refused(
    tmp_path, table_bundle, image_bundle, home
):
    port, _ = admin_port(tmp_path, table_bundle, home)
    archive = b"".join(pack(table_bundle))
    for name in ("", "?version=v2"):
        path = f"/admin/models/heart/versions{name}"
        first = await asked(port.app, "POST", path, archive, b"", content_type=MEDIA_TYPE)
        assert first[0] == 200
        assert await asked(port.app, "POST", path, archive, b"", content_type=MEDIA_TYPE) == first
    assert [event.kind for event in port.store.events("heart")] == ["published"] * 2
    other = b"".join(pack(image_bundle))
    status, answer, _ = await asked(port.app, "POST", path, other, b"", content_type=MEDIA_TYPE)
    assert (status, answer["code"]) == (409, "conflict")
    port.store.close()


@pytest.mark.anyio
async def test_who_asks_for_the_same_release_again_learns_how_it_stands(tmp_path, table_bundle, home, monkeypatch):
    monkeypatch.setattr(releases, "ALIVE", 600.0)
    port, settings = admin_port(tmp_path, table_bundle, home)
    digest = port.bundles.put(table_bundle, trust_of(settings))
    for version in ("v1", "v2", "v3"):
        port.catalogue.add("heart", version, digest, "run", "ann")
    path = "/admin/models/heart/release"
    ready = [in_memory("heart", version, digest) for version in ("v1", "v2", "v3")]

    async def release(version: str, mode: str) -> tuple[int, Any]:
        port.store.beat("node", "worker-1", ready)
        body = orjson.dumps({"version": version, "mode": mode})
        status, answer, _ = await asked(port.app, "POST", path, body, b"")
        return status, answer.get("state", answer.get("code"))

    def decisions() -> int:
        return len(port.store.events("heart"))

    assert await release("v1", "at_once") == (200, "answers")
    for version, mode, state in (("v2", "canary", "canary"), ("v3", "shadow", "shadow"), ("v3", "at_once", "answers")):
        both = await asyncio.gather(release(version, mode), release(version, mode))
        assert both == [(200, state)] * 2
        made = decisions()
        assert await release(version, mode) == (200, state)
        assert decisions() == made
        if state == "answers":
            break
        # What is another wish is refused as before.
        assert await release("v1" if mode == "shadow" else "v3", "canary") == (409, "conflict")
        assert (await asked(port.app, "POST", "/admin/models/heart/roll_back", b"{}", b""))[0] == 200
    assert await release("v3", "canary") == (200, "answers")
    port.store.close()
