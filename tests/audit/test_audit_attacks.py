"""The parts of the attacks, each against an answer worked out by hand or a slow oracle."""

import numpy as np
import pytest

from fedclaw.audit.findings import AuditOptions, Finding, conclude
from fedclaw.audit.mechanism import Trials, most_alike
from fedclaw.audit.one_run import NoiseFamily, family_bound, one_run_bound
from fedclaw.audit.probe import sensitivity
from fedclaw.audit.run import attack_run, audit_run, claim_of
from fedclaw.audit.subject import LOUD, Subject, coins, gradient, make_canary, synthetic_sites
from fedclaw.audit.training_run import AuditedClaim, auc, contributions, membership, one_run, toss
from fedclaw.errors import PrivacyError, UsageError
from fedclaw.learning.workload import load_parameters
from fedclaw.privacy.accounting import NoiseEvent
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.server.session import initial_parameters
from tests.audit.conftest import MODES, SIZES

CLAIM = AuditedClaim("the run", 3.0, 1e-5)


@pytest.mark.parametrize("model", [{"name": "logistic"}, {"name": "mlp", "args": {"hidden": [64, 32]}}])
def test_a_canary_is_loud_and_a_blank_is_silent(subject, schema, model):
    record = subject(workload={"name": "tabular", "schema_file": schema, "model": model}).record()
    workload = record.make_workload()
    canary = make_canary(workload, record.model, initial_parameters(record), 2.0, np.random.default_rng(0))
    network = workload.build(record.model)
    load_parameters(network, canary.parameters)
    loud = gradient(workload, network, canary.inputs, canary.loud)
    assert np.linalg.norm(loud) >= LOUD * 2.0
    assert np.linalg.norm(gradient(workload, network, canary.inputs, canary.silent)) < 1e-3
    assert -loud / np.linalg.norm(loud) == pytest.approx(canary.direction)
    rows = canary.units(5, 2)
    assert list(rows.targets == canary.loud[0]) == [True, True, False, False, False]


def test_a_model_that_cannot_be_sure_has_no_canary(subject, monkeypatch):
    record = subject().record()
    workload = record.make_workload()
    monkeypatch.setattr(workload, "loss", lambda logits, _targets: logits.sum() * 0.0)
    with pytest.raises(PrivacyError, match="loud enough for a canary"):
        make_canary(workload, record.model, initial_parameters(record), 1.0, np.random.default_rng(0))


def test_coins_are_fair_and_new_each_time():
    tossed = coins(200_000)
    assert abs(tossed.mean() - 0.5) < 5.5 * 0.5 / np.sqrt(200_000)
    assert len(coins(3)) == 3
    assert not np.array_equal(coins(256), coins(256))


def test_contributions_find_who_was_added():
    """moved = 0.3 x the gradients of those present + noise: who has more than the middle is present."""
    generator = np.random.default_rng(5)
    gradients = generator.normal(size=(80, 400)) + generator.normal(size=400)
    present = generator.random(80) < 0.5
    moved = 0.3 * gradients[present].sum(axis=0) + 0.5 * generator.normal(size=400)
    scores = contributions(gradients, moved)
    assert scores[present].min() > scores[~present].max()
    assert auc(scores[present], scores[~present])[0] == 1.0


def test_contributions_are_those_of_ridge_regression():
    """With the ratio that it chose, against the normal equations."""
    generator = np.random.default_rng(6)
    gradients = generator.normal(size=(7, 30))
    moved = generator.normal(size=30)
    common = gradients.sum(axis=0)
    rest = moved - (moved @ common) / (common @ common) * common
    scale = (gradients**2).sum() / 7
    found = contributions(gradients, moved)
    fits = []
    for ratio in np.logspace(-6, 6, 25):
        solved = np.linalg.solve(gradients @ gradients.T + ratio * scale * np.eye(7), gradients @ rest)
        covariance = np.eye(30) + gradients.T @ gradients / (ratio * scale)
        evidence = -np.linalg.slogdet(covariance)[1] - 30 * np.log(rest @ np.linalg.solve(covariance, rest))
        fits.append((evidence, np.abs(solved - found).max()))
    assert max(fits)[1] < 1e-8
    assert contributions(np.zeros((3, 4)), np.ones(4)) == pytest.approx(0)


def test_the_area_under_the_curve_counts_pairs():
    members, others = np.array([3.0, 1.0, 2.0]), np.array([2.0, 0.0])
    area, error = auc(members, others)
    assert area == pytest.approx((1 + 0.5 + 1 + 1 + 1) / 6)
    assert 0 < error < 0.5


def test_one_run_guesses_the_ends():
    """Scores that tell everything: all guesses, as many as were fixed beforehand, are right."""
    present, family = np.arange(400) % 2 == 0, NoiseFamily((NoiseEvent(1.0, 1.5, 1),))
    told = present + np.linspace(0, 0.1, 400)
    finding = one_run(CLAIM, family, told, present, "gradients")
    assert finding.seen == "120 of 120 guesses about 400 canaries right"
    assert finding.bound(0.95) == family_bound(family, 400, 120, 120, CLAIM.delta, 0.95) > 2
    assert finding.bound_any(0.95) == one_run_bound(400, 120, 120, CLAIM.delta, 0.95)
    without = one_run(CLAIM, None, told, present, "gradients")
    assert without.bound(0.95) == without.bound_any(0.95) == finding.bound_any(0.95)
    blind = one_run(CLAIM, family, np.random.default_rng(0).random(400), present, "gradients")
    assert blind.bound(0.95) == 0


def test_membership_is_told_by_half_of_the_scores():
    present = np.arange(400) % 2 == 0
    generator = np.random.default_rng(1)
    told = membership(CLAIM, present + 0.01 * generator.random(400), present, generator, "loss")
    assert told is not None
    assert told.bound(0.95) > 2
    assert "AUC 1.000" in told.seen
    blind = membership(CLAIM, generator.random(400), present, generator, "loss")
    assert blind is not None
    assert blind.bound(0.95) == 0
    assert membership(CLAIM, generator.random(60), present[:60], generator, "loss") is None


def test_a_run_without_privacy_gives_its_canaries_away(configured):
    """The whole chain: real rounds, coins, gradients, guesses; and hardly anything left of it under noise."""
    options = AuditOptions(canaries=160, examples=20, attacked_rounds=2)
    bounds = {}
    for name, privacy in {"none": None, "dp": {"epsilon": 1, "delta": 1e-3, "max_grad_norm": 1.0}}.items():
        settings = configured(privacy=privacy, training={"steps": 10, "batch_size": 50, "learning_rate": 0.3})
        wide = settings.model_copy(
            update={
                "workload": settings.workload.model_copy(
                    update={"model": settings.workload.model.model_copy(update={"args": {"hidden": [64]}})}
                )
            }
        )
        subject = Subject(wide, synthetic_sites(wide, SIZES))
        found = attack_run(subject, claim_of(mechanism_of(subject.record())), options, np.random.default_rng(2))
        bounds[name] = next(item for item in found if item.name == "one run, gradients").bound(0.95)
    assert bounds["none"] > 1.0
    assert bounds["dp"] < 1.0


def test_tossed_examples_are_in_by_their_coins(subject):
    chosen = subject()
    tossed = toss(chosen, 30, 8, np.random.default_rng(0))
    assert sum(int(item.planted.sum()) for item in tossed.values()) == 30
    for name, item in tossed.items():
        own = len(item.table) - int(item.planted.sum())
        assert own == min(8, len(chosen.sites[name].data.train))
        assert len(item.training()) == item.present.sum()
        assert np.array_equal(item.training().targets, item.table.targets[item.present])


def test_a_guarantee_for_rows_is_attacked_by_persons_whose_rows_come_and_go_together(subject):
    """The site is told of rows alone, in a number that no coin moves."""
    tossed = toss(subject(), 30, 8, np.random.default_rng(0), 5)
    assert sum(int(item.planted.sum()) for item in tossed.values()) == 30
    for item in tossed.values():
        assert np.bincount(item.owners).tolist() == [5 if planted else 1 for planted in item.planted]
        for person in np.flatnonzero(item.planted):
            rows = item.owners == person
            assert (item.table.inputs[rows] == item.table.inputs[rows][0]).all()
            assert len(set(item.table.targets[rows])) == 1
        trained = item.training()
        assert trained.persons is None
        assert len(trained) == item.present[item.owners].sum()
        assert item.stated == len(item.table)


def test_what_persons_find_of_a_guarantee_for_rows_refutes_no_claim(configured):
    settings = configured("central-example")
    options = AuditOptions(canaries=16, examples=10, rows_together=4)
    report = audit_run(settings, synthetic_sites(settings, SIZES), options)
    assert [check.name for check in report.checks] == ["one run, gradients", "one run, loss"]
    assert {check.epsilon_claimed for check in report.checks} == {None}
    assert all("by persons of 4 rows" in check.subject for check in report.checks)
    assert not report.flagged
    assert "does not cover them" in report.notes[0]
    assert not any("is protected" in note for note in report.notes), "said of rows, and read as of persons"


@pytest.mark.parametrize("mode", [{"privacy": None}, {"mode": "central-site"}])
def test_persons_attack_guarantees_for_rows_alone(configured, mode):
    settings = configured(**mode)
    with pytest.raises(UsageError, match="rows_together=5: it attacks a guarantee for rows, and there is none here"):
        audit_run(settings, synthetic_sites(settings, SIZES), AuditOptions(rows_together=5))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"weighting": "examples"}, 0.5 * 60 / 80),
        ({"weighting": "uniform"}, 0.5 / 4),
        ({"weighting": "capped", "weight_cap": 12}, 0.5 * 12 / (12 + 10 + 6 + 4)),
    ],
)
def test_the_sensitivity_is_that_of_the_weights(subject, changes, wanted):
    """60, 10, 6 and 4 examples, clip 0.5; by hand."""
    record = subject("central-site", **changes).record()
    assert sensitivity(record, list(SIZES)) == pytest.approx(wanted)


def test_the_sensitivity_to_an_example_is_that_of_one_step(subject):
    record = subject("central-example").record()
    assert sensitivity(record, list(SIZES)) == pytest.approx(0.3 * 0.5 / (0.3 * 80))


@pytest.mark.parametrize(
    ("mode", "changes", "label"),
    [
        ("local", {}, "local noise"),
        ("central-example", {}, "noise on the mean"),
        ("distributed-example", {}, "noise on the mean"),
        ("local", {"central": {**MODES["central-site"]["central"], "epsilon": 9}}, "local noise"),
    ],
)
def test_a_claim_is_about_examples(subject, mode, changes, label):
    claim = claim_of(mechanism_of(subject(mode, **changes).record()))
    assert (claim.epsilon, claim.delta) == (3, 1e-3)
    assert label in claim.label


def test_without_noise_and_for_whole_sites_nothing_is_claimed_of_an_example(subject):
    assert claim_of(mechanism_of(subject("central-site").record())) is None
    assert claim_of(mechanism_of(subject("distributed-site").record())) is None
    assert claim_of(mechanism_of(subject(privacy=None).record())).epsilon is None


def test_the_middle_moves_only_for_a_canary_that_is_too_large():
    generator = np.random.default_rng(7)
    present = np.arange(100) % 2 == 0
    noise = generator.normal(size=100)
    honest = Trials(present, present + noise, 100.0, 100)
    assert honest.guessed() == (90, int(((honest.scores > 0.5) == present)[10:].sum()))
    assert Trials(present, 40.0 * present + noise, 100.0, 100).guessed() == (90, 90)


def test_alike_vectors_are_found_at_their_shift():
    generator = np.random.default_rng(8)
    stream = generator.normal(size=1030)
    found = most_alike({"a": generator.normal(size=1000), "b": stream[:1000], "c": stream[30:]})
    assert (found.first, found.second, found.overlap) == ("b", "c", 970)
    assert found.correlation == pytest.approx(1)
    assert found.chance < 1e-30
    other = most_alike({"b": stream[30:], "c": stream[:1000]})
    assert (other.overlap, round(other.correlation, 6)) == (970, 1)


def test_chance_correlations_are_as_rare_as_said():
    """400 comparisons of independent vectors: the stated chance is below 0.05 in at most 5% of them."""
    generator = np.random.default_rng(9)
    chances = [most_alike(dict(zip("ab", generator.normal(size=(2, 200)), strict=True))).chance for _ in range(400)]
    assert np.mean(np.array(chances) < 0.05) < 0.05 + 5 * np.sqrt(0.05 * 0.95 / 400)
    small = most_alike({"a": np.ones(3), "b": np.array([1.0, -1.0, 0.0])})
    assert (small.overlap, small.tried, small.chance) == (3, 1, 1.0)


def test_risks_are_shared_out():
    """Each of two checks gets half of each risk."""
    asked = []

    def bound(confidence):
        asked.append(confidence)
        return 2.0 if confidence < 0.99 else 0.5

    finding = Finding(
        name="name", subject="subject", kind="attack", epsilon_claimed=1.0, bound=bound, seen="seen", fault="fault"
    )
    report = conclude([finding, finding], epsilon=1.0, delta=1e-5, confidence=0.95, alarm=1e-3)
    assert asked == pytest.approx([0.975, 0.9995] * 2)
    assert report.epsilon_lower == 2.0
    assert not report.flagged


def test_the_risk_is_shared_out_by_weight():
    """Of three parts of the risk the attack has two, and its share of the claim is told."""
    asked = []

    def bound(confidence):
        asked.append(confidence)
        return 0.6

    attack = Finding(
        name="a", subject="s", kind="attack", epsilon_claimed=1.5, bound=bound, weight=2, seen="seen", fault="fault"
    )
    measured = attack.model_copy(update={"kind": "measurement", "weight": 1, "name": "b", "bound_any": lambda _: 0.1})
    report = conclude([attack, measured], epsilon=1.5, delta=1e-5, confidence=0.97, alarm=3e-3)
    assert asked == pytest.approx([0.98, 0.998, 0.99, 0.999])
    assert report.sharpest.name == "a"
    assert report.sharpest.share == pytest.approx(0.4)
    assert [check.epsilon_lower_any for check in report.checks] == [None, 0.1]


def test_an_audit_needs_sites(configured):
    with pytest.raises(UsageError, match="at least one site"):
        Subject(configured(), {})
    with pytest.raises(UsageError, match="each at least 1"):
        synthetic_sites(configured(), [3, 0])


def test_made_up_labels_use_all_classes(subject):
    sites = subject().sites
    assert {name: len(site.data.train) for name, site in sites.items()} == {
        f"synthetic-{number}": size for number, size in enumerate(SIZES, 1)
    }
    labels = np.concatenate([site.data.train.targets for site in sites.values()])
    assert set(labels) == {0, 1}
