"""What a site refuses, whatever the server says. A refused call gives nothing away, and the right one still works."""

from collections.abc import Callable

import numpy as np
import pytest

from fedclaw.errors import SecureAggregationError
from fedclaw.identity import pki
from fedclaw.privacy.secure_aggregation import KeyList, SiteSession, SurvivorList, UnmaskRequest, local_identities
from fedclaw.privacy.secure_aggregation.keys import KEYS_PURPOSE, SessionKeys, keys_message
from fedclaw.privacy.secure_aggregation.site import Stage
from tests.privacy.secure_aggregation.rehearsal import FEDERATION, Exchange, identities, names, parameters, site_session


def changed(items: KeyList, site: str, **columns: bytes) -> KeyList:
    """`items` with the row of `site` changed."""
    row = items.sites.index(site)
    update = {}
    for name, value in columns.items():
        column = list(getattr(items, name))
        column[row] = value
        update[name] = tuple(column)
    return items.model_copy(update=update)


class TestKeys:
    @pytest.fixture
    def exchange(self) -> Exchange:
        return Exchange(parameters(4))

    @pytest.mark.parametrize("column", ["mask_publics", "share_publics", "sign_publics"])
    def test_keys_that_the_server_put_in_the_place_of_others(self, exchange: Exchange, column: str) -> None:
        items = exchange.keys()["site-a"]
        stranger = site_session(parameters(4), "site-b").advertise()
        with pytest.raises(SecureAggregationError, match="signature of site-b"):
            exchange.sites["site-a"].share(changed(items, "site-b", **{column: getattr(stranger, column[:-1])}))
        exchange.sites["site-a"].share(items)

    def test_a_server_with_a_ca_of_its_own(self, exchange: Exchange) -> None:
        signers, _ = local_identities(FEDERATION, ["site-b"])
        forged = SiteSession(exchange.parameters, "site-b", signers["site-b"], identities()[1]).advertise()
        items = exchange.keys()["site-a"]
        items = changed(
            items,
            "site-b",
            mask_publics=forged.mask_public,
            share_publics=forged.share_public,
            sign_publics=forged.sign_public,
            certificates=forged.certificate,
            signatures=forged.signature,
        )
        with pytest.raises(
            SecureAggregationError, match="certificate sent for site-b was not issued by this federation"
        ):
            exchange.sites["site-a"].share(items)

    def test_a_site_that_plays_another(self, exchange: Exchange) -> None:
        """Site c signs, with its own certificate, keys that are said to be of site b."""
        signer = identities()[0]["site-c"]
        own = SessionKeys()
        mask, share, sign = own.mask_public, own.share_public, own.sign_public
        message = keys_message(exchange.parameters, "site-b", mask, share, sign)
        items = changed(
            exchange.keys()["site-a"],
            "site-b",
            mask_publics=mask,
            share_publics=share,
            sign_publics=sign,
            certificates=pki.pem_of(signer.certificate),
            signatures=signer.sign(KEYS_PURPOSE, message),
        )
        with pytest.raises(SecureAggregationError, match="certificate sent for site-b belongs to site-c"):
            exchange.sites["site-a"].share(items)

    @pytest.mark.parametrize(
        "change", [{}, {"round": 4}, {"run": "summer"}, {"length": 6}, {"minimum": 3}, {"threshold": 4}]
    )
    def test_keys_of_another_session_or_other_parameters(self, exchange: Exchange, change: dict[str, object]) -> None:
        other = parameters(4, **({"session": exchange.parameters.session} | change if change else {}))
        old = site_session(other, "site-b").advertise()
        items = changed(
            exchange.keys()["site-a"],
            "site-b",
            mask_publics=old.mask_public,
            share_publics=old.share_public,
            sign_publics=old.sign_public,
            signatures=old.signature,
        )
        with pytest.raises(SecureAggregationError, match="signature of site-b"):
            exchange.sites["site-a"].share(items)

    def test_a_list_of_another_session(self, exchange: Exchange) -> None:
        exchange.keys()
        with pytest.raises(SecureAggregationError, match="of another session"):
            exchange.sites["site-a"].share(Exchange(parameters(4)).keys()["site-a"])

    def test_sites_that_are_no_neighbours(self) -> None:
        exchange = Exchange(parameters(8, neighbours=2, threshold=2))
        lists = exchange.keys()
        far = next(site for site in names(8)[1:] if site not in lists["site-a"].sites)
        with pytest.raises(SecureAggregationError, match="no neighbours of site-a"):
            exchange.sites["site-a"].share(next(lists[site] for site in lists if far in lists[site].sites))

    def test_too_few_neighbours(self, exchange: Exchange) -> None:
        items = exchange.keys()["site-a"]
        few = KeyList.of(items.session, items.advertisements[:1])
        with pytest.raises(
            SecureAggregationError, match="only 2 sites around site-a advertised keys, the threshold is 3"
        ):
            exchange.sites["site-a"].share(few)

    def test_one_key_under_two_names(self, exchange: Exchange) -> None:
        items = exchange.keys()["site-a"]
        with pytest.raises(SecureAggregationError, match="one public key twice"):
            exchange.sites["site-a"].share(changed(items, "site-b", mask_publics=items.mask_publics[1]))


class TestRoster:
    def test_of_somebody_else(self) -> None:
        exchange = Exchange(parameters(4))
        rosters = exchange.rosters()
        with pytest.raises(SecureAggregationError, match="roster of site-b was sent to site-a"):
            exchange.sites["site-a"].mask(exchange.vectors["site-a"], rosters["site-b"])

    def test_of_too_few_peers(self) -> None:
        exchange = Exchange(parameters(4))
        roster = exchange.rosters()["site-a"]
        few = roster.model_copy(update={"peers": roster.peers[:1]})
        with pytest.raises(SecureAggregationError, match="only 2 sites around site-a have shared their secrets"):
            exchange.sites["site-a"].mask(exchange.vectors["site-a"], few)

    def test_with_a_peer_whose_shares_never_came(self) -> None:
        exchange = Exchange(parameters(5), {"site-e": "shares"})
        roster = exchange.rosters()["site-a"]
        more = roster.model_copy(update={"peers": (*roster.peers, "site-e")})
        with pytest.raises(SecureAggregationError, match="site-a holds no shares of site-e"):
            exchange.sites["site-a"].check_roster(more)
        exchange.sites["site-a"].mask(exchange.vectors["site-a"].copy(), roster)

    def test_a_vector_of_another_length(self) -> None:
        exchange = Exchange(parameters(4))
        roster = exchange.rosters()["site-a"]
        with pytest.raises(SecureAggregationError, match="6 numbers, the sum is over 5"):
            exchange.sites["site-a"].mask(np.zeros(6, np.uint32), roster)


class TestSurvivors:
    @pytest.fixture
    def exchange(self) -> Exchange:
        exchange = Exchange(parameters(5, minimum=4))
        exchange.masked()
        return exchange

    def listed(self, exchange: Exchange, *survivors: str) -> SurvivorList:
        return SurvivorList(session=exchange.parameters.session, survivors=survivors)

    @pytest.mark.parametrize(
        ("survivors", "message"),
        [
            (names(5)[1:], "site-a is not among the survivors"),
            (names(3), "3 survivors are fewer than 4"),
            ((*names(4), "site-l"), "site-l survived a sum that they have no part in"),
        ],
    )
    def test_that_a_site_does_not_sign(self, exchange: Exchange, survivors: tuple[str, ...], message: str) -> None:
        with pytest.raises(SecureAggregationError, match=message):
            exchange.sites["site-a"].consent(self.listed(exchange, *survivors))

    def test_fewer_neighbours_than_the_threshold(self) -> None:
        exchange = Exchange(parameters(12, neighbours=4, threshold=4, session="5" * 32))
        exchange.masked()
        near = exchange.parameters.neighbours_of("site-a")
        far = [name for name in names(12) if name not in near]
        with pytest.raises(SecureAggregationError, match="only 2 sites around site-a survived, the threshold is 4"):
            exchange.sites["site-a"].consent(self.listed(exchange, *far, near[0]))

    def test_a_neighbour_without_a_common_mask(self) -> None:
        exchange = Exchange(parameters(5), {"site-e": "shares"})
        exchange.masked()
        with pytest.raises(SecureAggregationError, match="site-e survived without a mask with site-a"):
            exchange.sites["site-a"].consent(self.listed(exchange, *names(5)))

    def test_only_one_list_is_signed(self, exchange: Exchange) -> None:
        exchange.sites["site-a"].consent(self.listed(exchange, *names(5)))
        with pytest.raises(SecureAggregationError, match="asked to consent, but the next stage is to unmask"):
            exchange.sites["site-a"].consent(self.listed(exchange, *names(4)))


class TestUnmasking:
    @pytest.fixture
    def exchange(self) -> Exchange:
        return Exchange(parameters(5), {"site-e": "masked"})

    def test_gives_one_secret_a_neighbour(self, exchange: Exchange) -> None:
        exchange.unmask()
        for answer in exchange.unmaskings:
            assert set(answer.seed_owners) == set(names(4))
            assert answer.key_owners == ("site-e",)

    @pytest.mark.parametrize(
        ("update", "message"),
        [
            ({"dropped": ("site-b",)}, "both secrets of site-b are asked for"),
            ({"dropped": ("site-a",)}, "both secrets of site-a are asked for"),
            (
                {"survivors": ("site-a", "site-c", "site-d"), "dropped": ("site-b", "site-e")},
                "not those that this site has signed",
            ),
            ({"survivors": names(5), "dropped": ()}, "not those that this site has signed"),
            ({"consenting": (), "signatures": ()}, "only 1 sites around site-a consented"),
            ({"consenting": ("site-b", "site-c", "site-a"), "signatures": (b"1", b"2", b"3")}, "site-a cannot consent"),
            ({"consenting": ("site-b", "site-e"), "signatures": (b"1", b"2")}, "site-e cannot consent"),
        ],
    )
    def test_what_a_site_does_not_unmask(self, exchange: Exchange, update: dict[str, object], message: str) -> None:
        request = exchange.consents()["site-a"]
        with pytest.raises(SecureAggregationError, match=message):
            exchange.sites["site-a"].unmask(request.model_copy(update=update))
        exchange.sites["site-a"].unmask(request)

    def test_consents_to_other_survivors(self) -> None:
        """The server shows site a all survivors and the others a list without it; their consents do not fit."""
        exchange = Exchange(parameters(5))
        whole = exchange.masked()
        exchange.sites["site-a"].consent(whole)
        part = SurvivorList(session=whole.session, survivors=whole.survivors[:0] + whole.survivors[1:])
        others = {name: exchange.sites[name].consent(part).signature for name in names(5)[1:]}
        request = UnmaskRequest(
            session=whole.session,
            survivors=whole.survivors,
            dropped=(),
            consenting=tuple(others),
            signatures=tuple(others.values()),
        )
        with pytest.raises(SecureAggregationError, match="signature of site-b"):
            exchange.sites["site-a"].unmask(request)

    def test_a_consent_by_another_than_it_says(self, exchange: Exchange) -> None:
        request = exchange.consents()["site-a"]
        swapped = request.model_copy(
            update={"signatures": (request.signatures[1], *request.signatures[:1], *request.signatures[2:])}
        )
        with pytest.raises(SecureAggregationError, match="signature of site-b"):
            exchange.sites["site-a"].unmask(swapped)

    def test_a_second_time(self, exchange: Exchange) -> None:
        request = exchange.consents()["site-a"]
        exchange.sites["site-a"].unmask(request)
        with pytest.raises(SecureAggregationError, match="is closed at site-a"):
            exchange.sites["site-a"].unmask(request)

    def test_secrets_are_gone_afterwards(self, exchange: Exchange) -> None:
        request = exchange.consents()["site-a"]
        site = exchange.sites["site-a"]
        seed, secret = site._keys.seed, site._keys.mask_secret
        site.unmask(request)
        assert site._keys.seed == bytes(32) != seed
        assert site._keys.mask_secret != secret
        assert site._held == {}

    def test_what_claim_says_is_final(self) -> None:
        exchange = Exchange(parameters(3))

        def claim() -> None:
            raise SecureAggregationError("not written down")

        exchange.sites["site-a"] = site_session(exchange.parameters, "site-a", claim=claim)
        request = exchange.consents()["site-a"]
        with pytest.raises(SecureAggregationError, match="not written down"):
            exchange.sites["site-a"].unmask(request)


STEPS: list[Callable[[Exchange], object]] = [
    lambda exchange: exchange.sites["site-a"].share(KeyList.of(exchange.parameters.session, ())),
    lambda exchange: exchange.sites["site-a"].consent(
        SurvivorList(session=exchange.parameters.session, survivors=names(3))
    ),
    lambda exchange: exchange.sites["site-a"].unmask(
        UnmaskRequest(session=exchange.parameters.session, survivors=names(3), dropped=(), consenting=(), signatures=())
    ),
]


@pytest.mark.parametrize("step", STEPS)
def test_stages_come_in_order(step: Callable[[Exchange], object]) -> None:
    with pytest.raises(SecureAggregationError, match="but the next stage is to advertise"):
        step(Exchange(parameters(3)))


def test_keys_are_advertised_once() -> None:
    session = site_session(parameters(3), "site-a")
    session.advertise()
    with pytest.raises(SecureAggregationError, match="asked to advertise"):
        session.advertise()


def test_a_stranger_and_an_impostor() -> None:
    signers, verifier = identities()
    with pytest.raises(SecureAggregationError, match="site-d takes no part"):
        SiteSession(parameters(3), "site-d", signers["site-d"], verifier)
    with pytest.raises(SecureAggregationError, match="site-a cannot sign as site-b"):
        SiteSession(parameters(3), "site-a", signers["site-b"], verifier)


def test_nothing_shows_a_secret() -> None:
    exchange = Exchange(parameters(3))
    request = exchange.consents()["site-a"]
    site = exchange.sites["site-a"]
    secrets = [site._keys.seed, site._keys.mask_secret, *(held.seed for held in site._held.values())]
    shown = f"{site!r} {vars(site)!r} {site._held!r}"
    answer = site.unmask(request)
    shown += f"{answer!r}{exchange.server!r}{site!r}"
    assert site.stage is Stage.CLOSED
    for secret in secrets:
        assert repr(secret)[2:-1] not in shown
        assert secret.hex() not in shown
