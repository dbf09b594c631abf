"""``stream``: the same rows as ``read``, in constant memory, and from a pipe as they come."""

from __future__ import annotations

import gzip
import io
import os
import threading
import time
from typing import Any

import pytest

from finetune_cli.config.choices import DataFormat
from finetune_cli.config.schema import DataConfig
from finetune_cli.data import read, stream
from finetune_cli.data.encoding import Text
from finetune_cli.errors import UserError


def values(parts: Any, column: str = "text") -> list[str]:
    return [value for part in parts for value in part.column(column).to_pylist()]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.txt"])
def test_a_stream_of_a_file_is_the_file(write: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("finetune_cli.data.readers.CHUNK", 10)
    for module in ("delimited", "json_lines", "plain_text"):
        monkeypatch.setattr(f"finetune_cli.data.{module}.BATCH", 5)
    texts = [f"row {i}" for i in range(48)]
    form = {"a.csv": "{},x", "a.tsv": "{}\tx", "a.jsonl": '{{"text": "{}"}}', "a.txt": "{}"}[name]
    header = {"a.csv": "text,label\n", "a.tsv": "text\tlabel\n"}.get(name, "")
    write(name, header + "".join(form.format(text) + "\n" for text in texts))
    parts = list(stream(name, DataConfig(), format=DataFormat.auto))
    assert values(parts) == texts == read(name, DataConfig()).column("text").to_pylist()
    assert max(map(len, parts)) <= 10 and [int(n) for part in parts for n in part.row_of] == list(range(1, 49))


def test_the_name_tells_the_format_before_that_of_other_files_does(write: Any) -> None:
    config = DataConfig(format=DataFormat.csv)
    assert values(stream(write("a.jsonl", '{"text": "one"}\n'), config, format=DataFormat.auto)) == ["one"]
    assert values(stream(write("a.dat", "text,id\none,1\n"), config, format=DataFormat.auto)) == ["one"]
    assert values(stream("a.dat", config, format=DataFormat.text)) == ["text,id", "one,1"]


def test_row_numbers_go_on_over_files_and_lines_do_not(write: Any) -> None:
    write("a.txt", "one\ntwo\n")
    write("b.txt", "three\n")
    parts = list(stream(["a.txt", "b.txt"], DataConfig(), format=DataFormat.auto))
    assert [int(n) for part in parts for n in part.row_of] == [1, 2, 3]
    assert parts[-1].where(0) == "b.txt:1, row 3"


@pytest.mark.parametrize(
    ("data", "format", "want"),
    [
        (b"one\n\nthree", DataFormat.auto, ["one", "", "three"]),
        (b'{"text": "one"}\n{"text": "two"}\n', DataFormat.auto, ["one", "two"]),
        (b"text,id\none,1\ntwo,2\n", DataFormat.csv, ["one", "two"]),
        (b"text\nonly\n", DataFormat.csv, ["only"]),
        (b'[{"text": "one"}]', DataFormat.json, ["one"]),
        (b'[{"text": "one"}]', DataFormat.auto, ["one"]),
        (b'[\n  {"text": "one"},\n  {"text": "two"}\n]\n', DataFormat.auto, ["one", "two"]),
        (b"[1] one\n[two]\n", DataFormat.auto, ["[1] one", "[two]"]),
        (b"[1]\n", DataFormat.auto, ["[1]"]),
        (b'text,label\n"one, two",x\n', DataFormat.auto, ["one, two"]),
        (b"id\ttext\r\n1\tone\r\n", DataFormat.auto, ["one"]),
        (b"label;text\nx;one\n", DataFormat.auto, ["one"]),
        (b"text, she said\ntwo\n", DataFormat.auto, ["text, she said", "two"]),
        (b"text\ntwo\n", DataFormat.auto, ["text", "two"]),
        ("größe\n".encode("utf-16"), DataFormat.text, ["größe"]),
        (b"", DataFormat.auto, []),
        (b"text,id\n", DataFormat.csv, []),
    ],
)
def test_bytes_from_a_pipe(data: bytes, format: DataFormat, want: list[str]) -> None:
    assert values(stream(io.BytesIO(data), DataConfig(), format=format)) == want


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (gzip.compress(b"one\n", mtime=0), "a gzip file"),
        (b"PK\x03\x04\x14\0", "a ZIP or Excel file"),
        (b"PAR1\x15\x04\x15", "a Parquet file"),
        (b"ARROW1\0\0", "an Arrow file"),
        (b"\x28\xb5\x2f\xfd\x04", "a zstd file"),
    ],
)
def test_what_is_no_text_on_a_pipe_is_named(data: bytes, what: str, refused: Any) -> None:
    for format in (DataFormat.auto, DataFormat.text, DataFormat.csv):
        error = refused(stream, io.BytesIO(data), DataConfig(), format=format)
        assert what in error.what and "input=FILE" in error.fix
    assert values(stream(io.BytesIO(b"PAR1 is a gene\nBZh\n%PDF\n"), DataConfig(), format=DataFormat.auto))[0] == "PAR1 is a gene"


def test_texts_in_a_list_on_a_pipe_are_no_objects(refused: Any) -> None:
    error = refused(stream, io.BytesIO(b'["one", "two"]\n'), DataConfig(), format=DataFormat.auto)
    assert "a text, not an object" in error.what and "format=text" in error.fix


def test_the_place_of_an_error_on_a_pipe(refused: Any) -> None:
    error = refused(stream, io.BytesIO(b'{"text": "a"}\n{"text": }\n'), DataConfig(), format=DataFormat.auto)
    assert error.where == "standard input:2:10, row 2"
    error = refused(stream, io.BytesIO(b"text,id\na,1\nb\n"), DataConfig(), format=DataFormat.csv)
    assert error.where == "standard input:3, row 2"


@pytest.mark.parametrize("format", [DataFormat.text, DataFormat.jsonl, DataFormat.csv])
def test_what_has_come_is_handed_out_when_the_pipe_pauses(format: DataFormat) -> None:
    """A writer that waits for each answer must get it: row n+1 is written only when row n was handed out."""
    form = {DataFormat.text: "{}\n", DataFormat.jsonl: '{{"text": "{}"}}\n', DataFormat.csv: "{}\n"}[format]
    source, sink = os.pipe()
    answered = [threading.Event() for _ in range(5)]
    late: list[int] = []

    def writer() -> None:
        with os.fdopen(sink, "wb", buffering=0) as out:
            if format is DataFormat.csv:
                out.write(b"text\n")
            for i in range(5):
                out.write(form.format(f"row {i}").encode())
                if not answered[i].wait(20):
                    late.append(i)

    thread = threading.Thread(target=writer, daemon=True)
    thread.start()
    seen: list[str] = []
    with os.fdopen(source, "rb") as pipe:
        for part in stream(pipe, DataConfig(), format=format):
            seen += part.column("text").to_pylist()
            answered[len(seen) - 1].set()
    thread.join(30)
    assert not late and seen == [f"row {i}" for i in range(5)]


def test_half_a_line_waits_for_its_other_half() -> None:
    source, sink = os.pipe()

    def writer() -> None:
        with os.fdopen(sink, "wb", buffering=0) as out:
            for piece in (b"gr\xc3", b"\xb6\xc3\x9f", b"e\nne", b"xt\r", b"\nlast"):
                out.write(piece)
                time.sleep(0.05)

    thread = threading.Thread(target=writer, daemon=True)
    thread.start()
    with os.fdopen(source, "rb") as pipe:
        assert values(stream(pipe, DataConfig(), format=DataFormat.text)) == ["größe", "next", "last"]
    thread.join(10)


def test_bytes_that_were_peeked_are_not_lost() -> None:
    source, sink = os.pipe()
    os.write(sink, b"one\ntwo\n")
    with os.fdopen(source, "rb") as pipe:
        assert pipe.peek(1)[:1] == b"o"  # type: ignore[attr-defined]
        parts = stream(pipe, DataConfig(), format=DataFormat.text)
        assert next(parts).column("text").to_pylist() == ["one", "two"]
        os.close(sink)
        assert list(parts) == []


def test_a_nul_on_a_pipe_is_an_error_and_not_utf_16() -> None:
    for data in ("hé\n".encode("utf-16-le"), b"a\0b\0c\0\n", b"fine\nnot\0fine\n"):
        with pytest.raises(UserError):
            list(Text(io.BytesIO(data), "standard input", pipe=True).lines())
    marked = Text(io.BytesIO("hé\n".encode("utf-16")), "standard input", pipe=True)
    assert list(marked.lines()) == ["hé\n"]
