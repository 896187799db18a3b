"""The page GET /docs: whole in itself, and nothing but its own script may run in it."""

import re
from base64 import b64encode
from hashlib import sha256

from fedclaw.serve.inference.docs import docs_headers, docs_page


def test_the_page_loads_nothing() -> None:
    text = docs_page().decode()
    assert "/*css*/" not in text
    assert "/*js*/" not in text
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script src|<link rel=\"stylesheet", text)
    assert re.findall(r"fetch\(|asked\(\"[^\"]*\"", text) == ["fetch(", 'asked("openapi.json"', 'asked("predict/"']


def test_what_others_wrote_is_never_markup_and_the_token_is_never_kept() -> None:
    text = docs_page().decode()
    markup = ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(")
    for forbidden in (*markup, "localStorage", "sessionStorage", "cookie", "history."):
        assert forbidden not in text, forbidden


def test_only_its_own_script_and_style_may_run() -> None:
    text, policy = docs_page().decode(), docs_headers()["content-security-policy"]
    directives = dict(part.split(" ", 1) for part in policy.split("; "))
    assert directives["default-src"] == "'none'"
    assert directives["connect-src"] == "'self'"
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert directives[directive] == f"'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'"
    assert not re.search(r"<[^>]+ (style|on[a-z]+)=", text)
