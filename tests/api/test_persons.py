"""A notebook's federation whose examples are of persons: dealt, held out and protected as a whole."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import fedclaw
from fedclaw.api.federation import Federation
from fedclaw.errors import DataError, UsageError
from fedclaw.simulation.partitions.labels import Dirichlet, Shards
from fedclaw.simulation.partitions.natural import Natural
from fedclaw.simulation.partitions.sizes import Iid, Quantity
from tests.api.conftest import Net

PEOPLE = 60


class Small(Net):
    def __init__(self) -> None:
        super().__init__(3, 2)


def data(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One to four examples of each person, in no order; the last input says whose an example is."""
    generator = np.random.default_rng(seed)
    persons = generator.permutation(np.repeat(np.arange(PEOPLE), 1 + np.arange(PEOPLE) % 4))
    x = generator.normal(size=(len(persons), 3))
    x[:, 2] = persons
    return x, (x[:, 0] > 0).astype(int), persons


def who(federation: Federation, rows: Any) -> set[int]:
    return {int(person) for person in federation.table.inputs[rows, 2]}


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "shards", "quantity", "feature_shift"])
def test_all_of_a_persons_examples_go_to_one_client_or_are_held_out(partition: str) -> None:
    x, y, persons = data()
    federation = Federation.from_arrays(x, y, clients=4, partition=partition, persons=persons, test=0.25)
    assert federation.table.unit == federation.schema.unit == "person"
    numbers, test = federation.table.persons, federation.test
    assert numbers is not None
    assert test is not None
    homes = [set(numbers[rows].tolist()) for rows in federation.shares]
    assert sum(map(len, homes)) == len(set.union(*homes)) == federation.table.units == PEOPLE - 15
    assert not set(federation.table.person_names) & set(test.person_names)
    assert test.units == 15
    assert sum(federation.sizes) + len(test) == len(x)
    assert "by person" in repr(federation)


def test_clients_test_on_other_persons_than_they_train_on() -> None:
    x, y, persons = data()
    for by in (None, np.where(persons % 2, "east", "west")):
        clients = {"clients": 3} if by is None else {"by": by}
        federation = Federation.from_arrays(x, y, persons=persons, test=0.3, test_at="clients", **clients)
        assert federation.tests is not None
        for train, test in zip(federation.shares, federation.tests, strict=True):
            assert len(test)
            assert not who(federation, train) & who(federation, test)


def test_rows_stay_at_their_site_whosever_they_are() -> None:
    x, y, persons = data()
    by = np.where(np.arange(len(x)) % 2, "east", "west")
    federation = Federation.from_arrays(x, y, by=by, persons=persons, test=0)
    assert federation.sizes == (int((by == "east").sum()), int((by == "west").sum()))
    assert who(federation, federation.shares[0]) & who(federation, federation.shares[1])


@pytest.mark.parametrize("method", [Iid(), Dirichlet(alpha=0.5), Shards(), Quantity()])
def test_a_deal_of_persons_has_every_row_once(method: Any) -> None:
    x, y, persons = data()
    dealt = method.deal(y, x, 4, np.random.default_rng(0), persons=persons)
    assert sorted(dealt.rows.tolist()) == list(range(len(x)))
    assert dealt.bounds[-1] == len(x)
    homes = [set(persons[rows].tolist()) for rows in dealt.shares]
    assert sum(map(len, homes)) == PEOPLE
    assert min(map(len, homes)) >= method.fewest(PEOPLE, 4)
    sites = Natural().deal(y, x, 2, np.random.default_rng(0), sites=persons % 2, persons=persons)
    assert [set((persons[rows] % 2).tolist()) for rows in sites.shares] == [{0}, {1}]


def test_frames_name_the_column() -> None:
    x, y, persons = data()
    frame = pd.DataFrame({"age": x[:, 0], "dose": x[:, 1], "patient": [f"p{person}" for person in persons], "y": y})
    federation = Federation.from_frame(frame, "y", person="patient", clients=3, rows_per_person=2)
    assert federation.columns == ("age", "dose")
    assert (federation.schema.rows_per_person, federation.table.unit) == (2, "person")
    halves = {"west": frame[persons % 2 == 0], "east": frame[persons % 2 == 1]}
    apart = Federation.from_frames(halves, "y", person="patient", test=0)
    assert apart.table.units == PEOPLE
    frame.loc[3, "patient"] = None
    with pytest.raises(DataError, match=r"column 'patient' of the frame does not say in row 3 whose row it is"):
        Federation.from_frame(frame, "y", person="patient", clients=3)
    with pytest.raises(DataError, match="no column 'pid'"):
        Federation.from_frame(frame, "y", person="pid", clients=3)


def test_a_schema_of_frames_reads_files_by_person(tmp_path: Path) -> None:
    frame = pd.DataFrame({"age": range(30), "patient": [17, 18] * 15, "y": ["no", "no", "yes"] * 10})
    federation = Federation.from_frame(frame, "y", person="patient", clients=1, test=0)
    frame.to_csv(tmp_path / "rows.csv", index=False)
    assert federation.schema.read_examples(tmp_path / "rows.csv").person_names == ("17", "18")
    assert federation.table.person_names == ("17", "18")


def test_clients_of_three_arrays() -> None:
    x, y, persons = data()
    half = persons % 2 == 0
    federation = Federation.from_clients(
        [(x[half], y[half], persons[half]), (x[~half], y[~half], persons[~half])], test=0.2
    )
    assert federation.table.units + federation.test.units == PEOPLE  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="number 1 does not say whose"):
        Federation.from_clients([(x[half], y[half], persons[half]), (x[~half], y[~half])])


def test_what_cannot_be_right() -> None:
    x, y, persons = data()
    with pytest.raises(UsageError, match="nothing says whose"):
        Federation.from_arrays(x, y, clients=2, rows_per_person=2)
    with pytest.raises(UsageError, match="persons_test"):
        Federation.from_arrays(x, y, clients=2, persons=persons, test=(x[:5], y[:5]))
    with pytest.raises(DataError, match=r"\d+ persons of test are in the training data too"):
        Federation.from_arrays(x, y, clients=2, persons=persons, test=(x[:5], y[:5], persons[:5]))
    with pytest.raises(DataError, match="persons"):
        Federation.from_arrays(x, y, clients=2, persons=persons[:-1])
    other = Federation.from_arrays(x, y, clients=2, persons=persons, test=(x[:5], y[:5], persons[:5] + 1000))
    assert other.test is not None
    assert other.test.unit == "person"


def test_a_simulation_protects_persons(tmp_path: Path) -> None:
    x, y, persons = data()
    federation = Federation.from_arrays(x, y, clients=3, persons=persons, test=0.2)
    private = fedclaw.LocalPrivacy(epsilon=4, delta=1e-3, clip=1.0)
    run = fedclaw.simulate(federation, Small, rounds=1, batch_size=8, learning_rate=0.1, privacy=private)
    receipts = [found.receipt for found in run.receipts.values()]
    assert {receipt.unit for receipt in receipts} == {"person"}
    assert {receipt.sample_rate for receipt in receipts} == {8 / 16}


def test_when_everybody_is_held_out_nobody_can_be_dealt() -> None:
    """It was an IndexError."""
    x, y, persons = data()
    with pytest.raises(UsageError, match="and there are 0"):
        Federation.from_arrays(x, y, clients=2, persons=persons, test=0.999)
