"""One name for one thing: no two public classes of the product share a name."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def public_classes(root: Path) -> Iterator[tuple[str, str]]:
    """Name and module of each public class at the top of a module of ours; generated code is left out."""
    for room in ("fedclaw", "strategies", "clients"):
        for path in sorted((root / room).rglob("*.py")):
            if path.name.endswith("_pb2.py"):
                continue
            module = ".".join(path.relative_to(root).with_suffix("").parts)
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    yield node.name, module


def shared_names(root: Path) -> dict[str, set[str]]:
    """The modules of each name that more than one of them has."""
    modules: dict[str, set[str]] = defaultdict(set)
    for name, module in public_classes(root):
        modules[name].add(module)
    return {name: found for name, found in modules.items() if len(found) > 1}


def test_no_two_public_classes_share_a_name():
    assert shared_names(ROOT) == {}


def test_a_second_class_of_one_name_is_found(tmp_path: Path):
    for room, text in (("fedclaw", "class Ledger: ..."), ("clients", "class Ledger: ...\nclass _Own: ...")):
        (tmp_path / room).mkdir()
        (tmp_path / room / "made.py").write_text(text)
    assert shared_names(tmp_path) == {"Ledger": {"fedclaw.made", "clients.made"}}
