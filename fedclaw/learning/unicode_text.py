"""Unicode normalisation that no text makes slow.

Normalisation sorts each run of combining characters, and CPython's takes the square of its length: a megabyte of them
takes half an hour. Names and levels are short; a text that is longer than `LONGEST` is none, and is left as it is.
"""

import unicodedata

LONGEST = 1000
"""Characters."""


def composed(text: str) -> str:
    """The text in NFC, as it is compared with names and levels; a longer one than `LONGEST` as it is."""
    return text if text.isascii() or len(text) > LONGEST else unicodedata.normalize("NFC", text)
