"""Statistics through secure aggregation: the server sees a sum that has its noise, and nothing before it."""

import numpy as np
import pytest
import yaml

from fedclaw.errors import RoundError, UsageError
from fedclaw.learning.statistics import design_of
from fedclaw.privacy.mechanisms.local_noise import OwnNoise
from fedclaw.privacy.statistics import estimate
from fedclaw.protocol.message_identity import assume_server_identity
from fedclaw.protocol.statistics import STATISTICS
from fedclaw.protocol.terms import SecureRequest
from fedclaw.server.statistics import release_statistics, with_session
from fedclaw.site.statistics import statistics_vector
from fedclaw.transport.in_process import LocalGrid, open_sites
from tests.made_tables import make_sites
from tests.server.test_statistics import QUANTILES, request_for, schema_of

SECURE = SecureRequest(dropouts=0.25, corrupt=0.0, largest_weight=1000)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_sites(tmp_path_factory.mktemp("sites"), epsilon=None, require_secure_aggregation=True)


@pytest.fixture
def sites(made):
    return open_sites(made.directories, "clinic")


class Watching(LocalGrid):
    """A server that keeps all that reaches it; sites in `lost` do not answer the question itself."""

    def __init__(self, sites, lost=()):
        super().__init__(sites, 1)
        self.seen, self.lost = [], lost

    def send_and_receive(self, messages, *, timeout=None):
        for reply in super().send_and_receive(messages, timeout=timeout):
            name = self.site_name(reply.metadata.src_node_id)
            if reply.metadata.message_type == STATISTICS and name in self.lost:
                continue
            self.seen.append((name, reply))
            yield reply


def released(sites, *, secure=SECURE, lost=(), minimum=3, **changes):
    assume_server_identity(1)
    grid = Watching(sites, lost)
    request = request_for(sites, **changes)
    design = design_of(schema_of(sites), request.columns, request.labels, request.bins)
    asked = with_session(request, sorted(sites), secure, design, minimum)
    nodes = sorted(grid.get_node_ids())
    release = release_statistics(grid, nodes, schema_of(sites), asked, QUANTILES, minimum=minimum, deadline=10)
    return release, grid


def test_the_sum_is_right_and_costs_what_was_asked_while_the_server_sees_masks(made, sites):
    release, grid = released(sites, epsilon=2.0)
    told = release.statistics
    assert told.columns["dose"].mean.value == pytest.approx(made.dose.mean(), abs=6 * told.columns["dose"].mean.error)
    assert told.count.value == pytest.approx(800, abs=6 * told.count.error)
    assert release.mechanism.trust == "aggregation"
    for name, receipt in release.sites.items():
        assert 1.8 < receipt.epsilon_run <= 2.0
        assert receipt.trust == "aggregation"
        assert sites[name].ledger.rounds("statistics-1") == 1
    masked = [reply for _, reply in grid.seen if reply.metadata.message_type == STATISTICS]
    assert len(masked) == 4
    for reply in masked:
        assert "sum" not in reply.content
        (vector,) = reply.content["masked"].values()
        assert vector.numpy().dtype == np.uint32


def test_the_noise_of_the_sum_is_that_of_one_site_alone_not_of_all(sites, monkeypatch):
    """4 sites' shares, of which one may drop out; 40 sums of 144 numbers: the right scale is within 6% (6.4 errors)."""
    request = request_for(sites)
    design = design_of(schema_of(sites), request.columns, True, request.bins)
    exact = np.sum([statistics_vector(site, design) for site in sites.values()], axis=0)
    totals = []

    def read(*given, **options):
        totals.append(given[1])
        return estimate(*given, **options)

    monkeypatch.setattr("fedclaw.server.statistics.estimate", read)
    for number in range(40):
        release, _ = released(sites, run=f"statistics-{number}", epsilon=1.0)
    noise = np.array(totals) - exact
    said = release.mechanism.deviation
    assert noise.shape == (40, 144)
    assert np.std(noise) == pytest.approx(said, rel=0.06)
    assert abs(noise.mean()) < 6 * said / np.sqrt(noise.size)
    assert said == pytest.approx(OwnNoise.calibrated(1.0, 1e-4).noise_multiplier * np.sqrt(4 / 3), rel=0.02)


def test_a_site_that_drops_out_leaves_a_sum_with_enough_noise(sites):
    release, _ = released(sites, lost=("south",))
    assert list(release.sites) == ["east", "north", "west"]
    assert release.mechanism.deviation == pytest.approx(OwnNoise.calibrated(8.0, 1e-4).noise_multiplier, rel=0.02)
    assert release.statistics.count.value == pytest.approx(600, abs=40)


def test_too_many_drop_outs_give_nothing_and_are_paid_for(sites):
    with pytest.raises(RoundError, match=r"0 sites sent statistics, 3 are needed.*have paid"):
        released(sites, lost=("south", "west"))
    assert sites["north"].ledger.spent(1e-3) > 0


def test_a_site_with_more_examples_than_the_sum_is_made_for_takes_no_part_and_pays_nothing(sites):
    with pytest.raises(RoundError, match="at most 100 examples"):
        released(sites, secure=SECURE.model_copy(update={"largest_weight": 100}))
    assert all(site.ledger.spent(1e-3) == 0 for site in sites.values())


def test_noise_that_counts_on_more_sites_than_the_policy_does_is_refused(sites):
    for site in sites.values():
        site.policy = site.policy.model_copy(update={"assumed_dishonest": 0.6})
    with pytest.raises(RoundError, match="dishonest"):
        released(sites)
    for site in sites.values():
        site.policy = site.policy.model_copy(update={"assumed_dishonest": 0.0, "minimum_cohort": 5})
    with pytest.raises(RoundError):
        released(sites)
    assert all(site.ledger.spent(1e-3) == 0 for site in sites.values())


def test_settings_that_have_no_safe_sum_are_wrong_use(sites):
    with pytest.raises(UsageError, match="largest_weight is not set"):
        released(sites, secure=SecureRequest())
    with pytest.raises(UsageError, match="ask fewer at a time"):
        released(sites, secure=SECURE.model_copy(update={"largest_weight": 1e9}))


def test_in_the_clear_is_refused_where_secure_aggregation_is_required(sites):
    assume_server_identity(1)
    grid = LocalGrid(sites, 1)
    with pytest.raises(RoundError, match="requires secure aggregation"):
        release_statistics(
            grid, sorted(grid.get_node_ids()), schema_of(sites), request_for(sites), (), minimum=2, deadline=10
        )


def test_more_noise_than_32_bits_hold_is_a_wrong_setting(made, sites):
    """At such an epsilon the sum would leave its range now and then, and come back as another number."""
    with pytest.raises(UsageError, match="so much noise"):
        released(sites, secure=SECURE.model_copy(update={"largest_weight": 2.0}), epsilon=2e-4, delta=1e-9)


def of_persons(root):
    """Site directories in which two rows, one after the other, are of one person, and both are used."""
    made = make_sites(root, epsilon=None)
    for directory in made.directories:
        for name in ("train", "test"):
            path = directory / f"{name}.csv"
            header, *rows = path.read_text().splitlines()
            persons = [f"{name}-{number // 2},{row}" for number, row in enumerate(rows)]
            path.write_text("\n".join([f"patient,{header}", *persons, ""]))
        schema = yaml.safe_load((directory / "schema.yaml").read_text())
        (directory / "schema.yaml").write_text(yaml.safe_dump({**schema, "person": "patient", "rows_per_person": 2}))
    return made, open_sites(made.directories, "clinic")


def test_a_sum_over_persons_has_noise_for_all_rows_of_one(tmp_path):
    """Room for twice as many rows as there are persons, and a deviation for two of them."""
    made, sites = of_persons(tmp_path)
    release, _ = released(sites, epsilon=2.0)
    assert (release.rows_per_person, release.mechanism.sensitivity) == (2, 2.0)
    assert {receipt.unit for receipt in release.sites.values()} == {"person"}
    assert "person" in release.unit
    told = release.statistics
    assert told.count.value == pytest.approx(800, abs=6 * told.count.error)
    assert told.columns["dose"].mean.value == pytest.approx(made.dose.mean(), abs=6 * told.columns["dose"].mean.error)
    multiplier = min(receipt.noise_multiplier for receipt in release.sites.values())
    # Shares of the sites make up the noise; each by itself has less than what its receipt counts on.
    assert release.mechanism.deviation >= 2 * multiplier
