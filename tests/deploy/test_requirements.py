"""What the images install is what pyproject.toml says they need, at the versions that the tests ran with."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deploy" / "docker"

NOT_AT_A_NODE = {"torch", "flwr", "opacus", "mlflow", "dp-accounting", "scipy", "matplotlib", "jinja2"}
"""Of FedClaw's own requirements: what only training, accounting and reports import."""
AT_BUILDERS_CHOICE = re.compile(r"torch$|triton$|nvidia-|cuda-")


def _project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _needed(*extras: str) -> set[str]:
    project = _project()
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    found = [Requirement(line) for line in lines]
    inner = {extra for one in found if one.name == "fedclaw" for extra in one.extras}
    return {canonicalize_name(one.name) for one in found if one.name != "fedclaw"} | (
        _needed(*inner) if inner else set()
    )


def listed(name: str) -> set[str]:
    lines = (line.partition("#")[0].strip() for line in (DOCKER / f"{name}.in").read_text().splitlines())
    return {canonicalize_name(Requirement(line).name) for line in lines if line}


def locked(name: str) -> dict[str, set[str]]:
    """The versions of each distribution in a lock file: more than one where they differ by Python's version."""
    versions: dict[str, set[str]] = {}
    for line in (DOCKER / f"{name}.lock").read_text().splitlines():
        if found := re.match(r"([a-z0-9._-]+)==(\S+)", line):
            versions.setdefault(canonicalize_name(found[1]), set()).add(found[2])
    return versions


def test_a_node_installs_what_serving_needs_and_nothing_of_training():
    assert listed("node") == _needed("serve", "postgresql", "tracing") - NOT_AT_A_NODE
    assert not locked("node").keys() & NOT_AT_A_NODE


def test_a_site_and_a_coordinator_install_what_training_needs():
    assert listed("training") == _needed("data")


@pytest.mark.parametrize("name", ["build", "node", "training"])
def test_the_lock_has_what_is_listed_at_the_tested_version_with_digests(name: str):
    versions = locked(name)
    left_out = {one for one in listed(name) if AT_BUILDERS_CHOICE.match(one)}
    assert listed(name) - left_out <= versions.keys()
    assert not [one for one in versions if AT_BUILDERS_CHOICE.match(one)]
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for distribution, version in tested.items():
        assert versions.get(canonicalize_name(distribution), {version}) == {version}, distribution
    for block in re.split(r"\n(?=[a-z])", (DOCKER / f"{name}.lock").read_text())[1:]:
        assert "--hash=sha256:" in block, block.split()[0]
