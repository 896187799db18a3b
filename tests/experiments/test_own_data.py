"""Data of one's own in experiments: a table whose column names the sites, a directory of images, site directories."""

import csv
import hashlib
import random

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from experiments.datasets import SitePolicy, write_sites
from experiments.experiment import run_experiment
from experiments.persons import GroupedRows
from experiments.resumed import resumed
from experiments.settings import ExperimentSettings, check_experiment, with_own_data
from experiments.sources import DatasetSettings, load_source, with_content
from experiments.sweeps.identity import digest_of, identify
from fedclaw.cli import compose_settings
from fedclaw.errors import DataError, UsageError
from fedclaw.server.run_directory import RunDirectory
from fedclaw.simulation.partitions.natural import Natural
from fedclaw.site.directory import open_service
from fedclaw.site.settings import load_site_settings

TINY = ("tracking=none", "privacy=none", "rounds=1", "training.steps=1", "training.epochs=null")


@pytest.fixture
def table(tmp_path):
    path, generator = tmp_path / "table.csv", random.Random(1)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["age", "ward", "hospital", "died"])
        for number in range(120):
            age = generator.randint(20, 90)
            ward, hospital = ("icu", "er")[number % 2], ("St. Anna", "Charité", "North")[number % 3]
            writer.writerow([age, ward, hospital, "yes" if age > 55 else "no"])
    return path


def settings_of(*overrides):
    return with_own_data(compose_settings("run", overrides, ExperimentSettings))


def test_a_column_names_the_sites(table, tmp_path):
    source = load_source(DatasetSettings(name="csv", data=table, site_column="hospital", sites=3))
    assert source.features == ("age", "ward=er", "ward=icu")
    assert source.labels == ("no", "yes")
    assert source.inputs[0].tolist()[1:] == [0.0, 1.0]
    settings = settings_of(*TINY, "dataset=csv", f"data={table}", "sites=hospital", f"runs={tmp_path}/runs", "run=x")
    assert settings.partition == Natural()
    outcome = run_experiment(settings, quiet=True)
    assert set(outcome.receipts) == {"charit", "north", "st-anna"}


def test_a_column_that_says_which_row_is_which_is_no_input(table):
    lines = table.read_text().splitlines()
    table.write_text("\n".join(["pid," + lines[0], *(f"P-{i},{line}" for i, line in enumerate(lines[1:]))]) + "\n")
    said = r"'pid' has 120 different words; .* leave it out by dataset\.identifiers=\[pid\]"
    with pytest.raises(DataError, match=said):
        load_source(DatasetSettings(name="csv", data=table))
    source = load_source(DatasetSettings(name="csv", data=table, identifiers=("pid",), site_column="hospital", sites=3))
    assert source.features == ("age", "ward=er", "ward=icu")
    with pytest.raises(DataError, match="no column 'pit'; did you mean pid"):
        load_source(DatasetSettings(name="csv", data=table, identifiers=("pit",)))


def test_a_column_that_says_whose_a_row_is_is_dealt_by_and_protected(table, tmp_path):
    lines = table.read_text().splitlines()
    table.write_text("\n".join(["pid," + lines[0], *(f"P-{i // 4},{line}" for i, line in enumerate(lines[1:]))]) + "\n")
    dataset = DatasetSettings(name="csv", data=table, person="pid", sites=3, public=0.2)
    source = load_source(dataset)
    assert not any("pid" in feature for feature in source.features)
    directories = write_sites(tmp_path / "out", dataset, SitePolicy(epsilon=1.0, delta=1e-3))
    services = [open_service(root, load_site_settings(root), "f", durable=False) for root in directories]
    assert {service.data.train.unit for service in services} == {"person"}
    homes = [set(s.data.train.person_names) | set(s.data.test.person_names) for s in services]
    assert sum(map(len, homes)) == len(set.union(*homes)) == 24
    # At hospitals of their own, who is at two is one person at each.
    apart = load_source(dataset.model_copy(update={"site_column": "hospital"}))
    assert len(np.unique(apart.owners)) == len({(i // 4, i % 3) for i in range(120)})
    with pytest.raises(ValidationError, match="person names the column"):
        DatasetSettings(name="csv", data=table, person="pid", persons=GroupedRows())
    assert "person" not in DatasetSettings(name="csv", data=table).model_dump()


def test_sites_take_rows_of_their_own_hospital_alone(table, tmp_path):
    dataset = DatasetSettings(name="csv", data=table, site_column="hospital", sites=3, test=0)
    directories = write_sites(tmp_path / "out", dataset, SitePolicy(epsilon=1.0, delta=1e-3), Natural())
    ages = {row["age"]: set() for row in csv.DictReader(table.open())}
    for row in csv.DictReader(table.open()):
        ages[row["age"]].add(row["hospital"])
    for directory, hospital in zip(directories, ("Charité", "North", "St. Anna"), strict=True):
        rows = list(csv.DictReader((directory / "data" / "train.csv").open()))
        assert rows
        assert all(hospital in ages[str(int(float(row["age"])))] for row in rows)


@pytest.mark.parametrize("runtime", ["sites", "simulation"])
def test_cells_that_are_not_known_an_index_and_a_site_s_own_way_of_writing(table, tmp_path, runtime):
    """A table as pandas writes it for a country of decimal commas, with gaps, and a word that is rare."""
    rows = list(csv.DictReader(table.open()))
    lines = [";age;ward;dose;died"]
    for number, row in enumerate(rows):
        age, dose = "NA" if number % 7 == 0 else row["age"], f"{number}".replace("9", "") or "1"
        ward = "" if number % 5 == 0 else "rare" if number == 1 else row["ward"]
        lines.append(f"{number};{age};{ward};{dose},5;{row['died']}")
    table.write_text("\n".join(lines) + "\n", encoding="latin-1")
    words = ('dataset.written={delimiter:";",decimal:",",encoding:latin-1}', "sites=2", f"runtime={runtime}")
    settings = settings_of(*TINY, "dataset=csv", f"data={table}", *words, f"runs={tmp_path}/runs", "run=x")
    source = load_source(settings.dataset)
    assert source.features == ("age", "ward=er", "ward=icu", "ward=rare", "dose")
    assert np.isnan(source.inputs[::7, 0]).all()
    assert np.isnan(source.inputs[:, 0]).sum() == len(source.inputs[::7])
    assert source.inputs[::5, 1:4].sum() == 0
    assert source.inputs[1].tolist()[1:] == [0.0, 0.0, 1.0, 1.5]
    assert len(run_experiment(settings, quiet=True).receipts) == 2


@pytest.mark.parametrize("runtime", ["sites", "simulation"])
def test_a_number_of_sites_is_dealt_to(table, tmp_path, runtime):
    words = ("dataset=csv", f"data={table}", "sites=2", "dataset.target=ward", f"runtime={runtime}")
    settings = settings_of(*TINY, *words, f"runs={tmp_path}/runs", "run=x")
    assert len(run_experiment(settings, quiet=True).receipts) == 2


def test_a_directory_of_images(tmp_path):
    generator = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(20):
            pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{number}.png")
    words = ("dataset=images", "workload=vision", f"data={tmp_path / 'images'}", "sites=2", "partition=iid")
    outcome = run_experiment(settings_of(*TINY, *words, f"runs={tmp_path}/runs", "run=x"), quiet=True)
    assert outcome.directory.record().make_schema().labels == ("cat", "dog")
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(tmp_path / "images" / "dog" / "other.png")
    with pytest.raises(DataError, match=r"other\.png is of another size"):
        load_source(DatasetSettings(name="images", data=tmp_path / "images"))


def test_directories_of_sites_are_taken_as_they_are(tmp_path):
    policy = SitePolicy(epsilon=None, delta=1e-5, allow_training_without_privacy=True, minimum_cohort=1)
    directories = write_sites(tmp_path / "out", DatasetSettings(name="breast_cancer", sites=2), policy)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    where = f"sites=[{','.join(map(str, directories))}]"
    outcome = run_experiment(settings_of(*TINY, where, f"runs={tmp_path}/runs", "run=x"), quiet=True)
    assert set(outcome.receipts) == {directory.name for directory in directories}
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert RunDirectory.open(tmp_path / "runs" / "x").model_path.is_file()
    with pytest.raises(UsageError, match="deals in memory"):
        check_experiment(settings_of(*TINY, where, "runtime=simulation"))
    with pytest.raises(UsageError, match="is a site of workload=tabular"):
        check_experiment(settings_of(*TINY, where, "workload=vision"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("dataset=csv",), "dataset=csv needs data=PATH"),
        (("dataset=csv", "data=nowhere.csv"), "there is no such file"),
        (("dataset=csv", "data=TABLE", "sites=hospitl"), "has no such column; did you mean hospital?"),
        (("data=TABLE",), "data is for dataset=csv or dataset=images"),
    ],
)
def test_what_is_wrong_with_it_is_told(table, words, message):
    with pytest.raises((UsageError, ValidationError), match=message.replace("?", r"\?")):
        settings_of(*(word.replace("TABLE", str(table)) for word in words))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",yes\n", ",\n", "no value in column 'died'"),
        ("age,", "ward,", "different names"),
        ("20,", "20,9,", "cells"),
        ("\n7", "\nabout 7", "is no number, and most others are"),
        (",", ";", "written with a semicolon between the cells"),
    ],
)
def test_a_table_that_cannot_be_used_says_where(table, old, new, message):
    text = table.read_text()
    table.write_text(text.replace(old, new, -1 if old == "," else 1) if old in text else text + "1,2,3,4,5\n")
    with pytest.raises(DataError, match=message):
        load_source(DatasetSettings(name="csv", data=table))


def test_runs_of_the_shipped_sets_keep_their_digests_and_other_content_has_another(table):
    dumped = DatasetSettings(name="digits").model_dump(mode="json")
    assert set(dumped) == {"name", "sites", "public", "test", "seed", "synthetic"}
    settings = settings_of(*TINY).model_dump(mode="json")
    relevant = identify(settings).configuration
    assert not {"data", "sites", "resume"} & set(relevant)
    own = with_content(DatasetSettings(name="csv", data=table))
    assert own.content == hashlib.sha256(table.read_bytes()).hexdigest()
    assert DatasetSettings.model_validate(own.model_dump(mode="json")) == own
    table.write_text(table.read_text().replace("icu", "ICU", 1))
    before, after = (digest_of(settings.model_dump(mode="json")) for settings in (own, with_content(own)))
    assert before != after


def test_a_run_goes_on_with_the_data_that_it_was_begun_with_alone(table, tmp_path):
    words = (*TINY, "dataset=csv", f"data={table}", "sites=hospital", f"runs={tmp_path}/runs", "run=x")
    settings = settings_of(*words)
    root = run_experiment(settings, quiet=True).directory.root
    assert resumed(settings, root, ()).dataset == settings.dataset
    table.write_text(table.read_text().replace("icu", "ICU", 1))
    with pytest.raises(UsageError, match=r"table\.csv is not what it was when .*x was begun"):
        resumed(settings, root, ())


def test_settings_are_checked_without_a_look_at_the_data(tmp_path):
    """What is read is read in one step: neither checking nor writing settings opens a file."""
    missing = DatasetSettings(name="csv", data=tmp_path / "nowhere.csv", site_column="hospital")
    assert "content" not in missing.model_dump()
    for read in (with_content, load_source):
        with pytest.raises(UsageError, match=r"nowhere\.csv: there is no such file"):
            read(missing)
    with pytest.raises(UsageError, match="there is no such directory"):
        with_content(DatasetSettings(name="images", data=tmp_path / "nowhere"))


def test_a_measured_number_is_not_taken_for_classes(tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("dose,level\n" + "".join(f"{row % 7},{row / 8}\n" for row in range(60)))
    with pytest.raises(DataError, match=r"'level' has 60 different numbers in 60 rows.*dataset.range=\[SMALLEST,"):
        load_source(DatasetSettings(name="csv", data=table))
    assert len(load_source(DatasetSettings(name="csv", data=table, target="dose")).labels) == 7
    assert load_source(DatasetSettings(name="csv", data=table, range=(0, 8))).range == (0, 8)
