"""Survival curves over real sites in one process, openly and through a secure sum, beside those of the pooled rows."""

import numpy as np
import pytest

from fedclaw.errors import DataError, RoundError
from fedclaw.learning.statistics import survival_design
from fedclaw.learning.workload import schema_digest
from fedclaw.privacy.mechanisms.local_noise import OwnNoise
from fedclaw.privacy.survival_estimates import NoisedHistogram, curves, log_rank
from fedclaw.protocol.message_identity import assume_server_identity
from fedclaw.protocol.statistics import STATISTICS, StatisticsRequest, SurvivalQuestion
from fedclaw.protocol.terms import SecureRequest
from fedclaw.server.statistics import release_statistics, with_session
from fedclaw.server.statistics_release import read_release, write_release
from fedclaw.site.policy.policy import StatisticsAllowance
from fedclaw.site.statistics import statistics_vector
from fedclaw.transport.in_process import LocalGrid, open_sites
from tests.chance import scale_is_right
from tests.made_survival import make_survival_sites

QUESTION = SurvivalQuestion(time="days", event="outcome", event_level="dead", group="arm", bins=15, smallest=0)
SECURE = SecureRequest(dropouts=0.34, corrupt=0.0, largest_weight=1000)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_survival_sites(tmp_path_factory.mktemp("sites"), rows=300)


@pytest.fixture
def sites(made):
    assume_server_identity(1)
    return open_sites(made, "clinic")


class Watching(LocalGrid):
    """A server that keeps all answers that reach it."""

    def __init__(self, sites):
        super().__init__(sites, 1)
        self.seen = []

    def send_and_receive(self, messages, *, timeout=None):
        for reply in super().send_and_receive(messages, timeout=timeout):
            if reply.metadata.message_type == STATISTICS:
                self.seen.append(reply)
            yield reply


def released(sites, question=QUESTION, *, secure=None, minimum=2, epsilon=8.0, delta=1e-4, run="survival-1", **how):
    schema = next(iter(sites.values())).workload.schema
    request = StatisticsRequest(
        federation="clinic",
        run=run,
        cohort=len(sites),
        workload="tabular",
        schema_digest=schema_digest(schema.to_json()),
        columns=(),
        labels=False,
        bins=0,
        epsilon=epsilon,
        delta=delta,
        survival=question,
    )
    if secure is not None:
        request = with_session(request, sorted(sites), secure, survival_design(schema, question), minimum)
    grid = Watching(sites)
    nodes = sorted(grid.get_node_ids())
    return release_statistics(grid, nodes, schema, request, (), minimum=minimum, deadline=30, **how), grid


def pooled(sites, question=QUESTION):
    """What all rows together give, from the sites' own files."""
    design = survival_design(next(iter(sites.values())).workload.schema, question)
    return design, np.sum([statistics_vector(site, design) for site in sites.values()], axis=0)


@pytest.mark.parametrize("secure", [None, SECURE], ids=["open", "secure"])
def test_with_next_to_no_noise_the_curves_are_those_of_the_pooled_rows(sites, secure):
    """At epsilon 10^5 each cell's noise is some hundredths of a row."""
    release, _ = released(sites, secure=secure, epsilon=1e5)
    design, total = pooled(sites)
    exact = NoisedHistogram(design.cells(total), 0.0)
    told = release.survival
    assert list(told.groups) == ["old", "new"]
    assert told.ends == design.ends == tuple(200.0 * (bin_number + 1) for bin_number in range(15))
    for found, wanted in zip(told.groups.values(), curves(exact), strict=True):
        enough = sum(number > 50 for number in wanted.at_risk)
        assert len(found.survival) > enough > 6
        assert found.survival[:enough] == pytest.approx(wanted.survival[:enough], abs=0.01)
        assert found.at_risk[:enough] == pytest.approx(wanted.at_risk[:enough], abs=1)
        assert found.low[:enough] == pytest.approx(wanted.low[:enough], abs=0.03), "the rows' own chance is in the band"
    wanted = log_rank(exact)
    assert told.log_rank.statistic == pytest.approx(wanted.statistic, rel=0.02)
    assert told.log_rank.p_value <= 0.002 > wanted.p_value
    assert release.statistics.count.value == pytest.approx(total.sum(), abs=1)


def test_in_a_secure_sum_the_server_sees_masks_and_a_sum_with_one_sites_noise(sites):
    release, grid = released(sites, secure=SECURE, epsilon=2.0)
    assert len(grid.seen) == 3
    for reply in grid.seen:
        assert "sum" not in reply.content
        (vector,) = reply.content["masked"].values()
        assert vector.numpy().dtype == np.uint32
    assert (release.mechanism.placement, release.mechanism.trust) == ("secure sum", "aggregation")
    assert all(1.8 < receipt.epsilon_run <= 2.0 for receipt in release.sites.values())
    open_release, _ = released(sites, epsilon=2.0, run="survival-2")
    assert release.mechanism.deviation < 0.75 * open_release.mechanism.deviation


def test_the_noise_of_a_secure_sum_is_what_the_bands_are_made_for(sites, monkeypatch):
    """20 sums of 60 cells: a scale that is 15% off is 7 standard errors off."""
    seen = []

    def read(histogram, **how):
        seen.append(histogram)
        return curves(histogram, **how)

    monkeypatch.setattr("fedclaw.server.statistics.curves", read)
    design, total = pooled(sites)
    for number in range(20):
        release, _ = released(sites, secure=SECURE, epsilon=1.0, run=f"survival-{number}")
    noise = [histogram.cells - design.cells(total) for histogram in seen]
    (deviation,) = {histogram.deviation for histogram in seen}
    assert deviation == release.mechanism.deviation
    assert scale_is_right(noise, deviation)
    assert deviation == pytest.approx(OwnNoise.calibrated(1.0, 1e-4).noise_multiplier * np.sqrt(3 / 2), rel=0.02)


def test_where_secure_sums_are_required_survival_is_asked_in_one(sites):
    for site in sites.values():
        site.policy = site.policy.model_copy(update={"require_secure_aggregation": True})
    with pytest.raises(RoundError, match="requires secure aggregation"):
        released(sites)
    release, _ = released(sites, secure=SECURE, minimum=3, run="survival-2")
    assert len(release.sites) == 3


def test_smallest_numbers_are_left_out_after_the_noise(sites):
    """Whoever is at risk: the same question at another smallest number is cut by the noised numbers alone."""
    careful, _ = released(sites, QUESTION.model_copy(update={"smallest": 60.0}), epsilon=20.0)
    open_hearted, _ = released(sites, epsilon=20.0, run="survival-2")
    for group, curve in careful.survival.groups.items():
        assert min(curve.at_risk) >= 60
        assert len(curve.survival) < len(open_hearted.survival.groups[group].survival)


def test_a_site_without_the_permission_takes_no_part_and_pays_nothing(sites):
    wary = sites["east"]
    wary.policy = wary.policy.model_copy(update={"statistics": StatisticsAllowance(epsilon=8)})
    release, _ = released(sites)
    assert list(release.sites) == ["north", "south"]
    assert wary.ledger.spent(1e-3) == 0
    with pytest.raises(RoundError, match="does not say statistics: survival"):
        released(sites, minimum=3, run="survival-2")


def test_the_server_asks_nobody_what_the_schema_does_not_have(sites):
    with pytest.raises(DataError, match="no level 'gone'"):
        released(sites, QUESTION.model_copy(update={"event_level": "gone"}))
    assert all(site.ledger.spent(1e-3) == 0 for site in sites.values())


def test_a_release_is_written_and_read(sites, tmp_path):
    release, _ = released(sites, level=0.8)
    assert release.survival.level == 0.8
    write_release(tmp_path / "statistics.json", release)
    assert read_release(tmp_path / "statistics.json") == release
    assert "survival" in (tmp_path / "statistics.json").read_text()
    write_release(tmp_path / "other.json", release.model_copy(update={"survival": None}))
    assert "survival" not in (tmp_path / "other.json").read_text().replace("survival-1", "")
