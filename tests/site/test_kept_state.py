"""What a site keeps from round to round has no place under another mechanism, strategy or name than made it."""

from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message

from fedclaw.errors import CheckpointError
from fedclaw.protocol.arrays import unpack
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.protocol.terms import TopK
from fedclaw.site.service import SiteService
from fedclaw.site.state import SiteStates
from tests.hostile import DP, SITE, ask, wary_site
from tests.states import before, keep, newest

OPEN = {"allow_training_without_privacy": True, "epsilon": None}
NONE, LOCAL, SUMMED = {"privacy": None}, {"privacy": DP}, {"privacy": None, "central": SITE}


def accepted(reply: Message) -> Message:
    assert not reply.has_error(), reply.error.reason
    return reply


def refused(reply: Message, code: RefusalCode = RefusalCode.STRATEGY) -> str:
    assert reply.has_error(), "the site took part"
    assert RefusalCode(reply.error.code) is code, reply.error.reason
    return reply.error.reason


def paid(site: SiteService) -> int:
    return site.ledger.rounds("run-1")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("scaffold", NONE), ("scaffold", LOCAL)),
        (("feddyn", NONE), ("feddyn", LOCAL)),
        (("fedper", NONE), ("fedper", LOCAL)),
        (("fedper", SUMMED), ("fedper", LOCAL)),
        (("fedper", SUMMED), ("fedper", NONE)),
        (("fedper", LOCAL), ("fedper", SUMMED)),
        (("ditto", LOCAL), ("fedper", LOCAL)),
        (("fedper", LOCAL), ("fedrep", LOCAL)),
        (("ditto", LOCAL), ("fedavg", LOCAL)),
        (("scaffold", LOCAL), ("fedavg", LOCAL)),
        (("scaffold", LOCAL), ("feddyn", LOCAL)),
        (("scaffold", LOCAL), ("scaffold", {**LOCAL, "weighting": "uniform"})),
        (("fedper", LOCAL), ("fedper", {**LOCAL, "settings": {"head": ["head.weight"]}})),
        (("fedper", LOCAL), ("fedper", {**LOCAL, "model": "normed"})),
    ],
)
def test_a_round_under_other_terms_than_made_the_state_is_refused(first, second) -> None:
    """Nothing is paid for it, the state is as it was, and the run goes on under its own terms."""
    site = wary_site(**OPEN)
    accepted(ask(site, first[0], **first[1]))
    kept = newest(site.states, "clinic", "run-1")
    reason = refused(ask(site, second[0], **second[1], round=2))
    assert "was made under" in reason
    assert "begin another" in reason
    assert paid(site) == 1
    assert newest(site.states, "clinic", "run-1") is kept
    accepted(ask(site, first[0], **first[1], round=2))
    accepted(ask(site, second[0], **second[1], round=2, run="another run"))


def test_a_run_that_begins_again_begins_with_nothing(tmp_path: Path) -> None:
    """Round 1 is a new beginning under whatever name; what the old run left is gone."""
    site = wary_site(tmp_path, **OPEN)
    accepted(ask(site, "scaffold", **NONE))
    accepted(ask(site, "scaffold", **LOCAL))
    found = site.states.find("clinic", "run-1")
    assert found is not None
    assert found.made is not None
    assert found.made.local
    assert found.before == {}
    accepted(ask(site, "scaffold", **LOCAL, round=2))
    refused(ask(site, "scaffold", **NONE, round=2))


def test_a_clipping_bound_that_moves_is_no_other_mechanism() -> None:
    site = wary_site(**OPEN)
    moving = {"adaptive": {"count_noise": 10.0}, "noise_multiplier": 1.0}
    for number, clip in enumerate((1.0, 0.8, 0.7), 1):
        bound = SITE.model_validate({**SITE.model_dump(), **moving, "clip": clip})
        accepted(ask(site, "fedper", privacy=None, central=bound, weighting="uniform", round=number))


def test_a_memory_of_compression_alone_begins_anew() -> None:
    site = wary_site(**OPEN)
    topk = TopK(method="topk", fraction=0.2)
    accepted(ask(site, "fedavg", **NONE, compression=topk))
    assert newest(site.states, "clinic", "run-1")
    accepted(ask(site, "fedavg", **LOCAL, compression=topk, round=2))
    found = site.states.find("clinic", "run-1")
    assert found is not None
    assert found.before == {}
    assert found.made is not None
    assert found.made.local


def test_what_an_earlier_version_kept_opens_and_enters_no_private_round(tmp_path: Path) -> None:
    """It did not note what noise covers it."""
    site = wary_site(tmp_path, **OPEN)
    accepted(ask(site, "fedper", **LOCAL))
    kept = newest(site.states, "clinic", "run-1")
    keep(SiteStates(tmp_path), "clinic", "run-1", 1, kept)
    assert set(before(SiteStates(tmp_path), "clinic", "run-1", 2)) == set(kept)
    for noise in (LOCAL, SUMMED):
        assert "earlier version" in refused(ask(site, "fedper", **noise, round=2))
    accepted(ask(site, "fedper", **NONE, round=2))
    found = site.states.find("clinic", "run-1")
    assert found is not None
    assert set(found.before) == set(kept)


def test_what_was_made_is_kept_with_the_state_over_a_restart(tmp_path: Path) -> None:
    accepted(ask(wary_site(tmp_path, **OPEN), "scaffold", **NONE))
    refused(ask(wary_site(tmp_path, **OPEN), "scaffold", **LOCAL, round=2))
    accepted(ask(wary_site(tmp_path, **OPEN), "scaffold", **NONE, round=2))
    (path,) = tmp_path.iterdir()
    with np.load(path) as archive:
        arrays = dict(archive)
    np.savez(path, **{**arrays, "made": np.array('{"strategy": "scaffold"}')})
    with pytest.raises(CheckpointError, match="damaged"):
        newest(SiteStates(tmp_path), "clinic", "run-1")


@pytest.mark.parametrize(
    ("strategy", "noise"), [("ditto", LOCAL), ("fedper", SUMMED), ("fedbn", {**SUMMED, "model": "normed"})]
)
def test_metrics_of_a_model_that_no_noise_covers_do_not_leave(strategy: str, noise: dict) -> None:
    site = wary_site()
    accepted(ask(site, strategy, "evaluate", **noise))
    accepted(ask(site, strategy, **noise))
    for claimed in (noise, {**noise, **LOCAL, "central": None}):
        assert "trained without noise" in refused(ask(site, strategy, "evaluate", **claimed), RefusalCode.METRICS)
    noised = {"metrics_epsilon": 1.0, "metrics_budget": {"epsilon": 5.0}}
    site.policy = site.policy.model_validate({**site.policy.model_dump(), **noised})
    refused(ask(site, strategy, "evaluate", **noise), RefusalCode.METRICS)
    site.policy = site.policy.model_copy(
        update={"metrics_epsilon": None, "metrics_budget": None, "allow_metrics_of_own_models": True}
    )
    accepted(ask(site, strategy, "evaluate", **noise))


def test_metrics_of_a_model_whose_own_part_is_noised_as_the_rest_leave() -> None:
    site = wary_site()
    accepted(ask(site, "fedper", **LOCAL))
    before = accepted(ask(site, "fedper", "evaluate", **LOCAL)).content["metrics"]
    own = newest(site.states, "clinic", "run-1")["personal"]
    assert set(own) == {"head.weight", "head.bias"}
    sent = accepted(ask(site, "fedavg", "evaluate", **LOCAL)).content["metrics"]
    assert before != sent, "it was evaluated with its own head"
    refused(ask(site, "ditto", "evaluate", **LOCAL))


def test_metrics_of_an_old_state_need_the_clause(tmp_path: Path) -> None:
    site = wary_site(tmp_path)
    accepted(ask(site, "fedper", **LOCAL))
    keep(SiteStates(tmp_path), "clinic", "run-1", 1, newest(site.states, "clinic", "run-1"))
    refused(ask(site, "fedper", "evaluate", **LOCAL), RefusalCode.METRICS)


def test_what_a_first_round_left_does_not_leave_in_a_second() -> None:
    """A round without noise, then one under local noise that takes next to no step but along what was kept."""
    site = wary_site(**OPEN)
    accepted(ask(site, "feddyn", **NONE, settings={"alpha": 0.5}))
    tiny = {"steps": 1, "batch_size": 4, "learning_rate": 1e-6}
    reply = ask(site, "feddyn", **LOCAL, settings={"alpha": 9e5}, training=tiny, round=2)
    if not reply.has_error():
        kept = site.states.find("clinic", "run-1").before["moved"]
        both = [[array.reshape(-1) for _, array in sorted(a.items())] for a in (unpack(reply.content["sum"]), kept)]
        correlation = np.corrcoef(*map(np.concatenate, both))[0, 1]
        pytest.fail(f"the raw step of the first round left in the second: correlation {correlation:.6f}")
