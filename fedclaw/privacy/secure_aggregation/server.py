"""The server's half of a secure sum: it routes messages, adds up masked vectors as they arrive, and removes the masks.

    add_advertisement* -> key_lists      -> add_shares*    -> deliveries
    -> add_confirmation* -> accusations  -> add_opening*   -> rosters
    -> add_masked*     -> survivor_list  -> add_consent*   -> unmask_requests
    -> add_unmasking*  -> result

A site that has not answered when the next stage begins has dropped out. A wrong answer is refused
(SecureAggregationError, naming the site) and changes nothing: the site counts as one that did not answer. Beginning a
stage raises SecureAggregationError when too few sites are left; the session is then over.

Sites that sent wrong shares are found before anybody spends work on a vector, and by proof (`excluded`): what the site
signed for a neighbour, opened with the key that sealed it. Later mistakes, in a signature or a share, show by
themselves.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import SecureAggregationError
from fedclaw.privacy.secure_aggregation.dealing import Dealing, SecretShares, checked
from fedclaw.privacy.secure_aggregation.keys import (
    ACCUSATION_PURPOSE,
    KEYS_PURPOSE,
    SHARES_PURPOSE,
    SURVIVORS_PURPOSE,
    Verifier,
    accusation_message,
    apply_masks,
    check_publics,
    check_signature,
    check_vector,
    keys_message,
    reopened,
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
from fedclaw.privacy.secure_aggregation.recovery import Recovery


class _Stage(IntEnum):
    KEYS = 0
    SHARES = 1
    CONFIRM = 2
    DISPUTE = 3
    MASKED = 4
    CONSENT = 5
    UNMASK = 6
    DONE = 7


@dataclass(frozen=True)
class _Dealt:
    """The sealed shares of one site for one neighbour, and its signature."""

    sealed: bytes
    signature: bytes


class ServerSession:
    """The server's part in one session. It holds a single vector, whatever the number of sites."""

    def __init__(self, parameters: Parameters, verifier: Verifier | None = None) -> None:
        """With a `verifier`, false keys are refused here, before they stop the sites that would have to verify them."""
        self.parameters = parameters
        self._verifier = verifier
        self._stage = _Stage.KEYS
        self._failed = False
        self._advertised: dict[str, Advertisement] = {}
        self._bundles: dict[str, dict[str, _Dealt]] = {}
        self._dealings: dict[str, Dealing] = {}
        self._confirmed: dict[str, Confirmation] = {}
        self._accusers: dict[str, dict[str, bytes]] = {}
        self._openings: dict[str, Opening] = {}
        self._rostered: set[str] = set()
        self.excluded: dict[str, str] = {}
        """Sites that lied about shares, each with the proof in words. Complete after `rosters`."""
        self._masked: set[str] = set()
        self._sum: NDArray[np.uint32] | None = None
        self._consents: dict[str, bytes] = {}
        self._recovery: Recovery | None = None

    def __repr__(self) -> str:
        return f"ServerSession(session={self.parameters.session!r}, stage={self._stage.name})"

    @property
    def survivors(self) -> tuple[str, ...]:
        """The sites whose vectors are in the sum so far, in the order of the parameters."""
        return self._ordered(self._masked)

    @property
    def suspects(self) -> tuple[str, ...]:
        """Sites that revealed a share other than the one they were dealt."""
        return () if self._recovery is None else self._ordered(self._recovery.suspects)

    def add_advertisement(self, item: Advertisement) -> None:
        """Take a site's keys."""
        self._accept(item, item.site, _Stage.KEYS, self.parameters.sites, self._advertised)
        mine = {item.mask_public, item.share_public, item.sign_public}
        if len(mine) < 3:
            raise SecureAggregationError(f"{item.site} advertised one key for two uses; the sites would refuse it")
        for other in self._advertised.values():
            if mine & {other.mask_public, other.share_public, other.sign_public}:
                raise SecureAggregationError(f"{item.site} advertised a key of {other.site}; the sites would refuse it")
        message = keys_message(self.parameters, item.site, item.mask_public, item.share_public, item.sign_public)
        if self._verifier is not None:
            self._verifier.check(item.site, item.certificate, KEYS_PURPOSE, message, item.signature)
        check_publics(item.site, item.mask_public, item.share_public)
        self._advertised[item.site] = item

    def key_lists(self) -> dict[str, KeyList]:
        """What to send to each site: the keys of its neighbours that advertised."""
        alive = self._close(_Stage.KEYS, self._advertised, "advertised keys")
        self._advertised = {site: self._advertised[site] for site in alive}
        return {
            site: KeyList.of(self.parameters.session, (self._advertised[peer] for peer in self._near(site, alive)))
            for site in alive
        }

    def add_shares(self, item: ShareBundle) -> None:
        """Take a site's encrypted shares for its neighbours, with the proof that they are shares of its secrets."""
        self._accept(item, item.site, _Stage.SHARES, self._advertised, self._bundles)
        if set(item.receivers) != set(self._near(item.site, self._advertised)):
            raise SecureAggregationError(f"{item.site} has shares for others than its neighbours")
        commitments = {item.site: item.own, **dict(zip(item.receivers, item.commitments, strict=True))}
        mask_public = self._advertised[item.site].mask_public
        proofs = item.seed_proof, item.key_proof, item.nonce_public
        self._dealings[item.site] = checked(self.parameters, item.site, mask_public, commitments, *proofs)
        dealt = zip(item.receivers, item.sealed, item.signatures, strict=True)
        self._bundles[item.site] = {receiver: _Dealt(*rest) for receiver, *rest in dealt}

    def deliveries(self) -> dict[str, ShareDelivery]:
        """What to send to each site: the shares for it, to open and check."""
        alive = self._close(_Stage.SHARES, self._bundles, "sent shares")
        self._bundles = {site: self._bundles[site] for site in alive}
        return {
            site: ShareDelivery(
                session=self.parameters.session,
                receiver=site,
                senders=(senders := self._near(site, alive)),
                sealed=tuple(self._bundles[sender][site].sealed for sender in senders),
                proofs=tuple(self._dealings[sender].proof_for(self.parameters, site).pack() for sender in senders),
                signatures=tuple(self._bundles[sender][site].signature for sender in senders),
            )
            for site in alive
        }

    def add_confirmation(self, item: Confirmation) -> None:
        """Take a site's word on the shares that it received: which are not signed, and which are wrong."""
        self._accept(item, item.site, _Stage.CONFIRM, self._bundles, self._confirmed)
        near = self._near(item.site, self._bundles)
        if strangers := {*item.unsigned, *item.accused}.difference(near):
            raise SecureAggregationError(f"{item.site} complains of {sorted(strangers)[0]}, which sent it nothing")
        if both := set(item.unsigned).intersection(item.accused):
            raise SecureAggregationError(f"{item.site} says two things of {sorted(both)[0]}")
        for accused, signature in zip(item.accused, item.signatures, strict=True):
            message = accusation_message(self.parameters, item.site, accused, self._signed(accused, item.site))
            public = self._advertised[item.site].sign_public
            check_signature(item.site, public, ACCUSATION_PURPOSE, message, signature)
        self._confirmed[item.site] = item

    def accusations(self) -> dict[str, Accusations]:
        """What to send to each accused site: its accusers. Usually empty, and then no site has to be asked.

        This also settles, for each complaint of a missing signature, whether the dealer or the holder lied.
        """
        self._advance(_Stage.CONFIRM)
        for site, item in self._confirmed.items():
            for dealer in item.unsigned:
                self._settle_signature(site, dealer)
        for site, item in self._confirmed.items():
            for accused, signature in zip(item.accused, item.signatures, strict=True):
                if not {site, accused} & self.excluded.keys() and accused in self._confirmed:
                    self._accusers.setdefault(accused, {})[site] = signature
        return {
            accused: Accusations(
                session=self.parameters.session, accusers=tuple(accusers), signatures=tuple(accusers.values())
            )
            for accused, accusers in self._accusers.items()
        }

    def add_opening(self, item: Opening) -> None:
        """Take the keys that open what an accused site sent its accusers."""
        self._accept(item, item.site, _Stage.DISPUTE, self._accusers, self._openings)
        if set(item.accusers) != set(self._accusers[item.site]):
            raise SecureAggregationError(f"{item.site} has not shown what all of its accusers had")
        self._openings[item.site] = item

    def rosters(self) -> dict[str, Roster]:
        """What to send to each site with the request for its vector: the neighbours to mask it with."""
        for accused, accusers in self._accusers.items():
            self._settle(accused, accusers)
        honest = {site for site in self._confirmed if site not in self.excluded}
        alive = self._close(_Stage.DISPUTE, honest, "found each other's shares right")
        self._rostered = set(alive)
        return {
            site: Roster(session=self.parameters.session, receiver=site, peers=self._near(site, alive))
            for site in alive
        }

    def add_masked(self, item: MaskedInput, vector: NDArray[np.uint32]) -> None:
        """Add a masked vector, (length,) uint32, to the sum. The caller may discard it afterwards."""
        self._accept(item, item.site, _Stage.MASKED, self._rostered, self._masked)
        if set(item.peers) != set(self._near(item.site, self._rostered)):
            raise SecureAggregationError(f"{item.site} has not masked its vector with the neighbours it was told")
        check_vector(vector, self.parameters.length)
        if self._sum is None:
            self._sum = np.zeros(self.parameters.length, dtype=np.uint32)
        self._sum += vector
        self._masked.add(item.site)

    def survivor_list(self) -> SurvivorList:
        """What to send to every survivor."""
        survivors = self._survive(_Stage.MASKED, self._masked, "sent masked vectors")
        return SurvivorList(session=self.parameters.session, survivors=survivors)

    def add_consent(self, item: Consent) -> None:
        """Take a survivor's signature over the survivors."""
        self._accept(item, item.site, _Stage.CONSENT, self._masked, self._consents)
        message = survivors_message(self.parameters, item.site, self.survivors)
        public = self._advertised[item.site].sign_public
        check_signature(item.site, public, SURVIVORS_PURPOSE, message, item.signature)
        self._consents[item.site] = item.signature

    def unmask_requests(self) -> dict[str, UnmaskRequest]:
        """What to send to each survivor that consented. Raises unless their answers can remove every mask."""
        willing = self._survive(_Stage.CONSENT, self._consents, "consented to the survivors")
        self._recovery = Recovery(self.parameters, self._advertised, self._dealings, self.survivors, self._dropped)
        return {site: self._request(site) for site in willing}

    def add_unmasking(self, item: Unmasking) -> None:
        """Take the shares that a survivor reveals."""
        recovery = self._recovery
        self._accept(item, item.site, _Stage.UNMASK, self._consents, recovery.answered if recovery else ())
        assert recovery is not None
        recovery.add(item)

    def result(self) -> NDArray[np.uint32]:
        """The exact sum of the survivors' vectors modulo 2^32, (length,) uint32."""
        recovery, total = self._recovery, self._sum
        if recovery is None or total is None:
            raise SecureAggregationError("there is no sum yet: nothing has been unmasked")
        self._can_recover(recovery.answered, "gave their shares")
        self._advance(_Stage.UNMASK)
        try:
            added, subtracted = recovery.mask_keys()
        except SecureAggregationError:
            self._failed = True
            raise
        # What the sites added comes off, and the other way round.
        apply_masks(total, subtracted, added)
        self._sum = None
        return total

    @property
    def _dropped(self) -> tuple[str, ...]:
        """Sites whose vector is not in the sum, while the masks that they share with survivors are."""
        return tuple(
            site
            for site in self._ordered(self._rostered)
            if site not in self._masked and self._near(site, self._masked)
        )

    def _request(self, site: str) -> UnmaskRequest:
        consenting = self._near(site, self._consents)
        return UnmaskRequest(
            session=self.parameters.session,
            survivors=self.survivors,
            dropped=self._dropped,
            consenting=consenting,
            signatures=tuple(self._consents[peer] for peer in consenting),
        )

    def _signed(self, dealer: str, holder: str) -> bytes:
        """What `dealer` signed, or should have signed, for the shares that it sent to `holder`."""
        proof = self._dealings[dealer].proof_for(self.parameters, holder).pack()
        return shares_message(self.parameters, dealer, holder, self._bundles[dealer][holder].sealed, proof)

    def _settle_signature(self, holder: str, dealer: str) -> None:
        """Exclude the dealer if it did not sign what it sent, else the holder that says so."""
        public, signature = self._advertised[dealer].sign_public, self._bundles[dealer][holder].signature
        try:
            check_signature(dealer, public, SHARES_PURPOSE, self._signed(dealer, holder), signature)
        except SecureAggregationError:
            self.excluded.setdefault(dealer, f"{dealer} has not signed the shares that it sent to {holder}")
        else:
            self.excluded.setdefault(holder, f"{holder} says that {dealer} has not signed its shares, and it has")

    def _settle(self, accused: str, accusers: Mapping[str, bytes]) -> None:
        """Exclude the accused or its accusers: whoever lied, as the opened shares show."""
        opening = self._openings.get(accused)
        if opening is None:
            self.excluded.setdefault(accused, f"{accused} has not shown the shares that {min(accusers)} says are none")
            return
        for accuser, key in zip(opening.accusers, opening.keys, strict=True):
            if self._are_shares(accused, accuser, key):
                self.excluded.setdefault(accuser, f"{accuser} says that {accused} sent it no shares, and it has")
            else:
                self.excluded.setdefault(accused, f"{accused} sent {accuser} what are no shares of its secrets")

    def _are_shares(self, dealer: str, holder: str, key: bytes) -> bool:
        """Whether what `dealer` sealed for `holder` with the ephemeral `key` is what it committed to."""
        public, sealed = self._advertised[holder].share_public, self._bundles[dealer][holder].sealed
        try:
            shares = SecretShares.unpack(reopened(self.parameters, dealer, holder, public, sealed, key))
        except SecureAggregationError:
            return False
        return self._dealings[dealer].proof_for(self.parameters, holder).holds(self.parameters, dealer, holder, shares)

    def _near(self, site: str, among: Collection[str]) -> tuple[str, ...]:
        return tuple(peer for peer in self.parameters.neighbours_of(site) if peer in among)

    def _ordered(self, sites: Collection[str]) -> tuple[str, ...]:
        return tuple(site for site in self.parameters.sites if site in sites)

    def _accept(
        self, item: Wire, site: str, stage: _Stage, expected: Collection[str], answered: Collection[str]
    ) -> None:
        what = type(item).__name__
        if self._failed or stage is not self._stage:
            raise SecureAggregationError(f"a {what} of {site} comes too late or too early")
        if item.session != self.parameters.session:
            raise SecureAggregationError(f"{site} sent a {what} of another session")
        if site not in expected:
            raise SecureAggregationError(f"{site} was not asked for a {what}")
        if site in answered:
            raise SecureAggregationError(f"{site} sent a second {what}")

    def _advance(self, stage: _Stage) -> None:
        if self._failed:
            raise SecureAggregationError("the secure sum has failed; it takes a new session to try again")
        if self._stage is not stage:
            raise SecureAggregationError(
                f"the stage {stage.name.lower()} is not the present one, {self._stage.name.lower()}"
            )
        self._stage = _Stage(stage + 1)

    def _close(self, stage: _Stage, answered: Collection[str], what: str) -> tuple[str, ...]:
        """The sites that go on: those with enough neighbours that go on too. Raises if fewer than the minimum do."""
        self._advance(stage)
        alive = set(answered)
        while lonely := {site for site in alive if len(self._near(site, alive)) + 1 < self.parameters.threshold}:
            alive -= lonely
        self._require(len(alive) >= self.parameters.minimum, len(answered), what)
        return self._ordered(alive)

    def _survive(self, stage: _Stage, answered: Collection[str], what: str) -> tuple[str, ...]:
        """All sites that answered, if they can remove every mask. Else raises, before anything is asked of them."""
        self._advance(stage)
        self._require(len(self._masked) >= self.parameters.minimum, len(self._masked), what)
        self._can_recover(answered, what)
        return self._ordered(answered)

    def _can_recover(self, holders: Collection[str], what: str) -> None:
        """Raise unless `holders` hold enough shares of every secret that is needed."""
        for site in (*self.survivors, *self._dropped):
            count = len(self._near(site, holders)) + (site in holders)
            self._require(
                count >= self.parameters.threshold, len(holders), what, f"; {count} of them hold shares of {site}"
            )

    def _require(self, holds: bool, count: int, what: str, more: str = "") -> None:
        if holds:
            return
        self._failed = True
        raise SecureAggregationError(
            f"secure sum of round {self.parameters.round}: {count} of {len(self.parameters.sites)} sites {what}{more}: "
            f"too few (threshold {self.parameters.threshold}, at least {self.parameters.minimum} sites); nothing is "
            "unmasked"
        )
