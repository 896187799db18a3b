"""Runs beside each other: what varies, seeds put together, the best, what was sent; by hand."""

import csv
import io
import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.sweeps import plots
from experiments.sweeps.comparison import compare, to_csv, to_json
from experiments.sweeps.identity import IRRELEVANT, identify
from experiments.sweeps.labels import label_of
from experiments.sweeps.results import Point, RunResult
from experiments.sweeps.terminal import bytes_words, make_table
from experiments.sweeps.wire import bytes_up
from fedclaw.cli import make_console


def result(accuracies, *, epsilon=None, sent=100, **settings):
    """A finished run with an accuracy for each round, and `sent` bytes a round."""
    points = [
        Point(round=number, metrics={"accuracy": value, "loss": 1 - value}, bytes_up=sent * number)
        for number, value in enumerate(accuracies, 1)
    ]
    named = {key.replace("__", "."): str(value) for key, value in settings.items()}
    known = {"settings": named, "run": "../../x", "asked_epsilon": epsilon, "epsilon": epsilon, "seconds": 2.0}
    return RunResult(**known, status="finished", points=tuple(points))


def failed(**settings):
    named = {key.replace("__", "."): str(value) for key, value in settings.items()}
    return RunResult(settings=named, run=None, status="failed", reason="no reason")


def test_seeds_are_put_together_and_the_best_mean_is_marked():
    table = compare(
        [
            result([0.5, 0.6], strategy="a", seed=1, rounds=2),
            result([0.5, 0.8], strategy="a", seed=2, rounds=2),
            result([0.5, 0.9], strategy="b", seed=1, rounds=2),
            failed(strategy="b", seed=2, rounds=2),
        ]
    )
    assert table.varied == ("strategy",)
    assert table.seeds == ("seed",)
    first, second = table.rows
    assert first.spread("accuracy").mean == pytest.approx(0.7)
    assert first.spread("accuracy").deviation == pytest.approx(np.std([0.6, 0.8], ddof=1))
    assert second.spread("accuracy").deviation is None
    assert (first.best, second.best) == (False, True)
    assert (table.runs, table.failed) == (4, 1)
    assert second.reasons == ("no reason",)


def test_without_accuracy_the_lowest_loss_is_the_best():
    def only_loss(loss, lr):
        points = (Point(round=1, metrics={"loss": loss}, bytes_up=1),)
        return RunResult(settings={"lr": lr}, run="x", status="finished", points=points)

    table = compare([only_loss(0.5, "1"), only_loss(0.2, "2"), only_loss(0.9, "3")])
    assert table.score == "loss"
    assert [row.best for row in table.rows] == [False, True, False]


def test_a_sweep_of_which_nothing_finished_has_a_table_and_no_best(tmp_path):
    table = compare([failed(strategy="a"), failed(strategy="b")])
    assert table.best is None
    assert plots.draw(table, tmp_path) == []
    assert to_csv(table).count("no reason") == 2
    make_console().print(make_table(table, "name"))


def test_the_files_have_every_figure():
    rows = [result([0.25, 0.5], epsilon=2.0, strategy="a", seed=seed) for seed in (1, 2)]
    table = compare([*rows, result([0.75], strategy="b", seed=1)])
    read = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert [row["strategy"] for row in read] == ["a", "b"]
    assert (read[0]["accuracy"], read[0]["accuracy_deviation"], read[0]["loss"]) == ("0.5", "0", "0.5")
    assert (read[0]["epsilon"], read[0]["bytes_up"], read[0]["runs"]) == ("2", "200", "2")
    assert (read[1]["epsilon"], read[1]["accuracy_deviation"], read[1]["best"]) == ("", "", "1")
    plain = json.loads(json.dumps(to_json(table)))
    assert [len(row["runs"]) for row in plain["rows"]] == [2, 1]
    assert plain["rows"][0]["runs"][1]["metrics"] == {"accuracy": 0.5, "loss": 0.5}
    assert plain["rows"][0]["accuracy"] == {"mean": 0.5, "deviation": 0.0}


def test_bytes_are_those_recorded_or_those_of_float32_updates():
    line = {"answered": ["north", "south", "east"]}
    assert bytes_up(line, parameters=1000) == 12_000
    assert bytes_up({**line, "bytes_up": 77}, parameters=1000) == 77
    assert bytes_up({**line, "bytes_up": 0}, parameters=1000) == 0
    assert [bytes_words(count) for count in (12, 2980, 594e3, 1.25e6, 3e9)] == [
        *("12 B", "2.98 kB", "594 kB", "1.25 MB", "3 GB")
    ]


NAMES = {"accuracy_by_round.png", "accuracy_by_epsilon.png", "bytes_by_accuracy.png"}


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([result([0.1, 0.2], strategy="a"), result([0.1, 0.3], strategy="b")], {"accuracy_by_round.png"}),
        ([result([0.1], strategy="a"), result([0.3], strategy="b")], set()),
        (
            [result([0.1, 0.2], epsilon=e, privacy__epsilon=e) for e in (1.0, 2.0)],
            {"accuracy_by_round.png", "accuracy_by_epsilon.png"},
        ),
        ([result([0.2], sent=sent, upload=sent) for sent in (10, 5)], {"bytes_by_accuracy.png"}),
        ([result([0.1 * n, 0.2], sent=n, epsilon=n, e__epsilon=n) for n in range(1, 5)], NAMES),
        (
            [result([0.02 * n, 0.3], sent=n, lr=n, seed=s) for n in range(1, 14) for s in (1, 2)],
            NAMES - {"accuracy_by_epsilon.png"},
        ),
    ],
    ids=["rounds", "nothing varies", "epsilon", "bytes", "all", "more rows than colours"],
)
def test_a_plot_is_drawn_where_its_axis_varies_and_an_old_one_goes(tmp_path, results, expected):
    for name in NAMES:
        (tmp_path / name).write_bytes(b"old")
    drawn = plots.draw(compare(results), tmp_path)
    assert {path.name for path in drawn} == {path.name for path in tmp_path.iterdir()} == expected
    for path in drawn:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", content[16:24])
        assert width > 900
        assert height > 550


def test_labels_are_short_and_tell_rows_apart():
    settings = {"strategy": "fedavg", "privacy.epsilon": "2", "training.learning_rate": "0.1"}
    assert label_of(settings, list(settings)) == "fedavg, epsilon 2, learning rate 0.1"
    both = {"privacy.epsilon": "2", "central.epsilon": "4"}
    assert label_of(both, list(both)) == "privacy.epsilon 2, central.epsilon 4"
    assert label_of({"strategy": "fedavg"}, ["strategy", "seed"]) == "fedavg, seed as set"


SETTINGS = {
    **{"rounds": 3, "seed": 0, "dataset": {"name": "digits"}, "partition": {"alpha": 1.0}, "statistics": None},
    **{"runs": "runs", "run": None, "tracking": {"uri": None}, "runtime": {"name": "simulation", "workers": 1}},
}


@given(st.sampled_from(sorted(SETTINGS)))
def test_a_run_is_known_by_what_determines_its_result(name):
    before = identify(SETTINGS).digest
    changed = identify({**SETTINGS, name: "another"}).digest
    assert (changed == before) == (name in IRRELEVANT)


def test_of_the_runtime_what_is_simulated_counts_and_how_fast_does_not():
    digest = identify(SETTINGS).digest
    for name, value, same in (("workers", 2, True), ("name", "sites", False), ("clients", 9, False)):
        runtime = {**SETTINGS["runtime"], name: value}
        assert (identify({**SETTINGS, "runtime": runtime}).digest == digest) == same


def test_a_run_is_known_whatever_the_order_and_a_new_setting_counts():
    assert identify(SETTINGS).digest == identify(dict(reversed(SETTINGS.items()))).digest
    assert identify({**SETTINGS, "invented": 1}).digest != identify(SETTINGS).digest


def test_a_file_of_statistics_counts_by_its_content(tmp_path):
    digests = []
    for name, content in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).write_text(content)
        digests.append(identify({**SETTINGS, "statistics": str(tmp_path / name)}).digest)
    assert digests[0] == digests[1] != digests[2]
