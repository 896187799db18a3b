"""The terminal that everything is printed to."""

from rich.console import Console

PLAIN_WIDTH = 132
"""Columns when the output is a file or a pipe."""


def make_console(*, stderr: bool = False) -> Console:
    """The terminal, as wide as it is; a file or pipe, wide enough that no table is cut and no line broken."""
    console = Console(stderr=stderr, soft_wrap=True, highlight=False, emoji=False)
    if console.is_terminal:
        return console
    return Console(stderr=stderr, soft_wrap=True, highlight=False, emoji=False, width=PLAIN_WIDTH)
