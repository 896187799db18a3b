"""Long work says how far it is; short work says nothing."""

import logging

from fedclaw.progress import Progress


def test_a_line_every_ten_seconds_with_what_is_left(caplog):
    now = [100.0]
    progress = Progress(logging.getLogger("fedclaw.some"), "recovery, steps", 2000, lambda: now[0])
    with caplog.at_level(logging.INFO, "fedclaw.some"):
        now[0] = 109.0
        progress.done(100)
        assert not caplog.messages
        now[0] = 120.0
        progress.done(200)
        now[0] = 125.0
        progress.done(250)
        now[0] = 140.0
        progress.done(2000)
    assert caplog.messages == ["recovery, steps: 200 of 2000, at most about 3 min left"]
