"""What is installed, with a line about each, read from the files of plug-ins without importing any of them."""

import ast
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

STRATEGIES = "fedclaw.strategies"
WORKLOADS = "fedclaw.clients"
_WIDTH = 80
_INDENT = 2


@cache
def plugin_points(group: str) -> dict[str, EntryPoint]:
    """The group's entry points by name, read once: a look at all installed packages takes longer than a small round."""
    return {point.name: point for point in entry_points(group=group)}


def plugin_lines() -> list[str]:
    """Every strategy and workload that is installed, by name, with what its own file says of it first."""
    lines = []
    for title, group in (("strategies (strategy=NAME)", STRATEGIES), ("workloads (workload=NAME)", WORKLOADS)):
        lines += [f"Installed {title}:", *table(described(group))]
    return lines


def table(entries: Iterable[tuple[str, str]]) -> list[str]:
    """(name, words) in two columns, each line at most 80 characters wide."""
    known = list(entries)
    width = max((len(name) for name, _ in known), default=0)
    room = _WIDTH - _INDENT - width - 2
    return [
        f"{'':{_INDENT}}{name:<{width}}  {textwrap.shorten(words, room, placeholder=' …')}" for name, words in known
    ]


def described(group: str) -> list[tuple[str, str]]:
    """(name, one line) of the group's plug-ins, in order."""
    points = sorted(plugin_points(group).items())
    shared = Counter(point.module for _, point in points)
    return [(name, first_line(point, of_class=shared[point.module] > 1)) for name, point in points]


def first_line(point: EntryPoint, *, of_class: bool = False) -> str:
    """What the plug-in's module says of itself in the first line of its docstring; nothing if it cannot be read.

    `of_class`, or where the module says nothing: what its class says.
    """
    try:
        path = source_of(point.module)
        tree = ast.parse(path.read_bytes()) if path else ast.Module([], [])
    except (OSError, SyntaxError, ValueError, ImportError):
        return ""
    module = ast.get_docstring(tree)
    classes = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == point.attr)
    own = next((ast.get_docstring(node) for node in classes), None)
    text = (own or module) if of_class else (module or own)
    return " ".join((text or "").split("\n\n")[0].split()).rstrip(".")


def source_of(module: str) -> Path | None:
    """The file of a module that need not be imported, nor any package that it lies in."""
    path: list[str] | None = None
    parts = module.split(".")
    spec: ModuleSpec | None = None
    for depth in range(1, len(parts) + 1):
        spec = _spec(".".join(parts[:depth]), path)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or [])
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """'; did you mean NAME?', for what comes nearest to `given`; nothing where nothing is near."""
    near = get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def one_of(given: str, known: Iterable[str], words: str = "there are") -> str:
    """'; did you mean NAME? There are: ...', or '; there are: ...' where nothing is near to `given`."""
    near, names = did_you_mean(given, known), ", ".join(sorted(known)) or "none"
    return f"{near} {words.capitalize()}: {names}" if near else f"; {words}: {names}"


def _spec(name: str, path: list[str] | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        if (spec := finder.find_spec(name, path)) is not None:
            return spec
    return None
