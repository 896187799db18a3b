"""Who is named after a run for having paid without a receipt: by what the run's mechanism promises."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.server.__main__ import _say_who_is_behind
from fedclaw.server.run_directory import RunDirectory
from tests.hostile import DP, EXAMPLE, ONE_STEP, SITE
from tests.samples import run_record

LINES = (
    {"round": 1, "metrics": {}, "answered": ["north", "south"]},
    {"round": 2, "metrics": {}, "answered": ["north"], "silent": ["south"]},
)


@pytest.mark.parametrize(
    ("noise", "promises"),
    [
        ({"privacy": None}, False),
        ({"privacy": DP}, True),
        ({"privacy": None, "central": EXAMPLE, "training": ONE_STEP}, True),
        ({"privacy": None, "central": SITE}, True),
        ({"privacy": DP, "central": SITE}, True),
    ],
)
def test_a_late_answer_is_told_where_privacy_is_promised(tmp_path, noise, promises):
    record = run_record(**noise)
    assert mechanism_of(record).claims_privacy is promises
    directory = RunDirectory.create(tmp_path / "run", record)
    for line in LINES:
        directory.append_metrics(line["round"], line)
    said = io.StringIO()
    _say_who_is_behind(directory, record, SimpleNamespace(console=Console(file=said, width=200)))
    assert ("south was asked in round 2" in said.getvalue()) is promises
