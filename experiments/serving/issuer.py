"""An identity provider of the measurements' own: ES256 keys in a JWKS file, and tokens, right and wrong ones."""

import base64
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from fedclaw.files import write_atomic

ISSUER, AUDIENCE = "https://issuer.example", "fedclaw-node"
EVERYTHING = ("predict:*", "feedback:*", "admin:read", "admin:publish", "admin:route")
LIFETIME = 4 * 3600
"""Seconds that a token is good for: longer than any measurement."""


class Issuer:
    """One P-256 key, whose public half is in the file at `jwks`."""

    def __init__(self, jwks: Path, key_id: str = "benchmark") -> None:
        self.jwks = jwks
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._key_id = key_id
        public: dict[str, Any] = ECAlgorithm.to_jwk(self._key.public_key(), as_dict=True)
        key = {**public, "kid": key_id, "alg": "ES256", "use": "sig"}
        write_atomic(jwks, json.dumps({"keys": [key]}).encode())

    def settings(self) -> dict[str, str]:
        """What a node has to be told."""
        return {"tokens.jwks": str(self.jwks), "tokens.issuer": ISSUER, "tokens.audience": AUDIENCE}

    def token(self, scopes: tuple[str, ...] = EVERYTHING, subject: str = "benchmark", **changes: Any) -> str:
        """A token; `changes` are of its claims."""
        return jwt.encode(self._claims(scopes, subject, changes), self._key, "ES256", {"kid": self._key_id})

    def unsigned(self, subject: str = "benchmark") -> str:
        """The same with `alg: none`."""
        parts = ({"alg": "none", "typ": "JWT", "kid": self._key_id}, self._claims(EVERYTHING, subject, {}), None)
        return ".".join("" if part is None else _encoded(part) for part in parts)

    @staticmethod
    def _claims(scopes: tuple[str, ...], subject: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        now = int(time.time())
        claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": subject, "iat": now, "nbf": now - 5, "exp": now + LIFETIME}
        return {**claims, "scope": " ".join(scopes), **changes}


def _encoded(part: Mapping[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()
