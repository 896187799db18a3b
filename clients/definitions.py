"""What the schema files of all workloads share: strict reading, canonical text, names of classes."""

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BeforeValidator, ValidationError

from fedclaw.errors import DataError
from fedclaw.frozen import Frozen, explain

MAX_SCHEMA_BYTES = 4 * 2**20
SHOWN = 40

D = TypeVar("D", bound=Frozen)
T = TypeVar("T")


def as_text(value: Any) -> Any:
    """A YAML number as the text that it was written as; a YAML boolean is refused, for its spelling is lost."""
    if isinstance(value, bool):
        raise ValueError(f"YAML reads this as the boolean {value}; write it in quotes")
    return str(value) if isinstance(value, int | float) else value


def distinct(values: tuple[str, ...]) -> tuple[str, ...]:
    """The values, if no two are equal. Raises ValueError."""
    repeated = sorted({value for value in values if values.count(value) > 1}) if len(set(values)) < len(values) else []
    if repeated:
        raise ValueError(f"more than once: {', '.join(map(repr, repeated))}")
    return values


def sized(least: int, most: int) -> Callable[[tuple[T, ...]], tuple[T, ...]]:
    """A check of a tuple's length that, unlike pydantic's own, is silent when an item is wrong already."""

    def check(values: tuple[T, ...]) -> tuple[T, ...]:
        if not least <= len(values) <= most:
            raise ValueError(f"expected {least} to {most} of them, got {len(values)}")
        return values

    return check


Text = Annotated[str, BeforeValidator(as_text)]
Labels = Annotated[tuple[Text, ...], AfterValidator(sized(2, 10_000)), AfterValidator(distinct)]
"""Names of the classes, in the order of the model's outputs."""


def parse_definition(text: str, origin: str, definition: type[D]) -> D:
    """Read a schema file's text (YAML, of which JSON is a part). Raises DataError naming `origin` and each field."""
    if len(text) > MAX_SCHEMA_BYTES:
        raise DataError(f"{origin}: a schema of {len(text)} characters; at most {MAX_SCHEMA_BYTES} are read")
    try:
        plain = _plain(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{origin}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(plain, dict):
        raise DataError(f"{origin}: a schema is a mapping of fields, this is {type(plain).__name__}")
    try:
        return definition.model_validate(plain)
    except ValidationError as error:
        raise DataError(f"{origin}: {explain(error)}") from error


def _plain(text: str) -> Any:
    """JSON fast, anything else as YAML without aliases: a few nested ones can stand for more than the memory holds."""
    if text.startswith("{"):
        with suppress(json.JSONDecodeError):
            return json.loads(text)
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"aliases (*{event.anchor}) are not read; write it out")
    return yaml.safe_load(text)


def canonical_json(definition: Frozen) -> str:
    """The definition's fields in their declared order, without spaces and without what is not set."""
    return definition.model_dump_json(exclude_none=True)


def shown(value: object) -> str:
    """A value for an error message: quoted, and cut when long."""
    text = str(value)
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 1] + "…")
