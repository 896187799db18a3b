"""What the log says of work that goes wrong again and again."""

import logging

import pytest

from fedclaw.errors import FedClawError
from fedclaw.serve.repeated_work import RepeatedWork

log = logging.getLogger("tests.repeated_work")


def test_a_failure_is_said_once_until_it_goes_well_or_fails_otherwise(caplog):
    work = RepeatedWork(log, "nothing for now")
    for error in ("away", "away", "broken", None, "broken"):
        with work.attempt():
            if error is not None:
                raise FedClawError(error)
    assert [record.getMessage() for record in caplog.records] == [
        "nothing for now: away",
        "nothing for now: broken",
        "nothing for now: broken",
    ]
    assert not any(record.exc_info for record in caplog.records)


def test_what_nobody_expected_has_its_traceback_and_a_signal_ends_it(caplog):
    work = RepeatedWork(log, "nothing for now")
    with work.attempt():
        raise ZeroDivisionError("of a bug")
    assert caplog.records[0].exc_info[0] is ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), work.attempt():
        raise KeyboardInterrupt
