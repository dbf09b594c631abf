"""Words of a row, each with its place in the row's text: those of a list as they are, or running text cut by one rule.

The rule: a run of letters and digits is a word, with the marks and joiners that belong to them; any other visible character is one by
itself; so is every character of a script that sets no spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese), with its marks. So
``O'Neill`` is three words, ``100%`` two, and ``上海2号线`` five.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence

Place = tuple[int, int]
"""(start, end) of a word in its text, in characters; the end is exclusive."""

SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Characters of scripts that set no spaces between words, as ranges of a regular expression."""
_WIDE = re.compile(f"[{SPACELESS}\u3000-\u303f\uff00-\uffef]")
"""The same and their punctuation: no space is set beside them."""
_JOINERS = "\u00ad\u200c\u200d"


@functools.cache
def _rule() -> re.Pattern[str]:
    marks = _ranges([code for code in range(0x300, 0x20000) if unicodedata.category(chr(code))[0] == "M"]) + _JOINERS
    letter = rf"[^\W_{SPACELESS}{marks}]"
    return re.compile(rf"{letter}(?:{letter}|[{marks}])*|\S[{marks}]*")


def _ranges(codes: Sequence[int]) -> str:
    """Ascending code points as ranges of a regular expression."""
    parts, first = [], codes[0]
    for code, after in zip(codes, [*codes[1:], -1], strict=True):
        if after != code + 1:
            parts.append(f"{chr(first)}-{chr(code)}")
            first = after
    return "".join(parts)


def cut(text: str) -> list[Place]:
    """The words of running text; every character that is no white space lies in exactly one."""
    return [match.span() for match in _rule().finditer(text)]


def join(words: Sequence[str]) -> tuple[str, list[Place]]:
    """The text of a list of words and their places in it: with spaces between, but none beside a character of a script without.

    Single characters, some of them of such a script, are set without spaces throughout: they are a text cut into characters.
    """
    characters = len(words) > 1 and all(len(word) == 1 for word in words) and any(map(_WIDE.match, words))
    parts: list[str] = []
    places: list[Place] = []
    at, before = 0, ""
    for word in words:
        if at and not characters and not (_WIDE.match(before) or _WIDE.match(word)):
            parts.append(" ")
            at += 1
        parts.append(word)
        places.append((at, at + len(word)))
        at, before = at + len(word), word[-1:]
    return "".join(parts), places
