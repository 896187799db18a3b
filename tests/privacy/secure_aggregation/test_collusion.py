"""A server that shows two halves of the sites different survivors, and a site in league with it that signs both.

Against a threshold that does not reckon with the colluding site, both secrets of a site come out: the attack is real.
Against one that does, nobody gives anything.
"""

import pytest

from fedclaw.errors import SecureAggregationError
from fedclaw.privacy.secure_aggregation import SurvivorList, Unmasking, UnmaskRequest, neighbours_needed
from fedclaw.privacy.secure_aggregation.dealing import recover
from fedclaw.privacy.secure_aggregation.keys import SURVIVORS_PURPOSE, mask_public_of, survivors_message
from tests.privacy.secure_aggregation.rehearsal import Exchange, names, parameters

VICTIM, COLLUDING = "site-a", "site-c"
TOLD_OF_ALL = ("site-a", "site-b")
TOLD_WITHOUT_THE_VICTIM = ("site-d", "site-e")


def unmask_group(exchange: Exchange, group: tuple[str, ...], survivors: tuple[str, ...]) -> list[Unmasking]:
    """What `group` gives when it is told of `survivors`, with the colluding site's signature among its consents."""
    given, session = exchange.parameters, exchange.parameters.session
    listed = SurvivorList(session=session, survivors=survivors)
    consents = {name: exchange.sites[name].consent(listed).signature for name in group}
    message = survivors_message(given, COLLUDING, survivors)
    consents[COLLUDING] = exchange.sites[COLLUDING]._keys.sign(SURVIVORS_PURPOSE, message)
    answers = []
    for name in group:
        others = {site: signature for site, signature in consents.items() if site != name}
        request = UnmaskRequest(
            session=session,
            survivors=survivors,
            dropped=tuple(site for site in given.sites if site not in survivors),
            consenting=tuple(others),
            signatures=tuple(others.values()),
        )
        answers.append(exchange.sites[name].unmask(request))
    return answers


def numbers(shares: dict[int, bytes]) -> dict[int, int]:
    return {point: int.from_bytes(share, "big") for point, share in shares.items()}


def test_a_threshold_too_low_for_the_collusion_gives_away_both_secrets() -> None:
    exchange = Exchange(parameters(5, threshold=3))
    assert exchange.parameters.colluding == 0
    exchange.masked()
    given, stolen = exchange.parameters, exchange.sites[COLLUDING]._held[VICTIM]
    secret_seed = exchange.sites[VICTIM]._keys.seed
    advertised = exchange.server._advertised[VICTIM]
    point = given.point(COLLUDING)
    seeds = {point: stolen.seed}
    for answer in unmask_group(exchange, TOLD_OF_ALL, names(5)):
        seeds[given.point(answer.site)] = answer.seed_shares[answer.seed_owners.index(VICTIM)]
    assert stolen.key is not None
    keys = {point: stolen.key}
    for answer in unmask_group(exchange, TOLD_WITHOUT_THE_VICTIM, names(5)[1:]):
        keys[given.point(answer.site)] = answer.key_shares[answer.key_owners.index(VICTIM)]
    assert recover(numbers(seeds), 3) == secret_seed
    assert mask_public_of(recover(numbers(keys), 3)) == advertised.mask_public


def test_the_threshold_that_is_needed_gives_away_nothing() -> None:
    topology = neighbours_needed(5, dropouts=1, corrupt=1)
    exchange = Exchange(parameters(5, threshold=topology.threshold))
    assert exchange.parameters.colluding >= 1
    exchange.masked()
    for group, survivors in ((TOLD_OF_ALL, names(5)), (TOLD_WITHOUT_THE_VICTIM, names(5)[1:])):
        with pytest.raises(SecureAggregationError, match=r"only 3 sites around .* consented to these survivors"):
            unmask_group(exchange, group, survivors)
