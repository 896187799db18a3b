"""A federation's data: dealt as asked, held out as asked, and refused with a reason where it cannot be right."""

import numpy as np
import pandas as pd
import pytest
import torch

import fedclaw
from tests.api.conftest import examples

Federation = fedclaw.Federation
from_arrays, from_clients = Federation.from_arrays, Federation.from_clients
from_frame, from_frames = Federation.from_frame, Federation.from_frames


def rows_of(federation):
    """All examples that are anywhere in it, as tuples."""
    tables = [federation.table, *([federation.test] if federation.test is not None else [])]
    return sorted(tuple(row) for table in tables for row in table.inputs.tolist())


@pytest.mark.parametrize(
    ("partition", "options"),
    [("iid", {}), ("dirichlet", {"alpha": 0.2}), ("shards", {"shards": 2}), ("quantity", {})],
)
def test_each_example_is_once_in_it(partition, options):
    x, y = examples()
    federation = Federation.from_arrays(x, y, clients=5, partition=partition, **options)
    assert len(federation) == 5
    assert sum(federation.sizes) == 96
    assert len(federation.test) == 24
    assert rows_of(federation) == sorted(tuple(row) for row in x.astype(np.float32).tolist())
    assert sorted(np.concatenate(federation.shares).tolist()) == list(range(96))
    label_of = {tuple(row): label for row, label in zip(x.astype(np.float32).tolist(), y, strict=True)}
    for row, target in zip(federation.table.inputs.tolist(), federation.table.targets, strict=True):
        assert int(federation.labels[target]) == label_of[tuple(row)]


def test_the_same_seed_gives_the_same_federation_and_another_one_another():
    x, y = examples()
    one, same, other = (Federation.from_arrays(x, y, clients=3, partition="dirichlet", seed=s) for s in (4, 4, 5))
    assert all(np.array_equal(a, b) for a, b in zip(one.shares, same.shares, strict=True))
    assert one.sizes != other.sizes or not np.array_equal(one.shares[0], other.shares[0])


def test_who_an_example_is_from_can_be_said():
    x, y = examples()
    by = np.where(np.arange(120) < 30, "south", "north")
    federation = Federation.from_arrays(x, y, by=by, test=0)
    assert (federation.names, federation.sizes, federation.test) == (("north", "south"), (90, 30), None)
    pairs = {"north": (x[30:], y[30:]), "south": (x[:30], y[:30])}
    same = Federation.from_clients(pairs, test=0)
    assert (same.names, same.sizes) == (("north", "south"), (90, 30))
    assert rows_of(same) == rows_of(federation)
    unnamed = Federation.from_clients(list(pairs.values()), test=0)
    assert unnamed.names == ("client-0", "client-1")


def test_clients_can_have_tests_of_their_own():
    x, y = examples()
    federation = Federation.from_arrays(x, y, clients=4, test=0.25, test_at="clients")
    assert federation.test is None
    for share, tests in zip(federation.shares, federation.tests, strict=True):
        assert len(tests) == round(0.25 * (len(share) + len(tests)))
        assert not set(share.tolist()) & set(tests.tolist())
    assert sum(federation.sizes) + sum(map(len, federation.tests)) == 120


def test_a_test_set_of_its_own():
    x, y = examples()
    federation = Federation.from_arrays(x, y, clients=2, test=examples(10, seed=9))
    assert (sum(federation.sizes), len(federation.test)) == (120, 10)
    assert repr(federation) == "Federation(2 clients, 120 training and 10 test examples, inputs (5,), 3 classes)"


def test_an_instrument_changes_what_a_client_sees_and_nothing_else():
    x, y = np.random.default_rng(2).normal(size=(600, 4)), np.arange(600) % 2
    federation = Federation.from_arrays(x, y, clients=3, partition="feature_shift", strength=0.3, test=0)
    added = federation.table.inputs - x
    noise = [float(added[share].std()) for share in federation.shares]
    assert noise == pytest.approx(np.sqrt([0.1, 0.2, 0.3]), rel=0.2), "strength x client / clients, a variance"


def test_tensors_images_and_labels_of_every_kind():
    images = torch.zeros(12, 1, 3, 3, dtype=torch.uint8)
    for y in (["a", "b"] * 6, np.arange(12) % 2 == 0, torch.arange(12) % 2, np.array([["x"], ["y"]] * 6, object)):
        federation = Federation.from_arrays(images, y, clients=2)
        assert federation.input_shape == (1, 3, 3)
        assert len(federation.labels) == 2
        assert federation.table.inputs.dtype == np.float32
    eleven = Federation.from_arrays(np.arange(66).reshape(33, 2), np.arange(33) % 11, clients=1, test=0)
    assert (eleven.table.inputs[:, 0] / 2 % 11).tolist() == eleven.table.targets.tolist()
    assert eleven.labels == tuple(map(str, range(11))), "numbers are in the order of numbers"


FRAME = pd.DataFrame(
    {
        "age": [30, 41, 52, 63],
        "smoker": [True, False, True, True],
        "stage": pd.Categorical(["I", "II", "I", "IV"], categories=["I", "II", "III", "IV"]),
        "clinic": ["a", "b", "a", "b"],
        "outcome": ["well", "ill", "ill", "well"],
    }
)


def test_a_data_frame_by_one_of_its_columns():
    federation = Federation.from_frame(FRAME, target="outcome", by="clinic", test=0)
    assert federation.columns == ("age", "smoker", "stage=I", "stage=II", "stage=IV")
    assert federation.labels == ("ill", "well")
    assert federation.names == ("a", "b")
    by_client = [sorted(federation.table.inputs[share].tolist()) for share in federation.shares]
    assert by_client == [[[30, 1, 1, 0, 0], [52, 1, 1, 0, 0]], [[41, 0, 0, 1, 0], [63, 1, 0, 0, 1]]]


def test_columns_may_be_called_by_numbers():
    frame = pd.DataFrame({0: [1.5, 2.5, 3.5, 4.5], 1: ["a", "b"] * 2})
    federation = Federation.from_frame(frame, target=1, clients=2, test=0)
    assert (federation.columns, federation.labels) == (("0",), ("a", "b"))
    assert sorted(federation.table.inputs[:, 0].tolist()) == [1.5, 2.5, 3.5, 4.5]


def test_a_data_frame_a_client_has_the_levels_of_all():
    parts = {name: part.drop(columns="clinic") for name, part in FRAME.groupby("clinic")}
    federation = Federation.from_frames(parts, target="outcome", test=0)
    whole = Federation.from_frame(FRAME, target="outcome", by="clinic", test=0)
    assert (federation.names, federation.columns) == (whole.names, whole.columns)
    assert rows_of(federation) == rows_of(whole)
    tested = Federation.from_frames(list(parts.values()), target="outcome", test=parts["a"].assign(stage="III"))
    assert "stage=III" in tested.columns
    assert len(tested.test) == 2


def test_numbers_to_predict():
    x, y = examples()
    federation = from_arrays(x, y / 2, clients=3, value_range=(0, 1), loss="huber", test=(x[:2], [0.5, 1]))
    assert federation.table.targets.dtype == np.float32
    assert set(federation.table.targets.tolist()) == {0.0, 0.5, 1.0}
    assert federation.test.targets.tolist() == [0.5, 1.0]
    assert (federation.labels, federation.schema.task.kind) == ((), "huber")
    assert (
        repr(federation)
        == "Federation(3 clients, 120 training and 2 test examples, inputs (5,), one number to predict)"
    )
    frames = {"a": FRAME, "b": FRAME}
    by_age = from_frames(frames, target="age", value_range=(0, 120), test=0)
    assert sorted(by_age.table.targets.tolist()) == [30, 30, 41, 41, 52, 52, 63, 63]
    assert by_age.columns[0] == "smoker"


X, Y = examples(12)
HOLE = X.copy()
HOLE[3, 2] = np.nan
HUGE = X.copy()
HUGE[0, 1] = 1e300


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: from_arrays(HOLE, Y, clients=2),
            r"not a finite number in 1 places, the first is x\[3, 2\] = n",
        ),
        (lambda: from_arrays(HUGE, Y, clients=2), r"x\[0, 1\] = 1e\+300 \(too large for float32\)"),
        (lambda: from_arrays(X, Y.astype(float), clients=2), r"y holds float64.*y.astype\(int\)"),
        (
            lambda: from_arrays(X, Y + 0.5, clients=2),
            "class labels are no such numbers: name the classes; to predict the numbers themselves give value_range",
        ),
        (lambda: from_arrays(X, [1.0, np.nan] * 6, clients=2), "y has no label in 6 rows"),
        (
            lambda: from_arrays(X, [None, "a"] * 6, clients=2),
            r"y has no label in 6 rows \(0, 2, 4, 6, 8, …\)",
        ),
        (lambda: from_arrays(X, np.eye(3)[Y], clients=2), r"y.argmax\(axis=1\)"),
        (
            lambda: from_arrays(X, Y, clients=2, value_range=(0, 1)),
            r"not within value_range=\(0, 1\) in .* is 2",
        ),
        (lambda: from_arrays(X, [np.nan] * 12, clients=2, value_range=(0, 1)), "in 12 rows"),
        (lambda: from_arrays(X, ["a"] * 12, clients=2, value_range=(0, 1)), "numbers, one an example"),
        (lambda: from_arrays(X, Y, clients=2, value_range=(3, 0)), "from a smaller to a larger"),
        (lambda: from_arrays(X, Y, clients=2, value_range=(0, 3), loss="hubr"), "loss: .*'huber'"),
        (lambda: from_arrays(X, Y, clients=2, loss="huber"), "say which, value_range"),
        (lambda: from_arrays(X, Y, clients=2, value_range=(0, 3), partition="dirichlet"), "deals by label"),
        (
            lambda: from_frame(FRAME.assign(clinic=[None, "a"] * 2), target="outcome", by="clinic"),
            "does not say which client 2 rows are from",
        ),
        (lambda: from_arrays(X, Y[:7], clients=2), "12 examples and 7 labels"),
        (lambda: from_arrays(X[:0], Y[:0], clients=2), "there is no example"),
        (lambda: from_arrays(X[:, 0], Y, clients=2), r"x.reshape\(-1, 1\)"),
        (lambda: from_arrays([[1, 2], [3]], Y, clients=2), "x cannot be read as an array"),
        (lambda: from_arrays(X.astype(str), Y, clients=2), "encode text and categories first"),
        (lambda: from_arrays(X, Y * 0, clients=2), "two classes or more, and only 0 is there"),
        (lambda: from_arrays(X, Y), "clients= says how many"),
        (lambda: from_arrays(X, Y, clients=0), "clients=0: a whole number of at least 1"),
        (lambda: from_arrays(X, Y, clients=50), "have fewer clients or a smaller minimum"),
        (lambda: from_arrays(X, Y, clients=2, partition="dirichelt"), "did you mean dirichlet"),
        (
            lambda: from_arrays(X, Y, clients=2, partition="dirichlet", alpha=0),
            "'dirichlet': alpha: .*greater",
        ),
        (lambda: from_arrays(X, Y, clients=2, alpha=0.1), "alpha= is no argument, and no setting of partition='iid'"),
        (lambda: from_arrays(X, Y, by=Y, clients=7), "clients=7, and by= names 3"),
        (lambda: from_arrays(X, Y, by=Y, partition="shards"), "leave partition and its settings out"),
        (lambda: from_arrays(X, Y, by=Y[:3]), "x and by: 12 examples and 3 labels"),
        (lambda: from_arrays(X, Y, clients=2, test=1.0), "test=1: a share"),
        (lambda: from_arrays(X, Y, clients=2, test=(X, Y, Y)), "a pair of arrays"),
        (
            lambda: from_arrays(X, Y, clients=2, test=(X[:, :4], Y)),
            "the shape .4,., one of the training data .5,.",
        ),
        (lambda: from_arrays(X, Y, clients=2, test=(X, Y + 1)), "labels that the training data has not: 3"),
        (lambda: from_arrays(X, Y, clients=2, test_at="sites"), '"federation" or "clients"'),
        (lambda: from_clients([]), "there has to be one"),
        (lambda: from_clients([(X, Y), (X[:, :4], Y)]), "client-1 has the shape .4,., of client-0 .5,."),
        (lambda: from_frame(X, target="y", clients=2), "a data frame is needed, and this is a ndarray"),
        (lambda: from_frame(FRAME, target="result", clients=2), "no column 'result'; there are: age"),
        (
            lambda: from_frame(FRAME.assign(age=[1, None, 2, 3]), target="outcome", clients=1),
            "'age'.*in row 1",
        ),
        (lambda: from_frame(FRAME.assign(stage=None), target="outcome", clients=1), "'stage'.*in 4 rows"),
        (lambda: from_frame(FRAME.assign(age=pd.Timestamp(0)), target="outcome", clients=1), "days since"),
        (lambda: from_frames([FRAME, FRAME.drop(columns="age")], target="outcome"), "other columns.*: age"),
        (lambda: from_frame(pd.concat([FRAME, FRAME.age], axis=1), "outcome", clients=2), "'age' more than once"),
        (lambda: from_frame(FRAME, "outcome", by="outcome"), "are the same column, 'outcome'"),
        (lambda: from_frame(FRAME.assign(age=[[1]] * 4), "outcome", clients=1), "'age' holds a list in a row"),
        (lambda: from_frame(FRAME.assign(age=[1, "2"] * 2), "outcome", clients=1), "holds numbers as objects"),
        (lambda: from_frame(FRAME.rename(columns={"age": ""}), "outcome", clients=1), "column '' cannot be one"),
        (lambda: from_frame(FRAME.assign(stage=["I", "I "] * 2), "outcome", clients=1), "more than once: 'I'"),
        (lambda: from_arrays(X, Y, client=2), "client= is no argument.*did you mean clients"),
        (lambda: from_arrays(X, Y, clients=2, test=(X, Y), test_at="clients"), "test= is to be that share"),
        (lambda: from_frames([FRAME, 3], target="outcome"), "one data frame a client"),
        (lambda: from_arrays(X, Y, clients="two"), "clients='two': a whole number of at least 1"),
        (lambda: from_arrays(X, Y, clients=2.5), r"clients=2\.5: a whole number"),
        (lambda: from_arrays(X, Y, clients=2, seed=-1), "seed=-1: a whole number of at least 0"),
        (lambda: from_arrays(X, Y, clients=2, seed="a"), "seed='a': a whole number"),
        (lambda: from_arrays(None, Y, clients=2), "x is a NoneType: an array of numbers"),
        (lambda: from_arrays(X, Y, clients=2, test=None), "0 for none, or a pair"),
        (lambda: from_clients(3), r"\[\(x0, y0\), ...\] is needed, or a dict, not a int"),
        (lambda: from_clients(FRAME), "not a DataFrame"),
        (lambda: from_clients([(X, Y), (X,)]), "number 1 has to be a pair"),
        (
            lambda: from_frame(FRAME, target="outcome", clients=2, value_range=(0, 1)),
            "value_range= is for numbers.*leave value_range out",
        ),
    ],
)
def test_what_cannot_be_right_is_told_with_a_remedy(make, words):
    with pytest.raises(fedclaw.FedClawError, match=words):
        make()


def test_an_identifier_is_no_category():
    frame = pd.DataFrame({"patient": [f"p{number}" for number in range(1200)], "y": [0, 1] * 600})
    with pytest.raises(fedclaw.DataError, match=r"1200 different values.*leave an identifier out"):
        Federation.from_frame(frame, target="y", clients=2)
    few = frame[:30]
    with pytest.raises(fedclaw.DataError, match=r"'patient' has 30 different values in 30 rows.*astype\('category'\)"):
        Federation.from_frame(few, target="y", clients=2)
    declared = Federation.from_frame(few.assign(patient=few.patient.astype("category")), target="y", clients=2)
    assert declared.input_shape == (30,)
