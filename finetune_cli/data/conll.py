"""CoNLL columns: one word a line with its columns, a blank line between sentences.

A row is a sentence; its cells are lists with an entry a word. Columns are parted by tabs where the first line has one, else by spaces and
tabs. A line of nothing but white space ends a sentence as an empty one does. A sentence of ``-DOCSTART-`` is no sentence: such lines are
skipped and counted, and so are comments: lines with ``#`` before a sentence that have another number of columns than the words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa

from finetune_cli.config.schema import DataConfig
from finetune_cli.data.encoding import LONGEST_CELL, Text
from finetune_cli.data.rows import BATCH, BYTES, Rows, count, of_table
from finetune_cli.errors import UserError

DOCUMENT = "-DOCSTART-"
SPACE = re.compile(r"[ \t]+")
TAG = re.compile(r"O|[BIESMLU](-\S+)?")
"""What the last column of a line looks like where names are marked."""


class _Sentences:
    """Sentences in the making: their words column by column, end to end."""

    def __init__(self, width: int) -> None:
        self.cells: list[list[str]] = [[] for _ in range(width)]
        self.ends: list[int] = [0]
        self.lines: list[int] = []

    def add(self, fields: list[str], line: int) -> None:
        if not self.open:
            self.lines.append(line)
        for column, field in zip(self.cells, fields, strict=True):
            column.append(field)

    @property
    def open(self) -> bool:
        """Whether the last sentence goes on."""
        return len(self.lines) == len(self.ends)

    def close(self) -> None:
        if self.open:
            self.ends.append(len(self.cells[0]))

    def rows(self, names: list[str], name: str, first_row: int) -> Rows:
        ends = pa.array(self.ends, pa.int32())
        columns = [pa.ListArray.from_arrays(ends, pa.array(column, pa.string())) for column in self.cells]
        rows = of_table(pa.table(columns, names=names), name, np.array(self.lines), first_row)
        return replace(rows, word_files=frozenset({name}))


def read_conll(text: Text, config: DataConfig, notes: list[str]) -> Iterator[Rows]:
    """One row a sentence, in chunks; of a pipe, the sentences that are whole."""
    if text.empty and not text.pipe:
        raise UserError(f"{text.name} is empty (0 bytes)", where=text.name, fix="check how the file was written")
    skipped = {"document line": 0, "comment": 0}
    delimiter: str | None = None
    names: list[str] = []
    found, row, limit = _Sentences(0), 1, BYTES
    for number, line in enumerate(text.lines(), 1):
        if not line.strip():
            found.close()
            if len(found.lines) >= BATCH or text.characters > limit or (text.pipe and found.lines and not text.ready()):
                yield found.rows(names, text.name, row)
                row, limit, found = row + len(found.lines), text.characters + BYTES, _Sentences(len(names))
            continue
        if len(line) > LONGEST_CELL:
            raise UserError(
                f"the line has more than {LONGEST_CELL:,} characters",
                where=f"{text.name}:{number}",
                fix="write one word with its tag a line",
            )
        if line.startswith(DOCUMENT):
            found.close()
            skipped["document line"] += 1
            continue
        if not names and not line.startswith("#"):
            delimiter = "\t" if "\t" in line.strip() else None
            names = _names(len(_fields(line, delimiter)), config, f"{text.name}:{number}")
            found = _Sentences(len(names))
        fields = _fields(line, delimiter)
        if line.startswith("#") and not found.open and len(fields) != len(names):
            skipped["comment"] += 1
            continue
        if len(fields) != len(names):
            raise _ragged(fields, names, f"{text.name}:{number}, row {row + len(found.lines) - found.open}", delimiter)
        found.add(fields, number)
    found.close()
    if found.lines:
        yield found.rows(names, text.name, row)
    elif row == 1 and not text.pipe:
        raise UserError(f"{text.name} holds no sentence", where=text.name, fix="write one word with its tag a line")
    notes += [f"{text.name}: {count(number, what)} skipped" for what, number in skipped.items() if number]


def _fields(line: str, delimiter: str | None) -> list[str]:
    """The columns of a line. Only spaces and tabs part them: an ideographic space may be a word."""
    if delimiter is not None:
        return [field.strip(" ") for field in line.rstrip("\r\n").split(delimiter)]
    content = line.strip(" \t\r\n")
    return SPACE.split(content) if "\t" in content or "  " in content else content.split(" ")


def _names(width: int, config: DataConfig, where: str) -> list[str]:
    """``data.columns``, of which a file without the last ones (the tags, say) has the first; else ``column1`` and so on."""
    if config.columns is None:
        return [f"column{i + 1}" for i in range(width)]
    if width > len(config.columns) or len(set(config.columns)) < len(config.columns):
        raise UserError(
            f"the line has {count(width, 'column')}, data.columns names {len(config.columns)}",
            where=where,
            fix="name every column once, in order: data.columns=[word,tag]",
        )
    return list(config.columns[:width])


def _ragged(fields: list[str], names: list[str], where: str, delimiter: str | None) -> UserError:
    parted = "tab" if delimiter else "space"
    return UserError(
        f"the line {' '.join(fields)[:60]!r} has {count(len(fields), 'column')}, the lines before have {len(names)}",
        where=where,
        fix=f"mend the line: one word and its {count(len(names) - 1, 'further column')}, parted by a {parted}",
    )


def looks_like_columns(head: str) -> bool:
    """Whether text is tagged words in columns: equally many fields on every line, a tag as the last, and blank lines between sentences."""
    lines = re.split(r"\r\n|\n|\r", head)[:1000]
    words = [line for line in lines[:-1] if line.strip() and not line.startswith((DOCUMENT, "# "))]
    if len(words) < 2 or all(line.strip() for line in lines[:-1]):
        return False
    delimiter = "\t" if "\t" in words[0].strip() else None
    rows = [_fields(line, delimiter) for line in words]
    tags = {fields[-1] for fields in rows}
    return len(rows[0]) > 1 and len({len(fields) for fields in rows}) == 1 and len(tags) > 1 and all(map(TAG.fullmatch, tags))
