"""A site's secrets in one session, and the keys derived from them.

Each session has fresh ones: a P-256 key pair to agree on masks (`curve`), an X25519 pair (RFC 7748) that shares are
sealed to, an Ed25519 pair (RFC 8032) that signs the site's messages, and a seed for the site's own mask. Keys are
derived by HKDF-SHA256 (RFC 5869). Its info names the use, the digest of the parameters and both ends, so that no key
serves twice.

Masks are AES-256-CTR keystreams read as little-endian 32-bit words, added to a vector modulo 2^32.

A key makes one mask and nothing else, so the counter starts at 0. The vector is masked block by block, with all masks
of a block before the next: a block of the vector, of keystream and of zeros fits into the cache, and no memory beside
the vector grows with its length.

Whose a site's keys are, its certificate's key says, which signs them; the federation's CA vouches for the certificate.
"""

import secrets
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedclaw.errors import ProvisionError, SecureAggregationError
from fedclaw.identity import pki
from fedclaw.identity.descriptor import Descriptor
from fedclaw.identity.seal import encode_key, generate
from fedclaw.identity.site_home import SiteKeys, check_site_certificate
from fedclaw.privacy.secure_aggregation import curve
from fedclaw.privacy.secure_aggregation.dealing import SECRET_BYTES, SHARE_BYTES, DealerKeys
from fedclaw.privacy.secure_aggregation.parameters import MAX_SITES, Parameters, framed

KEYS_PURPOSE = "secure aggregation keys"
"""A site's certificate key signs only its keys of a session. Those sign everything else in the session."""
SHARES_PURPOSE = "secure aggregation shares"
ACCUSATION_PURPOSE = "secure aggregation accusation"
SURVIVORS_PURPOSE = "secure aggregation survivors"

MAX_CERTIFICATE = 8192
MAX_SIGNATURE = 128


class Signer(Protocol):
    """A site's own identity, such as `SiteKeys`."""

    site_name: str
    certificate: x509.Certificate

    def sign(self, purpose: str, message: bytes) -> bytes:
        """A signature that the certificate's public key verifies."""


class Verifier(Protocol):
    """Decides whether a signature is the named site's."""

    def check(self, site: str, certificate: bytes, purpose: str, message: bytes, signature: bytes) -> None:
        """Raise SecureAggregationError if it is not. `certificate` is PEM."""


class CertificateVerifier:
    """Accepts the site certificates of one federation, by the CA in the descriptor that the site was set up with.

    A certificate must be issued by that CA for a site of that federation, carry the site's name, and be valid now.

    This trusts the holder of the CA's key to certify only sites that exist: invented ones would count as survivors.
    Sites cannot fetch a revocation list; they know only the serial numbers in `revoked`. The server turns revoked sites
    away when they connect, but a dishonest server could let one in.
    """

    def __init__(self, descriptor: Descriptor, revoked: Collection[int] = ()) -> None:
        self._descriptor = descriptor
        self._revoked = frozenset(revoked)
        self._issued: dict[bytes, x509.Certificate] = {}

    def check(self, site: str, certificate: bytes, purpose: str, message: bytes, signature: bytes) -> None:
        """Raise SecureAggregationError, naming the site, unless its certificate and its signature are valid."""
        try:
            parsed = self._certificate(site, certificate)
            pki.check_signature(parsed, purpose, message, signature, site)
        except ProvisionError as error:
            raise SecureAggregationError(str(error)) from None

    def _certificate(self, site: str, pem: bytes) -> x509.Certificate:
        """The certificate of `site`, verified. The issuer's signature is checked once, the dates every time."""
        origin, remedy = f"the certificate sent for {site}", f"{site} has to renew it"
        certificate = self._issued.get(pem)
        if certificate is None:
            certificate = pki.parse_certificate(pem, origin)
            check_site_certificate(certificate, self._descriptor, origin, remedy)
            if len(self._issued) >= MAX_SITES:
                self._issued.clear()
            self._issued[pem] = certificate
        pki.check_dates(certificate, origin, remedy)
        if (named := pki.common_name(certificate)) != site:
            raise SecureAggregationError(f"{origin} belongs to {named}")
        if certificate.serial_number in self._revoked:
            raise SecureAggregationError(f"{origin} is revoked")
        return certificate


def keys_message(
    parameters: Parameters, site: str, mask_public: bytes, share_public: bytes, sign_public: bytes
) -> bytes:
    """What a site signs to advertise its keys. The parameters' digest ties them to one session."""
    return _statement(parameters, site, mask_public, share_public, sign_public)


def shares_message(parameters: Parameters, dealer: str, holder: str, sealed: bytes, proof: bytes) -> bytes:
    """What a dealer signs for one holder: the sealed shares, and the proof that they are checked with."""
    return _statement(parameters, dealer, holder.encode(), sealed, proof)


def accusation_message(parameters: Parameters, accuser: str, dealer: str, shares: bytes) -> bytes:
    """What a holder signs to accuse `dealer`: `shares` is the `shares_message` that the dealer signed for it."""
    return _statement(parameters, accuser, dealer.encode(), shares)


def survivors_message(parameters: Parameters, site: str, survivors: Sequence[str]) -> bytes:
    """What a site signs to consent to the survivors, in whatever order they come."""
    return _statement(parameters, site, *(name.encode() for name in sorted(survivors)))


def _statement(parameters: Parameters, site: str, *parts: bytes) -> bytes:
    names = (parameters.federation, parameters.run, str(parameters.round), parameters.session, site)
    return framed(*(name.encode() for name in names), parameters.digest, *parts)


def local_identities(federation: str, sites: Sequence[str]) -> tuple[dict[str, SiteKeys], CertificateVerifier]:
    """Identities for a simulation: a CA and certificates that are valid for a day and never leave this process."""
    ca_key = pki.new_key()
    ca = pki.new_ca(federation, ca_key)
    descriptor = Descriptor(
        name=federation,
        address="127.0.0.1:1",
        ca_certificate=pki.pem_of(ca).decode(),
        seal_suite="x25519",
        seal_public_key=encode_key(generate("x25519").public),
    )
    identities = {}
    for site in sites:
        key = pki.new_key()
        certificate = pki.issue_site(ca, ca_key, key.public_key(), federation, site, days=1)
        identities[site] = SiteKeys(Path(site), descriptor, certificate, key)
    return identities, CertificateVerifier(descriptor)


PUBLIC_BYTES = 32
EPHEMERAL_BYTES = 32
SESSION_SIGNATURE_BYTES = 64
SEALED_BYTES = PUBLIC_BYTES + 2 * SHARE_BYTES + 16
"""The sender's ephemeral public key, then a share of the seed and one of the mask key, encrypted."""

# Every key encrypts one message, in one direction.
_NONCE = bytes(12)


class SealedShares(NamedTuple):
    """What goes to one receiver, and the ephemeral private key (raw), which opens it as the receiver's own does."""

    content: bytes
    ephemeral: bytes


class SessionKeys:
    """A site's secrets for one session. They leave only as shares, and `wipe` forgets them."""

    def __init__(self) -> None:
        self._mask = curve.private_key(_number())
        self._share = X25519PrivateKey.generate()
        self._sign = Ed25519PrivateKey.generate()
        self._seed = bytearray(_number().to_bytes(SECRET_BYTES, "big"))

    def __repr__(self) -> str:
        return "SessionKeys()"

    def __getstate__(self) -> object:
        raise TypeError("the keys of a session are never copied or sent")

    @property
    def mask_public(self) -> bytes:
        """Public key of the masks, a compressed point."""
        return curve.encoded(self._mask.public_key())

    @property
    def share_public(self) -> bytes:
        """Public key that shares are sealed to, raw."""
        return self._share.public_key().public_bytes_raw()

    @property
    def sign_public(self) -> bytes:
        """Public key of what the site signs in the session, raw."""
        return self._sign.public_key().public_bytes_raw()

    @property
    def seed(self) -> bytes:
        """The seed of the site's own mask: a number below the group's order."""
        return bytes(self._seed)

    @property
    def mask_secret(self) -> bytes:
        """The private key of the masks, 32 bytes, big-endian. It is shared among the neighbours."""
        return self._mask.private_numbers().private_value.to_bytes(SECRET_BYTES, "big")

    @property
    def dealt(self) -> DealerKeys:
        """Both secrets as numbers, ready to be shared."""
        seed, secret = int.from_bytes(self._seed, "big"), self._mask.private_numbers().private_value
        return DealerKeys(seed, secret, self.mask_public)

    def sign(self, purpose: str, message: bytes) -> bytes:
        """A signature that `check_signature` accepts with `sign_public`."""
        return self._sign.sign(framed(purpose.encode(), message))

    def open(self, parameters: Parameters, me: str, sender: str, sealed: bytes) -> bytes:
        """What `sender` sealed for `me`. Raises SecureAggregationError if it does not open."""
        return _opened(parameters, sender, me, self._share, sealed[:PUBLIC_BYTES], sealed)

    def wipe(self) -> None:
        """Forget the secrets: overwrite the seed's bytes, and put other private keys in the place of these.

        Python may have left copies in freed memory, but nothing in the process refers to them any more.
        """
        self._seed[:] = bytes(len(self._seed))
        self._mask = curve.private_key(_number())
        self._share = X25519PrivateKey.generate()
        self._sign = Ed25519PrivateKey.generate()


def seal(parameters: Parameters, sender: str, receiver: str, receiver_public: bytes, plain: bytes) -> SealedShares:
    """Encrypt `plain` from `sender` to `receiver` for this session. Raises SecureAggregationError for a bad key.

    Each receiver has an ephemeral key of its own: revealing it shows what this receiver was sent, and nothing else.
    """
    ephemeral = X25519PrivateKey.generate()
    public = ephemeral.public_key().public_bytes_raw()
    shared = _agree(ephemeral, receiver_public, receiver)
    key, context = _cipher_key(parameters, sender, receiver, public, shared)
    return SealedShares(public + AESGCM(key).encrypt(_NONCE, plain, context), ephemeral.private_bytes_raw())


def reopened(
    parameters: Parameters, sender: str, receiver: str, receiver_public: bytes, sealed: bytes, ephemeral: bytes
) -> bytes:
    """Open what `sender` sealed for `receiver`, with the ephemeral private key that it revealed.

    Raises SecureAggregationError if it is another key, or if the shares do not open.
    """
    private = X25519PrivateKey.from_private_bytes(ephemeral)
    if private.public_key().public_bytes_raw() != sealed[:PUBLIC_BYTES]:
        raise SecureAggregationError(f"{sender} has shown another key than the one that it sealed for {receiver} with")
    return _opened(parameters, sender, receiver, private, receiver_public, sealed)


def pair_key(parameters: Parameters, mask_secret: bytes, owner: str, peer: str, peer_public: bytes) -> bytes:
    """The key of the mask that `owner`, whose private key is given, shares with `peer`. Both ends derive the same.

    Raises SecureAggregationError for a public key that is not on the curve.
    """
    first, second = sorted((owner, peer))
    context = framed(b"fedclaw pair mask v2", parameters.digest, first.encode(), second.encode())
    try:
        return _derive(curve.agreed(int.from_bytes(mask_secret, "big"), peer_public), context)
    except ValueError:
        raise SecureAggregationError(f"a public key of {peer} is of no use (it is no point of the curve)") from None


def own_key(parameters: Parameters, site: str, seed: bytes) -> bytes:
    """The key of the site's own mask."""
    return _derive(seed, framed(b"fedclaw own mask v1", parameters.digest, site.encode()))


def mask_public_of(mask_secret: bytes) -> bytes:
    """The public key of a mask key. Raises ValueError for a number that is no private key."""
    return curve.public_of(int.from_bytes(mask_secret, "big"))


def check_publics(site: str, mask_public: bytes, share_public: bytes) -> None:
    """Raise SecureAggregationError, naming the site, for public keys that cannot be used for key agreement."""
    _agree(X25519PrivateKey.generate(), share_public, site)
    try:
        curve.point(mask_public)
    except ValueError:
        raise SecureAggregationError(f"a public key of {site} is of no use (it is no point of the curve)") from None


def check_signature(site: str, sign_public: bytes, purpose: str, message: bytes, signature: bytes) -> None:
    """Raise SecureAggregationError, naming the site, unless the session key `sign_public` has signed `message`."""
    try:
        Ed25519PublicKey.from_public_bytes(sign_public).verify(signature, framed(purpose.encode(), message))
    except (InvalidSignature, ValueError):
        raise SecureAggregationError(f"the signature of {site} does not check ({purpose})") from None


def _number() -> int:
    return 1 + secrets.randbelow(curve.ORDER - 1)


def _opened(
    parameters: Parameters, sender: str, receiver: str, private: X25519PrivateKey, public: bytes, sealed: bytes
) -> bytes:
    """The content of `sealed`; `private` and `public` are one end's private key and the other's public key."""
    key, context = _cipher_key(parameters, sender, receiver, sealed[:PUBLIC_BYTES], _agree(private, public, sender))
    try:
        return AESGCM(key).decrypt(_NONCE, sealed[PUBLIC_BYTES:], context)
    except InvalidTag:
        raise SecureAggregationError(
            f"the shares from {sender} for {receiver} do not open: tampered with, or not from this session"
        ) from None


def _cipher_key(
    parameters: Parameters, sender: str, receiver: str, ephemeral_public: bytes, shared: bytes
) -> tuple[bytes, bytes]:
    context = framed(b"fedclaw shares v2", parameters.digest, sender.encode(), receiver.encode(), ephemeral_public)
    return _derive(shared, context), context


def _agree(private: X25519PrivateKey, public: bytes, owner: str) -> bytes:
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise SecureAggregationError(f"a public key of {owner} is of no use (a point of small order)") from None


def _derive(secret: bytes, context: bytes) -> bytes:
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=context).derive(secret)


KEY_BYTES = 32
BLOCK = 1 << 16
"""Words in a block: 256 KiB."""

Words = NDArray[np.uint32]


def apply_masks(vector: Words, added: Sequence[bytes], subtracted: Sequence[bytes]) -> None:
    """Add the masks of the keys `added` to `vector` and subtract those of `subtracted`, in place, modulo 2^32.

    `vector`: (d,) uint32, contiguous and writable. Raises SecureAggregationError if it is not.
    """
    check_vector(vector)
    if not vector.flags.writeable:
        raise SecureAggregationError("a vector that is masked in place must be writable")
    streams = [(_keystream(key), np.add) for key in added] + [(_keystream(key), np.subtract) for key in subtracted]
    words = min(BLOCK, len(vector))
    zeros = memoryview(bytes(4 * words))
    mask = np.empty(words, dtype="<u4")
    for start in range(0, len(vector), BLOCK):
        part = vector[start : start + BLOCK]
        block = mask[: len(part)]
        raw = block.view(np.uint8).data
        for stream, combine in streams:
            stream.update_into(zeros[: len(raw)], raw)
            combine(part, block, out=part)


def check_vector(vector: Any, length: int | None = None) -> Words:
    """`vector`, if it is (length,) uint32 and contiguous. Raises SecureAggregationError."""
    if not isinstance(vector, np.ndarray) or vector.dtype != np.uint32 or vector.ndim != 1:
        raise SecureAggregationError("a vector of a secure sum has one dimension and is of type uint32")
    if not vector.flags.c_contiguous:
        raise SecureAggregationError("a vector of a secure sum must lie in one piece")
    if length is not None and len(vector) != length:
        raise SecureAggregationError(f"the vector has {len(vector)} numbers, the sum is over {length}")
    return vector


def _keystream(key: bytes) -> CipherContext:
    if len(key) != KEY_BYTES:
        raise SecureAggregationError(f"the key of a mask has {KEY_BYTES} bytes, not {len(key)}")
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
