"""The columns that rows are split by besides the label: groups that stay together, and times."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from finetune_cli.data.rows import Rows, count, listed
from finetune_cli.errors import UserError


def group_codes(rows: Rows, column: str) -> np.ndarray:
    """Groups as codes from 0 in order of first occurrence; a row without a group is a group of its own."""
    encoded = rows.column(column).combine_chunks().dictionary_encode()
    values = encoded.dictionary.to_pylist()
    codes = np.asarray(encoded.indices.fill_null(-1), dtype=np.int64)
    alone = codes < 0
    if "" in values:
        alone |= codes == values.index("")
    codes = codes.copy()
    codes[alone] = len(values) + np.arange(int(alone.sum()))
    return np.unique(codes, return_inverse=True)[1].astype(np.int64)


def times(rows: Rows, column: str) -> np.ndarray:
    """[N] float64: seconds or whatever number the column holds; text must be ISO 8601 or all numbers."""
    cells = rows.column(column)
    if pa.types.is_timestamp(cells.type) or pa.types.is_date(cells.type):
        cells = cells.cast(pa.timestamp("us")).cast(pa.int64())
    bad = np.flatnonzero(np.asarray(cells.is_null()))
    if len(bad):
        raise UserError(f"{column!r} is empty; rows are split by it", where=rows.named(bad), fix="complete the rows, or data.time=null")
    if pa.types.is_integer(cells.type) or pa.types.is_floating(cells.type):
        return np.asarray(cells, dtype=np.float64)
    try:
        return np.asarray(cells.cast(pa.float64()), dtype=np.float64)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return np.array([_seconds(rows, column, i, value) for i, value in enumerate(cells.to_pylist())])


def _seconds(rows: Rows, column: str, at: int, value: Any) -> float:
    from datetime import UTC, datetime

    try:
        moment = datetime.fromisoformat(str(value).strip())
    except ValueError:
        raise UserError(
            f"{column!r} is {value!r}; expected a date such as 2024-05-31", where=rows.where(at), fix="write dates as ISO 8601"
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def shared_groups(rows: dict[str, Rows], column: str) -> list[str]:
    """Notes on groups that stand in train and in another split, as given files may have it."""
    if not rows["train"].has(column):
        return []
    own = pc.unique(rows["train"].column(column))
    notes = []
    for name, part in rows.items():
        if name == "train" or not part.has(column):
            continue
        theirs = pc.unique(part.column(column))
        shared = theirs.filter(pc.is_in(theirs.cast(own.type), value_set=own))
        if len(shared):
            notes.append(
                f"{name}: {count(len(shared), 'group')} of {column!r} also stand in train: {listed([repr(v) for v in shared.to_pylist()])}"
            )
    return notes
