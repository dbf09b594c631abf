"""Parquet and Arrow files: types stay, text comes in one form (dictionary, view and binary columns become text), batch by batch."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from finetune_cli.data.encoding import refuse_bomb
from finetune_cli.data.rows import Rows, of_table
from finetune_cli.errors import UserError

DAMAGE = (pa.ArrowException, OSError, EOFError, ValueError, MemoryError)
"""What pyarrow raises for a damaged file; MemoryError for a length that damage made absurd."""


def read_parquet(stream: BinaryIO, name: str) -> Iterator[Rows]:
    """The row groups of a Parquet file."""
    import pyarrow.parquet as pq

    try:
        seekable, size = _seekable(stream)
        file = pq.ParquetFile(seekable)
        yield from _rows((batch for batch in file.iter_batches(batch_size=65_536)), name, size)
    except DAMAGE as error:
        raise _damaged(name, "Parquet", error) from None


def read_arrow(stream: BinaryIO, name: str) -> Iterator[Rows]:
    """The batches of an Arrow file or stream (as ``datasets`` and Feather write them)."""
    seekable, size = _seekable(stream)
    magic = seekable.read(6)
    seekable.seek(0)
    try:
        if magic == b"ARROW1":
            file = pa.ipc.open_file(seekable)
            yield from _rows((file.get_batch(i) for i in range(file.num_record_batches)), name, size)
        elif magic.startswith(b"FEA1"):
            raise UserError(f"{name} is Feather version 1", where=name, fix="write it again with pyarrow.feather, version 2")
        else:
            yield from _rows(iter(pa.ipc.open_stream(seekable)), name, size)
    except DAMAGE as error:
        raise _damaged(name, "Arrow", error) from None


def _damaged(name: str, form: str, error: Exception) -> UserError:
    cause = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "encrypt" in cause.lower():
        return UserError(f"{name} is encrypted", where=name, fix="decrypt it first")
    return UserError(
        f"{name} is not a whole {form} file: {cause}", where=name, fix="copy or write the file again; data.format says what it is"
    )


def _seekable(stream: BinaryIO) -> tuple[Any, int]:
    """The stream itself where it can seek cheaply, else its bytes in memory; and its size."""
    if isinstance(stream, io.BufferedReader) and stream.seekable():
        return stream, os.fstat(stream.fileno()).st_size
    data = stream.read()
    return io.BytesIO(data), len(data)


def _rows(batches: Iterator[Any], name: str, size: int) -> Iterator[Rows]:
    """Row groups as rows; few bytes can stand for very many cells that are the same."""
    row, unpacked = 1, 0
    for batch in batches:
        batch.validate(full=True)  # offsets inside their buffers, text that is UTF-8: pyarrow would read past them unasked
        table = plain_types(pa.Table.from_batches([batch]), name, row)
        twice = sorted({c for c in table.column_names if table.column_names.count(c) > 1})
        if twice:
            raise UserError(f"column name {twice[0]!r} stands there more than once", where=name, fix="give every column a name of its own")
        unpacked += table.nbytes
        refuse_bomb(unpacked, size, name)
        if table.num_rows:
            yield of_table(table, name, None, row)
        row += table.num_rows
    if row == 1:
        raise UserError(f"{name} has no rows", where=name, fix="check how the file was written")


def plain_types(table: pa.Table, name: str, first_row: int = 1) -> pa.Table:
    """The table with every kind of text as ``string``; binary cells must be UTF-8."""
    for i, field in enumerate(table.schema):
        of = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        wanted = of
        if pa.types.is_large_string(of) or pa.types.is_string_view(of) or _is_binary(of):
            wanted = pa.string()
        if wanted == field.type:
            continue
        try:
            column = table.column(i).cast(of).cast(wanted)
        except pa.ArrowInvalid as error:
            raise UserError(
                f"column {field.name!r} is {field.type} and not UTF-8 text ({str(error).splitlines()[0]})",
                where=f"{name}, rows from {first_row}",
                fix="write the column as text",
            ) from None
        table = table.set_column(i, field.name, column)
    return table


def _is_binary(of: pa.DataType) -> bool:
    return bool(pa.types.is_binary(of) or pa.types.is_large_binary(of) or pa.types.is_binary_view(of))
