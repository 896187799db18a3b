"""Pages in Markdown, from texts into which numbers have been put."""

import textwrap
from collections.abc import Sequence

WIDTH = 120


def filled(parts: Sequence[str]) -> str:
    """A page of these parts, whose paragraphs and lists are filled anew now that their numbers are in."""
    blocks = "\n\n".join(part.strip("\n") for part in parts if part.strip()).split("\n\n")
    return "\n\n".join(_wrapped(block) for block in blocks if block.strip()) + "\n"


def _wrapped(block: str) -> str:
    """A paragraph or list, filled anew now that its numbers are in; anything else as it is."""
    if block.startswith(("#", "|", "!", "    ")):
        return block
    items = block.split("\n- ") if block.startswith("- ") else [block]
    marks = ["", *["- "] * (len(items) - 1)]
    return "\n".join(
        textwrap.fill(
            " ".join(f"{mark}{item}".split()),
            WIDTH,
            subsequent_indent="  " if block.startswith("- ") else "",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for mark, item in zip(marks, items, strict=True)
    )
