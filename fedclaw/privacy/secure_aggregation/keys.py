"""The secrets of a site in one session, and the keys that come of them.

Fresh for each session: a P-256 pair that agrees on masks (`curve`), an X25519 pair (RFC 7748) that shares are sealed
to, an Ed25519 pair (RFC 8032) that signs what the site says in the session, and a seed for the site's own mask. All
derived keys are HKDF-SHA256 (RFC 5869) with an info that names their use, the digest of the parameters and both ends,
so that none serves twice.
"""

import secrets
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedclaw.errors import SecureAggregationError
from fedclaw.privacy.secure_aggregation import curve
from fedclaw.privacy.secure_aggregation.dealing import DealerKeys
from fedclaw.privacy.secure_aggregation.parameters import Parameters, framed
from fedclaw.privacy.secure_aggregation.shamir import SECRET_BYTES, SHARE_BYTES

PUBLIC_BYTES = 32
EPHEMERAL_BYTES = 32
SESSION_SIGNATURE_BYTES = 64
SEALED_BYTES = PUBLIC_BYTES + 2 * SHARE_BYTES + 16
"""The sender's ephemeral public key; a share of the seed and one of the mask key, encrypted."""

# Every key encrypts one message, in one direction.
_NONCE = bytes(12)


class SealedShares(NamedTuple):
    """What goes to one receiver, and the private key (raw) that opens it beside the receiver's own."""

    content: bytes
    ephemeral: bytes


class SessionKeys:
    """A site's secrets for one session. `wipe` forgets them; until then they never leave but as shares."""

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
        """The private key of the masks, big-endian: what is shared among the neighbours."""
        return self._mask.private_numbers().private_value.to_bytes(SECRET_BYTES, "big")

    @property
    def dealt(self) -> DealerKeys:
        """Both secrets as numbers, to be shared."""
        seed, secret = int.from_bytes(self._seed, "big"), self._mask.private_numbers().private_value
        return DealerKeys(seed, secret, self.mask_public)

    def sign(self, purpose: str, message: bytes) -> bytes:
        """A signature that `check_signature` checks by `sign_public`."""
        return self._sign.sign(framed(purpose.encode(), message))

    def open(self, parameters: Parameters, me: str, sender: str, sealed: bytes) -> bytes:
        """What `sender` sealed for `me`. Raises SecureAggregationError if it does not open."""
        return _opened(parameters, sender, me, self._share, sealed[:PUBLIC_BYTES], sealed)

    def wipe(self) -> None:
        """Forget the secrets: the seed's bytes are overwritten, the private keys exchanged for useless ones.

        Python may have left copies in freed memory; nothing in the process refers to them any more.
        """
        self._seed[:] = bytes(len(self._seed))
        self._mask = curve.private_key(_number())
        self._share = X25519PrivateKey.generate()
        self._sign = Ed25519PrivateKey.generate()


def seal(parameters: Parameters, sender: str, receiver: str, receiver_public: bytes, plain: bytes) -> SealedShares:
    """`plain`, which `receiver` opens, as from `sender` in this session. Raises SecureAggregationError for a bad key.

    The ephemeral key is each receiver's own: to show what one was sent shows nothing of what others were.
    """
    ephemeral = X25519PrivateKey.generate()
    public = ephemeral.public_key().public_bytes_raw()
    shared = _agree(ephemeral, receiver_public, receiver)
    key, context = _cipher_key(parameters, sender, receiver, public, shared)
    return SealedShares(public + AESGCM(key).encrypt(_NONCE, plain, context), ephemeral.private_bytes_raw())


def reopened(
    parameters: Parameters, sender: str, receiver: str, receiver_public: bytes, sealed: bytes, ephemeral: bytes
) -> bytes:
    """What `sender` sealed for `receiver`, by the ephemeral private key that it has shown.

    Raises SecureAggregationError if that is not the key, or nothing opens.
    """
    private = X25519PrivateKey.from_private_bytes(ephemeral)
    if private.public_key().public_bytes_raw() != sealed[:PUBLIC_BYTES]:
        raise SecureAggregationError(f"{sender} has shown another key than the one that it sealed for {receiver} with")
    return _opened(parameters, sender, receiver, private, receiver_public, sealed)


def pair_key(parameters: Parameters, mask_secret: bytes, owner: str, peer: str, peer_public: bytes) -> bytes:
    """The key of the mask between `owner`, whose private key is given, and `peer`: the same from either end.

    Raises SecureAggregationError for a public key that is no point.
    """
    first, second = sorted((owner, peer))
    context = framed(b"fedclaw pair mask v2", parameters.digest, first.encode(), second.encode())
    try:
        return _derive(curve.agreed(int.from_bytes(mask_secret, "big"), peer_public), context)
    except ValueError:
        raise SecureAggregationError(f"a public key of {peer} is of no use (it is no point of the curve)") from None


def own_key(parameters: Parameters, site: str, seed: bytes) -> bytes:
    """The key of the mask that `site` adds by itself."""
    return _derive(seed, framed(b"fedclaw own mask v1", parameters.digest, site.encode()))


def mask_public_of(mask_secret: bytes) -> bytes:
    """The public key that belongs to a mask key. Raises ValueError for a number that is none."""
    return curve.public_of(int.from_bytes(mask_secret, "big"))


def check_publics(site: str, mask_public: bytes, share_public: bytes) -> None:
    """Raise SecureAggregationError, naming the site, for public keys that nobody can agree on anything with."""
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
    """The content of `sealed`, by the agreement of `private` with `public`: of either end."""
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
