"""Shares that are none: found before anybody masks anything, their sender named by proof, and nobody else by a lie."""

import os
import re
import secrets
from collections.abc import Callable

import numpy as np
import pytest

from fedclaw.errors import SecureAggregationError
from fedclaw.privacy.secure_aggregation import Accusations, Confirmation, KeyList, ShareBundle
from fedclaw.privacy.secure_aggregation import keys as session_keys
from fedclaw.privacy.secure_aggregation.curve import ORDER, public_of
from fedclaw.privacy.secure_aggregation.dealing import (
    DealerKeys,
    Dealing,
    SecretShares,
    _challenge,
    _commit,
    deal,
    evaluate,
    packed,
    recover,
)
from fedclaw.privacy.secure_aggregation.keys import (
    ACCUSATION_PURPOSE,
    SHARES_PURPOSE,
    accusation_message,
    shares_message,
)
from fedclaw.privacy.secure_aggregation.site import SiteSession
from tests.privacy.secure_aggregation.rehearsal import Exchange, names, parameters, wired

LIAR = "site-c"


class Disputed(Exchange):
    """An exchange in which one site writes over what it answers, and the others are honest."""

    def __init__(self, count: int = 6, **lies: Callable) -> None:
        super().__init__(parameters(count))
        self.lies = lies
        self.refused: dict[str, str] = {}

    def said(self, stage: str, site: str, item, add: Callable) -> None:
        if site == LIAR and stage in self.lies:
            item = self.lies[stage](self, item)
            if item is None:
                return
        try:
            add(wired(item))
        except SecureAggregationError as error:
            self.refused[site] = str(error)

    def shares(self):
        for name, item in self.keys().items():
            self.said("shares", name, self.sites[name].share(item), self.server.add_shares)
        return {name: wired(item) for name, item in self.server.deliveries().items()}

    def rosters(self):
        for name, delivery in self.shares().items():
            self.said("confirm", name, self.sites[name].confirm(delivery), self.server.add_confirmation)
        for name, accusations in self.server.accusations().items():
            self.said("dispute", name, self.sites[name].open_for(wired(accusations)), self.server.add_opening)
        return {name: wired(item) for name, item in self.server.rosters().items()}


def signed(site: SiteSession, bundle: ShareBundle, sealed: tuple[bytes, ...]) -> ShareBundle:
    """`bundle` with other content, signed by its sender, who can still show the keys that it would open by."""
    proofs = [site._sent[peer].signed for peer in bundle.receivers]
    signatures = []
    for peer, content, old, message in zip(bundle.receivers, sealed, bundle.sealed, proofs, strict=True):
        proof = message[message.index(old) + len(old) + 4 :]
        again = shares_message(site.parameters, site.me, peer, content, proof)
        site._sent[peer] = type(site._sent[peer])(again, site._sent[peer].ephemeral)
        signatures.append(site._keys.sign(SHARES_PURPOSE, again))
    return bundle.model_copy(update={"sealed": sealed, "signatures": tuple(signatures)})


def garbage(exchange: Disputed, bundle: ShareBundle) -> ShareBundle:
    return signed(exchange.sites[LIAR], bundle, tuple(os.urandom(len(item)) for item in bundle.sealed))


def one_wrong(exchange: Disputed, bundle: ShareBundle) -> ShareBundle:
    """Well sealed for all, and for one neighbour another share than was committed to."""
    site = exchange.sites[LIAR]
    plain = SecretShares(1 + secrets.randbelow(ORDER - 1), 5).pack()
    victim = bundle.receivers[0]
    made = session_keys.seal(site.parameters, LIAR, victim, site._peers[victim].share_public, plain)
    site._sent[victim] = type(site._sent[victim])(site._sent[victim].signed, made.ephemeral)
    return signed(site, bundle, (made.content, *bundle.sealed[1:]))


def dealt_again(exchange: Disputed, bundle: ShareBundle, change: Callable[[dict, object], tuple]) -> ShareBundle:
    """A dealing that `change` has spoilt, well sealed and signed by a site that knows what it does."""
    site = exchange.sites[LIAR]
    holders = [LIAR, *bundle.receivers]
    shares, dealing = change(*deal(site.parameters, LIAR, holders, site._keys.dealt))
    sealed, signatures = [], []
    for peer in bundle.receivers:
        made = session_keys.seal(site.parameters, LIAR, peer, site._peers[peer].share_public, shares[peer].pack())
        message = shares_message(
            site.parameters, LIAR, peer, made.content, dealing.proof_for(site.parameters, peer).pack()
        )
        site._sent[peer] = type(site._sent[peer])(message, made.ephemeral)
        sealed.append(made.content)
        signatures.append(site._keys.sign(SHARES_PURPOSE, message))
    return bundle.model_copy(
        update={
            "own": dealing.commitments[LIAR],
            "seed_proof": packed(dealing.seed_proof),
            "key_proof": packed(dealing.key_proof),
            "nonce_public": dealing.nonce_public,
            "sealed": tuple(sealed),
            "commitments": tuple(dealing.commitments[peer] for peer in bundle.receivers),
            "signatures": tuple(signatures),
        }
    )


def off_the_polynomial(exchange: Disputed, bundle: ShareBundle) -> ShareBundle:
    def change(shares: dict, dealing: object) -> tuple:
        return {holder: SecretShares(share.seed, (share.key + 1) % ORDER) for holder, share in shares.items()}, dealing

    return dealt_again(exchange, bundle, change)


def chosen_afterwards(exchange: Disputed, bundle: ShareBundle) -> ShareBundle:
    """Blinds on no polynomial, the challenge, then any z that fits the key, and each share such that it fits z.

    What a dealer can do whose shares are not in the challenge: it drops out later, and nobody can take off its masks.
    """
    site = exchange.sites[LIAR]
    given, keys = site.parameters, site._keys.dealt
    holders = (LIAR, *bundle.receivers)
    blinds = {holder: [1 + secrets.randbelow(ORDER - 1) for _ in range(2)] for holder in holders}
    guesses = {holder: [1 + secrets.randbelow(ORDER - 1) for _ in range(2)] for holder in holders}
    commitments = {
        holder: _commit(given, LIAR, holder, "seed", blinds[holder][0], guesses[holder][0])
        + _commit(given, LIAR, holder, "key", blinds[holder][1], guesses[holder][1])
        for holder in holders
    }
    nonce = 1 + secrets.randbelow(ORDER - 1)
    d = _challenge(given, LIAR, keys.mask_public, public_of(nonce), commitments)
    z_seed = [secrets.randbelow(ORDER) for _ in range(given.threshold)]
    z_key = [(nonce + d * keys.mask_secret) % ORDER, *z_seed[1:]]

    def share(z: list[int], holder: str, blind: int) -> int:
        return (evaluate(z, given.point(holder)) - blind) * pow(d, -1, ORDER) % ORDER

    shares = {
        holder: SecretShares(*(share(z, holder, b) for z, b in zip((z_seed, z_key), blinds[holder], strict=True)))
        for holder in holders
    }
    dealing = Dealing(LIAR, commitments, tuple(z_seed), tuple(z_key), public_of(nonce), d)
    return dealt_again(exchange, bundle, lambda _shares, _dealing: (shares, dealing))


def another_key(exchange: Disputed, bundle: ShareBundle) -> ShareBundle:
    """A perfect sharing, of a key that is not the one which it has advertised."""
    site = exchange.sites[LIAR]
    other = DealerKeys(5, 7, site._keys.mask_public)
    holders = [LIAR, *bundle.receivers]
    return dealt_again(exchange, bundle, lambda _shares, _dealing: deal(site.parameters, LIAR, holders, other))


def short_polynomial(exchange: Disputed, bundle: ShareBundle) -> ShareBundle:
    return bundle.model_copy(update={"seed_proof": bundle.seed_proof[:-32]})


def unsigned(exchange: Disputed, bundle: ShareBundle) -> ShareBundle:
    return bundle.model_copy(update={"signatures": (os.urandom(64), *bundle.signatures[1:])})


def silent(exchange: Disputed, item: object) -> None:
    return None


def accuses(exchange: Disputed, item: Confirmation) -> Confirmation:
    """Of all its neighbours it says that what they sent, which is right, is nothing."""
    site = exchange.sites[LIAR]
    accused = tuple(site._peers)
    messages = [
        accusation_message(site.parameters, LIAR, peer, exchange.sites[peer]._sent[LIAR].signed) for peer in accused
    ]
    signatures = tuple(site._keys.sign(ACCUSATION_PURPOSE, message) for message in messages)
    return item.model_copy(update={"accused": accused, "signatures": signatures})


def calls_unsigned(exchange: Disputed, item: Confirmation) -> Confirmation:
    return item.model_copy(update={"unsigned": ("site-a", "site-b")})


def forges(exchange: Disputed, item: Confirmation) -> Confirmation:
    return item.model_copy(update={"accused": ("site-a",), "signatures": (os.urandom(64),)})


def strangers(exchange: Disputed, item: Confirmation) -> Confirmation:
    return item.model_copy(update={"unsigned": ("site-l",)})


def other_keys(exchange: Disputed, item):
    return item.model_copy(update={"keys": tuple(os.urandom(32) for _ in item.keys)})


LIES = {
    "garbage": ({"shares": garbage}, "site-c sent site-. what are no shares"),
    "garbage and no word of it": ({"shares": garbage, "dispute": silent}, "has not shown the shares"),
    "garbage and other keys": ({"shares": garbage, "dispute": other_keys}, "what are no shares"),
    "one wrong share": ({"shares": one_wrong}, "site-c sent site-a what are no shares"),
    "shares of no polynomial": ({"shares": off_the_polynomial}, "what are no shares"),
    "shares chosen after the challenge": ({"shares": chosen_afterwards}, "what are no shares"),
    "another key than its own": ({"shares": another_key}, "has not shared the key that it advertised"),
    "another threshold": ({"shares": short_polynomial}, "shares of another threshold"),
    "a signature that is none": ({"shares": unsigned}, "has not signed the shares that it sent to site-a"),
    "false accusations": ({"confirm": accuses}, "says that site-. sent it no shares, and it has"),
    "false complaints": ({"confirm": calls_unsigned}, "says that site-a has not signed its shares, and it has"),
    "accusations that it has not signed": ({"confirm": forges}, "signature of site-c"),
    "complaints of strangers": ({"confirm": strangers}, "complains of site-l"),
}


@pytest.mark.parametrize(("lies", "words"), LIES.values(), ids=LIES)
def test_the_liar_is_left_out_by_proof_and_the_others_have_their_sum(lies: dict[str, Callable], words: str) -> None:
    exchange = Disputed(**lies)
    rosters = exchange.rosters()
    named = {**exchange.refused, **exchange.server.excluded}
    assert list(named) == [LIAR]
    assert re.search(words, named[LIAR])
    assert set(rosters) == set(names(6)) - {LIAR}, "before anybody has masked anything"
    assert all(LIAR not in roster.peers for roster in rosters.values())


def test_the_sum_of_the_others_is_exact() -> None:
    exchange = Disputed(shares=garbage)
    assert np.array_equal(exchange.run(), exchange.plain_sum())
    assert exchange.server.survivors == tuple(name for name in names(6) if name != LIAR)


def test_two_who_lie_together_get_nobody_excluded_but_themselves() -> None:
    exchange = Disputed(7, confirm=accuses)
    other = "site-e"
    true = exchange.sites[other].confirm

    def confirm(delivery):
        """It accuses site a only, falsely."""
        item, site = true(delivery), exchange.sites[other]
        message = accusation_message(site.parameters, other, "site-a", exchange.sites["site-a"]._sent[other].signed)
        signature = site._keys.sign(ACCUSATION_PURPOSE, message)
        return item.model_copy(update={"accused": ("site-a",), "signatures": (signature,)})

    exchange.sites[other].confirm = confirm  # type: ignore[method-assign]
    rosters = exchange.rosters()
    assert set(exchange.server.excluded) == {LIAR, other}
    assert set(rosters) == set(names(7)) - {LIAR, other}


class TestWhatAnOpeningGivesAway:
    def test_nothing_without_an_accusers_signature(self) -> None:
        """A server that would have a site show its shares, neighbour by neighbour, gets none."""
        exchange = Exchange(parameters(4))
        exchange.shares()
        site = exchange.sites["site-a"]
        signatures = tuple(os.urandom(64) for _ in range(3))
        false = Accusations(session=exchange.parameters.session, accusers=names(4)[1:], signatures=signatures)
        with pytest.raises(SecureAggregationError, match="signature of site-b"):
            site.open_for(false)

    def test_nothing_that_the_accuser_did_not_have(self) -> None:
        exchange = Disputed(confirm=accuses)
        deliveries = exchange.shares()
        for name, delivery in deliveries.items():
            exchange.said("confirm", name, exchange.sites[name].confirm(delivery), exchange.server.add_confirmation)
        opening = exchange.sites["site-a"].open_for(exchange.server.accusations()["site-a"])
        assert opening.accusers == (LIAR,)
        for peer in ("site-b", "site-d"):
            sealed = exchange.server._bundles["site-a"][peer].sealed
            public = exchange.server._advertised[peer].share_public
            with pytest.raises(SecureAggregationError):
                session_keys.reopened(exchange.parameters, "site-a", peer, public, sealed, opening.keys[0])

    def test_nothing_for_what_a_server_has_changed_on_the_way(self) -> None:
        """An honest site accuses nobody of what its dealer has not signed."""
        for column in ("sealed", "proofs", "signatures"):
            exchange = Exchange(parameters(4))
            delivery = exchange.shares()["site-a"]
            spoilt = tuple(item[:-1] + bytes([item[-1] ^ 1]) for item in getattr(delivery, column))
            said = exchange.sites["site-a"].confirm(delivery.model_copy(update={column: spoilt}))
            assert said.accused == ()
            assert set(said.unsigned) == set(delivery.senders)

    def test_nothing_once_a_vector_is_masked(self) -> None:
        exchange = Exchange(parameters(4))
        exchange.masked()
        asked = Accusations(session=exchange.parameters.session, accusers=("site-b",), signatures=(os.urandom(64),))
        with pytest.raises(SecureAggregationError, match="but the next stage is to consent"):
            exchange.sites["site-a"].open_for(asked)


class TestDelivery:
    def test_for_somebody_else(self) -> None:
        exchange = Exchange(parameters(4))
        deliveries = exchange.shares()
        with pytest.raises(SecureAggregationError, match="shares for site-b were sent to site-a"):
            exchange.sites["site-a"].confirm(deliveries["site-b"])

    def test_whose_senders_are_exchanged_and_what_comes_back_to_its_sender(self) -> None:
        exchange = Exchange(parameters(4))
        delivery = exchange.shares()["site-a"]
        first, second, *rest = delivery.senders
        swapped = delivery.model_copy(update={"senders": (second, first, *rest)})
        assert set(exchange.sites["site-a"].confirm(swapped).unsigned) == {first, second}

    def test_of_a_site_whose_keys_were_not_shown(self) -> None:
        exchange = Exchange(parameters(5))
        lists = exchange.keys()
        lists["site-a"] = KeyList.of(lists["site-a"].session, lists["site-a"].advertisements[1:])
        for name, item in lists.items():
            bundle = exchange.sites[name].share(item)
            if name != "site-a":
                exchange.server.add_shares(bundle)
        delivery = exchange.server.deliveries()["site-b"].model_copy(update={"receiver": "site-a"})
        asked = delivery.model_copy(
            update={name: getattr(delivery, name)[:1] for name in ("sealed", "proofs", "signatures")}
            | {"senders": ("site-b",)}
        )
        with pytest.raises(SecureAggregationError, match="no keys of theirs came to site-a"):
            exchange.sites["site-a"].confirm(asked)


def test_a_dealing_by_hand() -> None:
    """Any threshold of the shares gives the secret, and each fits its own commitment and no other's."""
    given = parameters(4)
    shares, dealing = deal(given, "site-a", names(4), DealerKeys(1234, 77, public_of(77)))
    for holder, share in shares.items():
        proof = dealing.proof_for(given, holder)
        assert proof.holds(given, "site-a", holder, share)
        assert not proof.fits(given, "site-a", holder, "seed", share.key)
        assert not proof.fits(given, "site-a", holder, "key", (share.key + 1) % ORDER)
        assert not proof.fits(given, "site-a", holder, "key", share.key + ORDER)
    points = [(given.point(holder), share.seed) for holder, share in shares.items()]
    for start in range(2):
        assert int.from_bytes(recover(dict(points[start:]), given.threshold), "big") == 1234
    assert evaluate([5, 3], 2) == 11
