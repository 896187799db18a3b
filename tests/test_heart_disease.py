"""The four hospitals' files as FLamby prepares them, against rows worked out by hand; and what a wrong file is told."""

import numpy as np
import pytest

from experiments.heart_disease.made_up import SIZES, made_up_rows, write_files
from experiments.heart_disease.prepare import Part, folds, prepare, split
from experiments.heart_disease.source import CENTRES, NAMES, read_centres
from fedclaw.errors import DataError
from tests.conftest import run_module

NAN = float("nan")


def patients(count, *, first_age, **changes):
    """Rows that differ in age alone, by default complete: (count, 14)."""
    columns = {
        "age": 0.0,
        "sex": 1.0,
        "cp": 1.0,
        "trestbps": 120.0,
        "chol": 200.0,
        "fbs": 0.0,
        "restecg": 0.0,
        "thalach": 150.0,
        "exang": 0.0,
        "oldpeak": 1.5,
        "slope": NAN,
        "ca": NAN,
        "thal": NAN,
        "num": 0.0,
        **changes,
    }
    rows = np.tile(np.array(list(columns.values())), (count, 1))
    rows[:, 0] = first_age + np.arange(count)
    return rows


def by_age(hospital):
    """Every row of a split by its age, with its label."""
    both = (hospital.train, hospital.test)
    return {
        row[0]: (row[1:].tolist(), int(label))
        for part in both
        for row, label in zip(part.features, part.labels, strict=True)
    }


def hand_made():
    a = patients(12, first_age=30)
    a[0, 2], a[0, 13] = 2.0, 3.0  # chest pain of kind 2; ill, to the third degree
    a[1, 6] = 2.0  # electrocardiogram of kind 2
    a[2, 4] = NAN  # cholesterol not known: dropped
    b = patients(11, first_age=60, cp=4.0, num=1.0)
    b[0, 10:13] = (2.0, 0.0, 3.0)  # what others lack is dropped for all
    return {"a": a, "b": b}


def test_preparation_of_hand_made_rows():
    hospitals = prepare(hand_made())
    names = ("age", "sex", "trestbps", "chol", "fbs", "thalach", "exang", "oldpeak", "cp_2", "cp_4", "restecg_2")
    assert hospitals.features == names, "cp 1 and restecg 0 are the first levels, of both hospitals together"
    a, b = by_age(hospitals.splits["a"]), by_age(hospitals.splits["b"])
    plain = [1, 120, 200, 0, 150, 0, 1.5]
    assert a[30] == ([*plain, 1, 0, 0], 1)
    assert a[31] == ([*plain, 0, 0, 1], 0)
    assert a[33] == ([*plain, 0, 0, 0], 0)
    assert b[60] == b[61] == ([*plain, 0, 1, 0], 1)
    assert sorted(a) == [30, 31, *range(33, 42)]
    assert sorted(b) == list(range(60, 71))


def test_the_published_sizes_and_stratified_labels():
    hospitals = prepare(made_up_rows(0))
    sizes = {name: (len(one.train), len(one.test)) for name, one in hospitals.splits.items()}
    assert sizes == {"cleveland": (199, 104), "hungarian": (172, 89), "switzerland": (30, 16), "va": (85, 45)}
    assert len(hospitals.features) == 13
    for name in ("cleveland", "hungarian", "va"):
        one = hospitals.splits[name]
        assert one.train.labels.mean() == pytest.approx(one.test.labels.mean(), abs=0.02)
    pooled = hospitals.pooled()
    assert (len(pooled.train), len(pooled.test)) == (486, 254)
    assert np.array_equal(pooled.test.features[104 : 104 + 89], hospitals.splits["hungarian"].test.features)


def test_a_hospital_with_one_healthy_patient_is_split_without_regard_to_labels():
    labels = np.array([0] + [1] * 45)
    parts = split(Part(np.arange(46.0)[:, None], labels))
    assert (len(parts.train), len(parts.test)) == (30, 16)
    assert sorted(np.concatenate([parts.train.features, parts.test.features])[:, 0]) == list(range(46))


def test_the_split_is_the_published_one():
    # Without strata: the first 34% of numpy's old permutation with the seed 43, whose stream is frozen.
    order = np.random.RandomState(43).permutation(10)
    parts = split(Part(np.arange(10.0)[:, None], np.ones(10, np.int64)))
    assert parts.test.features[:, 0].tolist() == order[:4].tolist()
    assert parts.train.features[:, 0].tolist() == order[4:].tolist()


def test_folds_test_every_training_row_once_and_no_test_row():
    hospitals = prepare(made_up_rows(1))
    dealt = folds(hospitals, 5, seed=3)
    for name, one in hospitals.splits.items():
        rows = [tuple(row) for row in one.train.features]
        tested = [tuple(row) for fold in dealt for row in fold.splits[name].test.features]
        assert sorted(tested) == sorted(rows)
        for fold in dealt:
            part = fold.splits[name]
            both = [*map(tuple, part.train.features), *map(tuple, part.test.features)]
            assert sorted(both) == sorted(rows)
    again = folds(hospitals, 5, seed=4)
    assert not np.array_equal(again[0].splits["va"].test.features, dealt[0].splits["va"].test.features)


def test_too_few_complete_rows():
    with pytest.raises(DataError, match="b has 9 complete rows; at least 10"):
        prepare({"a": patients(12, first_age=30), "b": patients(9, first_age=30)})


def test_files_come_back_with_their_missing_cells(tmp_path):
    rows = made_up_rows(5, dict.fromkeys(NAMES, 12))
    rows["va"][3, [4, 11]] = NAN
    write_files(tmp_path, rows)
    assert ",?," in (tmp_path / "processed.va.data").read_text()
    windows = tmp_path / "processed.cleveland.data"
    windows.write_bytes(windows.read_bytes().replace(b"\n", b"\r\n"))
    found = read_centres(tmp_path, verify=False)
    assert list(found) == list(NAMES) == list(SIZES)
    for name in NAMES:
        np.testing.assert_array_equal(found[name], rows[name])


@pytest.fixture
def files(tmp_path):
    write_files(tmp_path, made_up_rows(0))
    return tmp_path


WRONG = [
    (b"", "is empty"),
    (b"63,1,1,145\n", "line 1: 4 cells, and there are 14 columns"),
    (b"1,1,1,1,1,1,1,1,1,1,1,1,1,0\n1,1,1,1,ten,1,1,1,1,1,1,1,1,0\n", "line 2, column chol: neither a number nor '?'"),
    (b"1,1,1,1,inf,1,1,1,1,1,1,1,1,0\n", "line 1, column chol"),
    (b"1,1,1,1,\xe9,1,1,1,1,1,1,1,1,0\n", "is not text in ASCII"),
]


@pytest.mark.parametrize(("content", "words"), WRONG)
def test_a_wrong_file_is_told_with_its_place_and_where_the_data_is_to_be_had(files, content, words):
    path = files / "processed.hungarian.data"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_centres(files, verify=False)
    message = str(caught.value)
    assert str(path) in message
    assert words in message
    assert "10.24432/C52P4X" in message
    assert "\n" not in message


def test_other_files_than_the_published_ones_are_refused_unless_asked_for(files):
    with pytest.raises(DataError, match=r"processed\.cleveland\.data is not the file .* verify=false"):
        read_centres(files, verify=True)
    assert len({centre.sha256 for centre in CENTRES}) == 4


def test_the_command_tells_a_missing_directory_in_one_line(tmp_path):
    missing = run_module("experiments.heart_disease", f"data={tmp_path / 'nowhere'}")
    assert missing.code == 1
    assert len(missing.lines) == 1
    assert "nowhere/processed.cleveland.data cannot be read (No such file or directory)" in missing.errors
    assert "doi.org/10.24432/C52P4X" in missing.errors
    unsaid = run_module("experiments.heart_disease")
    assert unsaid.code == 2
    assert "data= is missing" in unsaid.errors
    unknown = run_module("experiments.heart_disease", "dance", "data=.")
    assert unknown.code == 2
    assert "there are: run, search" in unknown.errors
