"""Answers that are given again: the newest, whole, and of Flower's own classes alone."""

import os
import time

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedclaw.protocol.arrays import pack, unpack
from fedclaw.transport.flower.site import KEPT, AnswerStore, for_flower

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def answers(tmp_path):
    return AnswerStore(tmp_path / "answers")


def answer(number=0):
    return RecordDict(
        {
            "sum": pack({"w": VALUES + number}),
            "metrics": MetricRecord({"weight": 2.5, "examples": 3}),
            "receipt": ConfigRecord({"json": "{}"}),
        }
    )


def test_an_answer_comes_back_whole_and_private(answers, tmp_path):
    answers.store("a", answer())
    found = answers.find("a")
    assert found is not None
    assert found == answer()
    (path,) = (tmp_path / "answers").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert answers.find("b") is None


def test_what_flower_gets_is_of_its_own_classes(answers):
    answers.store("a", answer())
    content = for_flower(answers.find("a"))
    assert type(content) is RecordDict
    assert type(content["sum"]) is ArrayRecord
    assert type(content["sum"]["w"]) is Array
    np.testing.assert_array_equal(unpack(content.array_records["sum"])["w"], VALUES)


def test_the_newest_are_kept(answers, tmp_path):
    for number in range(KEPT + 3):
        answers.store(str(number), answer(number))
        newest = max((tmp_path / "answers").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, ns=(time.time_ns(), time.time_ns()))
    assert [answers.find(str(number)) is not None for number in range(KEPT + 3)] == [False] * 3 + [True] * KEPT


def test_a_damaged_answer_is_dropped(answers, tmp_path, caplog):
    answers.store("a", answer())
    (path,) = (tmp_path / "answers").iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    assert answers.find("a") is None
    assert not path.exists()
    assert "damaged" in caplog.text
