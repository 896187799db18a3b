"""Rows grouped into persons: each row is one person's, and nobody is at two sites or on both sides of a split."""

from itertools import combinations

import numpy as np
import pytest
from pydantic import ValidationError

from experiments.datasets import SitePolicy, write_sites
from experiments.partitions.dealing import deal_out
from experiments.partitions.in_memory import in_memory
from experiments.persons import GroupedRows
from experiments.sources import DatasetSettings, load_source
from fedclaw.learning.registry import schema_class
from fedclaw.simulation.partitions.labels import Dirichlet
from fedclaw.simulation.partitions.sizes import Iid

DIGITS = DatasetSettings(name="digits", public=0.1, persons=GroupedRows())
TABLE = DatasetSettings(name="breast_cancer", sites=3, persons=GroupedRows(most=4, seed=3))


def test_all_rows_are_of_one_person_each_and_persons_have_1_to_20():
    owners = GroupedRows().owners(1797)
    sizes = np.bincount(owners)
    assert len(owners) == 1797
    assert sizes.min() == 1
    assert sizes.max() == 20
    assert set(sizes) == set(range(1, 21))
    # 10.5 rows a person, and the deviation of a mean of 170 such numbers is 0.44.
    assert sizes.mean() == pytest.approx(10.5, abs=2)
    assert np.abs(np.diff(np.flatnonzero(owners == 3))).max() > 20, "a person's rows stand together in the data"


def test_the_grouping_has_a_seed_of_its_own():
    first, again = (load_source(DIGITS.model_copy(update={"seed": seed})).owners for seed in (1, 2))
    assert np.array_equal(first, again)
    other = GroupedRows(seed=1)
    assert not np.array_equal(first, other.owners(1797))


@pytest.mark.parametrize("method", [Dirichlet(), Iid()], ids=lambda method: method.name)
@pytest.mark.parametrize("dataset", [DIGITS, TABLE], ids=lambda dataset: dataset.name)
def test_nobody_is_at_two_sites_or_on_both_sides_of_a_split(dataset, method):
    dealt = deal_out(dataset, method)
    owners, parts = dealt.source.owners, [dealt.public]
    for client in range(dataset.sites):
        rows, held_out = dealt.rows(client), dealt.held_out(client)
        assert 0 < held_out < len(rows)
        parts += [rows[:held_out], rows[held_out:]]
        assert len(np.unique(owners[rows[:held_out]])) == max(1, round(dataset.test * len(np.unique(owners[rows]))))
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(owners)))
    for one, other in combinations(parts, 2):
        assert not set(owners[one]) & set(owners[other])


def test_the_unit_changes_neither_rows_nor_deal():
    as_rows = DIGITS.model_copy(update={"persons": GroupedRows(unit="example")})
    one, other = deal_out(DIGITS, Dirichlet()), deal_out(as_rows, Dirichlet())
    for client in range(4):
        assert np.array_equal(one.rows(client), other.rows(client))
        assert one.held_out(client) == other.held_out(client)
        assert other.owners(client) is None


@pytest.mark.parametrize("dataset", [DIGITS, TABLE], ids=lambda dataset: dataset.name)
def test_a_site_reads_whose_its_rows_are(tmp_path, dataset):
    directories = write_sites(tmp_path, dataset, SitePolicy(1.0, 1e-3))
    dealt, memory = deal_out(dataset, Dirichlet()), in_memory(dataset, Dirichlet(), dataset.sites)
    schema = schema_class(dealt.source.workload).parse((tmp_path / "schema.yaml").read_text(), "schema.yaml")
    assert schema.unit == "person"
    assert memory.schema.to_json() == schema.to_json()
    for client, directory in enumerate(directories):
        held_out, owners = dealt.held_out(client), dealt.owners(client)
        for part, rows in (("test", slice(held_out)), ("train", slice(held_out, None))):
            (file,) = (directory / "data").glob(f"{part}.*")
            read = schema.read_examples(file)
            assert read.unit == "person"
            assert [int(read.person_names[person]) for person in read.persons] == owners[rows].tolist()
            held = memory.table.take((memory.tests if part == "test" else memory.shares)[client])
            assert np.array_equal(held.persons, read.persons)
            assert held.person_names == read.person_names


def test_rows_by_themselves_are_written_without_persons(tmp_path):
    dataset = TABLE.model_copy(update={"persons": GroupedRows(unit="example")})
    directories = write_sites(tmp_path, dataset, SitePolicy(1.0, 1e-3))
    schema = schema_class("tabular").parse((tmp_path / "schema.yaml").read_text(), "schema.yaml")
    assert schema.unit == "example"
    assert schema.read_examples(directories[0] / "data" / "train.csv").persons is None


def test_data_without_persons_is_the_same_data_set_as_before():
    plain = DatasetSettings(name="digits")
    assert "persons" not in plain.model_dump()
    assert DIGITS.model_dump()["persons"]["most"] == 20


def test_fewer_rows_at_most_than_at_least_are_refused():
    with pytest.raises(ValidationError, match="least is 5 rows of a person, more than most, 4"):
        GroupedRows(least=5, most=4)
