"""Seconds to the first line, and to hear of a wrong value, of every command at a terminal.

    python -m experiments.benchmarks.startup [REPEATS]

A command's output goes to a terminal made for it. First: until it writes anything. Wrong value: until it has ended
after a setting that does not exist, or, for the rows with words, after settings that do not go together.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("experiments.benchmarks.startup", __doc__)

import os
import pty
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from experiments.benchmarks.report import report
from fedclaw.errors import UsageError

COMMANDS = (
    *("fedclaw.server", "fedclaw.client", "fedclaw.statistics", "fedclaw.audit", "fedclaw.provision", "fedclaw.ledger"),
    *("fedclaw.compress", "fedclaw.export", "fedclaw.verify", "fedclaw.predict", "experiments.run", "experiments.demo"),
)
WRONG = {
    "simulation and secagg": ("experiments.run", "runtime=simulation", "secure=secagg"),
    "a loss that no noise covers": ("experiments.run", "strategy=qfedavg"),
}
FIRST_LIMIT, WRONG_LIMIT = 0.5, 2.0
"""Seconds that the project promises."""


def measure(module: str, *arguments: str) -> tuple[float, float]:
    """(seconds to the first byte, seconds to the end) of one start."""
    ours, theirs = pty.openpty()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", module, *arguments]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        process = subprocess.Popen(command, stdout=theirs, stderr=theirs, cwd=place, env=environment)
        os.close(theirs)
        os.read(ours, 1)
        first = time.monotonic() - began
        try:
            while os.read(ours, 4096):
                pass
        except OSError:  # the last writer has gone
            process.wait()
        os.close(ours)
    return first, time.monotonic() - began


def main(arguments: Sequence[str]) -> None:
    """Measure and report. Raises UsageError."""
    repeats = int(arguments[0]) if arguments and arguments[0].isdigit() else 3
    if repeats < 1 or len(arguments) > 1:
        raise UsageError("give the number of repeats, 1 or more")
    rows, figures = [], {}
    tried = {module: (module, "nonsense=1") for module in COMMANDS} | WRONG
    for name, command in tried.items():
        found = [measure(*command) for _ in range(repeats)]
        first, end = (statistics.median(values) for values in zip(*found, strict=True))
        rows.append((name, f"{first:.2f} s, {end:.2f} s", f"{FIRST_LIMIT} s, {WRONG_LIMIT} s"))
        figures[f"{name}: first line"], figures[f"{name}: wrong value"] = round(first, 3), round(end, 3)
        print(f"{len(rows)}/{len(tried)} {name}", file=sys.stderr)
    report(f"seconds to the first line, and to hear of a wrong value (median of {repeats})", rows, figures)


if __name__ == "__main__":
    main(sys.argv[1:])
