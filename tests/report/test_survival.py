"""Survival curves at the terminal and as a picture."""

import io

import pytest
from PIL import Image
from rich.console import Console

from fedclaw.privacy.survival_estimates import Curve, LogRank
from fedclaw.protocol.statistics import SurvivalQuestion
from fedclaw.report.survival import draw, start_of, survival_tables, told
from fedclaw.server.statistics_release import SurvivalCurves

EMPTY = Curve(survival=(), low=(), high=(), at_risk=())
OLD = Curve(survival=(0.8, 0.4), low=(0.7, 0.3), high=(0.9, 0.52), at_risk=(101.3, 77.9))


def made(groups, log_rank=None):
    question = SurvivalQuestion(time="days", event="dead", event_level="true", group="arm", ends=(100.0, 250.0))
    return SurvivalCurves(question=question, ends=(100.0, 250.0), level=0.9, groups=groups, log_rank=log_rank)


def printed(curves):
    console = Console(width=140, file=io.StringIO(), record=True)
    for table in survival_tables(curves):
        console.print(table)
    return " ".join(console.export_text().split())


def test_the_tables_have_medians_numbers_at_risk_and_the_test():
    text = printed(made({"old": OLD, "new [b]": EMPTY}, LogRank(statistic=4.2, p_value=0.0412, bins=2)))
    for words in (
        "Survival by arm",
        "90% band",
        "old 101 250 250 to not reached 250",
        "new [b] too few not reached not reached to not reached nothing",
        "log-rank test of all groups, up to 250: p = 0.0412",
        "250 78 40.0% 30.0% to 52.0%",
    ):
        cells = " ".join(text.translate(str.maketrans("│┃", "  ")).split())
        assert words in cells, cells
    assert "one group" in printed(made({"all": OLD}))
    assert "too few are at risk to compare" in printed(made({"old": OLD, "new": EMPTY}))


@pytest.mark.parametrize("groups", [{"all": OLD}, {"old": OLD, r"$\frac$": EMPTY}, {"none": EMPTY}])
def test_the_picture_is_drawn_of_whatever_was_released(tmp_path, groups):
    draw(made(groups), tmp_path / "survival.png")
    with Image.open(tmp_path / "survival.png") as picture:
        assert picture.width > 600
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert ((0, 0x72, 0xB2) in colours) == (list(groups) != ["none"])


def test_times_that_are_told_are_spread_to_the_last():
    assert told(20) == [3, 7, 11, 15, 19]
    assert told(2) == [0, 1]
    assert told(0) == []


def test_a_picture_begins_at_0_or_a_bin_before_the_first_end():
    assert start_of((100.0, 250.0)) == 0
    assert start_of((-5.0, 5.0)) == -15
    assert start_of((0.0,)) == -1
