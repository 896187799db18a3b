"""What the processes of a node and the GPUs of its machine use: from /proc and, where it is there, nvidia-smi."""

import csv
import io
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
ASKED = ("index", "memory.used", "memory.total", "utilization.gpu")
FRESH = 10.0
"""Seconds for which figures of GPUs are good: to ask takes a process, and up to a second."""
PATIENCE = 2.0
MEBIBYTE = 1 << 20

_gpus: tuple[float, Mapping[str, Mapping[str, float]]] = (float("-inf"), {})


def process_figures(pid: int) -> dict[str, float]:
    """By metric what the process uses; nothing of one that is gone, or where there is no /proc."""
    root = Path("/proc") / str(pid)
    try:
        # The second field is the program's name in brackets, whatever it holds.
        fields = (root / "stat").read_text(errors="replace").rpartition(")")[2].split()
        figures = {
            "process_cpu_seconds_total": (int(fields[11]) + int(fields[12])) / TICKS,
            "process_threads": float(fields[17]),
            "process_resident_memory_bytes": float(fields[21]) * PAGE,
        }
    except (OSError, IndexError, ValueError):
        return {}
    with suppress(OSError):  # of another user's process
        figures["process_open_fds"] = float(len(list((root / "fd").iterdir())))
    with suppress(OSError, ValueError, IndexError):  # no number: unlimited
        most = (root / "limits").read_text().partition("Max open files")[2].split()[0]
        figures["process_max_fds"] = float(most)
    return figures


def gpu_figures() -> Mapping[str, Mapping[str, float]]:
    """By GPU and metric; nothing where there is no nvidia-smi, or it gives no answer in time."""
    global _gpus
    asked, figures = _gpus
    if time.monotonic() - asked > FRESH:
        figures = _ask_gpus()
        _gpus = (time.monotonic(), figures)
    return figures


def _ask_gpus() -> Mapping[str, Mapping[str, float]]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=True, text=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return read_gpus(done.stdout)


def read_gpus(text: str) -> Mapping[str, Mapping[str, float]]:
    """What nvidia-smi wrote: a line a GPU; a figure that a GPU does not have is in brackets, and left out."""
    found: dict[str, dict[str, float]] = {}
    for row in csv.reader(io.StringIO(text), skipinitialspace=True):
        if len(row) != len(ASKED):
            continue
        index, used, total, busy = row
        named = {
            "gpu_memory_used_bytes": (used, MEBIBYTE),
            "gpu_memory_total_bytes": (total, MEBIBYTE),
            "gpu_utilisation_ratio": (busy, 0.01),
        }
        found[index] = {name: float(text) * unit for name, (text, unit) in named.items() if _is_number(text)}
    return found


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()
