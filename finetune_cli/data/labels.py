"""Texts, labels and targets out of rows: one rule for how a cell becomes a label, and every odd cell named with its line.

A label is a string, always: ``true`` for a boolean, ``3`` for 3 and 3.0, text as it stands without surrounding space. Cells that are equal
share one list object, so that a million of them cost a million references.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from finetune_cli.config.schema import DataConfig
from finetune_cli.data.roles import Roles
from finetune_cli.data.rows import NAMED, Rows, kind, listed
from finetune_cli.errors import UserError

LARGEST = 1e36
"""Size of a target up to which a model's float32 holds it, its deviation and what the last layer makes of them."""
NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")


def texts(rows: Rows, column: str) -> list[str]:
    """The texts of a column; a cell that is not text is an error with its line and type."""
    cells = rows.column(column)
    if pa.types.is_struct(cells.type):
        inner = [cells.type.field(i).name for i in range(cells.type.num_fields)]
        raise UserError(
            f"{column!r} is an object with {listed(map(repr, inner))}, not a text",
            where=rows.where(0),
            fix=f"data.text={column}.{inner[0]}" if inner else "data.text=COLUMN",
        )
    text = pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)
    if cells.null_count or not text:
        nulls = np.asarray(cells.is_null())
        bad = np.flatnonzero(nulls) if text else np.flatnonzero(~nulls)[:1]
        if len(bad) or nulls.any():
            at = int(bad[0]) if len(bad) else 0
            what = "null" if text or not len(bad) else f"{kind(cells.type)} ({cells[at].as_py()!r})"
            more = f", likewise {rows.named(bad[1:])}" if len(bad) > 1 else ""
            raise UserError(f"{column!r} is {what}, not a text{more}", where=rows.where(at), fix="write it as text, or drop the row")
    return list(cells.to_pylist())


def text_of(rows: Rows, roles: Roles, i: int) -> str:
    """The text of one row, both parts of a pair."""
    row = rows.slice(i, 1)
    first = texts(row, roles.text)[0]
    return f"{first} ‖ {texts(row, roles.text_pair)[0]}" if roles.text_pair else first


def canonical(value: Any) -> str:
    """A cell as a label."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _is_list(of: pa.DataType) -> bool:
    return bool(pa.types.is_list(of) or pa.types.is_large_list(of) or pa.types.is_fixed_size_list(of))


def is_text(of: pa.DataType) -> bool:
    """Whether a column holds text."""
    return bool(pa.types.is_string(of) or pa.types.is_large_string(of))


def missing(rows: Rows, roles: Roles, config: DataConfig) -> np.ndarray:
    """[N] bool: rows without a label. An empty list, or an empty cell that ``data.label_delimiter`` splits, says that there are none."""
    found = np.zeros(len(rows), bool)
    for name in roles.labels:
        cells = rows.column(name)
        found |= np.asarray(cells.is_null(nan_is_null=True))
        if is_text(cells.type) and not (config.label_delimiter and len(roles.labels) == 1):
            empty = pc.equal(pc.utf8_trim_whitespace(cells), "")
            found |= np.asarray(pc.fill_null(empty, False))
    return found


def has_several_labels(rows: Rows, roles: Roles, config: DataConfig) -> bool:
    """Whether a row may have any number of labels: lists, delimited cells, or several columns of 0 and 1."""
    if len(roles.labels) > 1:
        values = {canonical(value).lower() for name in roles.labels for value in pc.unique(rows.column(name)).to_pylist()}
        return values <= set(ZERO_ONE)
    of = rows.column(roles.labels[0]).type
    return _is_list(of) or (bool(config.label_delimiter) and is_text(of))


def label_cells(rows: Rows, roles: Roles, config: DataConfig) -> list[list[str]]:
    """The labels of each row: one; several for a list, a delimited cell or 0/1 columns; [] for none. Shared, not to be changed."""
    if len(roles.labels) > 1:
        return _from_columns(rows, roles)
    cells = rows.column(roles.labels[0])
    if pa.types.is_struct(cells.type) or pa.types.is_map(cells.type):
        raise UserError(f"{roles.labels[0]!r} is an object, not a label", where=rows.where(0), fix="data.label=COLUMN or COLUMN.KEY")
    if _is_list(cells.type):
        return _from_lists(rows, cells, roles.labels[0])
    encoded = pc.dictionary_encode(cells).unify_dictionaries()
    if isinstance(encoded, pa.ChunkedArray):
        chunks = encoded.chunks
    else:
        chunks = [encoded]
    none: list[str] = []
    made: list[list[str]] = []
    for chunk in chunks:
        split = [_split(value, config.label_delimiter) for value in chunk.dictionary.to_pylist()]
        made.extend(none if i is None else split[i] for i in chunk.indices.to_pylist())
    return made


def _split(value: Any, delimiter: str | None) -> list[str]:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if delimiter and isinstance(value, str):
        return list(dict.fromkeys(part.strip() for part in value.split(delimiter) if part.strip()))
    label = canonical(value)
    return [label] if label else []


def _from_lists(rows: Rows, cells: pa.ChunkedArray, name: str) -> list[list[str]]:
    shared: dict[tuple[Any, ...], list[str]] = {}
    made = []
    for at, cell in enumerate(cells.to_pylist()):
        key = tuple(cell) if cell is not None and not any(isinstance(v, (list, dict)) for v in cell) else ()
        if cell and (not key or any(value is None or value == "" for value in key)):
            raise UserError(
                f"{name!r} holds {cell!r}; expected a list of labels", where=rows.where(at), fix='for example ["price", "quality"] or []'
            )
        if key not in shared:
            shared[key] = list(dict.fromkeys(canonical(value) for value in key))
        made.append(shared[key])
    return made


ZERO_ONE = {"0": False, "1": True, "false": False, "true": True}


def _from_columns(rows: Rows, roles: Roles) -> list[list[str]]:
    marks = np.zeros((len(rows), len(roles.labels)), bool)
    for j, name in enumerate(roles.labels):
        cells = _scalars(rows.column(name))
        allowed = [ZERO_ONE.get(canonical(value).lower()) if value is not None else None for value in cells.dictionary.to_pylist()]
        values = [None if i is None else allowed[i] for i in cells.indices.to_pylist()]
        bad = [at for at, value in enumerate(values) if value is None]
        if bad:
            found = rows.column(name)[bad[0]].as_py()
            raise UserError(
                f"{name!r} is {found!r}; expected 0 or 1 in each of several label columns",
                where=rows.named(bad),
                fix="mend the cells, name one column in data.label, or task=multi-task-classification",
            )
        marks[:, j] = values
    shared: dict[bytes, list[str]] = {}
    for row in np.unique(marks, axis=0):
        shared[row.tobytes()] = [name for name, mark in zip(roles.labels, row, strict=True) if mark]
    return [shared[row.tobytes()] for row in marks]


def _scalars(cells: pa.ChunkedArray) -> Any:
    return cells.combine_chunks().dictionary_encode()


def targets(rows: Rows, roles: Roles) -> np.ndarray:
    """[N, T] float64: the numbers of the label columns; text that is no plain finite number, or too large, is an error with its line."""
    found = [_numbers(rows, name) for name in roles.labels]
    for name, values in zip(roles.labels, found, strict=True):
        if len(bad := np.flatnonzero(np.abs(values) > LARGEST)):
            raise UserError(
                f"{name!r} is {values[bad[0]]:g}; a target lies between -{LARGEST:g} and {LARGEST:g}, for float32's sake",
                where=rows.named(bad),
                fix="mend the number, or write the column in a larger unit",
            )
    return np.stack(found, axis=1)


def _numbers(rows: Rows, name: str) -> np.ndarray:
    cells = rows.column(name)
    if pa.types.is_integer(cells.type) or pa.types.is_floating(cells.type) or pa.types.is_decimal(cells.type):
        values = np.asarray(cells.cast(pa.float64()).fill_null(math.nan), dtype=np.float64)
        if not np.isfinite(values).all():
            raise _no_number(rows, name, np.flatnonzero(~np.isfinite(values)))
        return values
    if not is_text(cells.type):
        raise UserError(f"{name!r} is {kind(cells.type)}, not a number", where=rows.where(0), fix="data.label=COLUMN with numbers")
    matched = np.asarray(pc.fill_null(pc.match_substring_regex(cells, "^" + NUMBER.pattern + "$"), False))
    if not matched.all():
        raise _no_number(rows, name, np.flatnonzero(~matched))
    plain = pc.utf8_ltrim(pc.utf8_trim_whitespace(cells), "+")
    values = np.asarray(plain.cast(pa.float64()), dtype=np.float64)
    if not np.isfinite(values).all():
        raise _no_number(rows, name, np.flatnonzero(~np.isfinite(values)))
    return values


def _no_number(rows: Rows, name: str, bad: np.ndarray) -> UserError:
    cells = [rows.column(name)[int(i)].as_py() for i in bad[:NAMED]]
    first = cells[0]
    comma = isinstance(first, str) and re.fullmatch(r"\s*[+-]?\d+,\d+\s*", first)
    fix = "write a decimal point, not a comma" if comma else "write a finite number, or data.missing_labels=drop for empty cells"
    found = ", ".join(dict.fromkeys(repr(cell) for cell in cells))
    return UserError(f"{name!r} is {found}; expected a finite number", where=rows.named(bad), fix=fix)


def names_in(value: Any) -> list[str]:
    """``data.label_names``: a list, or a file with one name a line."""
    if isinstance(value, (list, tuple)):
        names, where = [str(name).strip() for name in value], "data.label_names"
    else:
        from finetune_cli.data.encoding import Text, open_bytes
        from finetune_cli.data.sources import File, resolve

        place = resolve(value, key="data.label_names")[0]
        if not isinstance(place, File):
            raise UserError(f"no such file: {value}", where="data.label_names", fix="a list or a file with one name a line")
        lines = Text(open_bytes(place.path, place.name), place.name).lines()
        names, where = [line.strip() for line in lines], place.name
        while names and not names[-1]:
            names.pop()
    if not names or not all(names) or len(set(names)) < len(names):
        raise UserError(
            f"{where} does not give one different name a label: {listed(map(repr, names))}", where=where, fix="one name a line, none twice"
        )
    return names


def label_names(config: DataConfig, found: Sequence[str]) -> dict[str, str]:
    """Number to name by ``data.label_names``, for the labels ``found``; numbers count from 0, or from 1 where no 0 occurs.

    Empty where no names are given, or where the labels are those names already.
    """
    if config.label_names is None:
        return {}
    names = names_in(config.label_names)
    if set(found) <= set(names):
        return {}
    odd = [label for label in found if not re.fullmatch(r"\d+", label)]
    if odd:
        raise UserError(
            f"data.label_names names numbered labels, but there are labels such as {listed(map(repr, odd))}",
            where="data.label_names",
            fix="drop data.label_names, or give the names that occur",
        )
    base = 0 if "0" in found else 1
    numbers = {str(i + base): name for i, name in enumerate(names)}
    beyond = sorted(set(found) - set(numbers))
    if beyond:
        raise UserError(
            f"label {listed(map(repr, beyond))} has no name: {len(names)} names count from {base}",
            where="data.label_names",
            fix=f"give {max(map(int, found)) - base + 1} names",
        )
    return numbers
