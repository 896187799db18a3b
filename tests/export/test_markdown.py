"""Text of others in a page: shown as it is, and never markup, by a parser of CommonMark with tables."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from fedclaw.export.markdown import REPLACEMENT, Markdown, bullets, code, escape, plain, table

PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
HOSTILE = (
    "<script>alert(1)</script>",
    "<!-- the rest is hidden",
    "&lt;b&gt; &#60;",
    "a | b | c",
    "a \\| b",
    "`code`",
    "``` fence",
    "~~~ fence",
    "*bold* _it_ __b__ ~~s~~",
    "[link](https://evil.example)",
    "![image](x)",
    "[ref]: https://evil.example",
    "# heading",
    "---",
    "===",
    "> quote",
    "- item",
    "+ item",
    "1. item",
    "12) item",
    "    indented",
    "two\n\n# lines",
    "back\\",
    "<https://evil.example>",
    "$x$",
    "-",
    "- - -",
    "-0.5",
    "0.9750",
)
TEXTS = st.one_of(
    st.sampled_from(HOSTILE), st.text(alphabet=st.sampled_from("a1 \n\t`|\\<>&#*_~[]()!-+=.:/$\"'é"), max_size=30)
)
MARKUP_FREE = {"text", "text_special", "code_inline"}


def inline(token):
    """What a block of text holds, as (types, text shown)."""
    return {child.type for child in token.children}, "".join(child.content for child in token.children)


@given(TEXTS)
def test_a_paragraph_shows_the_text_and_nothing_else(text):
    tokens = PARSER.parse(escape(text))
    if not plain(text):
        assert tokens == []
        return
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    types, shown = inline(tokens[1])
    assert types <= MARKUP_FREE
    assert shown == plain(text)


@given(st.lists(TEXTS, min_size=1, max_size=3))
def test_a_list_has_one_level_and_an_item_for_each_text(texts):
    tokens = PARSER.parse(bullets(texts))
    assert [token.type for token in tokens].count("bullet_list_open") == 1
    assert [token.type for token in tokens].count("list_item_open") == len(texts)
    assert {token.type for token in tokens} <= {
        "bullet_list_open", "list_item_open", "paragraph_open", "inline",
        "paragraph_close", "list_item_close", "bullet_list_close",
    }  # fmt: skip


@pytest.mark.parametrize("cell", [escape, code])
@given(TEXTS, TEXTS)
def test_a_table_has_the_cells_that_it_was_given(cell, one, two):
    tokens = PARSER.parse(table(("Name", "Value"), [(cell(one), cell(two))]))
    assert (tokens[0].type, tokens[-1].type) == ("table_open", "table_close")
    cells = [inline(after) for token, after in pairwise(tokens) if token.type == "td_open"]
    assert [shown for _, shown in cells] == [plain(one), plain(two)]
    assert set().union(*(types for types, _ in cells)) <= MARKUP_FREE


def test_what_is_markdown_already_stays():
    assert escape(Markdown("**bold**")) == "**bold**"
    assert code("a_b") == "`a_b`"


@pytest.mark.parametrize("letter", ["\x1b", "\u202e", "\u200b", "\ue000", "\x00"])
def test_letters_that_hide_or_reorder_others_are_replaced(letter):
    assert plain(f"a{letter}b") == f"a{REPLACEMENT}b"


@pytest.mark.parametrize("text", ["https://evil.example", "see www.evil.example", "HTTP://evil.example"])
def test_an_address_is_no_link_in_a_dialect_that_makes_links_of_bare_text(text):
    assert "\\" in escape(text)
    assert inline(PARSER.parse(escape(text))[1]) == ({"text"}, text)
