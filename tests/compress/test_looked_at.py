"""What each step looked at, and that none but the measurement looks at the rows that are reported."""

import json
import shutil

import pytest

from fedclaw.compress.inputs import content_digest
from fedclaw.compress.record import CompressSettings, RecoverySettings, read_compressed
from fedclaw.compress.stage import compress
from fedclaw.errors import UsageError
from fedclaw.files import sha256_file

QUICK = RecoverySettings(steps=1)


@pytest.fixture
def run(make_run, trained):
    return make_run(*trained)


@pytest.fixture
def go(run):
    def go(**changes):
        usual = {"run": run.root, "fraction": 0.25, "latency_repeats": 1, "device": "cpu", "overwrite": True}
        return compress(CompressSettings(**usual | {"recovery": QUICK, "controls": False} | changes))

    return go


def said(record):
    return [(item.step, item.origin, item.examples, item.sha256) for item in record.looked_at]


LATENCY = ("measurement", "synthetic", 32, None)
IMPORTANCE = ("importance", "none", 0, None)


def sensitivity(origin, digest=None):
    """It looks at some of what recovery learns from."""
    return ("layer sensitivity", origin, 256, digest)


def test_public_files_are_named_with_their_digests(go, digits):
    record = go(inputs=digits.public, labelled=digits.train, evaluation=digits.test, controls=True)
    both = next(item for item in record.looked_at if item.step == "recovery")
    assert both.description == (
        "800 public inputs of public.csv and 600 labelled public examples of train.csv, to learn from and to stop by"
    )
    trained, tested = sha256_file(digits.train), sha256_file(digits.test)
    assert said(record) == [
        IMPORTANCE,
        sensitivity("public", both.sha256),
        ("recovery", "public", 1400, both.sha256),
        ("recovery", "public", 600, trained),
        ("controls", "public", 1400, both.sha256),
        ("controls", "public", 600, trained),
        ("measurement", "public", 397, tested),
        LATENCY,
    ]


def test_agreement_is_measured_on_inputs_that_nothing_else_saw(go, digits):
    record = go(inputs=digits.public)
    digest = sha256_file(digits.public)
    assert said(record) == [
        IMPORTANCE,
        sensitivity("public", digest),
        ("recovery", "public", 640, digest),
        ("measurement", "public", 160, digest),
        LATENCY,
    ]
    assert record.accuracy_examples == 160


def test_no_recovery(go, digits):
    record = go(mode="none", evaluation=digits.test)
    assert record.recovery == ()
    assert record.accuracy_after == record.accuracy_pruned
    measured = ("measurement", "public", 397, sha256_file(digits.test))
    assert said(record) == [IMPORTANCE, sensitivity("synthetic"), measured, LATENCY]


def test_one_kind_after_the_other(go, digits):
    record = go(mode=("synthetic", "proxy"), inputs=digits.public, synthetic=500, evaluation=digits.test)
    assert [report.mode for report in record.recovery] == ["synthetic", "proxy"]
    # 500 of the schema, and the 64 that the generator had made by the one step.
    assert [item[:3] for item in said(record)[2:4]] == [("recovery", "synthetic", 564), ("recovery", "public", 800)]
    turned = go(mode=("proxy", "synthetic"), inputs=digits.public, synthetic=500, evaluation=digits.test)
    assert [report.mode for report in turned.recovery] == ["proxy", "synthetic"]


@pytest.mark.parametrize("setting", ["inputs", "labelled"])
def test_the_evaluation_file_is_not_learnt_from(go, run, digits, tmp_path, setting):
    copied = tmp_path / "copy.csv"
    shutil.copy(digits.test, copied)
    with pytest.raises(UsageError, match=rf"{setting}=.*copy\.csv and evaluation=.*test\.csv have the same content"):
        go(**{setting: copied}, evaluation=digits.test)
    assert not run.compressed.exists()


def test_rows_that_are_in_both_files_are_refused_or_dropped(go, run, digits, tmp_path):
    mixed = tmp_path / "mixed.csv"
    train, test = (path.read_text().splitlines(keepends=True) for path in (digits.train, digits.test))
    mixed.write_text("".join([*train[:101], *test[1:4]]))
    with pytest.raises(UsageError, match=r"3 of 103 rows of labelled=.*mixed\.csv are in evaluation=.*overlap=drop"):
        go(labelled=mixed, evaluation=digits.test)
    assert not run.compressed.exists()
    record = go(labelled=mixed, evaluation=digits.test, overlap="drop")
    assert record.recovery[0].inputs == "100 labelled public examples of mixed.csv"


def test_a_folder_is_known_by_its_files_content(tmp_path):
    for folder, names in (("one", ("a", "b")), ("two", ("x", "y")), ("three", ("a", "b"))):
        (tmp_path / folder).mkdir()
        for name, text in zip(names, ("first", "second"), strict=True):
            (tmp_path / folder / name).write_text(text)
    (tmp_path / "three" / "b").write_text("third")
    one, two, three = (content_digest(tmp_path / folder) for folder in ("one", "two", "three"))
    assert one == two != three


def test_without_labels_the_controls_say_what_they_learnt(go, digits):
    record = go(inputs=digits.public, evaluation=digits.test, controls=True)
    assert record.controls[0].data == "800 public inputs of public.csv, labelled by the teacher"
    assert record.controls_note.startswith("No labelled data was given")
    assert record.verdict
    assert "agreement with the teacher " in go(inputs=digits.public, controls=True).verdict, "no accuracy was measured"
    assert go(inputs=digits.public).verdict.startswith("No controls were trained (controls=false)")


def test_a_record_of_version_1_is_read(go, run, digits):
    record = go(inputs=digits.public, evaluation=digits.test)
    plain = record.model_dump(mode="json")
    for later in ("version", "controls", "controls_note", "verdict", "difference", "looked_at"):
        del plain[later]
    control = {"name": "distilled from scratch", "accuracy": 0.5, "agreement": 0.75}
    plain["recovery"] = {key: plain["recovery"][0][key] for key in plain["recovery"][0] if key != "losses"}
    plain["recovery"]["controls"] = [control]
    (run.compressed / "compression.json").write_text(json.dumps(plain))
    read, _ = read_compressed(run)
    assert (read.version, read.recovery[0].mode) == (1, "proxy")
    assert (read.controls[0].name, read.controls[0].agreement) == ("distilled from scratch", 0.75)
