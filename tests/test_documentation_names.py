"""Modules, files and sections that pages, docstrings and settings name are there: rooms move, and prose stays."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GROUPS = ("strategies", "clients", "schemas", "tasks")
"""What entry points are called, `fedclaw.schemas`, without being modules."""

EXAMPLES = {"fedclaw.COMMAND", "fedclaw.X", "fedclaw/a/b.py", "tests/a/test_b.py", "conf/X.yaml"}
MODULE = re.compile(r"(?<![\w./\"-])fedclaw(?:\.[A-Za-z_]\w*)+(?!\w)")
FILE = re.compile(r"(?<![\w./-])(?:fedclaw|docs|conf|tests|experiments|clients|strategies)/[\w./-]*[\w/]")
LINK = re.compile(r"\]\(([^)\s]+)\)")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]


def sources() -> list[Path]:
    """All that people read: pages, settings with their comments, code with its docstrings."""
    rooms = ("fedclaw", "strategies", "clients", "experiments", "conf", "hydra_plugins")
    found = [path for room in rooms for kind in ("py", "yaml", "html") for path in (ROOT / room).rglob(f"*.{kind}")]
    return [*PAGES, ROOT / "pyproject.toml", *found]


def is_there(dotted: str) -> bool:
    """Whether a module of this name exists, and its source has the names that follow."""
    parts = dotted.split(".")
    if len(parts) == 2 and parts[1] in GROUPS:
        return True
    place = ROOT
    while parts and (place / parts[0]).is_dir():
        place /= parts.pop(0)
    is_module = parts and (place / f"{parts[0]}.py").is_file()
    source = place / (f"{parts.pop(0)}.py" if is_module else "__init__.py")
    text = source.read_text() if source.is_file() else ""
    return all(re.search(rf"\b{name}\b", text) for name in parts)


def missing(text: str) -> Iterator[str]:
    """Each module and file of ours that the text names and that is not there."""
    for name in MODULE.findall(text):
        if name not in EXAMPLES and not is_there(name):
            yield name
    for name in FILE.findall(text):
        if name in EXAMPLES or "NAME" in name or (ROOT / name).exists() or (ROOT / f"{name}.py").exists():
            continue
        yield name


def test_what_prose_names_is_there():
    stale = [f"{path.relative_to(ROOT)}: {name}" for path in sources() for name in missing(path.read_text())]
    assert stale == ["pyproject.toml: fedclaw/conf"]  # made when the wheel is built


@pytest.mark.parametrize(
    "text",
    [
        "see `fedclaw.federation.coordinator`",
        "see fedclaw.learning.strategy.Strategem.",
        "(fedclaw/site/station.py)",
        "[clause](docs/policies.md)",
        "`tests/federation/`",
    ],
)
def test_a_stale_name_is_found(text):
    assert len(list(missing(text))) == 1


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    lines = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL).splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            there = (page.parent / path) if path else page
            assert there.exists(), target
            assert not anchor or anchor in headings(there), target


def test_each_page_can_be_reached_from_the_readme():
    seen, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        seen.add(page)
        links = [target.partition("#")[0] for target in LINK.findall(page.read_text())]
        found = {(page.parent / link).resolve() for link in links if link.endswith(".md")}
        ahead += [path for path in found - seen if path.exists()]
    assert [str(page) for page in PAGES if page.resolve() not in {path.resolve() for path in seen}] == []


def test_commands_that_pages_show_are_modules():
    for page in PAGES:
        for name in re.findall(r"python -m ((?:fedclaw|experiments)[\w.]*)", page.read_text()):
            place = ROOT.joinpath(*name.rstrip(".").split("."))
            assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), f"{page.name}: {name}"


def settings_shown(text: str) -> Iterator[str]:
    """The settings that a page has an experiment take, up to the first dot."""
    for command in re.findall(r"(?:python -m experiments\.run|`dataset=)[^`#\n]*", text):
        yield from re.findall(r"(?<=[ `])([a-z_]+)[\w.]*=", command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_of_experiments_that_a_page_shows_are_there(page):
    files = (ROOT / "conf" / "run.yaml", ROOT / "conf" / "federated.yaml")
    known = {key for file in files for key in re.findall(r"^([a-z_]+):", file.read_text(), re.MULTILINE)}
    known |= {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}
    assert set(settings_shown(page.read_text())) <= known


def test_a_setting_is_found_where_it_is_shown():
    text = "`dataset=csv data=FILE target=COLUMN` and\npython -m experiments.run -m privacy.epsilon=2,8 rounds=3  # a=b"
    assert list(settings_shown(text)) == ["dataset", "data", "target", "privacy", "rounds"]
