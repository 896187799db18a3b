"""The survival experiment in small, over made-up files of the two studies' form: read, asked, drawn and told."""

import csv

import numpy as np
import pytest

from experiments.survival_curves import studies
from experiments.survival_curves.__main__ import main
from experiments.survival_curves.cells import distance, exact_curve, histogram, run_cell, without_noise
from experiments.survival_curves.page import render
from experiments.survival_curves.results import Results, Row
from experiments.survival_curves.settings import Cell, CurveSettings
from experiments.survival_curves.studies import REGIONS, read_brca, read_gbsg2
from fedclaw.cli import compose_settings
from fedclaw.errors import DataError, FedClawError, UsageError
from fedclaw.privacy.survival_estimates import NoisedHistogram, curves
from tests.privacy.test_survival_estimates import PLACEBO, TREATED, row_by_row


def write_brca(directory, rows=90):
    """Rows of six regions, one row in no region; the older half dies sooner."""
    random = np.random.default_rng(4)
    directory.mkdir(parents=True)
    with (directory / "brca.csv").open("w", newline="") as one, (directory / "train_test_split.csv").open("w") as two:
        writer = csv.writer(one)
        writer.writerow(["pid", "age_at_index", "E", "T"])
        two.write("pid,fold,fold2\n")
        for number in range(rows):
            age = 40 + 40 * (number % 2)
            days, end = random.exponential(900 if age > 60 else 3000), random.uniform(100, 3600)
            writer.writerow([f"p{number}", age, float(days <= end), float(round(min(days, end)))])
            if number:
                fold = ("train", "test")[number % 4 == 0]
                two.write(f"p{number},{fold},{fold}_{number % 6}\n")
    return directory


def write_gbsg2(path, rows=60, *, arff=False):
    random = np.random.default_rng(5)
    quote = "'" if arff else ""
    lines = []
    for number in range(rows):
        therapy, menopause, grade = (f"{quote}{word}{quote}" for word in (("no", "yes")[number % 2], "Post", "II"))
        days, seen = int(random.exponential(1200)), number % 3 != 0
        lines.append(f"{therapy},60,{menopause},20,{grade},2,10,10,{days},{int(seen)}")
    head = ["@relation GBSG2", "@DATA"] if arff else ["horTh,age,menostat,tsize,tgrade,pnodes,progrec,estrec,time,cens"]
    path.write_text("\n".join([*head, *lines]) + "\n")
    return path


def settings_for(tmp_path, *more):
    given = (f"output={tmp_path / 'out'}", "workers=1", "draws=3", "epsilons=[3]", *more)
    return compose_settings("survival_curves", given, CurveSettings)


def test_from_files_to_page_and_picture(tmp_path, capsys):
    data, gbsg2 = write_brca(tmp_path / "data"), write_gbsg2(tmp_path / "gbsg2.csv")
    given = [f"data={data}", f"gbsg2={gbsg2}", f"output={tmp_path / 'out'}", "workers=1", "draws=3"]
    main([*given, "epsilons=[20]", "smallest=2"])
    results = Results.read(tmp_path / "out" / "survival_curves.json")
    assert list(results.studies) == ["brca", "gbsg2"]
    assert [row.cell.placement for row in results.rows] == ["own", "shares"] * 2
    for row in results.rows:
        assert 19 < row.result.epsilon <= 20
        assert 0 < row.result.coverage <= 1
        assert 0 < row.result.distance.low <= row.result.distance.median <= row.result.distance.high
    own, shares = (row.result for row in results.of("brca"))
    assert shares.deviation < 0.6 * own.deviation, "six sites' noise against little more than one's"
    page = (tmp_path / "out" / "survival_curves.md").read_text()
    assert "89 rows" in page
    assert f"{results.studies['brca'].log_rank.statistic:.2f}" in page
    assert "| each site's own | 20 |" in page
    assert (tmp_path / "out" / "survival_curves.png").read_bytes().startswith(b"\x89PNG")
    assert page == render(results, "survival_curves.png")
    main(["page", *given])
    assert (tmp_path / "out" / "survival_curves.md").read_text() == page


def test_where_noise_leaves_no_curve_there_is_nothing_to_hold_and_nothing_to_compare(tmp_path):
    settings, study = settings_for(tmp_path), read_gbsg2(write_gbsg2(tmp_path / "gbsg2.csv"), 4, 1)
    found = run_cell(Cell(study="gbsg2", placement="own", epsilon=0.1), (study,), settings)
    assert found.coverage is found.released_log_rank is found.p_value is None
    assert found.reached == found.released_distance == 0
    results = Results(
        settings=settings,
        studies={"gbsg2": without_noise(study, settings)},
        rows=(Row(cell=Cell(study="gbsg2", placement="own", epsilon=0.1), result=found),),
    )
    assert "| no curve | too few at risk | too few at risk |" in render(results, "x.png")


def test_both_forms_of_gbsg2_are_the_same_study(tmp_path):
    one = read_gbsg2(write_gbsg2(tmp_path / "gbsg2.csv"), 4, 1)
    other = read_gbsg2(write_gbsg2(tmp_path / "GBSG2.arff", arff=True), 4, 1)
    assert np.array_equal(one.days, other.days)
    assert np.array_equal(one.died, other.died)
    assert np.array_equal(one.of_group, other.of_group)
    assert sorted(np.bincount(one.of_site)) == [15] * 4


def test_regions_and_groups_of_brca(tmp_path):
    study = read_brca(write_brca(tmp_path / "data"))
    assert len(study) == 89, "the row of no region is left out"
    assert study.sites == REGIONS
    assert np.bincount(study.of_site).tolist() == [14, 15, 15, 15, 15, 15]
    assert np.bincount(study.of_group).tolist() == [44, 45]


def test_exact_times_have_the_curve_of_the_definition(tmp_path):
    study = read_gbsg2(write_gbsg2(tmp_path / "gbsg2.csv", rows=42), 2, 1)
    weeks = np.array([*TREATED, *PLACEBO])
    group = (np.arange(42) >= 21).astype(np.int64)
    study = studies.Study(**{**vars(study), "days": np.abs(weeks).astype(float), "died": weeks > 0, "of_group": group})
    ends = tuple(float(week) for week in range(1, 36))
    for number, rows in enumerate((TREATED, PLACEBO)):
        assert exact_curve(study, number, ends) == pytest.approx(row_by_row(rows))
        (curve,) = curves(NoisedHistogram(histogram(study, ends)[number][None], 0.0))
        assert distance(curve.survival, exact_curve(study, number, ends)) < 1e-12, "bins of the times' own unit"


def test_sites_that_do_not_add_up_to_the_pooled_rows_end_it(tmp_path, monkeypatch):
    """The check of federated against pooled is one that can fail."""
    settings = settings_for(tmp_path)
    study = read_gbsg2(write_gbsg2(tmp_path / "gbsg2.csv"), 4, 1)
    without_noise(study, settings)
    monkeypatch.setattr("experiments.survival_curves.cells.statistics_vector", lambda *_: np.zeros(56))
    with pytest.raises(FedClawError, match="is not what the pooled rows give"):
        without_noise(study, settings)


def test_what_is_no_such_data_is_one_line(tmp_path, monkeypatch):
    data = write_brca(tmp_path / "data")
    monkeypatch.setattr(studies, "SHIPPED", (("no_such_package", "gbsg2.csv"),))
    with pytest.raises(UsageError, match="no data: give data=DIRECTORY"):
        main([f"output={tmp_path}"])
    with pytest.raises(UsageError, match="cannot be read"):
        main([f"output={tmp_path}", f"data={tmp_path / 'nowhere'}"])
    split = data / "train_test_split.csv"
    split.write_text(split.read_text().replace("_5", "_4"))
    with pytest.raises(DataError, match="not of six regions"):
        read_brca(data)
    (data / "brca.csv").write_text("pid,E,T\n")
    with pytest.raises(DataError, match="no rows with the columns"):
        read_brca(data)
    bad = write_gbsg2(tmp_path / "bad.csv")
    bad.write_text(bad.read_text().replace(",1\n", ",dead\n", 1))
    with pytest.raises(DataError, match="cens holds something that is no number"):
        read_gbsg2(bad, 4, 1)
    (tmp_path / "bad.arff").write_text("@relation x\n")
    with pytest.raises(DataError, match="has no @data"):
        read_gbsg2(tmp_path / "bad.arff", 4, 1)
    with pytest.raises(UsageError, match="run the experiment first"):
        main(["page", f"output={tmp_path}"])
