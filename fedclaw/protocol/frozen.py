"""The base of everything that is read from a file, a command line or the wire."""

from collections.abc import Callable, Iterator, Mapping
from reprlib import Repr
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from fedclaw.catalogue import did_you_mean
from fedclaw.errors import Reason, Setting, UsageError


class Frozen(BaseModel):
    """An immutable, fully checked value: unknown fields and NaN are refused, nothing is guessed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Written(Frozen):
    """What a person writes by hand: there, yes and no are no numbers, which Python would take for 1 and 0."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, asked: ValidationInfo) -> Any:
        field = cls.model_fields[asked.field_name or ""]
        if isinstance(value, bool) and _takes(field.annotation, (int, float)) and not _takes(field.annotation, (bool,)):
            raise ValueError(f"Input should be a number, not {'yes' if value else 'no'}")
        return value


def _takes(annotation: Any, types: tuple[type, ...]) -> bool:
    """Whether a value of one of these types is among what a field is annotated with, itself or in a union."""
    return annotation in types or any(_takes(part, types) for part in _alternatives(annotation))


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Annotated, Union, UnionType) else ()


S = TypeVar("S", bound=Frozen)


def fields_of(value: Frozen, shared: type[Frozen]) -> dict[str, Any]:
    """The fields of `value` that `shared`, a base of its class and of another, declares: to make the other from."""
    return {name: getattr(value, name) for name in shared.model_fields}


_MOST_FIELDS = 10
_TEXT = frozenset({"string_type", "path_type"})
_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxtuple = 3, 8, 8, 8
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 60, 60, 60


def check_settings(plain: Any, settings: type[S]) -> S:
    """A plain container as a settings object. Raises UsageError naming each wrong field."""
    try:
        return settings.model_validate(plain)
    except ValidationError as error:
        raise UsageError(f"configuration: {explain(error, plain, settings)}") from error


def explain(
    error: ValidationError,
    plain: Any = None,
    settings: type[BaseModel] | None = None,
    words: Callable[[Setting], str] = str,
) -> str:
    """One line a person can act on: each wrong field by its path in `plain`, what it is and what it should be.

    For a field that `settings` does not have, the nearest that it has; a number where text belongs is to be quoted.
    Of many wrong fields the first ten, and of long names and values the beginning: they may be a stranger's. Fields and
    other settings are named in `words`.
    """
    parts = []
    wrong = error.errors(include_url=False)
    for item in wrong[:_MOST_FIELDS]:
        path = ".".join(f"{step!s:.60}" for step in _path(item["loc"], plain))
        where = words(Setting(path)) if path else ""
        message = f"{_message(item, words):.500}"
        given = "" if item["type"] in {"missing", "value_error"} else f" (given: {_given(item['input'])})"
        if item["type"] in _TEXT and isinstance(item["input"], int | float):
            kind = "yes or no" if isinstance(item["input"], bool) else "a number"
            message, given = f"{_given(item['input'])} is read as {kind}; text like it is put in quotes", ""
        elif item["type"] == "extra_forbidden":
            given += did_you_mean(f"{item['loc'][-1]!s:.60}", _fields_at(settings, item["loc"][:-1]))
        parts.append(f"{where}: {message}{given}" if where else f"{message}{given}")
    if len(wrong) > _MOST_FIELDS:
        parts.append(f"and {len(wrong) - _MOST_FIELDS} more")
    return "; ".join(parts)


def _message(item: Any, words: Callable[[Setting], str]) -> str:
    """What pydantic says of a field, or the reason that our own check of it gave."""
    raised = item.get("ctx", {}).get("error")
    if isinstance(raised, ValueError) and raised.args and isinstance(raised.args[0], Reason):
        return raised.args[0].said(words)
    return str(item["msg"].removeprefix("Value error, "))


def _fields_at(settings: type[BaseModel] | None, location: tuple[int | str, ...]) -> set[str]:
    """Names of the fields that there are at `location` in `settings`."""
    models = [] if settings is None else [settings]
    for step in location:
        below = [field for model in models if (field := model.model_fields.get(str(step))) is not None]
        # A step that is no field is an item's place, or the name of the one of several classes that it took.
        models = [model for field in below for model in _models_in(field.annotation)] if below else models
    return {field.alias or name for model in models for name, field in model.model_fields.items()}


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _given(value: Any) -> str:
    """The beginning of what was given, at a cost that does not grow with it."""
    return f"{value[:80]!r:.80}" if isinstance(value, str) else f"{_SHORT.repr(value):.80}"


def _path(location: tuple[int | str, ...], plain: Any) -> Iterator[int | str]:
    """The steps of `location` without those that pydantic adds: the name of the one of several classes that it took."""
    for step in location:
        if isinstance(plain, Mapping) and step not in plain and step in plain.values():
            continue
        yield step
        plain = plain.get(step) if isinstance(plain, Mapping) else None
