"""Files damaged at random: read whole or refused in three lines, never a traceback."""

from __future__ import annotations

import gzip
import io
import json
import random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_cli.config.schema import DataConfig
from finetune_cli.data import label_cells, load_splits, texts
from finetune_cli.errors import UserError

ROWS = [{"text": f'row {i} "so", \u2028 中 é', "label": "ab"[i % 2]} for i in range(30)]


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue()


def arrow() -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, pa.Table.from_pylist(ROWS).schema) as writer:
        writer.write_table(pa.Table.from_pylist(ROWS))
    return sink.getvalue()


JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = b"text,label\n" + "".join('"' + row["text"].replace('"', '""') + f'",{row["label"]}\n' for row in ROWS).encode()
WHOLE = {
    "a.csv": CSV,
    "a.tsv": b"text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in ROWS).encode(),
    "b.csv": b"\xff\xfe" + CSV.decode().encode("utf-16-le"),
    "a.jsonl": JSONL,
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "a.csv.gz": gzip.compress(CSV, mtime=0),
    "a.jsonl.zst": pa.compress(JSONL, codec="zstd", asbytes=True),
    "a.parquet": parquet(),
    "a.arrow": arrow(),
    "a.txt": "".join(f"{row['label']} {row['text']}\n" for row in ROWS).encode(),
}


def damaged(whole: bytes, draw: random.Random) -> bytes:
    data = bytearray(whole)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(data))
        kind = draw.randrange(5)
        if kind == 0:
            data[at] = draw.randrange(256)
        elif kind == 1:
            data = data[: at + 1]
        elif kind == 2:
            data[at:at] = draw.choice([b'"', b"\n", b"\r", b",", b"\t", b"\0", b"{", b"]", b"\xff", "中".encode(), b'""', b"\xc3"])
        elif kind == 3:
            del data[at : at + draw.randint(1, 20)]
            data = data or bytearray(b"x")
        else:
            data[at:at] = data[: draw.randint(1, 60)]
    return bytes(data)


@pytest.mark.parametrize("name", WHOLE)
def test_damage_is_read_or_refused(write: Any, name: str) -> None:
    config = DataConfig(train=name, pattern="{label} {text}" if name == "a.txt" else None)
    write(name, WHOLE[name])
    assert sum(map(len, load_splits(config, seed=0).rows.values())) == 30
    refusals = 0
    for seed in range(3000):
        write(name, damaged(WHOLE[name], random.Random(f"{name}{seed}")))
        try:
            splits = load_splits(config, seed=0)
            for rows in splits.rows.values():
                texts(rows, splits.roles.text)
                label_cells(rows, splits.roles, config)
        except UserError as error:
            assert error.where and error.fix and len(error.lines()) == 3, error.lines()
            refusals += 1
    assert refusals > 10, "so much damage cannot all be harmless"
