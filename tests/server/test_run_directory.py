"""What a run goes on with is read before anything else, and damage is told with the file's name."""

import pytest

from fedclaw.errors import CheckpointError
from fedclaw.server.run_directory import RunDirectory, SiteReceipt
from tests.disks import full_after
from tests.samples import receipt, run_record

RECEIPT = SiteReceipt(examples=9, receipt=receipt())


@pytest.fixture
def directory(tmp_path):
    made = RunDirectory.create(tmp_path / "first", run_record())
    made.write_receipts({"north": RECEIPT})
    made.append_metrics(1, {"metrics": {"accuracy": 1}, "answered": ["north"]})
    return made


def test_what_was_written_is_read_again(directory):
    directory.check()
    assert directory.read_receipts() == {"north": RECEIPT}
    assert directory.read_metrics() == [{"round": 1, "metrics": {"accuracy": 1}, "answered": ["north"]}]


def test_a_line_of_a_round_that_is_run_again_is_replaced(directory):
    directory.append_metrics(2, {"metrics": {"accuracy": 0.5}})
    directory.append_metrics(1, {"metrics": {}})
    assert directory.read_metrics() == [{"round": 1, "metrics": {}}]


DAMAGE = [b"", b"[]", b"3", b"{", b"\xff\xfe\x00", b'{"north": []}', b'{"north": {"examples": 9}}']


@pytest.mark.parametrize("room", [0, 7])
def test_a_line_of_metrics_is_there_whole_or_not_at_all(directory, room):
    for number in (1, 2):
        directory.append_metrics(number, {"metrics": {}})
    before = directory.metrics_path.read_bytes()
    with full_after(len(before) + room), pytest.raises(OSError, match="File too large"):
        directory.append_metrics(3, {"metrics": {}})
    assert directory.metrics_path.read_bytes() == before
    directory.append_metrics(3, {"metrics": {}})
    assert [line["round"] for line in directory.read_metrics()] == [1, 2, 3]


@pytest.mark.parametrize("content", DAMAGE)
def test_damaged_receipts(directory, content):
    (directory.root / "receipts.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"receipts\.json is damaged"):
        directory.check()


LINES = [
    b"\n",
    b"[]\n",
    b"{\n",
    b"\xff\xfe\x00\n",
    b'{"metrics": {}}\n',
    b'{"round": "1", "metrics": {}}\n',
    b'{"round": 1}\n',
    b'{"round": 1, "metrics": [1]}\n',
    b'{"round": 1, "metrics": {"accuracy": "high"}}\n',
]


@pytest.mark.parametrize("line", LINES)
def test_damaged_metrics(directory, line):
    with directory.metrics_path.open("ab") as file:
        file.write(line)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is damaged"):
        directory.check()


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"run": "first"}'])
def test_a_damaged_record(directory, content):
    (directory.root / "run.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        directory.check()
