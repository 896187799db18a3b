"""The federation descriptor: all that a site needs to know of its federation, signed by the federation's CA.

It is public. It carries the CA that it is signed by, so it proves that it is whole, not whose it is: a site
compares the CA's fingerprint with the coordinator once, when it joins, and refuses another CA from then on.
"""

import base64
import json
from pathlib import Path
from typing import Annotated, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from pydantic import AfterValidator, ValidationError

from fedclaw.errors import ProvisionError, SealError
from fedclaw.identity import pki
from fedclaw.identity.names import check_address, check_name
from fedclaw.identity.seal import Sealer, SealSuite, decode_key
from fedclaw.protocol.frozen import Frozen, explain

DESCRIPTOR_FILE = "federation.json"

_MAX_BYTES = 64 * 1024


class Descriptor(Frozen):
    """What a site needs besides its own key and certificate."""

    version: Literal[1] = 1
    name: Annotated[str, AfterValidator(check_name)]
    address: Annotated[str, AfterValidator(check_address)]
    """Where the server is: "host:port"."""
    ca_certificate: str
    """PEM."""
    seal_suite: SealSuite
    seal_public_key: str
    """Raw public key of the suite, base64."""

    @property
    def ca(self) -> x509.Certificate:
        """The CA's certificate. Raises ProvisionError."""
        return pki.parse_certificate(self.ca_certificate.encode(), f"the CA in the descriptor of {self.name}")

    def sealer(self) -> Sealer:
        """Seals to this federation's aggregator. Raises SealError."""
        return Sealer(self.seal_suite, decode_key(self.seal_public_key))


class _Signed(Frozen):
    descriptor: Descriptor
    signature: str


def encode_descriptor(descriptor: Descriptor, ca_key: pki.PrivateKey) -> bytes:
    """The content of federation.json."""
    signature = ca_key.sign(_canonical(descriptor), pki.ECDSA)
    signed = _Signed(descriptor=descriptor, signature=base64.b64encode(signature).decode())
    return signed.model_dump_json(indent=2).encode() + b"\n"


def load_descriptor(path: Path) -> Descriptor:
    """Read a descriptor and check it: its form, its CA, the CA's signature over it, its keys.

    Raises ProvisionError.
    """
    content = pki.read_file(path, "the federation descriptor", limit=_MAX_BYTES)
    try:
        signed = _Signed.model_validate_json(content)
    except ValidationError as error:
        raise ProvisionError(f"{path} is not a federation descriptor: {explain(error)}") from None
    descriptor = signed.descriptor
    ca = pki.parse_certificate(descriptor.ca_certificate.encode(), f"the CA certificate in {path}")
    pki.check_ca(ca, descriptor.name, f"the CA certificate in {path}")
    try:
        signature = base64.b64decode(signed.signature, validate=True)
        pki.p384_key(ca, str(path)).verify(signature, _canonical(descriptor), pki.ECDSA)
    except (ValueError, InvalidSignature):
        raise ProvisionError(
            f"{path} was changed after the coordinator signed it; fetch federation.json from the coordinator again"
        ) from None
    try:
        descriptor.sealer()
    except SealError as error:
        raise ProvisionError(f"{path}: {error}") from None
    return descriptor


def _canonical(descriptor: Descriptor) -> bytes:
    return json.dumps(descriptor.model_dump(), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
