"""YAML as people mean it: a plain scalar is what was written, and nothing in a file is replaced without a word.

PyYAML reads YAML 1.1, where 010 is eight, 12:30 is 750, 1_000 is a thousand and 2024-01-31 is no text. Here, as in YAML
1.2 (core schema), a number is decimal, and each number knows the text that it was written as; times and dates are text.
Of YAML 1.1 only yes, no, on and off stay booleans. Aliases, tags but !!str, and a key that comes twice are refused.
"""

import re
from dataclasses import dataclass
from typing import Any

import yaml

_INTEGER = re.compile(r"[-+]?[0-9]+", re.ASCII)
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", re.ASCII)
_NOT_FINITE = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NOTHING = frozenset({"", "~", "null", "Null", "NULL"})
_TEXT_TAGS = frozenset({"!", "tag:yaml.org,2002:str"})
MAX_DIGITS = 400
"""A plain scalar of more digits is text: no number that is meant has as many, and reading one takes quadratic time."""
MAX_DEPTH = 100


class WrittenInt(int):
    """A whole number, and the text that it was written as."""

    written: str

    def __new__(cls, written: str) -> "WrittenInt":
        """The number that `written` spells in decimal."""
        number = super().__new__(cls, written)
        number.written = written
        return number


class WrittenFloat(float):
    """A number, and the text that it was written as."""

    written: str

    def __new__(cls, written: str, value: str | None = None) -> "WrittenFloat":
        """The number that `value`, else `written`, spells."""
        number = super().__new__(cls, value or written)
        number.written = written
        return number


class RepeatedKeyError(ValueError):
    """A key comes twice in one mapping; `where` is the mapping's path, empty for the outermost one."""

    def __init__(self, where: str, key: str) -> None:
        super().__init__(f"more than once: {key!r}")
        self.where = where


def read_yaml(text: str) -> Any:
    """The one document in `text`; None if there is none. Keys are as written.

    Raises ValueError (RepeatedKeyError, or with the place in the file) for what is not read.
    """
    try:
        return _Builder().build(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


@dataclass
class _Open:
    """A mapping or a list whose end has not come yet."""

    node: dict[Any, Any] | list[Any]
    key: Any = None
    keyed: bool = False
    """Whether `key` waits for its value."""


class _Builder:
    """Plain containers from the parser's events, without recursion."""

    def __init__(self) -> None:
        self._open: list[_Open] = []
        self._root: list[Any] = []

    def build(self, text: str) -> Any:
        for event in yaml.parse(text, Loader=_LOADER):
            self._take(event)
        return self._root[0] if self._root else None

    def _take(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"aliases (*{event.anchor}) are not read; write it out")
        if isinstance(event, yaml.ScalarEvent):
            self._put(_scalar(event), event)
        elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            if event.tag is not None:
                raise ValueError(f"the tag {event.tag} is not read{_place(event)}")
            if len(self._open) == MAX_DEPTH:
                raise ValueError(f"more than {MAX_DEPTH} levels deep{_place(event)}")
            node: dict[Any, Any] | list[Any] = {} if isinstance(event, yaml.MappingStartEvent) else []
            self._put(node, event)
            self._open.append(_Open(node))
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            self._open.pop()

    def _put(self, value: Any, event: yaml.Event) -> None:
        if not self._open:
            if self._root:
                raise ValueError(f"a second document{_place(event)}; a file holds one")
            self._root.append(value)
            return
        inner = self._open[-1]
        if isinstance(inner.node, list):
            inner.node.append(value)
        elif inner.keyed:
            inner.node[inner.key], inner.keyed = value, False
        else:
            self._set_key(inner, value, event)

    def _set_key(self, inner: _Open, value: Any, event: yaml.Event) -> None:
        if isinstance(value, dict | list):
            raise ValueError(f"a key that is no text{_place(event)}")
        key = value.written if isinstance(value, WrittenInt | WrittenFloat) else value
        assert isinstance(inner.node, dict)
        if key in inner.node:
            raise RepeatedKeyError(".".join(self._path()), str(key))
        inner.key, inner.keyed = key, True

    def _path(self) -> list[str]:
        steps = []
        for outer in self._open[:-1]:
            steps.append(str(len(outer.node) - 1) if isinstance(outer.node, list) else str(outer.key))
        return steps


def _scalar(event: yaml.ScalarEvent) -> Any:
    text = event.value
    if event.tag is not None and event.tag not in _TEXT_TAGS:
        raise ValueError(f"the tag {event.tag} is not read{_place(event)}")
    if event.tag is not None or not event.implicit[0]:
        return text
    if text in _NOTHING:
        return None
    if text.lower() in _BOOLEANS and text in {text.lower(), text.title(), text.upper()}:
        return _BOOLEANS[text.lower()]
    if len(text) <= MAX_DIGITS and _INTEGER.fullmatch(text):
        return WrittenInt(text)
    if len(text) <= MAX_DIGITS and _FLOAT.fullmatch(text):
        return WrittenFloat(text)
    if found := _NOT_FINITE.fullmatch(text):
        return WrittenFloat(text, "nan" if found[3] else f"{found[1]}inf")
    return text


def _place(event: yaml.Event) -> str:
    return f" (line {event.start_mark.line + 1})" if event.start_mark else ""


_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's parser, ten times as fast, where PyYAML was built with it."""


def written(value: Any) -> Any:
    """A number of `read_yaml` as the text that it was written as; anything else as it is."""
    return value.written if isinstance(value, WrittenInt | WrittenFloat) else value
