"""Plain text: one text a line, or one labelled text a line by a declared pattern.

Every line is a row, a blank one too, so that the rows of a prediction are the lines of its input. Under a pattern, blank lines hold nothing
and are skipped and counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from finetune_cli.config.schema import DataConfig
from finetune_cli.data.encoding import LONGEST_CELL, Text
from finetune_cli.data.rows import BATCH, BYTES, Rows, count, of_table
from finetune_cli.errors import UserError


def text_column(config: DataConfig) -> str:
    """What the one column of a text file is called: as the config calls the text."""
    return config.text if isinstance(config.text, str) else "text"


def read_text(text: Text, config: DataConfig) -> Iterator[Rows]:
    """One row a line, in chunks."""
    if text.empty and not text.pipe:
        raise UserError(f"{text.name} is empty (0 bytes)", where=text.name, fix="check how the file was written")
    name, row = text_column(config), 1
    cells: list[str] = []
    limit = BYTES
    for line in text.lines():
        cells.append(line.rstrip("\r\n"))
        if len(line) > LONGEST_CELL:
            raise _too_long(text, row + len(cells) - 1)
        if len(cells) >= BATCH or text.characters > limit or (text.pipe and not text.ready()):
            yield of_table(pa.table([pa.array(cells, pa.string())], names=[name]), text.name, np.arange(row, row + len(cells)), row)
            row, limit, cells = row + len(cells), text.characters + BYTES, []
    if cells:
        yield of_table(pa.table([pa.array(cells, pa.string())], names=[name]), text.name, np.arange(row, row + len(cells)), row)


def read_pattern(text: Text, config: DataConfig, notes: list[str]) -> Iterator[Rows]:
    """Lines of the form ``data.pattern``, one column per name in it."""
    assert config.pattern is not None
    names, form = compiled(config.pattern)
    if text.empty and not text.pipe:
        raise UserError(f"{text.name} is empty (0 bytes)", where=text.name, fix="check how the file was written")
    rows: list[tuple[str, ...]] = []
    lines: list[int] = []
    row, blank, limit = 1, 0, BYTES
    for number, line in enumerate(text.lines(), 1):
        content = line.rstrip("\r\n")
        if not content.strip():
            blank += 1
            continue
        if len(line) > LONGEST_CELL:
            raise _too_long(text, number)
        match = form.fullmatch(content)
        if match is None:
            raise UserError(
                f"the line {content[:60]!r} is not of the form {config.pattern!r}",
                where=f"{text.name}:{number}, row {row + len(rows)}",
                fix="mend the line, change data.pattern, or data.pattern=null for one text a line",
            )
        rows.append(match.groups())
        lines.append(number)
        if len(rows) >= BATCH or text.characters > limit or (text.pipe and not text.ready()):
            yield _chunk(names, rows, lines, text.name, row)
            row, limit, rows, lines = row + len(rows), text.characters + BYTES, [], []
    if rows:
        yield _chunk(names, rows, lines, text.name, row)
    if blank:
        notes.append(f"{text.name}: {count(blank, 'blank line')} skipped")


def _chunk(names: list[str], rows: list[tuple[str, ...]], lines: list[int], name: str, first_row: int) -> Rows:
    columns = [pa.array(column, pa.string()) for column in zip(*rows, strict=True)]
    return of_table(pa.table(columns, names=names), name, np.array(lines), first_row)


def compiled(pattern: str) -> tuple[list[str], re.Pattern[str]]:
    """Names in a pattern, and the pattern as an expression: ``{text}`` takes as much as it can, every other name as little."""
    parts = re.split(r"\{(\w+)\}", pattern)
    names = parts[1::2]
    if not names or len(set(names)) < len(names) or "{" in "".join(parts[0::2]):
        raise UserError(
            f"data.pattern is {pattern!r}; it needs different names in braces", where="data.pattern", fix="data.pattern='{label} {text}'"
        )
    if any(not between for between in parts[2:-1:2]):
        raise UserError(
            f"data.pattern {pattern!r} has nothing between two names", where="data.pattern", fix="data.pattern='{label} {text}'"
        )
    forms = [re.escape(part) if i % 2 == 0 else ("(.*)" if part.startswith("text") else "(.+?)") for i, part in enumerate(parts)]
    return names, re.compile("".join(forms), re.DOTALL)


def _too_long(text: Text, line: int) -> UserError:
    return UserError(
        f"the line has more than {LONGEST_CELL:,} characters", where=f"{text.name}:{line}", fix="cut the text into shorter ones"
    )
