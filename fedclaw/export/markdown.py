"""Markdown that holds text of others: names, labels and column headers that a site or a coordinator chose.

Text is escaped wherever it enters a page, unless it is `Markdown`, so nothing that a page quotes can start a heading, a
link, a table cell or HTML (CommonMark 0.31, section 2.4, and the tables and autolinks of GitHub's dialect).
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence


class Markdown(str):
    """Text that is Markdown already, and goes into a page as it is."""

    __slots__ = ()


_ESCAPES = str.maketrans({letter: f"\\{letter}" for letter in "\\`*_[]|~$#"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;"})
_LINK = re.compile(r":(?=//)|(?<=\bwww)\.", re.IGNORECASE)
"""What turns bare text into a link: the colon of a scheme, the point after www."""
_BLOCK = re.compile(r"^(\d{1,9}(?=[.)](?:\s|$))|[-+](?=\s|$)|[-=](?=[-=\s]*$))")
"""What starts a list, is a rule, or underlines a heading at the beginning of a line; -0.5 does not."""
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n\s*", re.DOTALL)
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def plain(text: str) -> str:
    """`text` on one line; a control or format character (Unicode category C) becomes a replacement character.

    Format characters are replaced because they change the order or the look of what stands around them.
    """
    line = " ".join(text.split())
    return "".join(REPLACEMENT if unicodedata.category(letter).startswith("C") else letter for letter in line)


def escape(text: str) -> Markdown:
    """`text` on one line, shown as it is and never taken for markup; `Markdown` unchanged."""
    if isinstance(text, Markdown):
        return text
    safe = _LINK.sub(lambda found: "\\" + found[0], plain(text).translate(_ESCAPES))
    return Markdown(_BLOCK.sub(_not_a_block, safe))


def _not_a_block(start: "re.Match[str]") -> str:
    """A list's number keeps its digits, and what follows them gets the backslash."""
    return f"{start[0]}\\" if start[0][0].isdigit() else f"\\{start[0]}"


def code(text: str) -> Markdown:
    """`text` as a code span, on one line; as ordinary text where a code span in a table could not hold it."""
    line = plain(text)
    return Markdown(f"`{line}`") if line and not {"`", "|"} & set(line) else escape(line)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Markdown:
    """A table; each row has as many cells as `head`."""
    lines = [head, [Markdown("---")] * len(head), *rows]
    return Markdown("\n".join("| " + " | ".join(escape(cell) for cell in line) + " |" for line in lines))


def bullets(items: Iterable[str]) -> Markdown:
    """A list of one level."""
    return Markdown("\n".join(f"- {escape(item)}" for item in items))


def without_front_matter(page: str) -> str:
    """`page` without the block of YAML at its head, which is for machines; a page without one as it is."""
    return _FRONT_MATTER.sub("", page, count=1)
