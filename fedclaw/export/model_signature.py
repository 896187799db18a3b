"""`model.sig`: the signature of a bundle in the form of OpenSSF Model Signing (OMS) 1.0.

A Sigstore bundle in JSON holds a DSSE envelope, the envelope an in-toto statement v1, and the statement the SHA-256 of
every file but `model.sig`. The release key signs the envelope: ECDSA with the hash that goes with its curve, over
DSSE's pre-authentication encoding. `model_signing verify certificate` of the package model-signing checks it as well.

Reading is strict, so that nothing in the file that the signature does not cover means anything: no name twice in an
object, no field that OMS, DSSE, in-toto and Sigstore do not know (resources may have further ones: OMS 5.2.1), base64
in its one standard spelling, one signature, in DER. What OMS leaves open is closed: files in one directory, SHA-256,
no links. One change passes: of an ECDSA signature (r, s) anybody can make (r, -s), which is as good. Nothing may be
concluded from the bytes of `model.sig` itself; a bundle is named by the digest in the statement's subject.

OMS 1.0, sections 4 to 8; DSSE 1.0, protocol.md; Sigstore bundle v0.3; in-toto attestation framework v1.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, Self, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import BeforeValidator, ConfigDict, Field, StrictBool, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from fedclaw.errors import BundleError
from fedclaw.export.layout import CA_CERTIFICATE, FILE_NAME, RELEASE_CERTIFICATE, SIGNATURE
from fedclaw.export.signature import check_signature, parse_certificate, printable
from fedclaw.protocol.frozen import Frozen, explain

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"

Method = Literal["certificate", "key", "sigstore"]
"""The signing methods of OMS 4.1."""


class ContentSigner(Protocol):
    """A release key, wherever it is kept."""

    certificate_pem: bytes
    ca_pem: bytes

    def sign(self, content: bytes) -> bytes:
        """ECDSA with the hash that goes with the key's curve, DER."""
        ...


@dataclass(frozen=True)
class DsseEnvelope:
    """What `model.sig` holds, well-formed and not yet checked. Certificates are DER, the signer's first."""

    method: Method
    certificates: tuple[bytes, ...]
    witnessed: bool
    """Whether entries of a transparency log or timestamps come with it."""
    payload: bytes
    signature: bytes


def sign_digests(digests: Mapping[str, str], name: str, signer: ContentSigner) -> bytes:
    """`model.sig` over the files' SHA-256 (`digests`: file name to lower-case hex); `name` is the directory's."""
    release = parse_certificate(signer.certificate_pem, RELEASE_CERTIFICATE)
    payload = _compact(_statement(digests, name))
    # Without the CA: a verifier has it already, and Sigstore's bundles must not hold a root.
    chain = [{"rawBytes": _encode(release.public_bytes(Encoding.DER))}]
    content = {
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {"x509CertificateChain": {"certificates": chain}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": _encode(payload),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": _encode(signer.sign(pre_authentication_encoding(payload)))}],
        },
    }
    return _compact(content)


def verify_digests(content: bytes, release: x509.Certificate, authority: x509.Certificate) -> dict[str, str]:
    """The digests by file name that `content`, a `model.sig`, holds, signed by `release`. Raises BundleError.

    The caller has checked that `release` may sign bundles, and that `authority` issued it.
    """
    envelope = parse_envelope(content)
    _require_signer(envelope, release, authority)
    message = pre_authentication_encoding(envelope.payload)
    refusal = f"{SIGNATURE} is not {RELEASE_CERTIFICATE}'s signature over the statement in it"
    check_signature(release, envelope.signature, message, refusal)
    return parse_statement(envelope.payload)


def parse_envelope(content: bytes) -> DsseEnvelope:
    """Read a `model.sig` of any signing method. Raises BundleError when it is not of the form; verifies nothing."""
    bundle = _parse(_Bundle, content)
    material, envelope = bundle.verification_material, bundle.dsse_envelope
    return DsseEnvelope(
        method=material.method,
        certificates=tuple(item.raw_bytes for item in material.certificates),
        witnessed=bool(material.tlog_entries) or material.timestamp_verification_data is not None,
        payload=envelope.payload,
        signature=envelope.signatures[0].sig,
    )


def parse_statement(payload: bytes) -> dict[str, str]:
    """The SHA-256 by file name in an in-toto statement of OMS. Raises BundleError when it is not of the form."""
    statement = _parse(_Statement, payload)
    resources = statement.predicate.resources
    names = [resource.name for resource in resources]
    if names != sorted(set(names)):
        raise _damaged("its files are not in alphabetical order, each once")
    digests = {resource.name: resource.digest for resource in resources}
    if statement.subject[0].digest.sha256 != root_digest(digests):
        raise _damaged("the subject's digest is not that of the files' digests")
    return digests


def root_digest(digests: Mapping[str, str]) -> str:
    """One SHA-256 for all files: over their digests, as bytes, by name (OMS 6.5.1)."""
    return hashlib.sha256(b"".join(bytes.fromhex(digests[name]) for name in sorted(digests))).hexdigest()


def pre_authentication_encoding(payload: bytes) -> bytes:
    """What a DSSE signature is over, so that no signature for something else can be taken for it."""
    return f"DSSEv1 {len(PAYLOAD_TYPE)} {PAYLOAD_TYPE} {len(payload)} ".encode("ascii") + payload


def _require_signer(envelope: DsseEnvelope, release: x509.Certificate, authority: x509.Certificate) -> None:
    """Check that `envelope` names `release`, and nobody beside it and its CA."""
    if envelope.method == "key":
        raise BundleError(
            f"{SIGNATURE} is signed by a bare key, not a certificate: "
            "a bundle of a federation is signed by its release certificate"
        )
    if envelope.method == "sigstore":
        raise BundleError(
            f"{SIGNATURE} is signed by Sigstore (a short-lived certificate and a public log): "
            "a bundle of a federation is signed by its release certificate, and checked without a network"
        )
    if envelope.witnessed:
        raise BundleError(f"{SIGNATURE} holds entries of a transparency log or timestamps, which nothing here checks")
    first, *others = envelope.certificates
    if first != release.public_bytes(Encoding.DER):
        raise BundleError(f"{SIGNATURE} is signed by another certificate than {RELEASE_CERTIFICATE}")
    if others and others != [authority.public_bytes(Encoding.DER)]:
        raise BundleError(f"{SIGNATURE} holds other certificates than {RELEASE_CERTIFICATE} and {CA_CERTIFICATE}")


def _statement(digests: Mapping[str, str], name: str) -> dict[str, Any]:
    resources = [{"name": file, "algorithm": "sha256", "digest": digests[file]} for file in sorted(digests)]
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": root_digest(digests)}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [SIGNATURE],
            },
            "resources": resources,
        },
    }


def _compact(plain: Mapping[str, Any]) -> bytes:
    return json.dumps(plain, separators=(",", ":")).encode("ascii")


def _encode(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _decode(text: object) -> bytes:
    if not isinstance(text, str):
        raise ValueError("it should be text in base64")
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        content = b""
    if not content or _encode(content) != text:
        raise ValueError("it is not base64 in its standard spelling")
    return content


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    if len(plain) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return plain


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number in JSON")


M = TypeVar("M", bound=Frozen)


def _parse(kind: type[M], content: bytes) -> M:
    try:
        plain = json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number)
    except RecursionError:
        raise _damaged("its JSON is nested too deeply") from None
    except ValueError as error:
        raise _damaged(f"it is not JSON ({error})") from error
    try:
        return kind.model_validate(plain)
    except ValidationError as error:
        raise _damaged(explain(error)) from error


def _damaged(why: str) -> BundleError:
    return BundleError(f"{SIGNATURE} is damaged: {printable(why)}")


Base64 = Annotated[bytes, BeforeValidator(_decode)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Json(Frozen):
    model_config = ConfigDict(alias_generator=to_camel)


class _Certificate(_Json):
    raw_bytes: Base64


class _CertificateChain(_Json):
    certificates: tuple[_Certificate, ...] = Field(min_length=1)


class _PublicKey(_Json):
    model_config = ConfigDict(extra="ignore")

    hint: str | None = None
    raw_bytes: str | None = None

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.hint is None and self.raw_bytes is None:
            raise ValueError("it names no key")
        return self


class _Material(_Json):
    public_key: _PublicKey | None = None
    x509_certificate_chain: _CertificateChain | None = Field(default=None, alias="x509CertificateChain")
    certificate: _Certificate | None = None
    tlog_entries: tuple[dict[str, Any], ...] = ()
    timestamp_verification_data: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _of_one_method(self) -> Self:
        given = [item for item in (self.public_key, self.x509_certificate_chain, self.certificate) if item is not None]
        if len(given) != 1:
            raise ValueError(f"{len(given)} of publicKey, x509CertificateChain and certificate are given, not one")
        if self.method == "sigstore" and not self.tlog_entries:
            raise ValueError("a certificate of Sigstore comes with an entry of a transparency log, and there is none")
        return self

    @property
    def method(self) -> Method:
        if self.public_key is not None:
            return "key"
        return "sigstore" if self.certificate is not None else "certificate"

    @property
    def certificates(self) -> tuple[_Certificate, ...]:
        if self.x509_certificate_chain is not None:
            return self.x509_certificate_chain.certificates
        return () if self.certificate is None else (self.certificate,)


class _Signature(_Json):
    sig: Base64
    keyid: Literal[""] | None = None
    """Nothing signs it; so it says nothing."""


class _Envelope(_Json):
    payload: Base64
    payload_type: Literal["application/vnd.in-toto+json"]
    signatures: tuple[_Signature, ...] = Field(min_length=1, max_length=1)


class _Bundle(_Json):
    media_type: Literal["application/vnd.dev.sigstore.bundle.v0.3+json"]
    verification_material: _Material
    dsse_envelope: _Envelope


class _DigestSet(Frozen):
    sha256: Sha256


class _Subject(Frozen):
    model_config = ConfigDict(extra="ignore")

    name: str = Field(min_length=1)
    digest: _DigestSet


class _Resource(Frozen):
    model_config = ConfigDict(extra="ignore")

    name: str = Field(pattern=FILE_NAME)
    digest: Sha256
    algorithm: Literal["sha256"]


class _Serialization(Frozen):
    method: Literal["files"]
    hash_type: Literal["sha256"]
    allow_symlinks: StrictBool
    ignore_paths: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """What the signer left out. A bundle must not hold it either."""

    @model_validator(mode="after")
    def _no_links(self) -> Self:
        if self.allow_symlinks:
            raise ValueError("the signer followed symbolic links; a bundle holds plain files only")
        return self


class _Predicate(Frozen):
    resources: tuple[_Resource, ...] = Field(min_length=1)
    serialization: _Serialization


class _Statement(Frozen):
    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: tuple[_Subject, ...] = Field(min_length=1, max_length=1)
    predicate_type: Literal["https://model_signing/signature/v1.0"] = Field(alias="predicateType")
    predicate: _Predicate
