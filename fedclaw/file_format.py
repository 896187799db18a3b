"""How a site's data files are written, where that is the site's own affair and no part of what was agreed on."""

from typing import Literal

from pydantic import Field

from fedclaw.protocol.frozen import Frozen

Delimiter = Literal[",", ";", "\t", "|"]


class FileFormat(Frozen):
    """How text files are written. None of it changes what is read, so no digest covers it."""

    delimiter: Delimiter | None = None
    """Between the cells; None: as the schema says."""
    decimal: Literal[".", ","] = "."
    """Before the decimals of a number. With a comma, a point in a number is refused: it may stand for thousands."""
    encoding: Literal["utf-8", "utf-16", "latin-1", "windows-1252"] = "utf-8"
    title_lines: int = Field(default=0, ge=0, le=100)
    """Lines above the header that are no part of the table."""
