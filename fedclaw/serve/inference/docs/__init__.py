"""`GET /docs`: a page for people that shows what a node answers and lets them try it.

One self-contained page: it loads nothing but `openapi.json` and sends nothing but what its reader predicts, to the
node that it came from. It holds no model's name: what a reader may see is what the token, which stays in the page's
memory, lets them ask.
"""

from base64 import b64encode
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path

HERE = Path(__file__).resolve().parent


@cache
def docs_page() -> bytes:
    """The page."""
    text = _part("page.html").replace("/*css*/", _part("page.css")).replace("/*js*/", _part("page.js"))
    return text.encode()


@cache
def docs_headers() -> Mapping[str, str]:
    """Its headers: the only script and style that may run are the page's own, by their digests."""
    policy = {
        "default-src": "'none'",
        "script-src": _digest("page.js"),
        "style-src": _digest("page.css"),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-store",
    }


def _part(name: str) -> str:
    return (HERE / name).read_text("utf-8")


def _digest(name: str) -> str:
    return f"'sha256-{b64encode(sha256(_part(name).encode()).digest()).decode()}'"
