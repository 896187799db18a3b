"""The site's half of a secure sum. Each stage runs once, in this order:

    advertise -> share -> confirm (-> open_for) -> mask -> consent -> unmask

A refused call raises SecureAggregationError, changes nothing and reveals nothing. A site never reveals both secrets of
a neighbour. It treats what the server says as a claim: it accepts keys that their owner signed, shares that match what
their dealer signed, and a list of survivors that enough neighbours signed too.

`confirm` opens and checks the shares, before the site spends any work or privacy budget on a vector, and accuses
whoever sent wrong ones. An accused site reveals the ephemeral key with which it sealed the accuser's shares. The key
opens those shares and no others, and shows which of the two lied. An accusation carries the accuser's signature over
what the accused signed, so a server alone obtains no shares in this way; an accuser that lies reveals only its own.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import SecureAggregationError
from fedclaw.identity import pki
from fedclaw.privacy.secure_aggregation.dealing import SHARE_BYTES, SecretShares, ShareProof, deal, packed
from fedclaw.privacy.secure_aggregation.keys import (
    ACCUSATION_PURPOSE,
    KEYS_PURPOSE,
    SHARES_PURPOSE,
    SURVIVORS_PURPOSE,
    SessionKeys,
    Signer,
    Verifier,
    accusation_message,
    apply_masks,
    check_publics,
    check_signature,
    check_vector,
    keys_message,
    own_key,
    pair_key,
    seal,
    shares_message,
    survivors_message,
)
from fedclaw.privacy.secure_aggregation.messages import (
    Accusations,
    Advertisement,
    Confirmation,
    Consent,
    KeyList,
    MaskedInput,
    Opening,
    Roster,
    ShareBundle,
    ShareDelivery,
    SurvivorList,
    Unmasking,
    UnmaskRequest,
    Wire,
)
from fedclaw.privacy.secure_aggregation.parameters import Parameters


class Stage(IntEnum):
    """The stage that is next."""

    ADVERTISE = 0
    SHARE = 1
    CONFIRM = 2
    MASK = 3
    CONSENT = 4
    UNMASK = 5
    CLOSED = 6


@dataclass(frozen=True)
class _Held:
    """The shares of one dealer that a site holds."""

    seed: bytes = field(repr=False)
    key: bytes | None = field(repr=False)
    """None for the site's own key, of which it never reveals a share."""


@dataclass(frozen=True)
class _Sent:
    """What a site signed for one neighbour, and the ephemeral key that sealed it."""

    signed: bytes = field(repr=False)
    ephemeral: bytes = field(repr=False)


class _NotShares(Exception):
    """A dealer signed something that is not the share it committed to."""


class SiteSession:
    """One site's part in one session."""

    def __init__(
        self,
        parameters: Parameters,
        me: str,
        signer: Signer,
        verifier: Verifier,
        claim: Callable[[], None] | None = None,
    ) -> None:
        """`claim` is called once, before `unmask` reveals shares; if it raises, they stay (see `Sessions`)."""
        if me not in parameters.sites:
            raise SecureAggregationError(f"{me} takes no part in this secure sum")
        if signer.site_name != me:
            raise SecureAggregationError(f"{me} cannot sign as {signer.site_name}")
        self.parameters = parameters
        self.me = me
        self.stage = Stage.ADVERTISE
        self._signer = signer
        self._verifier = verifier
        self._claim = claim
        self._keys = SessionKeys()
        self._peers: dict[str, Advertisement] = {}
        self._held: dict[str, _Held] = {}
        self._sent: dict[str, _Sent] = {}
        self._survivors: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return f"SiteSession({self.me!r}, session={self.parameters.session!r}, stage={self.stage.name})"

    def advertise(self) -> Advertisement:
        """The site's public keys, signed."""
        self._expect(Stage.ADVERTISE)
        mask, share = self._keys.mask_public, self._keys.share_public
        sign = self._keys.sign_public
        message = keys_message(self.parameters, self.me, mask, share, sign)
        advertisement = Advertisement(
            session=self.parameters.session,
            site=self.me,
            mask_public=mask,
            share_public=share,
            sign_public=sign,
            certificate=pki.pem_of(self._signer.certificate),
            signature=self._signer.sign(KEYS_PURPOSE, message),
        )
        self.stage = Stage.SHARE
        return advertisement

    def share(self, neighbours: KeyList) -> ShareBundle:
        """Verify the keys of the neighbours that advertised, and share this site's seed and mask key among them.

        Refuses keys that their site did not sign for this session, sites that are not neighbours of this one, a key
        that appears twice, and fewer sites than the threshold (this one included).
        """
        self._expect(Stage.SHARE)
        self._belongs(neighbours)
        peers = {item.site: item for item in neighbours.advertisements}
        self._are_neighbours(peers, "the list of keys")
        self._enough(peers, "advertised keys")
        publics = [key for item in peers.values() for key in (item.mask_public, item.share_public, item.sign_public)]
        mine = self._keys.mask_public, self._keys.share_public, self._keys.sign_public
        if len({*publics, *mine}) != len(publics) + len(mine):
            raise SecureAggregationError("the list of keys has one public key twice")
        for item in peers.values():
            self._check_keys(item)
        bundle, own = self._shared(peers)
        self._peers = peers
        self._held = {self.me: own}
        self.stage = Stage.CONFIRM
        return bundle

    def confirm(self, delivery: ShareDelivery) -> Confirmation:
        """Open and check the neighbours' shares. Right ones are kept, and the senders of the others are named.

        Refuses a delivery for another site, and shares from strangers or from sites whose keys this site never saw.
        """
        self._expect(Stage.CONFIRM)
        self._belongs(delivery)
        if delivery.receiver != self.me:
            raise SecureAggregationError(f"shares for {delivery.receiver} were sent to {self.me}")
        self._are_neighbours(delivery.senders, "the delivery of shares")
        if unknown := set(delivery.senders).difference(self._peers):
            raise SecureAggregationError(f"{_names(unknown)} sent shares, but no keys of theirs came to {self.me}")
        held, unsigned, accused = {}, [], {}
        for sender, *sent in zip(delivery.senders, delivery.sealed, delivery.proofs, delivery.signatures, strict=True):
            try:
                held[sender] = self._opened(sender, *sent)
            except SecureAggregationError:
                unsigned.append(sender)
            except _NotShares:
                shares = shares_message(self.parameters, sender, self.me, sent[0], sent[1])
                accused[sender] = accusation_message(self.parameters, self.me, sender, shares)
        self._held |= held
        self.stage = Stage.MASK
        return Confirmation(
            session=self.parameters.session,
            site=self.me,
            unsigned=tuple(unsigned),
            accused=tuple(accused),
            signatures=tuple(self._keys.sign(ACCUSATION_PURPOSE, message) for message in accused.values()),
        )

    def open_for(self, accusations: Accusations) -> Opening:
        """The ephemeral keys that sealed the accusers' shares. Only before this site masks its vector.

        Refuses accusers that this site sent nothing to, and accusations that they did not sign.
        """
        if self.stage is not Stage.CONFIRM:
            self._expect(Stage.MASK)
        self._belongs(accusations)
        for accuser, signature in zip(accusations.accusers, accusations.signatures, strict=True):
            if accuser not in self._sent:
                raise SecureAggregationError(f"{accuser} cannot accuse {self.me}, which sent it nothing")
            message = accusation_message(self.parameters, accuser, self.me, self._sent[accuser].signed)
            public = self._peers[accuser].sign_public
            check_signature(accuser, public, ACCUSATION_PURPOSE, message, signature)
        return Opening(
            session=self.parameters.session,
            site=self.me,
            accusers=accusations.accusers,
            keys=tuple(self._sent[accuser].ephemeral for accuser in accusations.accusers),
        )

    def check_roster(self, roster: Roster) -> None:
        """Raise what `mask` would raise for `roster`, so that no work is spent on a vector.

        Refuses peers whose shares this site does not hold, and fewer sites than the threshold (this one included).
        """
        self._expect(Stage.MASK)
        self._belongs(roster)
        if roster.receiver != self.me:
            raise SecureAggregationError(f"the roster of {roster.receiver} was sent to {self.me}")
        self._are_neighbours(roster.peers, "the roster")
        if missing := set(roster.peers).difference(self._held):
            raise SecureAggregationError(f"{self.me} holds no shares of {_names(missing)}")
        self._enough(roster.peers, "have shared their secrets")

    def mask(self, vector: NDArray[np.uint32], roster: Roster) -> MaskedInput:
        """Mask `vector`, (length,) uint32, in place, with the peers in `roster`.

        Refuses what `check_roster` refuses, and a vector of another shape or type.
        """
        self.check_roster(roster)
        check_vector(vector, self.parameters.length)
        apply_masks(vector, *self._mask_keys(roster.peers))
        self._held = {site: held for site, held in self._held.items() if site == self.me or site in roster.peers}
        self._sent = {}
        self.stage = Stage.CONSENT
        return MaskedInput(session=self.parameters.session, site=self.me, peers=roster.peers)

    def consent(self, listed: SurvivorList) -> Consent:
        """The site's signature over the survivors. It signs a single list in a session.

        Refuses a list without this site, with strangers, with neighbours that share no mask with this site, with fewer
        sites than the minimum, or with fewer neighbours than the threshold (this site included).
        """
        self._expect(Stage.CONSENT)
        self._belongs(listed)
        survivors = frozenset(listed.survivors)
        if strangers := survivors.difference(self.parameters.sites):
            raise SecureAggregationError(f"{_names(strangers)} survived a sum that they have no part in")
        if self.me not in survivors:
            raise SecureAggregationError(f"{self.me} is not among the survivors and does not help to unmask them")
        if len(survivors) < self.parameters.minimum:
            raise SecureAggregationError(
                f"{len(survivors)} survivors are fewer than {self.parameters.minimum}; nothing is unmasked"
            )
        near = survivors.intersection(self.parameters.neighbours_of(self.me))
        if unmasked := near.difference(self._held):
            raise SecureAggregationError(f"{_names(unmasked)} survived without a mask with {self.me}")
        self._enough(near, "survived")
        message = survivors_message(self.parameters, self.me, listed.survivors)
        consent = Consent(
            session=self.parameters.session, site=self.me, signature=self._keys.sign(SURVIVORS_PURPOSE, message)
        )
        self._survivors = survivors
        self.stage = Stage.UNMASK
        return consent

    def unmask(self, request: UnmaskRequest) -> Unmasking:
        """Reveal shares of the survivors' seeds and of the dropped neighbours' mask keys, then forget everything.

        Refuses survivors other than those that this site signed, a site that is both dropped and a survivor, and too
        few or false consents. If `claim` raises, its exception passes through and nothing is revealed.
        """
        self._expect(Stage.UNMASK)
        self._belongs(request)
        if frozenset(request.survivors) != self._survivors:
            raise SecureAggregationError("the survivors are not those that this site has signed")
        if both := self._survivors.intersection(request.dropped):
            raise SecureAggregationError(f"both secrets of {_names(both)} are asked for; a site gives one of them")
        self._check_consents(request)
        answer = self._answer(request)
        if self._claim is not None:
            self._claim()
        self.close()
        return answer

    def close(self) -> None:
        """Forget every secret and end the session."""
        self.stage = Stage.CLOSED
        self._keys.wipe()
        self._held = {}
        self._sent = {}
        self._peers = {}

    def _shared(self, peers: Mapping[str, Advertisement]) -> tuple[ShareBundle, _Held]:
        """The bundle for `peers`, and the share of its own seed that the site keeps."""
        shares, dealing = deal(self.parameters, self.me, [self.me, *peers], self._keys.dealt)
        sealed, signatures = [], []
        for peer, item in peers.items():
            content = seal(self.parameters, self.me, peer, item.share_public, shares[peer].pack())
            proof = dealing.proof_for(self.parameters, peer).pack()
            message = shares_message(self.parameters, self.me, peer, content.content, proof)
            self._sent[peer] = _Sent(message, content.ephemeral)
            sealed.append(content.content)
            signatures.append(self._keys.sign(SHARES_PURPOSE, message))
        bundle = ShareBundle(
            session=self.parameters.session,
            site=self.me,
            own=dealing.commitments[self.me],
            seed_proof=packed(dealing.seed_proof),
            key_proof=packed(dealing.key_proof),
            nonce_public=dealing.nonce_public,
            receivers=tuple(peers),
            sealed=tuple(sealed),
            commitments=tuple(dealing.commitments[peer] for peer in peers),
            signatures=tuple(signatures),
        )
        return bundle, _Held(shares[self.me].seed.to_bytes(SHARE_BYTES, "big"), None)

    def _opened(self, sender: str, sealed: bytes, proof: bytes, signature: bytes) -> _Held:
        """The shares that `sender` sent. Raises SecureAggregationError if it did not sign them, _NotShares if it signed
        something else."""
        message = shares_message(self.parameters, sender, self.me, sealed, proof)
        check_signature(sender, self._peers[sender].sign_public, SHARES_PURPOSE, message, signature)
        try:
            plain = SecretShares.unpack(self._keys.open(self.parameters, self.me, sender, sealed))
        except SecureAggregationError:
            raise _NotShares from None
        if not ShareProof.unpack(proof).holds(self.parameters, sender, self.me, plain):
            raise _NotShares
        return _Held(plain.seed.to_bytes(SHARE_BYTES, "big"), plain.key.to_bytes(SHARE_BYTES, "big"))

    def _mask_keys(self, peers: Iterable[str]) -> tuple[list[bytes], list[bytes]]:
        """Keys of the masks to add, and of those to subtract: the site with the lower index of a pair adds."""
        added, subtracted = [own_key(self.parameters, self.me, self._keys.seed)], list[bytes]()
        for peer in peers:
            public = self._peers[peer].mask_public
            key = pair_key(self.parameters, self._keys.mask_secret, self.me, peer, public)
            (added if adds(self.parameters, self.me, peer) else subtracted).append(key)
        return added, subtracted

    def _answer(self, request: UnmaskRequest) -> Unmasking:
        seeds = {site: held.seed for site, held in self._held.items() if site in self._survivors}
        dropped = (site for site in request.dropped if site in self._held)
        secrets = {site: key for site in dropped if (key := self._held[site].key) is not None}
        return Unmasking(
            session=self.parameters.session,
            site=self.me,
            seed_owners=tuple(seeds),
            seed_shares=tuple(seeds.values()),
            key_owners=tuple(secrets),
            key_shares=tuple(secrets.values()),
        )

    def _check_keys(self, item: Advertisement) -> None:
        check_publics(item.site, item.mask_public, item.share_public)
        message = keys_message(self.parameters, item.site, item.mask_public, item.share_public, item.sign_public)
        self._verifier.check(item.site, item.certificate, KEYS_PURPOSE, message, item.signature)

    def _check_consents(self, request: UnmaskRequest) -> None:
        """Raise unless as many sites as the threshold, this one included, signed the same survivors."""
        near = self._survivors.intersection(self._held) - {self.me}
        consenting = dict(zip(request.consenting, request.signatures, strict=True))
        if strangers := set(consenting) - near:
            raise SecureAggregationError(f"{_names(strangers)} cannot consent: no surviving neighbours of {self.me}")
        self._enough(consenting, "consented to these survivors")
        for site, signature in consenting.items():
            message = survivors_message(self.parameters, site, request.survivors)
            check_signature(site, self._peers[site].sign_public, SURVIVORS_PURPOSE, message, signature)

    def _expect(self, stage: Stage) -> None:
        if self.stage is Stage.CLOSED:
            raise SecureAggregationError(f"the session {self.parameters.session} is closed at {self.me}")
        if self.stage is not stage:
            raise SecureAggregationError(
                f"{self.me} is asked to {stage.name.lower()}, but the next stage is to {self.stage.name.lower()}"
            )

    def _belongs(self, message: Wire) -> None:
        if message.session != self.parameters.session:
            raise SecureAggregationError(f"a {type(message).__name__} of another session came to {self.me}")

    def _are_neighbours(self, sites: Iterable[str], what: str) -> None:
        if strangers := set(sites).difference(self.parameters.neighbours_of(self.me)):
            raise SecureAggregationError(f"{what} names {_names(strangers)}, no neighbours of {self.me}")

    def _enough(self, others: Iterable[str], what: str) -> None:
        count = len(set(others)) + 1
        if count < self.parameters.threshold:
            raise SecureAggregationError(
                f"only {count} sites around {self.me} {what}, the threshold is {self.parameters.threshold}"
            )


def adds(parameters: Parameters, site: str, peer: str) -> bool:
    """Whether `site` adds the mask that it shares with `peer`, which then subtracts it."""
    return parameters.index(site) < parameters.index(peer)


def _names(sites: Iterable[str]) -> str:
    return ", ".join(sorted(sites))
