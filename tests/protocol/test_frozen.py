"""What people write, as settings objects: yes and no are no numbers there, however deep they stand."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from fedclaw.errors import UsageError
from fedclaw.protocol.frozen import Frozen, Written, check_settings


class Inner(Frozen):
    size: Annotated[int, Field(ge=0)] = 1
    on: bool = False


class Other(Frozen):
    size: float
    kind: Literal["other"] = "other"


class Outer(Frozen):
    rate: float | None = None
    inner: Inner = Inner()
    several: tuple[Inner | Other, ...] = ()
    named: dict[str, Inner] = {}
    numbers: tuple[Annotated[float, Field(gt=0)], ...] = ()
    either: int | bool = 0
    anything: Any = None
    last: float = Field(default=1.0, alias="the-last")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"rate": True}, "rate: Input should be a number, not yes"),
    ({"inner": {"size": False}}, "inner.size: Input should be a number, not no"),
    ({"several": [{}, {"size": True}]}, "several.1.size: Input should be a number, not yes"),
    ({"named": {"a": {"size": True}}}, "named.a.size: Input should be a number, not yes"),
    ({"numbers": [1.0, True]}, "numbers.1: Input should be a number, not yes"),
    ({"the-last": True}, "the-last: Input should be a number, not yes"),
]
RIGHT = {"inner": {"on": True}, "named": {"true": {"on": False}}, "either": True, "anything": {"size": True}, "rate": 1}


@pytest.mark.parametrize(("plain", "says"), WRONG)
def test_yes_is_no_number_in_settings(plain: dict[str, Any], says: str) -> None:
    """It was 1, and no 0."""
    with pytest.raises(UsageError) as caught:
        check_settings(plain, Outer)
    assert str(caught.value) == f"configuration: {says}"


@pytest.mark.parametrize(("plain", "says"), WRONG)
def test_yes_is_no_number_below_what_is_written(plain: dict[str, Any], says: str) -> None:
    """The columns of a schema and the speed of a site are values of their own."""

    class File(Written):
        outer: Outer

    with pytest.raises(ValidationError) as caught:
        File.model_validate({"outer": plain})
    assert f"Value error, {says}" in str(caught.value)


def test_yes_is_yes_where_that_is_asked() -> None:
    assert check_settings(RIGHT, Outer).inner.on


def test_what_is_nested_without_end_is_an_error_like_any_other() -> None:
    nested: Any = True
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(UsageError, match="numbers"):
        check_settings({"numbers": nested}, Outer)
