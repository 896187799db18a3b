"""Tokens, certificates and addresses of calls over a real gRPC port."""

import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from fedclaw.serve.inference.grpc_service import address_of
from fedclaw.serve.inference.protocol import SERVICE
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.requests import Caller
from fedclaw.serve.security.key_sets import KeyFile, KeyKeeper
from fedclaw.serve.security.rate_limits import FailureLimiter, Rate, RateTable
from fedclaw.serve.security.tls import ServerTls, thumbprint
from fedclaw.serve.security.tokens import Authenticator, TokenRules
from tests.serve.grpc_served import grpc_served
from tests.serve.security.issuer import AUDIENCE, ISSUER, ec_key, jwk, key_set, token
from tests.serve.security.test_tls import Authority


class Door:
    """Of a node, the part that lets callers in."""

    live = ready = True

    def __init__(self, path: Path) -> None:
        path.write_bytes(key_set(jwk(ec_key())))
        keeper = KeyKeeper(KeyFile(path), ("ES256",))
        keeper.refresh()
        failures = FailureLimiter(RateTable.private(), Rate(1e-3, 3))
        self.authenticator = Authenticator(TokenRules(ISSUER, AUDIENCE), keeper, failures)

    async def admit(
        self, authorization: bytes | None, peer: str, protocol: str, certificate: str | None = None
    ) -> Caller:
        return Caller(await self.authenticator.admit(authorization, certificate, peer), peer, protocol)

    def refused(self, refusal: ServeRefusal, peer: str, principal: str = "", model: str = "") -> None:
        refusal.noted = True


def test_calls_are_admitted_by_token_certificate_and_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path / "pki")
    bob = authority.client("bob")
    bound = token(cnf={"x5t#S256": thumbprint(bob.public_bytes(Encoding.DER))})

    def call(client: str, *tokens: str) -> Any:
        pem = (authority.at / f"{client}.pem").read_bytes()
        credentials = grpc.ssl_channel_credentials((authority.at / "ca.crt").read_bytes(), pem, pem)
        own = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.secure_channel(address, credentials, own) as channel:
            method = channel.unary_unary(f"/{SERVICE}/ServerMetadata")
            try:
                method(b"", timeout=30, metadata=[("authorization", f"Bearer {text}") for text in tokens])
            except grpc.RpcError as error:
                return error.code().name
            return "OK"

    with grpc_served(Door(tmp_path / "keys.json"), tls=ServerTls(authority.mutual)) as address:
        assert call("alice", token()) == "OK"
        assert call("alice") == "UNAUTHENTICATED"
        assert call("alice", token(), token(sub="other")) == "INVALID_ARGUMENT"
        assert call("bob", bound) == "OK"
        assert call("alice", bound) == "UNAUTHENTICATED"
        # Each call comes from a port of its own: it is the address that is counted.
        assert [call("alice", token(aud="x")) for _ in range(5)] == ["UNAUTHENTICATED"] * 3 + ["RESOURCE_EXHAUSTED"] * 2
        authority.crl(bob)
        monkeypatch.setattr("fedclaw.serve.security.tls.LOOK_EVERY", 0.0)
        assert call("alice", token()) in {"OK", "RESOURCE_EXHAUSTED"}
        # What is known of a certificate is believed for the second that was begun.
        end = time.monotonic() + 30
        while (code := call("bob", bound)) == "OK" and time.monotonic() < end:
            continue
        assert code == "UNAUTHENTICATED"


def test_addresses_of_peers() -> None:
    assert address_of("ipv4:10.0.0.1:5000") == "10.0.0.1"
    assert address_of("ipv6:%5B2001:db8::1%5D:5000") == "2001:db8::1"
    assert address_of("ipv6:[::1]:5000") == "::1"
    assert address_of("unix:/run/x") == "unix:/run/x"
