"""Each fault is planted from outside, as a wrong piece of the product, and found; without one, nothing is.

The probability of a false alarm is set to 1e-7 for honest configurations. A fault has to be found at the usual 1e-4.
"""

from functools import partial

import numpy as np
import pytest

from fedclaw.audit.findings import AuditOptions, conclude
from fedclaw.audit.run import audit_run, probe_mechanisms
from fedclaw.privacy import distributed, steps
from fedclaw.privacy import noise as noise_module
from fedclaw.privacy.mechanisms import shared_noise, sum_noise
from fedclaw.privacy.mechanisms.sum_noise import ServerNoise
from fedclaw.privacy.noise import GaussianSource
from fedclaw.privacy.steps import PrivateGradients
from tests.audit.conftest import MODES

QUICK = AuditOptions(trials=40, canaries=40, examples=20, attacked_rounds=1)
SURE = QUICK.model_copy(update={"alarm": 1e-7, "confidence": 1 - 1e-7})
LONGER = QUICK.model_copy(update={"trials": 200})


def audited(subject, options=QUICK):
    """The probes of an audit; a whole run tells less, and takes longer."""
    findings = probe_mechanisms(subject, options, np.random.default_rng(1))
    epsilon = (subject.settings.privacy or subject.settings.central).epsilon
    risks = {"confidence": options.confidence, "alarm": options.alarm}
    return conclude(findings, epsilon=epsilon, delta=1e-3, **risks)


def flagged(report):
    return {check.name for check in report.flagged}


@pytest.fixture
def noise(monkeypatch):
    """Scale all noise that is added to anything, and leave sampling alone."""
    real, share = GaussianSource.perturb_, distributed.with_noise

    def scale(factor):
        def with_noise(encoded, sigma, source):
            return share(encoded, factor * sigma, source) if factor else encoded

        monkeypatch.setattr(GaussianSource, "perturb_", lambda self, values, std: real(self, values, factor * std))
        monkeypatch.setattr(distributed, "with_noise", with_noise)

    return scale


@pytest.mark.parametrize(("mode", "epsilon"), [*((mode, 0.7) for mode in MODES), ("local", 8.0), ("central-site", 8.0)])
def test_an_honest_configuration_stays_below_its_claim(subject, mode, epsilon):
    placement = "privacy" if mode == "local" else "central"
    asked = dict(MODES[mode].get("central") or {"delta": 1e-3, "max_grad_norm": 1.0})
    chosen = subject(mode, **{placement: {**asked, "epsilon": epsilon}})
    report = audit_run(chosen.settings, chosen.sites, SURE)
    assert not report.flagged
    assert report.epsilon_claimed == epsilon
    assert all(check.epsilon_lower < epsilon for check in report.checks)
    scale = next(check for check in report.checks if check.name == "noise scale")
    assert scale.epsilon_lower > 0.6 * epsilon
    """The bound has teeth: the measurement is close to the claim."""


@pytest.mark.parametrize("mode", MODES)
def test_noise_off_is_flagged(subject, noise, mode):
    noise(0.0)
    report = audited(subject(mode))
    assert {"canary guesses", "noise scale"} <= flagged(report)
    assert report.epsilon_lower > 3


@pytest.mark.parametrize("mode", ["local", "central-site", "distributed-example"])
def test_noise_at_half_scale_is_flagged(subject, noise, mode):
    noise(0.5)
    assert "noise scale" in flagged(audited(subject(mode)))


def test_noise_a_tenth_too_small_is_flagged(subject, noise):
    noise(0.9)
    assert "noise scale" in flagged(audited(subject(), LONGER))


def test_half_the_noise_shows_in_guesses_alone(subject, noise):
    """Without any assumption on the noise's shape, in as many trials as that takes."""
    noise(0.5)
    chosen = subject(privacy={"epsilon": 8, "delta": 1e-3, "max_grad_norm": 1.0})
    report = audited(chosen, QUICK.model_copy(update={"trials": 1000}))
    assert "canary guesses" in flagged(report)
    assert report.epsilon_lower > 8


def test_clipping_off_in_a_private_step_is_flagged(subject, monkeypatch):
    """The same noise as ever, and gradients of whatever length they have."""

    class Unclipped(PrivateGradients):
        def __init__(self, model, loss, *, max_grad_norm, noise_multiplier, **others):
            super().__init__(
                model, loss, max_grad_norm=1e6 * max_grad_norm, noise_multiplier=noise_multiplier / 1e6, **others
            )

    monkeypatch.setattr(steps, "PrivateGradients", Unclipped)
    for mode in ("local", "central-example"):
        # How long a gradient is without a bound differs, and the guesses with it: one audit in some twenty or fewer
        # does not see it in them.
        names = [flagged(audited(subject(mode), LONGER))]
        while "canary guesses" not in names[-1] and len(names) < 3:
            names.append(flagged(audited(subject(mode), LONGER)))
        assert all("canary size" in found for found in names)
        assert "canary guesses" in names[-1]


def test_clipping_off_at_the_site_is_flagged(subject, monkeypatch):
    monkeypatch.setattr(sum_noise, "clip_to", lambda *_: 0.0)
    assert {"canary size", "canary guesses"} <= flagged(audited(subject("central-site"), LONGER))


def test_a_clipping_bound_that_is_half_as_large_again_is_flagged(subject, monkeypatch):
    real = sum_noise.clip_to
    monkeypatch.setattr(sum_noise, "clip_to", lambda arrays, bound: real(arrays, 1.5 * bound))
    report = audited(
        subject("central-site", central={**MODES["central-site"]["central"], "epsilon": 40}),
        LONGER,
    )
    assert "canary size" in flagged(report)


def test_one_seed_for_all_sites_is_flagged(subject):
    chosen = subject()
    for site in chosen.sites.values():
        site.source = GaussianSource(insecure_fixed_key_for_tests=bytes(32))
    assert flagged(audited(chosen, SURE)) == {"shared noise"}


def test_one_seed_at_different_places_of_its_stream_is_flagged(subject):
    """A site that has drawn more before stands elsewhere in the same stream."""
    chosen = subject(workload={**subject().settings.workload.model_dump(), "model": {"name": "mlp", "args": None}})
    for place, site in enumerate(chosen.sites.values()):
        site.source = GaussianSource(insecure_fixed_key_for_tests=bytes(32))
        site.source.words(place)
    assert "shared noise" in flagged(audited(chosen))


@pytest.mark.parametrize("mode", ["central-site", "central-example"])
def test_the_same_noise_in_every_round_is_flagged(subject, monkeypatch, mode):
    monkeypatch.setattr(noise_module, "GaussianSource", partial(GaussianSource, insecure_fixed_key_for_tests=bytes(32)))
    assert "shared noise" in flagged(audited(subject(mode)))


@pytest.mark.parametrize("mode", ["distributed-site", "distributed-example"])
def test_one_seed_for_all_shares_is_flagged(subject, mode):
    """Four equal shares are one share times four, which is more noise for all but the sites."""
    chosen = subject(mode)
    for site in chosen.sites.values():
        site.source = GaussianSource(insecure_fixed_key_for_tests=bytes(32))
    assert "separate shares" in flagged(audited(chosen))


def test_shares_that_count_on_everybody_are_flagged(subject, monkeypatch):
    """One site may drop out and one may tell what it added: shares that forget it are too small."""
    real = shared_noise.share_noise
    monkeypatch.setattr(
        shared_noise, "share_noise", lambda *asked, **others: real(*asked, **{**others, "tolerated": 0, "colluding": 0})
    )
    assert "noise scale" in flagged(audited(subject("distributed-site")))


def test_a_sensitivity_of_c_over_n_is_flagged(subject, monkeypatch):
    """Four sites, of which one has three quarters of the examples: it moves the mean by 0.75 C, not by C / 4."""
    monkeypatch.setattr(ServerNoise, "mean_sensitivity", lambda mechanism, _mean: mechanism.clip / 4)
    report = audited(subject("central-site"), LONGER)
    assert {"noise scale", "canary guesses"} <= flagged(report)
    assert report.epsilon_lower > report.epsilon_claimed


def test_c_over_n_is_right_under_uniform_weights(subject, monkeypatch):
    monkeypatch.setattr(ServerNoise, "mean_sensitivity", lambda mechanism, _mean: mechanism.clip / 4)
    assert not audited(subject("central-site", weighting="uniform"), SURE).flagged


def test_an_adaptive_bound_keeps_its_claim_too(subject):
    adaptive = {"quantile": 0.5, "learning_rate": 0.2, "count_noise": 5.0}
    asked = {**MODES["central-site"]["central"], "adaptive": adaptive}
    assert not audited(subject("central-site", central=asked, weighting="uniform"), SURE).flagged


def test_without_a_claim_there_is_nothing_to_refute(subject):
    """A run without privacy gives its canaries away, and the report says so."""
    chosen = subject(privacy=None, training={"steps": 20, "batch_size": 8, "learning_rate": 1.0})
    report = audit_run(chosen.settings, chosen.sites, AuditOptions(canaries=200, examples=20, attacked_rounds=3))
    assert report.epsilon_claimed is None
    assert not report.flagged
    assert {check.subject for check in report.checks} == {"the run, no privacy claimed"}


def test_bounds_that_hold_together_are_weaker_than_bounds_alone(subject):
    """The risk is shared out: eight checks at 95% together are each at 99.4%."""
    chosen = subject()
    report = audit_run(chosen.settings, chosen.sites, QUICK)
    assert len({check.name for check in report.checks}) == len(report.checks)
    assert report.epsilon_lower == max(check.epsilon_lower for check in report.checks if check.kind == "attack")
    assert np.isfinite(report.epsilon_lower)
