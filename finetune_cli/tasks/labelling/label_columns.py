"""Several label columns as one: the labels of a row as ``column=label``, in a list that may lack some.

In this form rows are split, counted, audited and named in errors like those of any task whose rows have several labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune_cli.config.choices import RowPolicy
from finetune_cli.config.schema import DataConfig
from finetune_cli.errors import UserError

if TYPE_CHECKING:
    from finetune_cli.data import Roles, Rows

LABELS = "column=label"
"""Name of the column that is made."""


def in_one_column(rows: Rows, roles: Roles, data: DataConfig) -> tuple[Rows, list[str]]:
    """The rows with a list of ``column=label`` beside their columns, null where a row has no label at all, and notes on what lacks.

    Raises UserError for fewer than two columns, for cells that are no single label, and for a row that has some of its labels only
    (``data.missing_labels=drop`` leaves out what is missing, and keeps the rest of the row).
    """
    import dataclasses

    import pyarrow as pa

    _refuse_options(rows, roles, data)
    named = {column: _named(rows, column) for column in roles.labels}
    cells = [[name for name in row if name is not None] for row in zip(*named.values(), strict=True)]
    lacking = [i for i, cell in enumerate(cells) if 0 < len(cell) < len(named)]
    notes = []
    if lacking and data.missing_labels is RowPolicy.error:
        first = next(column for column, names in named.items() if names[lacking[0]] is None)
        raise UserError(
            f"{len(lacking):,} row{'s' * (len(lacking) > 1)} with a label in some columns only (the first lacks {first!r})",
            where=rows.named(lacking),
            fix="complete the rows, or data.missing_labels=drop: the other columns of such a row are still learnt and scored",
        )
    if lacking:
        missing = {column: sum(names[i] is None for i in lacking) for column, names in named.items()}
        told = ", ".join(f"{number:,} in {column!r}" for column, number in missing.items() if number)
        notes.append(f"{rows.files[0]}: labels that are missing are left out, the other columns of the row are kept: {told}")
    made = pa.array([cell or None for cell in cells], pa.list_(pa.string()))
    table = rows.table.drop_columns([LABELS]) if LABELS in rows.table.column_names else rows.table
    return dataclasses.replace(rows, table=table.append_column(LABELS, made)), notes


def split_name(name: str) -> tuple[str, str]:
    """(column, label) of ``column=label``; a column has no ``=`` in its name."""
    column, _, label = name.partition("=")
    return column, label


def _refuse_options(rows: Rows, roles: Roles, data: DataConfig) -> None:
    if len(roles.labels) < 2:
        raise UserError(
            f"several label columns are needed, and there is one: {roles.labels[0]!r}",
            where=f"{rows.files[0]}, data.label",
            fix="data.label=[FIRST,SECOND], or task=text-classification for one",
        )
    for key, value in (("data.label_names", data.label_names), ("data.label_delimiter", data.label_delimiter)):
        if value is not None:
            raise UserError(f"{key} serves one label column, and there are {len(roles.labels)}", where=key, fix="leave it out")
    if odd := [column for column in roles.labels if "=" in column]:
        raise UserError(
            f"the label column {odd[0]!r} has '=' in its name, which parts column and label in the model",
            where=f"{rows.files[0]}, data.label",
            fix="rename the column",
        )


def _named(rows: Rows, column: str) -> list[str | None]:
    """``column=label`` of each row, None for an empty cell; cells that are equal share one text."""
    import math

    import pyarrow.compute as pc

    from finetune_cli.data import canonical

    cells = rows.column(column)
    if not rows.table.num_rows:
        return []
    first = next((value for value in (cell.as_py() for cell in cells) if value is not None), None)
    if isinstance(first, (list, dict, tuple)):
        at = next(i for i, cell in enumerate(cells) if cell.as_py() is not None)
        raise UserError(
            f"column {column!r} holds {first!r}, not one label", where=rows.where(at), fix="name columns with one label a row in data.label"
        )
    encoded = pc.dictionary_encode(cells.combine_chunks())
    names = [
        None
        if value is None or (isinstance(value, float) and math.isnan(value)) or not canonical(value)
        else f"{column}={canonical(value)}"
        for value in encoded.dictionary.to_pylist()
    ]
    return [None if i is None else names[i] for i in encoded.indices.to_pylist()]
