"""Datasets of the Hugging Face hub, through ``datasets`` where it is installed; the only reader that may use the network."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from finetune_cli.data.columnar import plain_types
from finetune_cli.data.rows import Rows, of_table
from finetune_cli.data.sources import Hub
from finetune_cli.errors import UserError


def read_hub(place: Hub, *, offline: bool, say: Callable[[str], None] | None = None) -> Rows:
    """One split of a hub dataset; numbered classes come by their names."""
    if offline or os.environ.get("HF_HUB_OFFLINE") == "1":
        raise UserError(
            f"{place.id!r} is no file here, and a hub dataset needs the network",
            where=place.name,
            fix="offline=false, or give the path of a file",
        )
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{place.id!r} is no file here; hub datasets need the package datasets",
            where=place.name,
            fix="pip install datasets, or give the path of a file",
        ) from None
    if say is not None:
        say(f"fetching dataset {place.id!r}, split {place.split!r}, from the Hugging Face hub")
    try:
        made = datasets.load_dataset(place.id, place.config, split=place.split)
    except Exception as error:  # noqa: BLE001 - whatever the hub, the network or the dataset's files raise
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"dataset {place.id!r} cannot be had: {cause}",
            where=place.name,
            fix="check the network and the name: ID, ID:SPLIT or ID:CONFIG:SPLIT",
        ) from None
    table = pa.table(made.with_format("arrow")[:])
    return of_table(plain_types(_named_classes(table, made.features), place.name), place.name)


def _named_classes(table: pa.Table, features: Any) -> pa.Table:
    """Class numbers as the dataset's own names; -1 (no label) as null."""
    for name, feature in features.items():
        names = getattr(feature, "names", None)
        if names is None or not pa.types.is_integer(table.schema.field(name).type):
            continue
        numbers = np.asarray(table.column(name).fill_null(-1), dtype=np.int64)
        column = pa.array([names[n] if 0 <= n < len(names) else None for n in numbers], pa.string())
        table = table.set_column(table.column_names.index(name), name, column)
    return table
