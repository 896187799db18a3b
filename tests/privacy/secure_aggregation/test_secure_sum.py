"""The whole protocol: the sum is exact whoever drops out, or there is no sum and nothing has left a site."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclaw.errors import SecureAggregationError
from fedclaw.privacy.secure_aggregation import ServerSession
from fedclaw.privacy.secure_aggregation.keys import BLOCK, SessionKeys
from fedclaw.privacy.secure_aggregation.parameters import least_threshold
from tests.chance import frequencies_fit
from tests.privacy.secure_aggregation.rehearsal import STAGES, Exchange, names, parameters, site_session


class _OneKey(SessionKeys):
    """Signs, so it says, with the key that shares are sealed to."""

    @property
    def sign_public(self) -> bytes:
        return self.share_public


@st.composite
def sums(draw: st.DrawFn) -> Exchange:
    count = draw(st.integers(2, 8))
    neighbours = draw(st.sampled_from([*range(2, count - 1, 2), count - 1]))
    threshold = draw(st.integers(least_threshold(neighbours, 0), neighbours + 1))
    length = draw(st.integers(1, 40))
    return Exchange(parameters(count, neighbours=neighbours, threshold=threshold, length=length))


@settings(max_examples=25, deadline=None)
@given(sums())
def test_the_sum_is_exact(exchange: Exchange) -> None:
    assert np.array_equal(exchange.run(), exchange.plain_sum())
    assert exchange.server.survivors == exchange.parameters.sites
    assert exchange.server.suspects == ()


@settings(max_examples=25, deadline=None)
@given(sums(), st.data())
def test_the_sum_is_exact_or_there_is_none(exchange: Exchange, data: st.DataObject) -> None:
    sites = exchange.parameters.sites
    absent = data.draw(st.dictionaries(st.sampled_from(sites), st.sampled_from(STAGES), max_size=4))
    exchange.absent = {site: STAGES.index(stage) for site, stage in absent.items()}
    try:
        total = exchange.run()
    except SecureAggregationError:
        return
    assert np.array_equal(total, exchange.plain_sum())
    gone_before_the_sum = {site for site, stage in absent.items() if STAGES.index(stage) <= STAGES.index("masked")}
    assert not gone_before_the_sum.intersection(exchange.server.survivors)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("neighbours", [7, 6])
@pytest.mark.parametrize("lost", [("site-a",), ("site-b", "site-f")])
def test_drop_outs_at_each_stage(stage: str, neighbours: int, lost: tuple[str, ...]) -> None:
    exchange = Exchange(parameters(8, neighbours=neighbours), dict.fromkeys(lost, stage))
    if neighbours == 6 and len(lost) == 2:
        exchange = Exchange(parameters(8, neighbours=6, threshold=4), dict.fromkeys(lost, stage))
    total = exchange.run()
    in_the_sum = STAGES.index(stage) > STAGES.index("masked")
    assert set(exchange.server.survivors) == set(names(8)) - (set() if in_the_sum else set(lost))
    assert np.array_equal(total, exchange.plain_sum())


def test_one_lost_at_every_stage() -> None:
    absent = dict(zip(names(6), STAGES, strict=True))
    exchange = Exchange(parameters(13), absent)
    assert np.array_equal(exchange.run(), exchange.plain_sum())
    assert len(exchange.server.survivors) == 9


@pytest.mark.parametrize("stage", STAGES)
def test_too_few_left_fails_and_nothing_leaves(stage: str) -> None:
    # Five sites, threshold 3: with two left no secret may be recovered.
    exchange = Exchange(parameters(5), dict.fromkeys(names(3), stage))
    with pytest.raises(SecureAggregationError, match=r"too few \(threshold 3, at least 2 sites\); nothing is unmasked"):
        exchange.run()
    # The two that are left give shares only if the others were lost after all had consented.
    assert len(exchange.unmaskings) == (2 if stage == "unmask" else 0)
    with pytest.raises(SecureAggregationError):
        exchange.server.result()
    with pytest.raises(SecureAggregationError):
        exchange.server.unmask_requests()


def test_fewer_survivors_than_the_minimum() -> None:
    exchange = Exchange(parameters(8, minimum=7), dict.fromkeys(names(2), "masked"))
    with pytest.raises(SecureAggregationError, match=r"6 of 8 sites sent masked vectors: too few .*at least 7"):
        exchange.run()
    assert exchange.unmaskings == []


def test_a_site_without_enough_neighbours_is_left_out_before_it_shares() -> None:
    # On the ring each site needs two of its two neighbours: when one is silent, those next to it are left out, then
    # those next to them, and so on: nobody remains. With a threshold of 2 everybody else remains.
    for threshold, remain in ((3, 0), (2, 11)):
        exchange = Exchange(parameters(12, neighbours=2, threshold=threshold), {"site-d": "keys"})
        if remain:
            assert len(exchange.keys()) == remain
        else:
            with pytest.raises(SecureAggregationError, match="11 of 12 sites advertised keys: too few"):
                exchange.keys()


def test_more_than_a_block() -> None:
    exchange = Exchange(parameters(3, length=BLOCK + 17, threshold=2), {"site-b": "masked"})
    assert np.array_equal(exchange.run(), exchange.plain_sum())


class TestWhatTheServerSees:
    def test_a_masked_vector_looks_uniform_whatever_is_in_it(self) -> None:
        for fill in (0, 0xFFFFFFFF, 7):
            exchange = Exchange(parameters(3, length=1 << 15))
            for vector in exchange.vectors.values():
                vector[:] = fill
            exchange.masked()
            for vector in exchange.sent.values():
                assert frequencies_fit(np.bincount(vector.view(np.uint8), minlength=256))

    def test_each_session_masks_anew(self) -> None:
        first, second = (Exchange(parameters(3, length=1000)) for _ in range(2))
        for exchange in (first, second):
            exchange.masked()
        # Equal words by chance: 1000 / 2^32 a site.
        assert all(np.count_nonzero(first.sent[name] == second.sent[name]) < 4 for name in names(3))

    def test_the_pair_masks_alone_do_not_open_a_survivor(self) -> None:
        """The own mask stays on when all neighbours' keys are known."""
        exchange = Exchange(parameters(3, length=1000))
        exchange.masked()
        total = sum(exchange.sent.values(), np.zeros(1000, np.uint32))
        assert np.count_nonzero(total == exchange.plain_sum()) < 4


class TestTheServerRefuses:
    def test_answers_out_of_order(self) -> None:
        exchange = Exchange(parameters(3))
        late = site_session(exchange.parameters, "site-a").advertise()
        exchange.keys()
        with pytest.raises(SecureAggregationError, match="Advertisement of site-a comes too late"):
            exchange.server.add_advertisement(late)

    def test_a_second_answer(self) -> None:
        exchange = Exchange(parameters(3))
        item = exchange.sites["site-a"].advertise()
        exchange.server.add_advertisement(item)
        with pytest.raises(SecureAggregationError, match="site-a sent a second Advertisement"):
            exchange.server.add_advertisement(item)

    def test_a_second_vector(self) -> None:
        exchange = Exchange(parameters(3))
        roster = exchange.rosters()["site-a"]
        vector = exchange.vectors["site-a"].copy()
        message = exchange.sites["site-a"].mask(vector, roster)
        exchange.server.add_masked(message, vector)
        with pytest.raises(SecureAggregationError, match="second MaskedInput"):
            exchange.server.add_masked(message, vector)

    def test_an_outsider(self) -> None:
        inside = parameters(3)
        wide = parameters(4, session=inside.session)
        with pytest.raises(SecureAggregationError, match="site-d was not asked"):
            Exchange(inside).server.add_advertisement(site_session(wide, "site-d").advertise())

    def test_another_session(self) -> None:
        with pytest.raises(SecureAggregationError, match="of another session"):
            Exchange(parameters(3)).server.add_advertisement(site_session(parameters(3), "site-a").advertise())

    def test_keys_signed_by_nobody(self) -> None:
        exchange = Exchange(parameters(3))
        item = exchange.sites["site-a"].advertise()
        with pytest.raises(SecureAggregationError, match="signature of site-a"):
            exchange.server.add_advertisement(item.model_copy(update={"mask_public": bytes(31) + b"\x09"}))

    def test_the_key_of_another(self) -> None:
        exchange = Exchange(parameters(3))
        server = ServerSession(exchange.parameters)
        item = exchange.sites["site-a"].advertise()
        server.add_advertisement(item)
        copied = exchange.sites["site-b"].advertise().model_copy(update={"share_public": item.mask_public})
        with pytest.raises(SecureAggregationError, match="site-b advertised a key of site-a"):
            server.add_advertisement(copied)

    def test_one_key_for_two_uses(self) -> None:
        """Its neighbours would refuse it, and with it all that they are told: nobody would be left."""
        exchange = Exchange(parameters(4))
        site = exchange.sites["site-b"]
        site._keys = _OneKey()
        for name in ("site-a", "site-c", "site-d"):
            exchange.server.add_advertisement(exchange.sites[name].advertise())
        with pytest.raises(SecureAggregationError, match="site-b advertised one key for two uses"):
            exchange.server.add_advertisement(site.advertise())
        for name, item in exchange.server.key_lists().items():
            exchange.sites[name].share(item)

    def test_a_false_consent(self) -> None:
        exchange = Exchange(parameters(3))
        survivors = exchange.masked()
        consent = exchange.sites["site-a"].consent(survivors)
        with pytest.raises(SecureAggregationError, match="signature of site-b"):
            exchange.server.add_consent(consent.model_copy(update={"site": "site-b"}))

    @pytest.mark.parametrize("vector", [np.zeros(5), np.zeros((5, 1), np.uint32), np.zeros(10, np.uint32)[::2]])
    def test_a_vector_of_the_wrong_kind(self, vector: np.ndarray) -> None:
        exchange = Exchange(parameters(3))
        roster = exchange.rosters()["site-a"]
        message = exchange.sites["site-a"].mask(exchange.vectors["site-a"].copy(), roster)
        with pytest.raises(SecureAggregationError, match="vector of a secure sum"):
            exchange.server.add_masked(message, vector)

    def test_a_vector_of_the_wrong_length(self) -> None:
        exchange = Exchange(parameters(3))
        roster = exchange.rosters()["site-a"]
        message = exchange.sites["site-a"].mask(exchange.vectors["site-a"].copy(), roster)
        with pytest.raises(SecureAggregationError, match="has 4 numbers, the sum is over 5"):
            exchange.server.add_masked(message, np.zeros(4, np.uint32))

    def test_a_vector_masked_with_others_than_the_neighbours(self) -> None:
        exchange = Exchange(parameters(4))
        roster = exchange.rosters()["site-a"]
        vector = exchange.vectors["site-a"].copy()
        message = exchange.sites["site-a"].mask(vector, roster)
        with pytest.raises(SecureAggregationError, match="site-a has not masked its vector with the neighbours"):
            exchange.server.add_masked(message.model_copy(update={"peers": message.peers[1:]}), vector)

    def test_shares_for_others_than_the_neighbours(self) -> None:
        exchange = Exchange(parameters(3))
        bundle = exchange.sites["site-a"].share(exchange.keys()["site-a"])
        with pytest.raises(SecureAggregationError, match="others than its neighbours"):
            exchange.server.add_shares(
                bundle.model_copy(update={"receivers": bundle.receivers[:1], "sealed": bundle.sealed[:1]})
            )

    def test_shares_that_were_not_asked_for(self) -> None:
        exchange = Exchange(parameters(5), {"site-e": "masked"})
        requests = exchange.consents()
        answer = exchange.sites["site-a"].unmask(requests["site-a"])
        short = answer.model_copy(update={"seed_owners": answer.seed_owners[1:], "seed_shares": answer.seed_shares[1:]})
        with pytest.raises(SecureAggregationError, match="did not give the shares"):
            exchange.server.add_unmasking(short)
        exchange.server.add_unmasking(answer)
        with pytest.raises(SecureAggregationError, match="second Unmasking"):
            exchange.server.add_unmasking(answer)


class TestWrongShares:
    @staticmethod
    def spoil(exchange: Exchange, liar: str, column: str = "seed_shares") -> None:
        for name, request in exchange.consents().items():
            answer = exchange.sites[name].unmask(request)
            if name == liar:
                wrong = tuple(value[:-1] + bytes([value[-1] ^ 1]) for value in getattr(answer, column))
                answer = answer.model_copy(update={column: wrong})
                with pytest.raises(SecureAggregationError, match=f"{liar} gave a share of .* that is not the one"):
                    exchange.server.add_unmasking(answer)
            else:
                exchange.server.add_unmasking(answer)

    def test_the_liar_alone_is_named_and_drops_out(self) -> None:
        """It found its shares right before anybody paid, so they were, and what it gives now is its own doing."""
        exchange = Exchange(parameters(5))
        self.spoil(exchange, "site-b")
        assert np.array_equal(exchange.server.result(), exchange.plain_sum())
        assert exchange.server.suspects == ("site-b",)
        assert exchange.server.survivors == names(5)

    def test_of_the_key_of_a_dropped_site(self) -> None:
        exchange = Exchange(parameters(6), {"site-f": "masked"})
        self.spoil(exchange, "site-a", "key_shares")
        assert np.array_equal(exchange.server.result(), exchange.plain_sum())
        assert exchange.server.suspects == ("site-a",)

    def test_as_many_as_may_drop_out(self) -> None:
        exchange = Exchange(parameters(7))
        for name, request in exchange.consents().items():
            answer = exchange.sites[name].unmask(request)
            if name in ("site-c", "site-d", "site-e"):
                swapped = answer.model_copy(update={"seed_shares": tuple(reversed(answer.seed_shares))})
                with pytest.raises(SecureAggregationError, match=f"{name} gave a share of site-.'s seed that is not"):
                    exchange.server.add_unmasking(swapped)
            else:
                exchange.server.add_unmasking(answer)
        assert np.array_equal(exchange.server.result(), exchange.plain_sum())
        assert exchange.server.suspects == ("site-c", "site-d", "site-e")

    def test_without_enough_right_ones_there_is_no_sum(self) -> None:
        exchange = Exchange(parameters(5, threshold=5))
        self.spoil(exchange, "site-b")
        with pytest.raises(SecureAggregationError, match=r"4 of 5 sites gave their shares.*too few \(threshold 5"):
            exchange.server.result()
        with pytest.raises(SecureAggregationError):
            exchange.server.result()
