"""References: the texts that a generated text is compared with, one or several a row, kept in Arrow memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from finetune_cli.data.rows import Rows, kind
from finetune_cli.errors import UserError

_LIST = pa.list_(pa.string())


class References:
    """The references of some rows; a row's are made Python objects only when it is looked at.

    Indexed by a number it gives the row's texts, by an array the references of those rows.
    """

    def __init__(self, cells: pa.ChunkedArray, at: np.ndarray | None = None) -> None:
        self.cells = cells
        self.at = np.arange(len(cells)) if at is None else at

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, (int, np.integer)):
            return self.cells[int(self.at[index])].as_py() or []
        return References(self.cells, self.at[index])

    def __iter__(self) -> Iterator[list[str]]:
        for i in range(len(self)):
            yield self[i]


def gather_references(rows: Rows, columns: Sequence[str]) -> pa.ChunkedArray:
    """Lists of texts: those of every column that are not blank; null for a row that has none. A cell may be a text or a list of texts."""
    chunks = []
    for chunk in rows.chunks():
        cells = [_texts(chunk, name) for name in columns]
        chunks.append(pa.array([[text for part in parts for text in part] or None for parts in zip(*cells, strict=True)], _LIST))
    return pa.chunked_array(chunks, _LIST)


def _texts(rows: Rows, name: str) -> list[list[str]]:
    """The texts of each cell of a column; other types are errors with their line."""
    found = []
    for i, cell in enumerate(rows.column(name).to_pylist()):
        several = cell if isinstance(cell, list) else [] if cell is None else [cell]
        odd = next((value for value in several if not isinstance(value, str)), "")
        if odd != "":
            what = kind(pa.scalar(odd).type) if odd is not None else "null"
            raise UserError(
                f"{name!r} holds {what} ({odd!r}); expected a text or a list of texts",
                where=rows.where(i),
                fix=f"write it as text, or data.label={name}.KEY for a text inside of it" if isinstance(odd, dict) else "write it as text",
            )
        found.append([text for text in several if text.strip()])
    return found
