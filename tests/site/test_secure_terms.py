"""What a site refuses of a secure sum's terms, before it shares a key.

Fields that contradict each other, and sums whose parts the server could know beforehand.
"""

import numpy as np
import pytest
from flwr.app import Message

from fedclaw.errors import RoundError, UsageError
from fedclaw.learning.workload import Table
from fedclaw.privacy.secure_aggregation.parameters import complete_graph, neighbours_needed
from fedclaw.protocol.message_identity import assume_server_identity
from fedclaw.protocol.messages import KEYS
from fedclaw.protocol.questions import Outgoing, question, questions
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.protocol.terms import (
    CentralNoise,
    LocalTraining,
    ModelSpec,
    PrivacyRequest,
    SecureAggregation,
    SecureRequest,
)
from fedclaw.server.coordinator import run_rounds
from fedclaw.server.early_checks import check_combination
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.session import make_plan, make_strategy
from fedclaw.site.service import SiteService
from fedclaw.transport.in_process import LocalGrid
from tests.least_squares import asked, identified, service
from tests.small_nets import SmallNets, first

DP = PrivacyRequest(epsilon=4, delta=1e-5, max_grad_norm=1)
STEPS = LocalTraining(steps=3, batch_size=4, learning_rate=0.1)
BY_SITES = CentralNoise(unit="site", noise_by="sites", epsilon=3, delta=1e-5, clip=1, noise_multiplier=2, sample_rate=1)
MANY = ("a", *(f"site-{number:02d}" for number in range(99)))


def made(name: str) -> SiteService:
    generator = np.random.default_rng(3)
    table = Table(generator.normal(size=(20, 3)).astype(np.float32), (np.arange(20) % 2).astype(np.int64))
    return service(name, SmallNets(3), table, test=table)


@pytest.fixture
def site() -> SiteService:
    assume_server_identity(1)
    here = made("a")
    identified({"a": here})
    return here


def session(sites: tuple[str, ...] = ("a", "b", "c"), **changes: object) -> SecureAggregation:
    topology = complete_graph(len(sites), 0)
    fields = {
        "session": "0" * 32,
        "sites": sites,
        "threshold": topology.threshold,
        "neighbours": topology.neighbours,
        "minimum": len(sites),
        "length": 9,
        "step": 2.0**-20,
        "value_range": 8.0,
        "largest_weight": 100.0,
    }
    return SecureAggregation.model_validate({**fields, **changes})


def ask(site: SiteService, strategy: str, model: str, secure: SecureAggregation, **changes: object) -> Message:
    record = asked(strategy, rounds=3, workload=SmallNets.name, model=ModelSpec(name=model))
    chosen = make_strategy(record)
    plan = make_plan(record, chosen, 1, len(secure.sites))
    personal = tuple(sorted(chosen.personal(SmallNets(3).build(record.model))))
    fields = {"schema_digest": site.schema_digest, "personal": personal, "training": STEPS, "secure": secure}
    plan = plan.model_validate({**plan.model_dump(), **fields, **changes})
    (message,) = questions([7], plan.round, KEYS, question(plan, Outgoing(first(model, 3))), 100.0)
    return site.answer(message)


PERSONAL = [("fedper", "parted"), ("fedrep", "parted"), ("fedbn", "normed")]


@pytest.mark.parametrize(("strategy", "model"), PERSONAL)
def test_parameters_that_each_site_brings_itself_are_in_no_sum_without_noise(
    site: SiteService, strategy: str, model: str
) -> None:
    """A dead head, given to the others in an earlier round, made their parts exactly 0: the sum was one site's."""
    reply = ask(site, strategy, model, session())
    assert RefusalCode(reply.error.code) is RefusalCode.STRATEGY
    assert "a sum could be one site's update" in reply.error.reason
    assert not ask(site, strategy, model, session(), privacy=DP).has_error()
    assert not ask(site, "fedavg", model, session()).has_error()


@pytest.mark.parametrize(("strategy", "model"), PERSONAL)
def test_a_server_is_told_so_at_the_start(strategy: str, model: str) -> None:
    secure = SecureRequest(largest_weight=9)
    record = asked(strategy, rounds=1, workload=SmallNets.name, model=ModelSpec(name=model), secure=secure)
    built = SmallNets(3).build(record.model)
    with pytest.raises(UsageError, match="a sum could be one site's update"):
        check_combination(record, make_strategy(record), built)
    check_combination(record.model_copy(update={"privacy": DP}), make_strategy(record), built)
    check_combination(record.model_copy(update={"secure": None}), make_strategy(record), built)


def test_a_range_of_values_lets_no_site_that_brings_noise_into_a_sparse_graph(site: SiteService) -> None:
    """Noise by the sites counts on all of them being in one sum; the range is what sums without it are told by."""
    sparse = neighbours_needed(len(MANY), 5, 0)
    assert sparse.neighbours < len(MANY) - 1
    changes = {"threshold": sparse.threshold, "neighbours": sparse.neighbours, "tolerated": 5, "minimum": 95}
    fields = {"central": BY_SITES, "weighting": "uniform", "privacy": None}
    reply = ask(site, "fedavg", "parted", session(MANY, **changes), **fields)
    assert RefusalCode(reply.error.code) is RefusalCode.SECURE_AGGREGATION
    assert "that is not enough" in reply.error.reason
    # Without noise it is what an honest server asks for.
    assert not ask(site, "fedavg", "parted", session(MANY, **changes), privacy=None).has_error()


def test_a_range_of_values_and_noise_contradict_each_other(site: SiteService) -> None:
    fields = {"central": BY_SITES, "weighting": "uniform", "privacy": None}
    reply = ask(site, "fedavg", "parted", session(), **fields)
    assert RefusalCode(reply.error.code) is RefusalCode.SECURE_AGGREGATION
    assert "only one can be meant" in reply.error.reason
    assert not ask(site, "fedavg", "parted", session(value_range=None), **fields).has_error()
    reply = ask(site, "fedavg", "parted", session(value_range=None), privacy=None)
    assert "needs a range of values" in reply.error.reason


def test_an_update_that_could_hide_nobody_is_not_added(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    """Parameters at which training diverges leave every site with a known constant."""
    assume_server_identity(1)
    sites = {name: made(name) for name in ("a", "b", "c")}
    identified(sites)
    record = asked(
        "fedavg",
        rounds=1,
        workload=SmallNets.name,
        model=ModelSpec(name="parted"),
        training=STEPS,
        secure=SecureRequest(dropouts=0, corrupt=0, largest_weight=100),
    )
    dead = {name: np.full_like(array, 3e37) for name, array in first("parted", 3).items()}
    with pytest.raises(RoundError, match="could not hide the other sites' updates"):
        run_rounds(LocalGrid(sites, 1), RunDirectory.create(tmp_path / "run", record), dead)
