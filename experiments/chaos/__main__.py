"""What goes wrong at a node, done on purpose and counted.

    python -m experiments.chaos
    python -m experiments.chaos trials=2 only=[worker_killed,errs]

    worker_killed   SIGKILL of a worker under load
    node_killed     SIGKILL of a whole node, of two behind HAProxy that share PostgreSQL
    errs, slow, disagrees   canaries that go wrong, until they are rolled back
    identical       canaries that compute what the stable version does: hardly one is rolled back
    first_share     which of the distinct keys get a new version first
    refused         tokens, bodies, connections and bundles that are wrong, while others are answered
    swapped         the node's own copy of a bundle, changed after it was verified

conf/chaos.yaml says what can be set. A table for people, then one line of JSON. Releases wait for evidence, not for a
clock: where the machine does something else, they take longer.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("experiments.chaos", __doc__)

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from experiments.benchmarks.report import Figure, Row, report
from experiments.chaos import hostile, kills, releases
from experiments.chaos.stage import ChaosSettings, Finding, Stage
from fedclaw.cli import make_console, run_main, settings_of
from fedclaw.errors import UsageError

KINDS: Mapping[str, Callable[[Stage], Finding]] = {
    "worker_killed": kills.worker_killed,
    "node_killed": kills.node_killed,
    "errs": releases.errs,
    "slow": releases.slow,
    "disagrees": releases.disagrees,
    "identical": releases.identical,
    "first_share": releases.first_share,
    "refused": hostile.refused,
    "swapped": hostile.swapped,
}


def main(arguments: Sequence[str]) -> None:
    """Play and report. Raises UsageError."""
    settings = settings_of(arguments, "chaos", ChaosSettings)
    chosen = tuple(KINDS) if settings.only is None else settings.only
    if unknown := sorted(set(chosen) - set(KINDS)):
        raise UsageError(f"only=[{', '.join(unknown)}]: there are {', '.join(KINDS)}")
    rows: list[Row] = []
    figures: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory(prefix="fedclaw-chaos-") as place:
        stage = Stage(settings, Path(place), make_console())
        for name in chosen:
            stage.say(name)
            found = KINDS[name](stage)
            rows += found.rows
            figures |= found.figures
    report(f"what goes wrong, {settings.trials} trials of each", rows, figures)


if __name__ == "__main__":
    run_main("experiments.chaos", __doc__, main)
