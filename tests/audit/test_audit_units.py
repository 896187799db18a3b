"""Both relations and both units are attacked as they are promised, and a fault of each is found."""

from dataclasses import replace

import numpy as np
import pytest

from fedclaw.audit.findings import AuditOptions, conclude
from fedclaw.audit.probe import local_probe, probes
from fedclaw.audit.run import audit_run, probe_mechanisms
from fedclaw.audit.subject import ROWS_OF_A_PERSON, Subject
from fedclaw.audit.training_run import Tap, attacked_run, toss
from fedclaw.privacy.steps import PrivateGradients
from fedclaw.site.site import Site
from tests.audit.conftest import MODES, SCHEMA

QUICK = AuditOptions(trials=40, canaries=24, examples=10, attacked_rounds=1)
PERSONS = SCHEMA.replace("target:", "person: patient\ntarget:")
RELATIONS = ("zero-out", "add-or-remove")
PROBED = ("local", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("central-example", "distributed-example")))


@pytest.fixture
def promised(subject, schema):
    """Settings and sites for a unit and a relation; declared numbers are not those that are there."""

    def make(unit: str, relation: str, mode: str = "local", **changes) -> Subject:
        schema.write_text(PERSONS if unit == "person" else SCHEMA)
        made = subject(mode, **changes)
        if relation == "add-or-remove":
            for site in made.sites.values():
                site.data = replace(site.data, public_examples=site.data.train.units + 3)
        return made

    return make


def flagged(subject, options=QUICK):
    findings = probe_mechanisms(subject, options, np.random.default_rng(1))
    report = conclude(findings, epsilon=3, delta=1e-3, confidence=options.confidence, alarm=options.alarm)
    return {check.name for check in report.flagged}


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("unit", ["example", "person"])
def test_what_is_promised_is_what_is_attacked(promised, unit, relation):
    chosen = promised(unit, relation)
    report = audit_run(chosen.settings, chosen.sites, QUICK.model_copy(update={"alarm": 1e-7}))
    assert not report.flagged
    words = {"zero-out": f"while the number of {unit}s stays public", "add-or-remove": "operator declared"}
    assert report.notes[0].startswith("Attacked: One " + unit)
    assert words[relation] in report.notes[0]
    assert {check.subject for check in report.checks} == {
        f"local noise, synthetic-1, unit one {unit}",
        f"the run, local noise, unit one {unit}",
    }


def test_two_relations_in_one_federation_are_told_by_site(promised):
    chosen = promised("example", "add-or-remove")
    site = chosen.sites["synthetic-2"]
    site.data = replace(site.data, public_examples=None)
    notes = audit_run(chosen.settings, chosen.sites, QUICK.model_copy(update={"trials": 20})).notes
    assert notes[0].startswith("Attacked (synthetic-1, synthetic-3, synthetic-4): One example of a site's data")
    assert notes[1].startswith("Attacked (synthetic-2): One example")


@pytest.mark.parametrize("mode", PROBED)
def test_persons_whose_rows_are_clipped_one_by_one_are_found(promised, monkeypatch, mode):
    """A person of three rows moves the sum by three times the bound."""
    real = PrivateGradients.gradients
    monkeypatch.setattr(
        PrivateGradients, "gradients", lambda self, inputs, targets, _units=None: real(self, inputs, targets)
    )
    epsilon = {**MODES[mode], "privacy": {"epsilon": 40, "delta": 1e-3, "max_grad_norm": 1.0}}
    if mode != "local":
        epsilon = {"central": {**MODES[mode]["central"], "epsilon": 40}}
    assert "canary size" in flagged(promised("person", "zero-out", mode, **epsilon))
    assert "canary size" not in flagged(promised("example", "zero-out", mode, **epsilon))


@pytest.mark.parametrize("mode", PROBED)
def test_a_number_that_is_counted_where_one_is_declared_is_found(promised, monkeypatch, mode):
    """It tells whether the canary is there, however much noise is beside it."""
    monkeypatch.setattr(Site, "examples", property(lambda site: site.data.train.units))
    assert "told beside" in flagged(promised("example", "add-or-remove", mode))
    assert "told beside" not in flagged(promised("example", "zero-out", mode))


@pytest.mark.parametrize("unit", ["example", "person"])
@pytest.mark.parametrize("mode", PROBED)
def test_the_canary_is_left_out_or_replaced(promised, unit, mode):
    """Where the number is declared there is one unit less without it; else as many."""
    for relation, units in {"zero-out": 4, "add-or-remove": 3}.items():
        (probe,) = probes(promised(unit, relation, mode), np.random.default_rng(0))
        there, away = (
            (probe.site, probe.others[probe.site.name])
            if mode == "local"
            else (
                probe.heavy,
                probe.sites[probe.heavy.name],
            )
        )
        assert (there.data.train.units, away.data.train.units) == (4, units)
        assert there.examples == away.examples == 4
        assert len(there.data.train) == 4 * (ROWS_OF_A_PERSON if unit == "person" else 1)
        assert probe.told(True) == probe.told(False)


def test_a_probe_of_a_person_has_the_sensitivity_of_one(promised):
    """Three loud rows are clipped together: without noise they move what leaves by 1."""
    probe = local_probe(
        promised("person", "add-or-remove", privacy={"epsilon": 1e4, "delta": 1e-3, "max_grad_norm": 0.7}),
        "synthetic-2",
        np.random.default_rng(0),
    )
    moved = (probe.release(True) - probe.release(False)) @ probe.direction
    assert moved == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("unit", ["example", "person"])
def test_no_coin_of_an_attacked_run_shows_in_a_number(promised, monkeypatch, unit):
    """Each site says how many units were tossed for, and trains on those that are in with all of their rows."""
    chosen, said, trained = promised(unit, "zero-out"), {}, {}
    real = Tap.answer

    def answer(tap, message):
        said[tap.site.name], trained[tap.site.name] = tap.site.examples, tap.site.data.train
        return real(tap, message)

    monkeypatch.setattr(Tap, "answer", answer)
    tossed = toss(chosen, 24, 10, np.random.default_rng(0))
    shown = attacked_run(chosen, tossed, 1)
    for name, item in tossed.items():
        assert said[name] == item.table.units == len(item.present)
        assert trained[name].units == item.present.sum()
        assert len(trained[name]) == item.present[item.owners].sum()
    each = ROWS_OF_A_PERSON if unit == "person" else 1
    planted = sum(int(item.planted[item.owners].sum()) for item in tossed.values())
    assert (shown.planted.sum(), planted) == (24, 24 * each)
    assert len(shown.by_gradient) == len(shown.by_loss) == sum(item.table.units for item in tossed.values())
    assert 2.9 < shown.family.epsilon(1.0, 1e-3) <= 3


def test_a_site_with_nobody_in_is_attacked_like_any_other(promised):
    """No coin is turned over for it: an audit that did would let one canary show in another's place."""
    chosen = promised("person", "zero-out")
    tossed = toss(chosen, 8, 2, np.random.default_rng(0))
    tossed["synthetic-2"].present[:] = False
    shown = attacked_run(chosen, tossed, 1)
    assert np.isfinite(shown.by_gradient).all()
    assert len(shown.present) == sum(item.table.units for item in tossed.values())
