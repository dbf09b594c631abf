"""Rows: a table in Arrow memory, with the place in a file that every row came from.

A row is never a Python object until somebody looks at it, and every row can say where it stands: the physical line for a text editor,
the data row for a spreadsheet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from finetune_cli.errors import UserError

CHUNK = 65_536
"""Rows handed on at a time."""
BATCH = 4_096
"""Rows that are Python objects at a time while they are read; measured: 1.4 times as fast as 65,536, for the garbage collector's sake."""
BYTES = 32 << 20
"""Characters of text after which a batch ends, however few rows it has."""
NAMED = 5
"""Rows that a message names at most."""


def listed(items: Iterable[str], total: int | None = None) -> str:
    """At most five items, then how many more there are."""
    shown = list(items)
    total = len(shown) if total is None else total
    shown = shown[:NAMED]
    rest = f"; and {total - len(shown):,} more" if total > len(shown) else ""
    return "; ".join(shown) + rest


def count(number: int, noun: str) -> str:
    """``1 row``, ``2 rows``."""
    plural = noun if number == 1 else noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{number:,} {plural}"


class Caution(str):
    """A note that is worth a warning."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A table, and for each row the index of its file, its physical line (0 where a format has none) and its data row there (from 1)."""

    table: pa.Table
    files: tuple[str, ...]
    file_of: np.ndarray
    line_of: np.ndarray
    row_of: np.ndarray
    word_files: frozenset[str] = frozenset()
    """Names of the files that have one word a line: word ``i`` of a row stands ``i`` lines below its first."""

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def columns(self) -> list[str]:
        """Column names in file order."""
        return [str(name) for name in self.table.column_names]

    def take(self, indices: Any) -> Rows:
        """The rows at ``indices``, in that order."""
        at = np.asarray(indices, dtype=np.int64)
        if len(at) and (np.diff(at) > 0).all():
            table = _take_ascending(self.table, at)
        else:
            columns = [_take(column, at) for column in self.table.columns]
            table = pa.table(columns, names=self.table.column_names)
        return replace(self, table=table, file_of=self.file_of[at], line_of=self.line_of[at], row_of=self.row_of[at])

    def slice(self, start: int, length: int) -> Rows:
        """``length`` rows from ``start``, without a copy."""
        end = start + length
        table = self.table.slice(start, length)
        return replace(self, table=table, file_of=self.file_of[start:end], line_of=self.line_of[start:end], row_of=self.row_of[start:end])

    def chunks(self, size: int = CHUNK) -> Iterator[Rows]:
        """The rows in order, ``size`` at a time, without a copy."""
        for start in range(0, len(self), size):
            yield self.slice(start, min(size, len(self) - start))

    def has(self, column: str) -> bool:
        """Whether ``column`` is there; ``doc.body`` is field ``body`` of the objects in column ``doc``."""
        return self._find(column) is not None

    def column(self, name: str) -> pa.ChunkedArray:
        """One column, or a field of a column of objects."""
        found = self._find(name)
        if found is None:
            raise KeyError(name)
        return found

    def _find(self, name: str) -> pa.ChunkedArray | None:
        if name in self.table.column_names:
            return self.table.column(name)
        head, _, rest = name.partition(".")
        if not rest or head not in self.table.column_names:
            return None
        column = self.table.column(head)
        for part in rest.split("."):
            if not pa.types.is_struct(column.type) or column.type.get_field_index(part) < 0:
                return None
            column = pc.struct_field(column, part)
        return column

    def place(self, index: int) -> str:
        """``train.csv:17``; the file's name alone where the format has no lines."""
        line = int(self.line_of[index])
        name = self.files[int(self.file_of[index])]
        return f"{name}:{line}" if line else f"{name} row {int(self.row_of[index])}"

    def where(self, index: int, word: int | None = None) -> str:
        """``train.csv:17, row 16``; of a word, counted from 0, ``train.conll:23, row 3, word 7``, on its own line where it has one."""
        name, line, row = self.files[int(self.file_of[index])], int(self.line_of[index]), int(self.row_of[index])
        told = f"row {row}" if word is None else f"row {row}, word {word + 1}"
        if word is not None and name in self.word_files:
            line += word
        return f"{name}:{line}, {told}" if line else f"{name}, {told}"

    def named(self, indices: Sequence[int] | np.ndarray) -> str:
        """Where the first five of ``indices`` stand, and how many more there are."""
        return listed([self.where(int(i)) for i in indices[:NAMED]], len(indices))


def _take_ascending(table: pa.Table, at: np.ndarray) -> pa.Table:
    """Rows in file order, chunk by chunk, so that nothing but the result is copied."""
    batches, start = [], 0
    for batch in table.to_batches():
        end = start + batch.num_rows
        low, high = np.searchsorted(at, (start, end))
        if high > low:
            batches.append(batch.take(pa.array(at[low:high] - start)))
        start = end
    return pa.Table.from_batches(batches, schema=table.schema)


def _take(column: pa.ChunkedArray, at: np.ndarray) -> pa.ChunkedArray:
    """Rows of one column; text beyond 2 GiB gets 64-bit offsets, which one Arrow array needs."""
    if pa.types.is_string(column.type) and column.nbytes > 2_000_000_000:
        column = column.cast(pa.large_string())
    return column.take(pa.array(at))


def of_table(table: pa.Table, name: str, lines: Any = None, first_row: int = 1) -> Rows:
    """Rows of one file; ``lines`` are the physical lines, none for formats without."""
    n = table.num_rows
    line_of = np.zeros(n, np.int64) if lines is None else np.asarray(lines, dtype=np.int64)
    return Rows(table, (name,), np.zeros(n, np.int32), line_of, np.arange(first_row, first_row + n, dtype=np.int64))


def concat(parts: Sequence[Rows]) -> Rows:
    """All parts as one; a column that has different types in two places is an error that names both."""
    if len(parts) == 1:
        return parts[0]
    table = _joined(parts)
    names: dict[str, int] = {}
    file_of = []
    for part in parts:
        index = np.array([names.setdefault(name, len(names)) for name in part.files], dtype=np.int32)
        file_of.append(index[part.file_of] if len(part.files) > 1 else np.full(len(part), index[0], np.int32))
    return Rows(
        table,
        tuple(names),
        np.concatenate(file_of),
        np.concatenate([part.line_of for part in parts]),
        np.concatenate([part.row_of for part in parts]),
        frozenset().union(*(part.word_files for part in parts)),
    )


def packed(rows: Rows) -> Rows:
    """The same rows in one piece of exactly their size: Arrow's builders leave up to as much again unused behind every small batch."""
    return replace(rows, table=rows.table.combine_chunks())


def _joined(parts: Sequence[Rows]) -> pa.Table:
    try:
        return pa.concat_tables([part.table for part in parts], promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise _type_clash(parts, str(error)) from None


def _type_clash(parts: Sequence[Rows], cause: str) -> UserError:
    """The first column whose type in one part cannot be joined with its type before."""
    seen: dict[str, tuple[pa.DataType, Rows]] = {}
    for part in parts:
        for column in part.table.schema:
            before = seen.get(column.name)
            if before is None or pa.types.is_null(before[0]):
                seen[column.name] = (column.type, part)
                continue
            try:
                pa.unify_schemas([pa.schema([(column.name, before[0])]), pa.schema([column])], promote_options="permissive")
            except (pa.ArrowTypeError, pa.ArrowInvalid):
                values = part.table.column(column.name)
                first = int(np.argmax(np.asarray(pc.is_valid(values))))
                found, wanted = kind(column.type), kind(before[0])
                return UserError(
                    f"column {column.name!r} holds {found} here, but {wanted} in {before[1].where(0).partition(',')[0]}",
                    where=part.where(first),
                    fix="write the column with one type everywhere",
                )
    return UserError(f"the files do not fit together: {cause}", where=parts[0].files[0])


KINDS: tuple[tuple[str, Callable[[pa.DataType], bool]], ...] = (
    ("null", pa.types.is_null),
    ("text", lambda t: pa.types.is_string(t) or pa.types.is_large_string(t)),
    ("true/false", pa.types.is_boolean),
    ("a whole number", pa.types.is_integer),
    ("a number", pa.types.is_floating),
    ("a number", pa.types.is_decimal),
    ("a list", lambda t: pa.types.is_list(t) or pa.types.is_large_list(t) or pa.types.is_fixed_size_list(t)),
    ("an object", pa.types.is_struct),
)


def kind(of: pa.DataType) -> str:
    """An Arrow type in plain words."""
    return next((name for name, test in KINDS if test(of)), str(of))
