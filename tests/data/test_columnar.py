"""Parquet and Arrow: every writer's kind of text is text, every type stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_cli.config.schema import DataConfig
from finetune_cli.data import read, texts

TABLE = pa.table({"text": ["a", "b", "c"], "label": [1, 0, 1], "tags": [["x"], [], ["y", "z"]]})
KINDS = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.string())]


def feather(table: pa.Table, path: Path) -> None:
    import pyarrow.feather

    pyarrow.feather.write_feather(table, path, compression="zstd")


def arrow_file(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def arrow_stream(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


WRITERS = {
    "a.parquet": lambda t, p: pq.write_table(t, p, row_group_size=2),
    "b.arrow": arrow_file,
    "c.arrow": arrow_stream,
    "d.feather": feather,
}


@pytest.mark.parametrize("name", WRITERS)
def test_tables_come_back_whole(write: Any, tmp_path: Path, name: str) -> None:
    WRITERS[name](TABLE, tmp_path / name)  # type: ignore[no-untyped-call]
    rows = read(name, DataConfig())
    assert rows.table.to_pylist() == TABLE.to_pylist()
    assert rows.row_of.tolist() == [1, 2, 3] and rows.where(1) == f"{name}, row 2"


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_of_text_is_text(write: Any, tmp_path: Path, kind: pa.DataType) -> None:
    column = TABLE.column("text").cast(pa.string())
    column = column.dictionary_encode() if pa.types.is_dictionary(kind) else column.cast(kind)
    pq.write_table(pa.table({"text": column, "label": TABLE.column("label")}), tmp_path / "a.parquet")
    assert texts(read("a.parquet", DataConfig()), "text") == ["a", "b", "c"]


def test_files_that_are_refused(write: Any, refused: Any, tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    assert "not a whole Parquet file" in refused(read, write("cut.parquet", whole[:-30]), DataConfig()).what
    assert "not a whole Parquet file" in refused(read, write("text.parquet", "text,label\n"), DataConfig()).what
    assert "parquet file, not csv" in refused(read, write("named.csv", whole), DataConfig()).what
    arrow_file(TABLE, tmp_path / "a.arrow")
    assert "not a whole Arrow file" in refused(read, write("cut.arrow", (tmp_path / "a.arrow").read_bytes()[:-40]), DataConfig()).what
    pq.write_table(TABLE.slice(0, 0), tmp_path / "none.parquet")
    assert "no rows" in refused(read, "none.parquet", DataConfig()).what
    pq.write_table(pa.table({"text": pa.array([b"\xff\xfe"], pa.binary())}), tmp_path / "bytes.parquet")
    assert "not UTF-8" in refused(read, "bytes.parquet", DataConfig()).what


def test_shards_with_different_types_are_refused_with_file_and_column(write: Any, refused: Any, tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "a.parquet")
    pq.write_table(TABLE.set_column(1, "label", pa.array(["1", "0", "1"])), tmp_path / "b.parquet")
    error = refused(read, ["a.parquet", "b.parquet"], DataConfig())
    assert "'label' holds text here, but a whole number in a.parquet" in error.what and error.where.startswith("b.parquet")


def test_shards_with_like_types_join(write: Any, tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "a.parquet")
    pq.write_table(TABLE.set_column(1, "label", pa.array([1.5, None, 2.0])).drop_columns(["tags"]), tmp_path / "b.parquet")
    rows = read("*.parquet", DataConfig())
    assert rows.table.column("label").to_pylist() == [1, 0, 1, 1.5, None, 2]
    assert rows.files == ("a.parquet", "b.parquet")
