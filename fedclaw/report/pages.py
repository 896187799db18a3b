"""The HTML templates beside this file, rendered by Jinja2: everything that a page is given is escaped by it."""

import math
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedclaw.report.ledger_words import rounded

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **values: Any) -> str:
    """The template of that name, filled in."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"moment": _moment, "epsilon": _epsilon}
    return environment


def _moment(text: str) -> str | None:
    """A time of the ledger without its seconds; None if it is no time."""
    try:
        return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M}"
    except ValueError:
        return None


def _epsilon(epsilon: float) -> str:
    return "no bound" if math.isinf(epsilon) else rounded(epsilon)
