"""Figures for a terminal of any width: no number is ever broken over two lines, and names are shortened in the middle.

What is too wide is first drawn with thinner lines, then without the columns that say the same in every row (they are
told once below), and at last as a list, a line a figure.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

SHORTEST = 12
"""Columns that a name keeps: enough for both of its ends."""
_CUT = "…"


def epsilon_words(value: float | None, absent: str = "unbounded") -> str:
    """An epsilon for a person; `absent` where there is none."""
    return absent if value is None else f"{value:.3f}"


def shortened(name: str, width: int) -> str:
    """`name` in at most `width` columns: its beginning and its end, which tell most names apart."""
    if cell_len(name) <= width:
        return name
    if width < 2:
        return _CUT[:width]
    head, tail = name, name
    while cell_len(head) > (width - 1) - (width - 1) // 2:
        head = head[:-1]
    while cell_len(tail) > (width - 1) // 2:
        tail = tail[1:]
    return head + _CUT + tail


@dataclass
class Figures:
    """A table whose first column names what the others are of. Cells are plain text, whoever they come from."""

    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    title: str = ""
    caption: str = ""
    words: frozenset[str] = frozenset()
    """Columns that are no numbers: to the left."""

    def add_row(self, *cells: str) -> None:
        """One more row, with a cell for each column."""
        self.rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """See rich."""
        everything = list(range(len(self.columns)))
        told_once = [place for place in everything[1:] if self._is_the_same(place)]
        rest = [place for place in everything if place not in told_once]
        attempts: list[tuple[list[int], list[int], bool]] = [(everything, [], True), (everything, [], False)]
        if told_once and len(rest) > 1:
            attempts += [(rest, told_once, True), (rest, told_once, False)]
        width = options.max_width
        for shown, once, lines in attempts:
            if (name := self._name_width(shown, width, lines)) is not None:
                yield self._table(shown, name, lines)
                yield from self._below(once, width)
                return
        yield from self._list(rest, width)
        yield from self._below(told_once, width)

    def _is_the_same(self, place: int) -> bool:
        return len(self.rows) > 1 and len({row[place] for row in self.rows}) == 1

    def _width(self, place: int) -> int:
        """Of a column: its longest cell, and the longest word of its heading."""
        words = [cell_len(word) for word in self.columns[place].split()]
        return max([*words, *(cell_len(row[place]) for row in self.rows)], default=0)

    def _name_width(self, shown: Sequence[int], width: int, lines: bool) -> int | None:
        """What is left of `width` for the names; None if that is not enough."""
        around, edge = (3, 1) if lines else (2, 0)
        left = width - sum(self._width(place) + around for place in shown[1:]) - around - edge
        return min(left, self._width(0)) if left >= min(SHORTEST, self._width(0)) else None

    def _table(self, shown: Sequence[int], name: int, lines: bool) -> Table:
        table = Table(
            title=Text(self.title) if self.title else None,
            title_justify="left",
            box=box.HEAVY_HEAD if lines else None,
            padding=(0, 1) if lines else (0, 2, 0, 0),
        )
        for place in shown:
            heading = self.columns[place]
            left = place == 0 or heading in self.words
            width = self._width(place) if place else max(name, 1)
            table.add_column(Text(heading), justify="left" if left else "right", width=width)
        for row in self.rows:
            cells = [shortened(row[0], name), *(row[place] for place in shown[1:])]
            table.add_row(*(Text(cell, no_wrap=True) for cell in cells))
        return table

    def _below(self, told_once: Sequence[int], width: int) -> Iterator[Text]:
        if told_once:
            said = [f"{self.columns[place]} {self.rows[0][place]}" for place in told_once]
            yield Text(parts_in_lines(["for all:", *said], width))
        if self.caption:
            yield Text(parts_in_lines(self.caption.split(), width, gap=" "))

    def _list(self, shown: Sequence[int], width: int) -> Iterator[Text]:
        if self.title:
            yield Text(parts_in_lines(self.title.split(), width, gap=" "), style="italic")
        for row in self.rows:
            yield Text(shortened(row[0], width), style="bold")
            for place in shown[1:]:
                label = self.columns[place]
                line = f"  {label} {row[place]}"
                yield from [Text(line)] if cell_len(line) <= width else [Text(f"  {label}"), Text(f"    {row[place]}")]


def parts_in_lines(parts: Sequence[str], width: int, indent: int = 4, gap: str = "  ") -> str:
    """`parts` with `gap` between them, on as many lines as it takes: none is broken that fits on a line."""
    lines = [""]
    for part in parts:
        longer = f"{lines[-1]}{gap}{part}" if lines[-1] else part
        if cell_len(longer) > width and lines[-1]:
            lines.append(" " * indent + part)
        else:
            lines[-1] = longer
    return "\n".join(lines)
