"""How long many runs take is said before they begin and after each of them."""

import io

from rich.console import Console

from experiments.attack_table.settings import TableSettings as AttackSettings
from experiments.compression_table.settings import TableSettings as CompressionSettings
from experiments.pace import Pace
from experiments.privacy_table.settings import TableSettings as PrivacySettings
from fedclaw.cli import compose_settings
from fedclaw.progress import duration


def told(**values):
    out = io.StringIO()
    return Pace(Console(file=out, width=200), **values), out


def test_the_announcement_has_the_time_by_what_is_known():
    pace, out = told(total=12, left=10, workers=2, known=(60.0, 120.0), usual=1.0)
    pace.announce()
    words = "12 runs, of which 2 are done; the other 10 take about 8 min in 2 processes, by those that are done\n"
    assert out.getvalue() == words
    pace, out = told(total=10, left=10, usual=6.0)
    pace.announce()
    assert out.getvalue().endswith("take about 60 s in 1 process, at a first guess\n")
    pace, out = told(total=3, left=0)
    pace.announce()
    assert out.getvalue() == "3 runs, of which 3 are done\n"


def test_each_run_says_how_much_is_left():
    pace, out = told(total=4, left=3)
    pace.began -= 50.0
    pace.step("first")
    assert out.getvalue() == "1/3 first; about 2 min left\n"
    pace.step("second")
    pace.step("third")
    assert out.getvalue().splitlines()[-1] == "3/3 third"


def test_durations_are_for_people():
    assert [duration(seconds) for seconds in (0.2, 20, 89, 90, 600, 5399, 5400, 12600)] == [
        *("1 s", "20 s", "89 s", "2 min", "10 min", "90 min", "1.5 h", "3.5 h"),
    ]


def test_no_table_writes_into_the_documentation_unless_it_is_told_to():
    for name, settings in (
        ("attack_table", AttackSettings),
        ("privacy_table", PrivacySettings),
        ("compression_table", CompressionSettings),
    ):
        assert compose_settings(name, (), settings).output.parts[0] == "runs"
