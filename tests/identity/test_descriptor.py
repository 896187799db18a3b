"""The descriptor is whole, signed by its own CA, and says nothing secret."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedclaw.errors import ProvisionError
from fedclaw.identity import pki, seal
from fedclaw.identity.descriptor import Descriptor, encode_descriptor, load_descriptor
from fedclaw.identity.federation_home import FederationHome

Change = Callable[[dict[str, Any]], None]


def rewrite(home: FederationHome, change: Change) -> Path:
    path = home.root / "federation.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def test_reads_what_was_written(home: FederationHome) -> None:
    descriptor = load_descriptor(home.root / "federation.json")
    assert (descriptor.name, descriptor.address, descriptor.seal_suite) == ("heart", "127.0.0.1:9443", "x25519")
    assert descriptor.ca_certificate.encode() == (home.root / "ca.crt").read_bytes()


def test_signature_is_over_canonical_json(home: FederationHome) -> None:
    """The layout of the file is free, its content is not."""
    path = rewrite(home, lambda content: content.update(descriptor=dict(reversed(content["descriptor"].items()))))
    assert load_descriptor(path) == home.descriptor
    content = json.loads(path.read_text())
    canonical = json.dumps(content["descriptor"], sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    key = pki.p384_key(home.ca, "the CA")
    key.verify(base64.b64decode(content["signature"]), canonical, pki.ECDSA)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("address", "attacker.example.org:9443"),
        ("seal_public_key", seal.encode_key(seal.generate("x25519").public)),
    ],
    ids=["address", "seal key"],
)
def test_a_changed_descriptor_is_refused(home: FederationHome, field: str, value: str) -> None:
    path = rewrite(home, lambda content: content["descriptor"].update({field: value}))
    with pytest.raises(ProvisionError, match="was changed after the coordinator signed it"):
        load_descriptor(path)


def test_another_name_is_refused(home: FederationHome) -> None:
    path = rewrite(home, lambda content: content["descriptor"].update(name="lung"))
    with pytest.raises(ProvisionError, match="not the CA certificate of the federation 'lung'"):
        load_descriptor(path)


def test_another_ca_is_refused(home: FederationHome) -> None:
    other = pki.pem_of(pki.new_ca("heart", pki.new_key())).decode()
    path = rewrite(home, lambda content: content["descriptor"].update(ca_certificate=other))
    with pytest.raises(ProvisionError, match="was changed"):
        load_descriptor(path)


def test_a_leaf_is_no_ca(home: FederationHome) -> None:
    """A site cannot make a descriptor out of the certificate that it was given."""
    server_key = pki.load_key(home.root / "server.key", "")
    leaf = (home.root / "server.crt").read_text()
    signed = encode_descriptor(home.descriptor.model_copy(update={"ca_certificate": leaf}), server_key)
    (home.root / "x.json").write_bytes(signed)
    with pytest.raises(ProvisionError, match="not a self-signed CA"):
        load_descriptor(home.root / "x.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(signature=""), "was changed"),
        (lambda content: content.update(signature="%%%"), "was changed"),
        (lambda content: content.pop("signature"), "signature: Field required"),
        (lambda content: content["descriptor"].update(version=2), "descriptor.version"),
        (lambda content: content["descriptor"].update(extra=1), "descriptor.extra"),
        (lambda content: content["descriptor"].update(name="../x"), "descriptor.name"),
        (lambda content: content["descriptor"].update(address="nowhere"), "descriptor.address"),
        (lambda content: content["descriptor"].update(seal_suite="rsa"), "descriptor.seal_suite"),
        (lambda content: content["descriptor"].update(ca_certificate="x"), "not a PEM certificate"),
    ],
)
def test_damage_is_named(home: FederationHome, change: Change, message: str) -> None:
    with pytest.raises(ProvisionError, match=message):
        load_descriptor(rewrite(home, change))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"descriptor": 1, "signature": "x"}'])
def test_garbage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "federation.json").write_bytes(content)
    with pytest.raises(ProvisionError, match="is not a federation descriptor"):
        load_descriptor(tmp_path / "federation.json")


def test_a_signed_but_useless_seal_key_is_refused(home: FederationHome) -> None:
    ca_key = pki.load_key(home.root / "ca.key", "")
    signed = encode_descriptor(home.descriptor.model_copy(update={"seal_public_key": "AAAA"}), ca_key)
    (home.root / "x.json").write_bytes(signed)
    with pytest.raises(ProvisionError, match="not one of the suite x25519"):
        load_descriptor(home.root / "x.json")


def test_missing_and_oversized(tmp_path: Path) -> None:
    with pytest.raises(ProvisionError, match=r"federation\.json is missing"):
        load_descriptor(tmp_path / "federation.json")
    (tmp_path / "federation.json").write_bytes(b" " * 70_000)
    with pytest.raises(ProvisionError, match="longer than"):
        load_descriptor(tmp_path / "federation.json")


def test_expired_ca(home: FederationHome, days_pass: Callable[[float], None]) -> None:
    days_pass(pki.CA_DAYS + 1)
    with pytest.raises(ProvisionError, match=r"expired on .* made anew"):
        load_descriptor(home.root / "federation.json")


def test_holds_no_secret(home: FederationHome) -> None:
    text = encode_descriptor(home.descriptor, pki.load_key(home.root / "ca.key", "")).decode()
    assert "PRIVATE" not in text
    assert json.loads((home.root / "seal.key").read_text())["private_key"] not in text
    assert set(Descriptor.model_fields) == {
        "version",
        "name",
        "address",
        "ca_certificate",
        "seal_suite",
        "seal_public_key",
    }
