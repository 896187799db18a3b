"""Every command that there is, and a look into its process while it starts."""

import json
import os
import pty
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import environment

COMMANDS = (
    *("fedclaw.server", "fedclaw.client", "fedclaw.statistics", "fedclaw.audit", "fedclaw.provision", "fedclaw.ledger"),
    *("fedclaw.compress", "fedclaw.export", "fedclaw.verify", "fedclaw.lineage", "fedclaw.layouts", "fedclaw.predict"),
    *("fedclaw.encryption", "fedclaw.serve", "fedclaw.transport.ray"),
    *("experiments.run", "experiments.sweep", "experiments.demo", "experiments.datasets", "experiments.partitions"),
    *("experiments.attack_table", "experiments.privacy_table", "experiments.compression_table"),
    "experiments.compression",
    *("experiments.heart_disease", "experiments.survival_curves"),
)

_WATCHED = """
import atexit, json, os, runpy, sys
HEAVY = {"torch", "flwr", "opacus", "mlflow"}
path, module, *arguments = sys.argv[1:]
seen = {"first": None, "last": None}
def note(which):
    if which == "last" or seen["first"] is None:
        seen[which] = sorted(HEAVY & set(sys.modules))
        open(path, "w").write(json.dumps(seen))
def watch(write):
    def watched(*given):
        note("first")
        return write(*given)
    return watched
os.write = watch(os.write)
sys.stdout.write, sys.stderr.write = watch(sys.stdout.write), watch(sys.stderr.write)
atexit.register(note, "last")
sys.argv[1:] = arguments
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class Start:
    """What a command that was watched wrote to a terminal, and what was imported at its first line and at its end."""

    code: int
    text: str
    first: list[str]
    last: list[str]


def watch(module: str, *arguments: str | Path, directory: Path) -> Start:
    """Run `python -m MODULE` at a terminal and look at its modules."""
    notes = directory / "modules.json"
    ours, theirs = pty.openpty()
    words = [sys.executable, "-c", _WATCHED, str(notes), module, *map(str, arguments)]
    process = subprocess.Popen(words, stdout=theirs, stderr=theirs, env=environment(), cwd=directory)
    os.close(theirs)
    parts = []
    try:
        while part := os.read(ours, 4096):
            parts.append(part)
    except OSError:
        pass  # what a terminal answers when its last writer has gone
    finally:
        os.close(ours)
    code = process.wait(60)
    seen = json.loads(notes.read_text())
    return Start(code, b"".join(parts).decode(), seen["first"], seen["last"])
