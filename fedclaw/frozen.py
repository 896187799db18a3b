"""The base of everything that is read from a file, a command line or the wire."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fedclaw.errors import UsageError


class Frozen(BaseModel):
    """An immutable, fully checked value: unknown fields and NaN are refused, nothing is guessed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


S = TypeVar("S", bound=Frozen)


def check_settings(plain: Any, settings: type[S]) -> S:
    """A plain container as a settings object. Raises UsageError naming each wrong field."""
    try:
        return settings.model_validate(plain)
    except ValidationError as error:
        raise UsageError(f"configuration: {explain(error, plain)}") from error


def explain(error: ValidationError, plain: Any = None) -> str:
    """One line a person can act on: each wrong field by its path in `plain`, what it is and what it should be."""
    parts = []
    for item in error.errors(include_url=False):
        where = ".".join(str(step) for step in _path(item["loc"], plain))
        message = item["msg"].removeprefix("Value error, ")
        given = "" if item["type"] in {"missing", "value_error"} else f" (given: {item['input']!r:.80})"
        parts.append(f"{where}: {message}{given}" if where else f"{message}{given}")
    return "; ".join(parts)


def _path(location: tuple[int | str, ...], plain: Any) -> Iterator[int | str]:
    """The steps of `location` without those that pydantic adds: the name of the one of several classes that it took."""
    for step in location:
        if isinstance(plain, Mapping) and step not in plain and step in plain.values():
            continue
        yield step
        plain = plain.get(step) if isinstance(plain, Mapping) else None
