"""Running text: the lines of a file joined to passages, their line ends a part of the text, so that a split takes whole passages."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from finetune_cli.config.choices import DataFormat
from finetune_cli.config.schema import DataConfig
from finetune_cli.data.labels import texts
from finetune_cli.data.roles import Roles
from finetune_cli.data.rows import CHUNK, Rows, count
from finetune_cli.data.sources import SUFFIXES, suffix_of

PASSAGE = "passage"
"""Our column."""
CHARACTERS = 4000
"""A passage ends at the first blank line after so many characters, or at twice as many."""


def from_text_files(rows: Rows, data: DataConfig) -> bool:
    """Whether every row is a line of a plain text file."""
    return len(rows.columns) == 1 and all(
        SUFFIXES.get(suffix_of(name), data.format) is DataFormat.text and data.pattern is None for name in rows.files
    )


def joined(rows: Rows, column: str) -> tuple[Rows, Roles, list[str]]:
    """Passages of consecutive rows of one file; each stands where its first line does."""
    passages: list[str] = []
    firsts: list[int] = []
    lines: list[str] = []
    size, start = 0, 0

    def close(end: int) -> None:
        nonlocal size, start
        if lines:
            passages.append("".join(lines))
            firsts.append(start)
            lines.clear()
        size, start = 0, end

    for chunk_start in range(0, len(rows), CHUNK):
        for i, line in enumerate(texts(rows.slice(chunk_start, min(CHUNK, len(rows) - chunk_start)), column), chunk_start):
            if i and (rows.file_of[i] != rows.file_of[i - 1] or rows.row_of[i] != rows.row_of[i - 1] + 1):
                close(i)
            lines.append(line + "\n")
            size += len(line) + 1
            if size >= 2 * CHARACTERS or size >= CHARACTERS and not line.strip():
                close(i + 1)
    close(len(rows))
    at = np.array(firsts, np.int64)
    table = pa.table({PASSAGE: pa.chunked_array([pa.array(passages, pa.large_string())])})
    made = Rows(table, rows.files, rows.file_of[at], rows.line_of[at], rows.row_of[at])
    told = f"running text: {count(len(rows), 'line')} joined to {count(len(made), 'passage')} (task.lines=documents: every line by itself)"
    return made, Roles(PASSAGE, None, (), {"text": column, "text_pair": None, "label": None}), [told]


def goes_on(rows: Rows) -> np.ndarray:
    """[N] bool: whether a passage begins in the very line where the one before it ended."""
    if not len(rows):
        return np.zeros(0, bool)
    ends = rows.row_of + np.array([text.count("\n") for text in texts(rows, PASSAGE)])
    found = np.zeros(len(rows), bool)
    found[1:] = (rows.file_of[1:] == rows.file_of[:-1]) & (rows.row_of[1:] == ends[:-1])
    return found
