"""Where a command's modules come from: from what is installed, never from the directory that it happens to be run in.

`python -m` puts the current directory in front of all that is installed. Files there that are called like a module
(torch.py, yaml.py, a project's own hydra_plugins/) would be imported in its place, with a site's keys and data within
reach. So a command of FedClaw takes that directory off the path before it imports anything from a path, and its child
processes (a compiler's workers, Ray, the jobs of a sweep) do the same. Code that the command line names
(app=module:name) may still lie there: see `fedclaw.transport.grpc.apps`.

Only commands do that. A notebook or a program that imports fedclaw keeps its path as it is.
"""

import os
import sys

_PACKAGE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120
_HOME = os.path.dirname(_PACKAGE)  # noqa: PTH120
"""The directory that fedclaw is imported from: a checkout, or site-packages. Nothing but os and sys is loaded yet."""
_COMMANDS = frozenset({"fedclaw", "experiments"})
"""Packages whose modules are commands."""


def leave_out_current_directory() -> None:
    """Take the current directory off `sys.path`, if this process is one of FedClaw's commands.

    Where PYTHONPATH or an editable install names the same directory in full, it goes to the end: what is nowhere else
    is still found there, and hides nothing. A dot in PYTHONPATH names no directory. The directory that fedclaw itself
    comes from stays where it is.
    """
    here = _current_directory()
    if here is None or _same(here, _HOME) or not is_command(sys.modules.get("__main__")):
        return
    others = [entry for entry in sys.path if entry and not _same(entry, here)]
    put_by_python = not sys.flags.safe_path and _same(sys.path[0], here)
    named = len(sys.path) - len(others) > put_by_python and not _is_by_chance(here)
    sys.path[:] = [*others, here] if named else others
    os.environ["PYTHONSAFEPATH"] = "1"


def is_command(main: object) -> bool:
    """Whether `main`, the module __main__, is a command of FedClaw: `python -m fedclaw.X`, or the script fedclaw."""
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:
        package = str(spec.name).partition(".")[0]
        return package in _COMMANDS and str(spec.origin).startswith(os.path.join(_HOME, package) + os.sep)  # noqa: PTH118
    if file is not None:
        return os.path.basename(str(file)) == "fedclaw"  # noqa: PTH119
    # Python is still looking for the module, and imports the packages that it lies in: sys.argv is ["-m", *arguments].
    if sys.argv[:1] != ["-m"] or len(sys.orig_argv) <= len(sys.argv):
        return False
    word = sys.orig_argv[-len(sys.argv)]
    name = word.partition("m")[2] if word.startswith("-") else word
    return name.partition(".")[0] == "fedclaw"


def _current_directory() -> str | None:
    """None: it has been removed."""
    try:
        return os.getcwd()  # noqa: PTH109
    except OSError:
        return None


def _is_by_chance(here: str) -> bool:
    """Whether PYTHONPATH has the current directory as an entry like '.' only."""
    variable = os.environ.get("PYTHONPATH", "")
    entries = [entry for entry in variable.split(os.pathsep) if _same(entry or ".", here)] if variable else []
    return bool(entries) and not any(map(os.path.isabs, entries))


def _same(first: str, second: str) -> bool:
    return os.path.realpath(first) == os.path.realpath(second)
