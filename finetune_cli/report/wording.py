"""Cells and texts in words: the same string in the page and in the text report; nothing here escapes."""

from __future__ import annotations

import math
import re
import unicodedata

from finetune_cli.report.content import decimals
from finetune_cli.tasks.sections import Cell

LONGEST_TEXT = 600
LONGEST_CELL = 160
_UNSEEN = re.compile("[\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]")
"""Marks that reorder or hide text."""


def clean(text: str) -> str:
    """A text that shows what it holds: control characters, marks that reorder text and broken surrogates become U+FFFD."""
    if text.isascii() and text.isprintable():
        return text
    shown = "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in text)
    return _UNSEEN.sub("\ufffd", shown)


def cut(text: str, most: int = LONGEST_CELL) -> str:
    """At most ``most`` characters, and how many were left out."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most:,} more characters)"


def cell(value: Cell, most: int = LONGEST_CELL) -> str:
    """A cell as it is printed; nothing and not-a-number are a dash."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return decimals(value)
    return cut(clean(str(value)), most)


def is_number(value: Cell) -> bool:
    """Whether a cell is set flush right."""
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
