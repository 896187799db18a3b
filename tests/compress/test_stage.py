"""The whole stage on a real run: what it writes, whether recovery recovers, and one clear line for a mistake."""

import re

import numpy as np
import pytest
import torch

from fedclaw.compress import proxy, stage
from fedclaw.compress.models import load_arrays
from fedclaw.compress.proxy import RecoverySettings
from fedclaw.compress.record import CompressSettings, read_compressed
from fedclaw.compress.stage import compress
from fedclaw.errors import CheckpointError, CompressionError, UsageError
from fedclaw.learning.step_loop import distillation_loss

FRACTION = 0.25


@pytest.fixture
def run(make_run, trained):
    return make_run(*trained)


def settings_for(run, **changes):
    usual = {"run": run.root, "fraction": FRACTION, "latency_repeats": 3, "device": "cpu", "overwrite": True}
    usual |= {"controls": False}
    return CompressSettings(**usual | changes)


def test_recovery_on_public_inputs(run, digits, trained):
    record = compress(settings_for(run, inputs=digits.public, evaluation=digits.test))
    assert record.accuracy_measure == "evaluation file"
    assert record.accuracy_examples == 397
    assert record.accuracy_before > 0.9
    assert record.accuracy_pruned < record.accuracy_before - 0.15
    assert record.accuracy_after >= record.accuracy_before - 0.03
    assert record.parameters_after <= FRACTION * record.parameters_before
    assert record.before.multiply_adds == 64 * 48 + 48 * 24 + 24 * 10
    assert record.after.multiply_adds < 0.3 * record.before.multiply_adds
    assert record.after.file_bytes == (run.compressed / "model.npz").stat().st_size
    assert record.before.file_bytes == run.model_path.stat().st_size
    # What is on disk is a model of the record's spec that scores what the record says.
    workload, _ = trained
    written, parameters = read_compressed(run)
    assert written == record
    model = workload.build(written.model)
    load_arrays(model, parameters)
    table = workload.schema.read_examples(digits.test)
    with torch.no_grad():
        metrics = workload.evaluate(model(torch.from_numpy(table.inputs)), torch.from_numpy(table.targets))
    assert metrics["accuracy"] == record.accuracy_after
    assert sorted(path.name for path in run.root.iterdir()) == ["compressed", "model.npz", "run.json", "run.lock"]


def test_recovery_on_synthetic_inputs(run):
    record = compress(settings_for(run, synthetic=800, recovery=RecoverySettings(steps=400)))
    assert record.accuracy_measure == "agreement with the teacher"
    assert record.accuracy_before == 1.0
    assert record.accuracy_after > record.accuracy_pruned
    assert record.recovery[0].agreement_after > record.recovery[0].agreement_pruned
    assert record.recovery[0].inputs == "800 synthetic inputs made from the schema"


@pytest.mark.parametrize("mix", [True, False])
def test_recovery_fails_without_the_teachers_knowledge(run, digits, monkeypatch, mix):
    """The same recovery recovers from the teacher, and does not when its answers are dealt out at random."""

    def shuffled(student, teacher, *rest):
        if student.requires_grad:
            teacher = teacher[torch.randperm(len(teacher), generator=generator)]
        return distillation_loss(student, teacher, *rest)

    how = RecoverySettings(steps=800, learning_rate=0.01, mix=mix)
    asked = settings_for(run, inputs=digits.public, evaluation=digits.test, recovery=how)
    sound = compress(asked)
    assert sound.accuracy_after >= sound.accuracy_before - 0.05
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(proxy, "distillation_loss", shuffled)
    assert compress(asked).accuracy_after < sound.accuracy_before - 0.15


def test_same_seed_same_model(run, digits):
    first = compress(settings_for(run, inputs=digits.public, seed=3, recovery=RecoverySettings(steps=100)))
    _, one = read_compressed(run)
    again = compress(settings_for(run, inputs=digits.public, seed=3, recovery=RecoverySettings(steps=100)))
    _, two = read_compressed(run)
    compress(settings_for(run, inputs=digits.public, seed=4, recovery=RecoverySettings(steps=100)))
    _, other = read_compressed(run)
    assert first.recovery == again.recovery
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert any(not np.array_equal(one[name], other[name]) for name in one)


def test_a_smaller_model_replaces_a_larger_one(run, digits):
    quick = {"inputs": digits.public, "recovery": RecoverySettings(steps=1)}
    large = compress(settings_for(run, fraction=0.5, **quick))
    (run.compressed / "stray").write_text("")
    small = compress(settings_for(run, fraction=0.2, **quick))
    assert small.parameters_after < large.parameters_after
    assert sorted(path.name for path in run.compressed.iterdir()) == ["compression.json", "model.npz"]
    assert read_compressed(run)[0] == small


def test_a_failed_compression_leaves_the_old_result(run, digits):
    kept = compress(settings_for(run, inputs=digits.public, recovery=RecoverySettings(steps=1)))
    with pytest.raises(CompressionError, match="diverged"):
        compress(settings_for(run, inputs=digits.public, recovery=RecoverySettings(steps=50, learning_rate=1e30)))
    assert read_compressed(run)[0] == kept


def test_an_earlier_result_is_replaced_only_on_demand_and_not_worked_for(run, digits, monkeypatch):
    quick = {"inputs": digits.public, "recovery": RecoverySettings(steps=1)}
    kept = compress(settings_for(run, overwrite=False, **quick))
    monkeypatch.setattr(stage, "load_teacher", None)
    with pytest.raises(UsageError, match="already holds a result; pass overwrite=true"):
        compress(settings_for(run, overwrite=False, **quick))
    assert read_compressed(run)[0] == kept


def test_an_earlier_result_survives_a_kill_between_the_renames(run, digits):
    kept = compress(settings_for(run, inputs=digits.public, recovery=RecoverySettings(steps=1)))
    limbo = run.root / ".compressed.abc"
    limbo.mkdir()
    run.compressed.rename(limbo / "old")
    with pytest.raises(UsageError, match="already holds a result"):
        compress(settings_for(run, overwrite=False))
    assert read_compressed(run)[0] == kept


def test_controls(run, digits):
    record = compress(
        settings_for(
            run,
            inputs=digits.public,
            evaluation=digits.test,
            labelled=digits.train,
            controls=True,
            recovery=RecoverySettings(steps=800, learning_rate=0.01),
        )
    )
    names = [control.name for control in record.controls]
    assert names == ["fine-tuned without teacher", "trained from scratch", "distilled from scratch"]
    for control in record.controls:
        assert control.accuracy > 0.9
        assert control.interval.low < control.accuracy < control.interval.high
        assert control.difference.value == pytest.approx(record.accuracy_after - control.accuracy)
    assert [control.data for control in record.controls[:2]] == ["600 labelled public examples"] * 2
    assert record.controls_note == ""


def test_too_small_a_fraction_names_the_smallest(run):
    with pytest.raises(CompressionError, match=r"cannot be pruned to 0\.001") as caught:
        compress(settings_for(run, fraction=0.001))
    smallest = float(re.search(r"fraction=([0-9.]+)", str(caught.value))[1])
    record = compress(settings_for(run, fraction=smallest, synthetic=20, recovery=RecoverySettings(steps=1)))
    assert record.model.args["hidden"] == [1, 1]


def test_a_model_that_does_not_fit_its_record(run):
    damaged = run.read_model()
    damaged["hidden.0.weight"] = damaged["hidden.0.weight"][:-1]
    run.write_model(damaged)
    with pytest.raises(CheckpointError, match=r"model\.npz does not fit"):
        compress(settings_for(run))


def test_a_teacher_of_nan_is_refused(run):
    damaged = run.read_model()
    damaged["head.weight"] = np.full_like(damaged["head.weight"], np.nan)
    run.write_model(damaged)
    with pytest.raises(CompressionError, match="not all finite"):
        compress(settings_for(run))


def test_reading_what_is_not_there(run):
    with pytest.raises(UsageError, match="has no compressed model"):
        read_compressed(run)


def test_reading_what_is_damaged(run, digits):
    compress(settings_for(run, inputs=digits.public, recovery=RecoverySettings(steps=1)))
    (run.compressed / "compression.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"compression\.json is damaged"):
        read_compressed(run)
