"""Tokens of one's own making, for a node without an identity provider and for the demo.

`python -m fedclaw.serve keys` writes a signing key, for its owner only, and the key set that the node checks with;
`python -m fedclaw.serve token` signs a token. Whoever reads the signing key can be anybody: keep it off the node.
"""

import json
import time
import uuid
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from pydantic import BeforeValidator

from fedclaw.errors import ProvisionError, UsageError
from fedclaw.files import PRIVATE_MODE, write_atomic
from fedclaw.identity.pki import read_private
from fedclaw.protocol.frozen import Frozen
from fedclaw.serve.security.scopes import is_known_scope
from fedclaw.serve.security.tokens import MAX_SUBJECT

SIGNING_KEY = "signing.key"
KEY_SET = "keys.json"
ALGORITHM = "ES256"
ISSUER, AUDIENCE = "fedclaw", "fedclaw"
"""Of tokens for which nothing else was asked: conf/serve_token.yaml."""
MAX_MINUTES = 30 * 24 * 60


class KeysCommand(Frozen):
    """conf/serve_keys.yaml, checked."""

    directory: Path


class TokenCommand(Frozen):
    """conf/serve_token.yaml, checked."""

    keys: Path
    """Directory of `write_keys`."""
    issuer: str
    audience: str
    subject: str
    scopes: Annotated[tuple[str, ...], BeforeValidator(lambda given: (given,) if isinstance(given, str) else given)]
    minutes: float
    output: Path | None
    """A file for its owner alone; None: the token is printed."""


def write_keys(directory: Path) -> Path:
    """Make a P-256 signing key and its key set in `directory`; the key set's path. Raises ProvisionError if there are
    some: tokens that were signed would no longer be good."""
    key_path, set_path = directory / SIGNING_KEY, directory / KEY_SET
    for path in (key_path, set_path):
        if path.exists() or path.is_symlink():
            raise ProvisionError(f"{path} is there already; remove both files first if its tokens may go")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    write_atomic(key_path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), PRIVATE_MODE)
    write_atomic(set_path, json.dumps({"keys": [_public(key)]}, indent=2).encode() + b"\n")
    return set_path


def sign_token(directory: Path, issuer: str, audience: str, subject: str, scopes: Sequence[str], minutes: float) -> str:
    """A token signed with the key in `directory`. Raises UsageError or ProvisionError."""
    if not 0 < minutes <= MAX_MINUTES:
        raise UsageError(f"minutes={minutes:g}: a token is good for more than 0 and at most {MAX_MINUTES} minutes")
    if not 0 < len(subject) <= MAX_SUBJECT or not subject.isprintable():
        raise UsageError(f"subject: a line of text of at most {MAX_SUBJECT} characters")
    if odd := [scope for scope in scopes if not is_known_scope(scope)]:
        raise UsageError(
            f"scopes: {odd[0]!r} is none; there are predict:MODEL, feedback:MODEL, admin:read, admin:publish and "
            "admin:route, and * in the place of what follows the colon"
        )
    key = _signing_key(directory / SIGNING_KEY)
    now = int(time.time())
    claims = {
        "iss": issuer,
        "aud": audience,
        "sub": subject,
        "iat": now,
        "exp": now + max(1, round(minutes * 60)),
        "jti": uuid.uuid4().hex,
        "scope": " ".join(scopes),
    }
    return jwt.encode(claims, key, ALGORITHM, headers={"typ": "at+jwt", "kid": _public(key)["kid"]})


def _signing_key(path: Path) -> ec.EllipticCurvePrivateKey:
    content = read_private(path, "the key that signs tokens; `python -m fedclaw.serve keys` makes one")
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ProvisionError(f"{path} is not a private key in unencrypted PEM form") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ProvisionError(f"{path} is not an ECDSA P-256 key")
    return key


def _public(key: ec.EllipticCurvePrivateKey) -> dict[str, str]:
    """The key set's entry; the id is the key's thumbprint (RFC 7638)."""
    public: dict[str, str] = jwt.algorithms.ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
    members = {name: public[name] for name in ("crv", "kty", "x", "y")}
    text = json.dumps(members, sort_keys=True, separators=(",", ":")).encode()
    thumbprint = jwt.utils.base64url_encode(sha256(text).digest()).decode()
    return {**members, "kid": thumbprint, "use": "sig", "alg": ALGORITHM}
