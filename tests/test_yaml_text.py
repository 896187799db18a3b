"""YAML as people mean it: numbers are decimal and know how they were written, and nothing changes without a word."""

import pickle

import pytest
import yaml

from fedclaw import yaml_text
from fedclaw.yaml_text import RepeatedKeyError, WrittenFloat, WrittenInt, read_yaml, written


@pytest.fixture(params=["libyaml", "python"], autouse=True)
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyYAML with and without libyaml."""
    if request.param == "python":
        monkeypatch.setattr(yaml_text, "_LOADER", yaml.SafeLoader)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("001", 1),
        ("010", 10),
        ("-9.00", -9.0),
        ("1.10", 1.1),
        ("1e-5", 1e-5),
        (".5", 0.5),
        (".inf", float("inf")),
        ("-.inf", float("-inf")),
    ],
)
def test_a_number_is_decimal_and_knows_its_text(text: str, value: float) -> None:
    (read,) = read_yaml(f"[{text}]")
    assert read == value
    assert isinstance(read, WrittenInt | WrittenFloat)
    assert written(read) == text
    assert written(pickle.loads(pickle.dumps(read))) == text


@pytest.mark.parametrize("text", ["12:30", "1_000", "0x1F", "0o17", "2024-01-31", "2024-01-31T12:30:00Z", "y", "1.2.3"])
def test_what_yaml_1_1_would_replace_is_text(text: str) -> None:
    assert read_yaml(f"a: {text}") == {"a": text}


def test_booleans_nothing_and_quotes() -> None:
    assert read_yaml("[yes, No, ON, off, true, False]") == [True, False, True, False, True, False]
    assert read_yaml("[~, null, '~', 'yes', \"001\", !!str 001, ! 7]") == [None, None, "~", "yes", "001", "001", "7"]
    assert read_yaml("a:\nb: |\n  001\n") == {"a": None, "b": "001\n"}
    assert read_yaml("") is None


def test_keys_are_as_they_are_written() -> None:
    assert read_yaml("{001: a, 1: b, 1.0: c}") == {"001": "a", "1": "b", "1.0": "c"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [1]\nb: *a", r"aliases \(\*a\) are not read; write it out"),
        ("!!python/object/apply:os.getcwd []", r"the tag tag:yaml.org,2002:python/object/apply:os.getcwd is not read"),
        ("!!int '1'", r"the tag .* is not read \(line 1\)"),
        ("a\n---\nb", r"a second document \(line 3\)"),
        ("? [a]\n: b", r"a key that is no text \(line 1\)"),
        ("[" * 101 + "]" * 101, "more than 100 levels deep"),
        ("a: [", "line [12]"),
    ],
)
def test_what_is_not_read(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_yaml(text)


@pytest.mark.parametrize(
    ("text", "where", "key"),
    [
        ("a: 1\na: 2", "", "a"),
        ("x: [{b: 1}, {a: {1: x, 01: y, '1': z}}]", "x.1.a", "1"),
        ("{yes: 1, on: 2}", "", "True"),
    ],
)
def test_a_key_that_comes_twice_is_named(text: str, where: str, key: str) -> None:
    with pytest.raises(RepeatedKeyError, match=f"more than once: '{key}'") as caught:
        read_yaml(text)
    assert caught.value.where == where
