"""The base of everything that is read from a file, a command line or the wire."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
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
        for place, given in _truths_for_numbers(value, [cls.model_fields[asked.field_name or ""].annotation]):
            raise ValueError(f"{place}: {_not_a_number(given)}" if place else _not_a_number(given))
        return value


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
    """A plain container as a settings object, in which yes and no are no numbers. Raises UsageError naming each wrong
    field."""
    if wrong := [f"{place}: {_not_a_number(given)}" for place, given in _truths_for_numbers(plain, [settings])]:
        raise UsageError(f"configuration: {'; '.join(wrong[:_MOST_FIELDS])}")
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


def _truths_for_numbers(value: Any, annotations: Sequence[Any], place: str = "") -> Iterator[tuple[str, bool]]:
    """Where in `value`, for fields with these annotations, yes or no stands for a number, and which."""
    if not _holds_truth(value):
        return
    taken = [one for annotation in annotations for one in _alternatives(annotation)]
    if isinstance(value, bool):
        if {int, float}.intersection(taken) and not {bool, Any}.intersection(taken):
            yield place, value
    elif isinstance(value, dict):
        if any(isinstance(one, type) and issubclass(one, Written) for one in taken):
            return  # It looks by itself.
        for name, below in value.items():
            fields = [known[name] for one in taken if name in (known := _annotations(one))]
            values = [get_args(one)[1] for one in taken if get_origin(one) in (dict, Mapping)]
            yield from _truths_for_numbers(below, fields or values, _below(place, name))
    elif isinstance(value, list | tuple):
        items = [part for one in taken if get_origin(one) in (list, tuple) for part in get_args(one)]
        for number, below in enumerate(value):
            yield from _truths_for_numbers(below, items, _below(place, number))


def _holds_truth(value: Any, depth: int = 16) -> bool:
    """Whether yes or no is anywhere in it: of most there is none, and a schema may have very many columns.

    No setting stands deeper than `depth`; a stranger's file may be nested until Python gives up.
    """
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return isinstance(value, bool) or (depth > 0 and any(_holds_truth(one, depth - 1) for one in below))


def _below(place: str, step: object) -> str:
    return f"{place}.{step!s:.60}" if place else f"{step!s:.60}"


def _alternatives(annotation: Any) -> Iterator[Any]:
    """What an annotation is a union of, itself if of nothing else."""
    if get_origin(annotation) is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from _alternatives(part)
    else:
        yield annotation


@cache
def _annotations(kind: Any) -> Mapping[object, Any]:
    """Those of a model's fields by the names that it takes for them; of anything else there are none."""
    models = kind.model_fields.items() if isinstance(kind, type) and issubclass(kind, BaseModel) else ()
    return {taken: field.annotation for name, field in models for taken in (name, field.alias) if taken}


def _not_a_number(given: bool) -> str:
    return f"Input should be a number, not {'yes' if given else 'no'}"


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
