import json

import pytest

from fedclaw.errors import BundleError
from fedclaw.export.statement import Receipts, state
from fedclaw.privacy.claims import Claim, every_claim
from fedclaw.protocol.receipt import CentralReceipt
from fedclaw.protocol.terms import CentralNoise
from fedclaw.server.run_directory import ReleaseUse, Simulated, SiteReceipt


def training(by_site):
    return Receipts("demo", "training", by_site)


def test_states_every_figure_of_every_receipt(samples):
    statement = state([training(samples.private)], None, "none.")
    north, south = statement.sites
    cost = json.loads(north.runs[0].model_dump_json())
    expected = samples.raw_receipt.model_dump()
    assert cost.pop("epsilon") == expected.pop("epsilon_run")
    expected.pop("epsilon_left")
    assert {key: cost[key] for key in expected} == expected
    assert (cost["examples"], cost["run"]) == (120, "demo")
    assert (south.epsilon, south.delta) == (1.5, 2e-5)


def test_all_private_gives_one_bound_and_no_warning(samples):
    statement = state([training(samples.private)], None, "none.")
    assert statement.guarantee == "every site"
    assert statement.warnings == ()
    assert (statement.overall.epsilon, statement.overall.delta) == (2.0, 2e-5)
    assert "epsilon = 2 at delta = 2e-05" in statement.summary


def test_a_site_without_privacy_is_named_loudly_and_there_is_no_bound(samples):
    statement = state([training({**samples.private, "west": samples.bare})], None, "none.")
    assert statement.guarantee == "some sites"
    assert statement.overall is None
    assert statement.warnings[0].startswith("NO DIFFERENTIAL PRIVACY AT SITE west")
    assert "1 of 3 sites trained without differential privacy" in statement.summary
    assert [site.differential_privacy for site in statement.sites] == [True, True, False]
    assert statement.sites[2].epsilon is None


def of_a_simulation(by_site, **about):
    simulated = Simulated(clients=len(by_site), **about)
    return state([training(by_site)], None, "none.", simulated=simulated)


def test_a_simulation_says_that_it_is_one(samples):
    statement = of_a_simulation(samples.private)
    assert [warning.split(":")[0] for warning in statement.warnings] == ["SIMULATED"]
    assert (statement.guarantee, statement.overall.epsilon) == ("every site", 2.0)
    assert "keep no ledgers" in statement.source
    bare = of_a_simulation({**samples.private, "west": samples.bare})
    assert bare.guarantee == "some sites"
    assert bare.warnings[1].startswith("NO DIFFERENTIAL PRIVACY FOR 1 OF THE CLIENTS")


def test_noise_that_can_be_made_again_is_none(samples):
    statement = of_a_simulation(samples.private, repeatable_noise=True)
    assert (statement.guarantee, statement.overall) == ("no site", None)
    assert "whoever knows that can subtract it" in statement.warnings[1]
    assert [site.epsilon for site in statement.sites] == [None, None]


def test_no_site_with_privacy(samples):
    statement = state([training({"west": samples.bare})], None, "none.")
    assert statement.guarantee == "no site"
    assert "carries no privacy guarantee" in statement.summary


def test_a_last_round_with_noise_does_not_hide_an_earlier_one_without(samples):
    mixed = SiteReceipt(examples=10, receipt=samples.receipt(epsilon_run=None, epsilon_lifetime=None))
    assert state([training({"west": mixed})], None, "none.").guarantee == "no site"


@pytest.mark.parametrize("sites", [[], [()], [("north",), ()]])
def test_missing_receipts_are_unknown_not_private(samples, sites):
    runs = [training({name: samples.private[name] for name in names}) for names in sites]
    statement = state(runs, None, "none.")
    assert statement.guarantee == "unknown"
    assert statement.overall is None
    assert "NO RECEIPTS" in statement.warnings[0]


def test_recovery_at_the_sites_adds_up(samples):
    more = {"north": SiteReceipt(examples=120, receipt=samples.receipt(epsilon_run=0.5, delta=1e-6))}
    statement = state(
        [training(samples.private), Receipts("demo-recovery", "recovery after pruning", more)], None, "sites."
    )
    north, south = statement.sites
    assert north.epsilon == 2.5
    assert north.delta == pytest.approx(1.1e-5)
    assert [cost.run for cost in north.runs] == ["demo", "demo-recovery"]
    assert south.epsilon == 1.5
    assert statement.overall.epsilon == 2.5


def test_recovery_without_privacy_takes_the_guarantee_away(samples):
    statement = state(
        [training(samples.private), Receipts("r", "recovery after pruning", {"north": samples.bare})], None, "sites."
    )
    assert statement.guarantee == "some sites"
    assert "AT SITE north" in statement.warnings[0]


def test_preprocessing_from_the_sites_data_is_said(samples):
    statement = state([training(samples.private)], None, "none.", data_dependent=True)
    assert statement.warnings[0].startswith("PREPROCESSING IS NOT COVERED")


def test_the_release_that_the_constants_come_from_counts(samples):
    plain = state([training(samples.private)], None, "none.")
    used = ReleaseUse(run="statistics-1", epsilon=1.5, delta=1e-6)
    statement = state([training(samples.private)], None, "none.", statistics=used)
    assert statement.overall.epsilon == pytest.approx(plain.overall.epsilon + 1.5)
    assert statement.overall.delta == pytest.approx(plain.overall.delta + 1e-6)
    assert f"{statement.overall.epsilon:.4g}" in statement.summary
    assert statement.statistics == used


def test_the_releases_that_the_compression_looked_at_count_and_each_once(samples):
    plain = state([training(samples.private)], None, "none.")
    constants = ReleaseUse(run="statistics-1", epsilon=1.5, delta=1e-6)
    further = ReleaseUse(run="statistics-2", epsilon=0.25, delta=1e-6, relation="add-or-remove")
    statement = state(
        [training(samples.private)],
        None,
        "recovered.",
        statistics=constants,
        compression_statistics=(constants, further),
    )
    assert statement.overall.epsilon == pytest.approx(plain.overall.epsilon + 1.75)
    assert statement.overall.delta == pytest.approx(plain.overall.delta + 2e-6)
    assert statement.compression_statistics == (constants, further)


def test_a_guarantee_that_counts_on_secret_cohorts_is_taken_back_towards_readers(samples):
    central = CentralNoise(
        unit="site", noise_by="server", epsilon=2, delta=1e-5, clip=1, noise_multiplier=3, sample_rate=0.2
    )
    statement = state([training(samples.private)], None, "none.", central=central)
    assert any("does not hold towards readers" in warning for warning in statement.warnings)
    assert statement.requested_central == central


def of_unit(samples, unit, **told):
    return {
        name: SiteReceipt(examples=item.examples, receipt=item.receipt.model_copy(update={"unit": unit, **told}))
        for name, item in samples.private.items()
    }


@pytest.mark.parametrize("claim", [claim for claim in every_claim() if claim.unit != "site"], ids=str)
def test_it_says_the_sentences_of_what_its_sites_claim(samples, claim):
    bare = {"epsilon_run": None, "mechanism": "none"} if claim.trust == "everybody" else {}
    by_site = of_unit(samples, claim.unit, relation=claim.relation, trust=claim.trust, **bare)
    statement = state([training(by_site)], None, "none.", unit=claim.unit)
    assert (statement.unit, statement.holds_against) == (claim.protects, claim.against)
    told = Claim(claim.unit, "zero-out" if bare else claim.relation)
    assert statement.not_covered == told.not_covered
    assert f"{claim.unit}-level differential privacy" in statement.summary or bare


def test_the_bound_over_all_sites_names_the_weakest_relation_and_trust(samples):
    by_site = of_unit(samples, "example", relation="add-or-remove")
    assert state([training(by_site)], None, "none.").unit == Claim("example", "add-or-remove").protects
    by_site["south"] = samples.private["south"]
    weaker = {"trust": "aggregation"}
    by_site["north"] = SiteReceipt(examples=9, receipt=by_site["north"].receipt.model_copy(update=weaker))
    statement = state([training(by_site)], None, "none.")
    claim = Claim("example", "zero-out", "aggregation")
    assert (statement.unit, statement.holds_against) == (claim.protects, claim.against)
    used = ReleaseUse(run="statistics-1", epsilon=1.5, delta=1e-6, relation="zero-out", trust="aggregation")
    statement = state([training(of_unit(samples, "example", relation="add-or-remove"))], None, "", statistics=used)
    assert (statement.unit, statement.holds_against) == (claim.protects, claim.against), "a release is in the bound"


def test_noise_for_whole_sites_says_so_beside_the_ledgers_unit(samples):
    noise = CentralReceipt(unit="site", noise_by="sites", epsilon=2, delta=1e-5)
    statement = state([training(of_unit(samples, "example", central=noise, trust="aggregation"))], None, "none.")
    whole = Claim("site", "zero-out", "aggregation")
    assert statement.unit == f"{Claim().protects} {whole.protects} {whole.against}"


def test_receipts_of_another_unit_than_the_schemas_make_no_statement(samples):
    mixed = {**samples.private, "south": of_unit(samples, "person")["south"]}
    for unit in ("example", "person"):
        with pytest.raises(BundleError, match=f"schema makes it {unit}"):
            state([training(mixed)], None, "none.", unit=unit)


def test_a_ledger_that_was_lost_is_said(samples):
    name, entry = sorted(samples.private.items())[0]
    lost = entry.model_copy(update={"receipt": entry.receipt.model_copy(update={"ledger_losses": 1})})
    statement = state([training(samples.private | {name: lost})], None, "none.")
    (warning,) = statement.warnings
    assert warning.startswith(f"AT {name} THE LEDGER WAS LOST")
