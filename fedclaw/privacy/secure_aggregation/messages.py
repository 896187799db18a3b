"""The messages of each stage. One packs into values that a Flower ConfigRecord holds, and is checked on unpacking.

stage     site -> server              server -> site
keys      Advertisement               (the parameters)
shares    ShareBundle                 KeyList
confirm   Confirmation                ShareDelivery
dispute   Opening                     Accusations     (accused sites only)
train     MaskedInput, and a vector   Roster
consent   Consent                     SurvivorList
unmask    Unmasking                   UnmaskRequest
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar, Self, TypeVar

from flwr.app import ConfigRecordValues
from pydantic import ConfigDict, Field, ValidationError, model_validator

from fedclaw.errors import SecureAggregationError
from fedclaw.privacy.secure_aggregation.curve import POINT_BYTES
from fedclaw.privacy.secure_aggregation.dealing import COMMITMENT_BYTES, NUMBER_BYTES, PROOF_BYTES, SHARE_BYTES
from fedclaw.privacy.secure_aggregation.keys import (
    EPHEMERAL_BYTES,
    MAX_CERTIFICATE,
    MAX_SIGNATURE,
    PUBLIC_BYTES,
    SEALED_BYTES,
    SESSION_SIGNATURE_BYTES,
)
from fedclaw.privacy.secure_aggregation.parameters import MAX_SITES, Name, Session
from fedclaw.protocol.frozen import Frozen

ConfigValue = ConfigRecordValues

Public = Annotated[bytes, Field(min_length=PUBLIC_BYTES, max_length=PUBLIC_BYTES)]
Point = Annotated[bytes, Field(min_length=POINT_BYTES, max_length=POINT_BYTES)]
Commitment = Annotated[bytes, Field(min_length=COMMITMENT_BYTES, max_length=COMMITMENT_BYTES)]
Certificate = Annotated[bytes, Field(min_length=1, max_length=MAX_CERTIFICATE)]
Signature = Annotated[bytes, Field(min_length=1, max_length=MAX_SIGNATURE)]
SessionSignature = Annotated[bytes, Field(min_length=SESSION_SIGNATURE_BYTES, max_length=SESSION_SIGNATURE_BYTES)]
Proof = Annotated[bytes, Field(min_length=PROOF_BYTES, max_length=PROOF_BYTES)]
Numbers = Annotated[bytes, Field(min_length=NUMBER_BYTES, max_length=MAX_SITES * NUMBER_BYTES)]
Ephemeral = Annotated[bytes, Field(min_length=EPHEMERAL_BYTES, max_length=EPHEMERAL_BYTES)]
SealedBytes = Annotated[bytes, Field(min_length=SEALED_BYTES, max_length=SEALED_BYTES)]
ShareValue = Annotated[bytes, Field(min_length=SHARE_BYTES, max_length=SHARE_BYTES)]

T = TypeVar("T")
Column = Annotated[tuple[T, ...], Field(max_length=MAX_SITES)]
"""One value for each of several sites."""
Names = Column[Name]
Columns = tuple[tuple[str, ...], ...]
"""Groups of fields of equal length, the names first."""


class Wire(Frozen):
    """A message of one session. Columns are tuples of equal length; the names in a column of names are distinct."""

    model_config = ConfigDict(strict=True)
    columns: ClassVar[Columns] = ()

    session: Session

    def pack(self) -> dict[str, ConfigValue]:
        """The message as values of a ConfigRecord."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in ((name, getattr(self, name)) for name in type(self).model_fields)
        }

    @classmethod
    def unpack(cls, mapping: Mapping[str, object]) -> Self:
        """The inverse of `pack`. Raises SecureAggregationError for a malformed message, without quoting its content."""
        plain = {name: tuple(value) if isinstance(value, list) else value for name, value in mapping.items()}
        try:
            return cls.model_validate(plain)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(str(step) for step in first["loc"]) or "(whole)"
            raise SecureAggregationError(
                f"malformed {cls.__name__}: {where:.80}: {first['msg'].removeprefix('Value error, '):.200}"
            ) from None

    @model_validator(mode="after")
    def _regular(self) -> Self:
        for names, *others in self.columns:
            column = getattr(self, names)
            if len(set(column)) != len(column):
                raise ValueError(f"{names} names a site twice")
            if any(len(getattr(self, other)) != len(column) for other in others):
                raise ValueError(f"{names} and {', '.join(others)} are of different lengths")
        return self


class Advertisement(Wire):
    """A site's public keys of this session, signed with the key of its certificate (PEM)."""

    site: Name
    mask_public: Point
    share_public: Public
    sign_public: Public
    certificate: Certificate
    signature: Signature


class KeyList(Wire):
    """The advertisements of a site's neighbours, as columns."""

    sites: Names
    mask_publics: Column[Point]
    share_publics: Column[Public]
    sign_publics: Column[Public]
    certificates: Column[Certificate]
    signatures: Column[Signature]

    @classmethod
    def of(cls, session: str, advertisements: Iterable[Advertisement]) -> Self:
        """The list of `advertisements`."""
        items = tuple(advertisements)
        return cls(
            session=session,
            sites=tuple(item.site for item in items),
            mask_publics=tuple(item.mask_public for item in items),
            share_publics=tuple(item.share_public for item in items),
            sign_publics=tuple(item.sign_public for item in items),
            certificates=tuple(item.certificate for item in items),
            signatures=tuple(item.signature for item in items),
        )

    @property
    def advertisements(self) -> tuple[Advertisement, ...]:
        """The list's rows."""
        rows = zip(
            self.sites,
            self.mask_publics,
            self.share_publics,
            self.sign_publics,
            self.certificates,
            self.signatures,
            strict=True,
        )
        return tuple(
            Advertisement(
                session=self.session,
                site=site,
                mask_public=mask,
                share_public=share,
                sign_public=sign,
                certificate=certificate,
                signature=signature,
            )
            for site, mask, share, sign, certificate, signature in rows
        )

    columns: ClassVar[Columns] = (
        ("sites", "mask_publics", "share_publics", "sign_publics", "certificates", "signatures"),
    )


class ShareBundle(Wire):
    """A site's shares for its neighbours: one of its seed and one of its mask key, encrypted to each.

    With them comes what proves them (`dealing`): a commitment for each holder, `own` for the site itself, and the
    coefficients of a polynomial for each secret. The session key signs what each receiver gets to see
    (`keys.shares_message`).
    """

    site: Name
    own: Commitment
    seed_proof: Numbers
    key_proof: Numbers
    nonce_public: Point
    receivers: Names
    sealed: Column[SealedBytes]
    commitments: Column[Commitment]
    signatures: Column[SessionSignature]

    columns: ClassVar[Columns] = (("receivers", "sealed", "commitments", "signatures"),)


class ShareDelivery(Wire):
    """The shares that a site's neighbours sent it, with the proofs to check them (`dealing.ShareProof`), all signed."""

    receiver: Name
    senders: Names
    sealed: Column[SealedBytes]
    proofs: Column[Proof]
    signatures: Column[SessionSignature]

    columns: ClassVar[Columns] = (("senders", "sealed", "proofs", "signatures"),)


class Confirmation(Wire):
    """The senders of shares that a site could not use: not signed by the sender, or signed but not as committed to.

    Accusations are signed, because an accused site opens the accuser's shares, and only those, on the strength of one
    (`Opening`).
    """

    site: Name
    unsigned: Names
    accused: Names
    signatures: Column[SessionSignature]

    columns: ClassVar[Columns] = (("unsigned",), ("accused", "signatures"))


class Accusations(Wire):
    """The sites that accuse the receiver of having sent them something other than shares."""

    accusers: Names
    signatures: Column[SessionSignature]

    columns: ClassVar[Columns] = (("accusers", "signatures"),)


class Opening(Wire):
    """The ephemeral keys (raw, X25519) with which a site sealed its accusers' shares."""

    site: Name
    accusers: Names
    keys: Column[Ephemeral] = Field(repr=False)

    columns: ClassVar[Columns] = (("accusers", "keys"),)


class Roster(Wire):
    """The neighbours that the receiver masks its vector with: each holds right shares of the other."""

    receiver: Name
    peers: Names

    columns: ClassVar[Columns] = (("peers",),)


class MaskedInput(Wire):
    """Goes with a masked vector: the site, and the neighbours that it shares masks with."""

    site: Name
    peers: Names

    columns: ClassVar[Columns] = (("peers",),)


class SurvivorList(Wire):
    """The sites whose vectors are in the sum."""

    survivors: Names

    columns: ClassVar[Columns] = (("survivors",),)


class Consent(Wire):
    """A survivor's signature over the list of survivors, by its session key."""

    site: Name
    signature: SessionSignature


class UnmaskRequest(Wire):
    """The survivors, the sites whose masks have to be recovered, and the consents of the receiver's neighbours."""

    survivors: Names
    dropped: Names
    consenting: Names
    signatures: Column[SessionSignature]

    columns: ClassVar[Columns] = (("survivors",), ("dropped",), ("consenting", "signatures"))


class Unmasking(Wire):
    """The shares that a site reveals: of survivors' seeds, and of dropped sites' mask keys."""

    site: Name
    seed_owners: Names
    seed_shares: Column[ShareValue] = Field(repr=False)
    key_owners: Names
    key_shares: Column[ShareValue] = Field(repr=False)

    columns: ClassVar[Columns] = (("seed_owners", "seed_shares"), ("key_owners", "key_shares"))
