"""Tables and long lines as plain text, for a log, for stdout, and for screens that they are too wide for."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from finetune_cli.said import sayable

FEW_ROWS = 4
"""A table of so many rows is turned on its side where it is too wide."""


def layout(title: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The plain form of a table, for a log or for stdout."""
    lines = [[cell(h) for h in headers], *([cell(value) for value in row] for row in rows)]
    count = max(map(len, lines))
    lines = [line + [""] * (count - len(line)) for line in lines]
    widths = [max(width_of(line[i]) for line in lines) for i in range(count)]
    right = [is_numeric(line[i] for line in lines[1:]) for i in range(count)]
    text = ["  " + "  ".join(map(_pad, line, widths, right)).rstrip() for line in lines if any(line)]
    return "\n".join([sayable(title), *text] if title else text)


def narrow(headers: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """A table as lines for a screen that it is too wide for: turned on its side where that fits, else a block for each row.

    Text is broken at spaces, values never; one that is longer than the screen runs over its edge.
    """
    if not any(headers):
        return [line for row in rows for line in _hanging(row[0], "  ".join(row[1:]), max(len(r[0]) for r in rows), width)]
    count = max(map(len, [headers, *rows]))
    full = [[*row, *[""] * (count - len(row))] for row in (list(headers), *map(list, rows))]
    first = max(map(width_of, full[0]))
    room = (width - 2 - first) // max(len(rows), 1) - 2
    if max((width_of(word) for row in full[1:] for value in row for word in value.split()), default=0) <= room:
        columns = [
            [textwrap.wrap(value, room, break_long_words=False, break_on_hyphens=False) or [""] for value in row] for row in full[1:]
        ]
        widths = [max(width_of(part) for parts in column for part in parts) for column in columns]
        right = [is_numeric(row[i] for row in full[1:]) for i in range(count)]
        lines = []
        for i, header in enumerate(full[0]):
            for n in range(max((len(column[i]) for column in columns), default=1)):
                parts = [column[i][n] if n < len(column[i]) else "" for column in columns]
                told = map(_pad, parts, widths, [right[i]] * len(parts))
                lines.append(("  " + "  ".join([_pad(header if not n else "", first, False), *told])).rstrip())
        return lines
    lines = []
    for number, row in enumerate(full[1:]):
        lines += [""] * bool(number)
        lines += [line for header, value in zip(full[0], row, strict=True) for line in _hanging(header, value, first, width)]
    return lines


def wrapped(text: str, width: int) -> list[str]:
    """Lines broken at spaces; a word that is longer than the screen, such as a path, stays whole."""
    found = []
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip(" ")))
        broken = textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        found += broken if width_of(line) > width else [line]
    return found


def _hanging(name: str, text: str, indent: int, width: int) -> list[str]:
    """A name and its text, broken at spaces, each further line under the first."""
    room = max(width - indent - 4, 20)
    parts = wrapped(text, room)
    return [("  " + _pad(name if not n else "", indent, False) + "  " + part).rstrip() for n, part in enumerate(parts)]


def too_narrow(headers: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> bool:
    """Whether a drawn table would be hard to read: it has no header or few rows, or words that do not fit."""
    if not any(headers) or len(rows) <= FEW_ROWS:
        return True
    columns = zip_longest(headers, *rows, fillvalue="")
    return sum(max(map(width_of, " ".join(column).split()), default=0) + 2 for column in columns) > width


def cell(value: object) -> str:
    """A table cell on one line: floats with four digits, counts with thousands marks, nothing as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return " ".join(sayable(value).split())


def duration(seconds: float) -> str:
    """``0:07``, ``12:30``, ``1:02:03``."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def width_of(text: str) -> int:
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _pad(text: str, width: int, right: bool) -> str:
    space = " " * (width - width_of(text))
    return space + text if right else text + space


def is_numeric(cells: Iterator[str]) -> bool:
    seen = [c for c in cells if c not in ("", "-")]
    return bool(seen) and all(c[0].isdigit() or c[0] in "+-.≥<>±" and len(c) > 1 for c in seen)
