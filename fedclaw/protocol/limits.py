"""What a value from outside may be at most, and the short texts that are read from one."""

from typing import Annotated

from pydantic import AfterValidator, Field, JsonValue

MAX_ROUNDS = 100_000
MAX_STEPS = 1_000_000
MAX_EPOCHS = 10_000.0
MAX_BATCH = 10_000_000
"""Limits of a plan: one small message must not keep a site busy for ever. Its policy sets narrower ones."""

MOST_EXAMPLES = 10**12
"""At one site."""

MOST_CHARGED = 10**15
"""Steps or rounds in a receipt."""

SMALLEST_CLIP, LARGEST_CLIP = 1e-6, 1e6
"""A clipping bound lies between them, at every site: far enough from where float32 ends that no parameters and no data
bring what is clipped there."""
LARGEST_RATE = 1e3
"""Of local learning rates."""

MAX_SITES = 10_000_000
"""Sites of a federation, by anybody's word."""

MAX_SUMMED, MAX_LENGTH = 100_000, 10**10
"""Sites in one secure sum, and numbers in its vector."""
MAX_COLUMNS = 100_000
"""Of a schema; and parameters that a plan can name."""
MAX_CONSTANTS = 64 << 20
"""Characters of preprocessing constants."""
MAX_TEXT = 4096
MAX_ARGUMENTS, MAX_DEPTH = 10_000, 8
"""Characters of a text in arguments, values in them, and how deep they lie in one another."""

Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\p{C}]+$")]
"""Of a run, a federation, a strategy: it stands in ledgers, logs and pages, so it is short and on one line."""

ParameterName = Annotated[str, Field(min_length=1, max_length=512)]
"""Of a parameter in a model's state, or of a column in a schema."""

Digest = Annotated[str, Field(max_length=64)]
"""SHA-256, hexadecimal."""


def _small(arguments: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """`arguments`. Raises ValueError for such as nothing has: too many, too deep, or texts as long as books."""
    level: list[JsonValue] = [arguments]
    count = 0
    for _ in range(MAX_DEPTH):
        inner: list[JsonValue] = []
        for value in level:
            if isinstance(value, str) and len(value) > MAX_TEXT:
                raise ValueError(f"a text of {len(value)} characters; at most {MAX_TEXT} are read")
            if isinstance(value, dict):
                inner += [*value, *value.values()]
            elif isinstance(value, list):
                inner += value
        count += len(inner)
        if count > MAX_ARGUMENTS:
            raise ValueError(f"more than {MAX_ARGUMENTS} values")
        if not inner:
            return arguments
        level = inner
    raise ValueError(f"values within values more than {MAX_DEPTH} deep")


Arguments = Annotated[dict[Annotated[str, Field(max_length=64)], JsonValue], AfterValidator(_small)]
"""Of a model or a strategy, by name."""
