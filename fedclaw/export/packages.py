"""The Python packages that a model was made with: FedClaw, its plug-ins, and all that they need, as installed here."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError
from importlib.metadata import distribution as distribution_of
from urllib.parse import quote

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

ROOT = "fedclaw"
ROOT_EXTRAS = ("export", "compress")
"""Extras of ours that take part in making a model; what of them is not installed is left out."""
_LONGEST_LICENSE = 100
"""Characters; a longer text is the licence itself and not its name."""


@dataclass(frozen=True)
class Package:
    """One installed distribution. `license` is an SPDX expression if `is_expression`, else a name from its metadata."""

    name: str
    """Normalised (PEP 503)."""
    version: str
    license: str | None
    is_expression: bool
    needs: tuple[str, ...]
    """Names of packages that are installed too, in order."""

    @property
    def purl(self) -> str:
        """Its package URL (purl-spec, type pypi)."""
        return f"pkg:pypi/{self.name}@{quote(self.version, safe='.-_~')}"


@cache
def installed_packages(
    root: str = ROOT, extras: tuple[str, ...] = ROOT_EXTRAS, more: tuple[str, ...] = ()
) -> tuple[Package, ...]:
    """`root` with these extras, `more`, and all that they need, by name; what is not installed is left out."""
    roots = [(root, frozenset(extras)), *((name, frozenset[str]()) for name in more)]
    wanted: deque[tuple[str, frozenset[str]]] = deque((canonicalize_name(name), asked) for name, asked in roots)
    asked: dict[str, frozenset[str]] = {}
    found: dict[str, Package] = {}
    while wanted:
        name, with_extras = wanted.popleft()
        if name in asked and with_extras <= asked[name]:
            continue
        asked[name] = with_extras | asked.get(name, frozenset())
        try:
            distribution = distribution_of(name)
        except PackageNotFoundError:
            continue
        needs = dict(_needs(distribution, asked[name]))
        found[name] = _package(name, distribution, needs)
        wanted.extend(needs.items())
    return tuple(_known(package, found) for _, package in sorted(found.items()))


def _needs(distribution: Distribution, extras: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """What a distribution requires here with these extras: name, and extras of it."""
    for line in distribution.requires or ():
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *sorted(extras))):
            yield canonicalize_name(requirement.name), frozenset(requirement.extras)


def _package(name: str, distribution: Distribution, needs: dict[str, frozenset[str]]) -> Package:
    expression = _field(distribution, "License-Expression")
    license = expression or _named_license(distribution)
    return Package(name, distribution.version, license, expression is not None, tuple(sorted(needs)))


def _field(distribution: Distribution, name: str) -> str | None:
    values = distribution.metadata.get_all(name)
    return values[0] if values else None


def _named_license(distribution: Distribution) -> str | None:
    """What metadata without an SPDX expression say: the classifier, or a licence's name on one line."""
    classifiers = distribution.metadata.get_all("Classifier") or ()
    named = [line.rpartition(" :: ")[2] for line in classifiers if line.startswith("License :: OSI Approved :: ")]
    text = (_field(distribution, "License") or "").strip()
    if named:
        return " AND ".join(sorted(named))
    return text if text and "\n" not in text and len(text) <= _LONGEST_LICENSE else None


def _known(package: Package, found: dict[str, Package]) -> Package:
    needs = tuple(name for name in package.needs if name in found)
    return Package(package.name, package.version, package.license, package.is_expression, needs)
