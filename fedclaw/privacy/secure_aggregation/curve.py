"""The group of the mask keys: P-256 (FIPS 186-5, NIST SP 800-186).

The library's ECDH returns x-coordinates only. A proof of a key also needs to add two points, which is written out here;
the points are public.
"""

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

CURVE = ec.SECP256R1()
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
"""The order of the group, a prime."""
FIELD = 2**256 - 2**224 + 2**192 + 2**96 - 1
"""Coordinates are numbers modulo this prime."""
POINT_BYTES = 33
"""Length of a compressed point."""


def private_key(secret: int) -> ec.EllipticCurvePrivateKey:
    """The private key with the number `secret`. Raises ValueError outside 1 .. ORDER - 1."""
    return ec.derive_private_key(secret, CURVE)


def encoded(public: ec.EllipticCurvePublicKey) -> bytes:
    """The compressed point, POINT_BYTES long."""
    return public.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)


def public_of(secret: int) -> bytes:
    """The public key of `secret`, encoded: `secret` times the generator."""
    return encoded(private_key(secret).public_key())


def point(data: bytes) -> ec.EllipticCurvePublicKey:
    """The point that `data` encodes. Raises ValueError if it is not on the curve."""
    return ec.EllipticCurvePublicKey.from_encoded_point(CURVE, data)


def agreed(secret: int, public: bytes) -> bytes:
    """The x-coordinate of `secret` times the point `public`, 32 bytes. Raises ValueError for a bad point or secret."""
    return private_key(secret).exchange(ec.ECDH(), point(public))


def proves(answer: int, nonce: bytes, challenge: int, public: bytes) -> bool:
    """Whether answer G - R = +- challenge Y, for the points R = `nonce` and Y = `public`."""
    try:
        left = private_key(answer).public_key().public_numbers()
        right = point(nonce).public_numbers()
        expected = agreed(challenge, public)
    except ValueError:
        return False
    if left.x == right.x:
        return False
    slope = (-right.y - left.y) * pow(right.x - left.x, -1, FIELD) % FIELD
    return (slope * slope - left.x - right.x) % FIELD == int.from_bytes(expected, "big")
