"""The statement: whole in itself, well-formed, escaped, readable, and it says what the ledger says."""

import re
import shutil
import subprocess
from html import escape, unescape
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fedclaw.errors import LedgerError
from fedclaw.privacy.claims import Claim, every_claim
from fedclaw.report import ledger_page
from fedclaw.report.ledger_page import render
from fedclaw.report.ledger_words import certainty, factor, meaning, rounded
from fedclaw.site.journal.ledger import Ledger
from fedclaw.site.journal.reconciliation import open_journal
from fedclaw.site.journal.spending import Point
from tests.ledgers import HISTORY, ROUND, SITE, UNLIMITED, Run, make_site


def page_of(root: Path) -> str:
    return render(open_journal(root))


def parsed(page: str) -> ElementTree.Element:
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))


def text_of(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(make_site(tmp_path_factory.mktemp("page") / "site"))


def test_it_needs_nothing_from_anywhere(page: str) -> None:
    tree = parsed(page)
    elements = {element.tag for element in tree.iter()}
    assert not elements & {"script", "link", "img", "iframe", "object", "embed", "form", "a", "base"}
    attributes = {name for element in tree.iter() for name in element.attrib}
    assert not {name for name in attributes if name.startswith("on") or name in {"src", "href", "action", "srcset"}}
    assert not re.search(r"url\(|@import|https?:", page)
    (policy,) = [item for item in tree.iter("meta") if item.get("http-equiv") == "Content-Security-Policy"]
    assert policy.get("content", "").startswith("default-src 'none'")


def test_it_can_be_read_without_eyes(page: str) -> None:
    tree = parsed(page)
    assert tree.get("lang") == "en"
    assert tree.findtext("head/title")
    levels = [int(item.tag[1]) for item in tree.iter() if re.fullmatch(r"h[1-6]", item.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    tables = list(tree.iter("table"))
    assert len(tables) == 4
    for table in tables:
        assert text_of(table.find("caption"))
        assert all(cell.get("scope") in {"col", "row"} for cell in table.iter("th"))
        assert {cell.tag for cell in table.find("tbody").iter() if cell.get("role") == "cell"} == {"td"}
    identities = [item.get("id") for item in tree.iter() if item.get("id")]
    assert len(set(identities)) == len(identities)
    for drawing in tree.iter("svg"):
        assert drawing.get("role") == "img"
        assert set(drawing.get("aria-labelledby", "").split()) <= set(identities)


def test_it_says_what_the_ledger_says(page: str, tmp_path: Path) -> None:
    spending = open_journal(make_site(tmp_path / "site")).spending()
    ward = spending.data_set("ward-4")
    section = next(item for item in parsed(page).iter("section") if "ward-4" in text_of(item.find("h2")))
    figures = dict(zip(map(text_of, section.iter("dt")), map(text_of, section.iter("dd")), strict=True))
    assert figures["Budget (epsilon)"] == "8"
    assert figures["Spent"] == rounded(ward.epsilon)
    assert figures["Left"] == rounded(8 - ward.epsilon, down=True)
    runs, contents = section.iter("table")
    rows = [[text_of(cell) for cell in row] for row in runs.find("tbody")]
    assert [row[0] for row in rows] == ["springfederation heart", "summerfederation heart", "summerfederation icu"]
    assert [row[2] for row in rows] == ["4", "31 open", "2"]
    assert [row[3] for row in rows] == [rounded(run.epsilon) for run in ward.runs]
    assert "52 steps at sample rate 0.08 with noise multiplier 1.5" in rows[0][4]
    assert "holds against everybody" in rows[0][4]
    assert "1 charge is open" in text_of(runs.find("caption"))
    assert [text_of(row[0]) for row in contents.find("tbody")] == ["ab" * 32, "cd" * 32]
    assert f"factor of at most {factor(ward.epsilon)}" in text_of(section)
    assert "1 in 1,000" in text_of(section)


def test_training_without_privacy_is_said_first_and_plainly(page: str) -> None:
    section = next(item for item in parsed(page).iter("section") if "outpatients" in text_of(item.find("h2")))
    assert "no bound" in text_of(section)
    assert "without differential privacy. Nothing bounds" in text_of(section)
    assert section.find(".//svg") is None


def test_it_says_how_to_check_it(tmp_path: Path) -> None:
    root = make_site(tmp_path / "site")
    journal = open_journal(root)
    assert f"fedclaw.ledger verify site={root} head={journal.index.head}" in unescape(render(journal))


HOSTILE = "<script>alert('run')</script>&\"'"


def test_names_from_elsewhere_are_text(tmp_path: Path) -> None:
    page = page_of(make_site(tmp_path / "site", [Run(HOSTILE, 1, federation=HOSTILE), *HISTORY]))
    assert "<script" not in page
    assert HOSTILE in [element.text for element in parsed(page).iter("th")]


def test_it_says_against_whom_it_does_not_hold(tmp_path: Path) -> None:
    root = make_site(tmp_path / "site", [Run("spring", 1)])
    journal = open_journal(root)
    for claim in every_claim():
        fields: dict[str, object] = {"unit": claim.unit, "relation": claim.relation, "trust": claim.trust}
        if claim.unit == "site":
            # Of a whole site, a receipt speaks beside its own figures.
            noise_by = {"server": "server", "aggregation": "sites"}.get(claim.trust)
            fields = {"central": {"unit": "site", "noise_by": noise_by}, "trust": claim.trust}
            if noise_by is None:
                continue
        line = journal.outbound[0].model_copy(update={"receipt": {**(journal.outbound[0].receipt or {}), **fields}})
        text = render(type(journal)(root, journal.settings, journal.entries, journal.index, (line,), journal.mark))
        said = text_of(parsed(text))
        for sentence in (claim.protects, claim.against):
            assert sentence in said.partition("By which run")[0], claim
        assert claim.against in said.partition("By which run")[2], "beside the run"
        for sentence in claim.not_covered if claim.unit != "site" else ():
            assert sentence in said.partition("do not cover")[2], claim
        assert ("One person" in said) == (claim.unit == "person" and claim.trust != "everybody")
    assert Claim().protects in text_of(parsed(page_of(root)))


def test_what_was_charged_and_never_left_is_said_in_the_ledgers_own_unit(tmp_path: Path) -> None:
    root = make_site(tmp_path / "site", [Run("none", 0)])
    for name, unit, declared in (("ward-4", "example", None), ("icu", "person", 40)):
        with Ledger.open(root / "state" / "ledger.sqlite", name, name.encode().hex(), declared) as ledger:
            ledger.reserve(name, "heart", "spring", 1, ROUND, UNLIMITED, unit=unit)
    sections = {text_of(item.find("h2")): text_of(item) for item in parsed(page_of(root)).iter("section")}
    assert Claim("example", "zero-out").protects in sections["Data set ward-4"]
    assert Claim("person", "add-or-remove").protects in sections["Data set icu"]
    assert "Take any one person" in sections["Data set icu"]
    for claim in (Claim("example", "zero-out"), Claim("person", "add-or-remove")):
        assert all(any(sentence in text for text in sections.values()) for sentence in claim.not_covered)
    assert not any(Claim().against in text for text in sections.values())


def test_a_site_that_never_trained(tmp_path: Path) -> None:
    page = page_of(make_site(tmp_path / "site", [Run("none", 0)]))
    assert "Nothing has been spent" in page
    assert "<table" not in page


def test_no_page_on_books_that_do_not_fit(tmp_path: Path) -> None:
    root = make_site(tmp_path / "site", [Run("spring", 2)])
    journal = open_journal(root)
    (root / "state" / "ledger.sqlite").unlink()
    make_site(tmp_path / "other", [Run("spring", 2)])
    other = open_journal(tmp_path / "other")
    with pytest.raises(LedgerError, match="line 1 of the outbound log"):
        render(type(journal)(root, journal.settings, other.entries, other.index, journal.outbound, other.mark))


def test_no_limit_is_said(tmp_path: Path) -> None:
    site = SITE.replace("epsilon: 8.0", "epsilon: null")
    page = page_of(make_site(tmp_path / "site", [Run("spring", 1)], site))
    assert text_of(parsed(page)).count("no limit") == 2
    assert 'class="bar"' not in page


def test_figures_are_rounded_against_the_spender() -> None:
    assert [rounded(value) for value in (0.0, 8.0, 3.871, 3.87, 12.01, 0.012341, 100.2)] == [
        "0",
        "8",
        "3.88",
        "3.87",
        "12.1",
        "0.0124",
        "101",
    ]
    assert [rounded(value, down=True) for value in (0.0, 4.129, 4.12, 12.09)] == ["0", "4.12", "4.12", "12"]
    assert rounded(1e-9) == "0.000000001"
    assert (factor(1.0), factor(8.0), factor(100.0)) == ("2.72", "2,981", "10^44")
    assert (certainty(0.0), certainty(1.0), certainty(9.0)) == ("50%", "73.2%", "more than 99.9%")


def test_the_words_for_nothing_and_for_everything_differ(tmp_path: Path) -> None:
    spending = open_journal(make_site(tmp_path / "site")).spending()
    texts = {" ".join(meaning(item)) for item in spending.data_sets}
    assert len(texts) == 2


def points(*values: float) -> list[Point]:
    return [Point(f"2026-0{month}-01T00:00:00+00:00", month, value) for month, value in enumerate(values, 1)]


def path_of(drawing: str) -> list[tuple[float, float]]:
    text = ElementTree.fromstring(drawing).find("path").get("d")
    return [(float(x), float(y)) for x, y in re.findall(r"H([\d.]+)V([\d.]+)", text)]


def test_the_line_only_goes_up_and_right() -> None:
    steps = path_of(ledger_page.draw(points(1.0, 2.0, 4.0), 8.0, "c"))
    assert [x for x, _ in steps] == sorted(x for x, _ in steps)
    heights = [216 - y for _, y in steps]
    assert heights[1] / heights[0] == pytest.approx(2, rel=1e-2)
    assert heights[2] / heights[0] == pytest.approx(4, rel=1e-2)


def test_a_clock_that_was_set_back_does_not_draw_backwards() -> None:
    history = points(1.0, 2.0, 3.0)
    history[1] = Point("1970-01-01T00:00:00+00:00", 2, 2.0)
    xs = [x for x, _ in path_of(ledger_page.draw(history, None, "c"))]
    assert xs[0] == xs[1] < xs[2]


def test_one_charge_an_unbounded_one_and_tiny_ones_can_be_drawn() -> None:
    assert len(path_of(ledger_page.draw(points(1.0), None, "c"))) == 1
    assert len(path_of(ledger_page.draw(points(1.0, float("inf")), 8.0, "c"))) == 1
    assert "unbounded from the first" in ledger_page.draw(points(float("inf")), 8.0, "c")
    assert len(path_of(ledger_page.draw(points(1e-6, 2e-6), None, "c"))) == 2
    assert len(path_of(ledger_page.draw(points(0.0), None, "c"))) == 1


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, definition of contrast ratio."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_the_colours_can_be_told_apart(scheme: int) -> None:
    style = files("fedclaw.report").joinpath("ledger_page.css").read_text()
    blocks = re.findall(r":root \{([^}]*)\}", style)
    colour = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", blocks[scheme]))
    for background in ("paper", "panel"):
        for text in ("ink", "quiet", "warn"):
            assert contrast(colour[text], colour[background]) >= 4.5, (text, background)
        assert contrast(colour["spent"], colour[background]) >= 3


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURE = """<body style="margin:0">
<iframe id="page" width="375" height="2000" style="border:0" srcdoc="{page}"></iframe>
<pre id="wide"></pre><script>onload = () => {{
  const whole = page.contentDocument.documentElement;
  wide.textContent = "WIDE:" + (whole.scrollWidth - whole.clientWidth) + ":" + getComputedStyle(
    page.contentDocument.querySelector(".figures dd")).whiteSpace + ":";
}}</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed to draw the page")
def test_a_phone_shows_all_of_it(tmp_path: Path) -> None:
    """375 px wide: no name, however long, makes the page wider, and no figure is broken over two lines."""
    site, data_set = "h" + "x" * 62, "ward" + "z" * 90
    history = [Run("r" * 120, 2, federation="f" * 60, data_set=data_set), Run("s", 1, data_set=data_set)]
    named = SITE.replace("hospital-north", site).replace("ward-4", data_set)
    wrapper = tmp_path / "phone.html"
    wrapper.write_text(MEASURE.format(page=escape(page_of(make_site(tmp_path / "site", history, named)))))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    drawn = subprocess.run(
        [str(BROWSER), *options, "--dump-dom", str(wrapper)], capture_output=True, text=True, timeout=90, check=True
    ).stdout
    found = re.search(r"WIDE:(\d+):([a-z]+):</pre>", drawn)
    assert found is not None, drawn[-500:]
    assert (int(found[1]), found[2]) == (0, "nowrap")
