"""From the shares that the sites reveal, the server recovers the keys of the masks that are still in the sum."""

from collections.abc import Collection, Mapping

from fedclaw.errors import SecureAggregationError
from fedclaw.privacy.secure_aggregation import keys
from fedclaw.privacy.secure_aggregation.dealing import Dealing, Secret, recover
from fedclaw.privacy.secure_aggregation.messages import Advertisement, Unmasking
from fedclaw.privacy.secure_aggregation.parameters import Parameters
from fedclaw.privacy.secure_aggregation.site import adds


class Recovery:
    """Shares of the survivors' seeds and of the dropped sites' mask keys.

    Each share is checked against its dealer's commitment for the holder. The holder confirmed the share when it came,
    so one that does not fit now is the holder's lie. Enough that fit give the secret.
    """

    def __init__(
        self,
        parameters: Parameters,
        advertised: Mapping[str, Advertisement],
        dealings: Mapping[str, Dealing],
        survivors: Collection[str],
        dropped: Collection[str],
    ) -> None:
        self.answered: set[str] = set()
        self.suspects: set[str] = set()
        """Holders that revealed a share other than the one they were dealt."""
        self._parameters = parameters
        self._advertised = advertised
        self._dealings = dealings
        self._seeds: dict[str, dict[int, int]] = {site: {} for site in survivors}
        self._keys: dict[str, dict[int, int]] = {site: {} for site in dropped}
        """By owner: the shares that were found right, by their holder's x."""

    def add(self, item: Unmasking) -> None:
        """Take what one site revealed. Raises SecureAggregationError, and takes nothing, for anything not asked for."""
        point = self._parameters.point(item.site)
        around = {item.site, *self._parameters.neighbours_of(item.site)}
        given = []
        columns: tuple[tuple[Secret, tuple[str, ...], tuple[bytes, ...], dict[str, dict[int, int]]], ...] = (
            ("seed", item.seed_owners, item.seed_shares, self._seeds),
            ("key", item.key_owners, item.key_shares, self._keys),
        )
        for secret, owners, values, wanted in columns:
            if set(owners) != around.intersection(wanted):
                raise SecureAggregationError(f"{item.site} did not give the shares that it was asked for")
            for owner, value in zip(owners, values, strict=True):
                share = int.from_bytes(value, "big")
                self._check(item.site, owner, secret, share)
                given.append((wanted[owner], share))
        for shares, share in given:
            shares[point] = share
        self.answered.add(item.site)

    def mask_keys(self) -> tuple[list[bytes], list[bytes]]:
        """Keys of the masks that survivors added to the sum, and of those that they subtracted.

        Raises SecureAggregationError if a recovered key is not the one that its site advertised.
        """
        threshold = self._parameters.threshold
        added = [keys.own_key(self._parameters, site, recover(self._seeds[site], threshold)) for site in self._seeds]
        subtracted: list[bytes] = []
        for site in self._keys:
            secret = recover(self._keys[site], threshold)
            # The first byte of a compressed point is its sign, which no mask depends on.
            if keys.mask_public_of(secret)[1:] != self._advertised[site].mask_public[1:]:
                raise SecureAggregationError(f"the masks of {site} cannot be taken off: this is not its key")
            for peer in self._parameters.neighbours_of(site):
                if peer in self._seeds:
                    public = self._advertised[peer].mask_public
                    key = keys.pair_key(self._parameters, secret, site, peer, public)
                    (added if adds(self._parameters, peer, site) else subtracted).append(key)
        return added, subtracted

    def _check(self, holder: str, owner: str, secret: Secret, share: int) -> None:
        """Raise SecureAggregationError for a share other than the one that `holder` was dealt."""
        proof = self._dealings[owner].proof_for(self._parameters, holder)
        if not proof.fits(self._parameters, owner, holder, secret, share):
            self.suspects.add(holder)
            raise SecureAggregationError(
                f"{holder} gave a share of {owner}'s {secret} that is not the one which {owner} dealt to it"
            )
