"""What the schema files of all workloads share: strict reading, canonical text, names of classes."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from fedclaw.clients.values import repeated
from fedclaw.errors import DataError
from fedclaw.protocol.frozen import Frozen, explain
from fedclaw.yaml_text import RepeatedKeyError, WrittenFloat, WrittenInt, read_yaml, written

MAX_SCHEMA_BYTES = 32 * 2**20
"""Room for 100,000 columns with their constants."""
SHOWN = 40

D = TypeVar("D", bound=Frozen)
T = TypeVar("T")


def as_text(value: Any) -> Any:
    """A YAML number as the text that it was written as; what YAML takes for a boolean or for nothing is refused."""
    if isinstance(value, bool):
        raise ValueError(f"YAML reads this as the boolean {value}; write it in quotes")
    if value is None:
        raise ValueError("YAML reads this as nothing; write it in quotes")
    spelt = written(value)
    return str(spelt) if isinstance(spelt, int | float) else spelt


def distinct(values: tuple[str, ...]) -> tuple[str, ...]:
    """The values, if no two are equal as text. Raises ValueError."""
    if found := repeated(values):
        raise ValueError(f"more than once: {', '.join(map(repr, found[:SHOWN]))}")
    return values


def sized(least: int, most: int) -> Callable[[tuple[T, ...]], tuple[T, ...]]:
    """A check of a tuple's length that, unlike pydantic's own, is silent when an item is wrong already."""

    def check(values: tuple[T, ...]) -> tuple[T, ...]:
        if not least <= len(values) <= most:
            raise ValueError(f"expected {least} to {most} of them, got {len(values)}")
        return values

    return check


def _text_keys(value: Any) -> Any:
    return {as_text(key): item for key, item in value.items()} if isinstance(value, dict) else value


Text = Annotated[str, BeforeValidator(as_text)]
Labels = Annotated[tuple[Text, ...], AfterValidator(sized(2, 10_000)), AfterValidator(distinct)]
"""Names of the classes, in the order of the model's outputs."""


MAX_WEIGHT = 1000.0
Weights = Annotated[dict[str, Annotated[float, Field(gt=0, le=MAX_WEIGHT)]], BeforeValidator(_text_keys)]
"""How much an example counts in the loss, by label."""


def weights_of(labels: Sequence[str], weights: Mapping[str, float] | None) -> tuple[float, ...] | None:
    """The weight of each label, 1 where none is stated; None if none is. Raises ValueError for one of no label."""
    if weights is None:
        return None
    if strange := sorted(set(weights) - set(labels)):
        raise ValueError(f"weights has {strange[0]!r}, which is no label")
    return tuple(weights.get(label, 1.0) for label in labels)


def parse_definition(text: str, origin: str, definition: type[D]) -> D:
    """Read a schema file's text (YAML, of which JSON is a part). Raises DataError naming `origin` and each field."""
    return parse_chosen(text, origin, lambda _: definition)


def parse_chosen(text: str, origin: str, choose: Callable[[dict[str, Any]], type[D]]) -> D:
    """The same, read as what `choose` says of its fields."""
    if len(text) > MAX_SCHEMA_BYTES:
        raise DataError(f"{origin}: a schema of {len(text)} characters; at most {MAX_SCHEMA_BYTES} are read")
    try:
        plain = _plain(text)
    except RepeatedKeyError as error:
        raise DataError(f"{origin}: {error.where}: {error}" if error.where else f"{origin}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin}: not YAML: {error}") from error
    if not isinstance(plain, dict):
        raise DataError(f"{origin}: a schema is a mapping of fields, this is {type(plain).__name__}")
    try:
        return choose(plain).model_validate(plain)
    except ValidationError as error:
        raise DataError(f"{origin}: {explain(error)}") from error


def _plain(text: str) -> Any:
    """JSON fast, anything else as YAML; a number of either knows how it was written."""
    if text.startswith("{"):
        with suppress(json.JSONDecodeError):
            return json.loads(text, parse_int=WrittenInt, parse_float=WrittenFloat, object_pairs_hook=_once)
    return read_yaml(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if found := repeated(key for key, _ in pairs):
        raise RepeatedKeyError("", found[0])
    return dict(pairs)


def canonical_json(definition: Frozen) -> str:
    """The definition's fields in their declared order, without spaces and without what is not set."""
    return definition.model_dump_json(exclude_none=True)


def shown(value: object) -> str:
    """A value for an error message: quoted, and cut when long."""
    text = str(value)
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 1] + "…")
