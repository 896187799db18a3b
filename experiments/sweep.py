"""The table and the plots of a sweep, made again from its runs' directories.

python -m experiments.sweep runs/sweeps/NAME
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("experiments.sweep", __doc__)

from collections.abc import Sequence
from pathlib import Path

from experiments.sweeps.directory import SweepDirectory
from experiments.sweeps.report import write_report
from fedclaw.cli import make_console, run_main, split
from fedclaw.errors import UsageError


def main(arguments: Sequence[str]) -> None:
    """Make them again for the one directory given."""
    line = split(arguments)
    if len(line.words) != 1 or line.overrides:
        raise UsageError("give one sweep's directory, like runs/sweeps/NAME")
    write_report(SweepDirectory.open(Path(line.words[0])), make_console())


if __name__ == "__main__":
    run_main("experiments.sweep", __doc__ or "", main)
