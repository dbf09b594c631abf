"""CoNLL columns: sentences with their lines, whatever stands between them, from files and pipes."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_cli.config.choices import DataFormat
from finetune_cli.config.schema import DataConfig
from finetune_cli.data import read, stream
from finetune_cli.data.conll import looks_like_columns
from finetune_cli.errors import UserError

Write = Callable[..., str]
PLAIN = "EU B-ORG\nrejects O\n\nGerman B-MISC\nlamb O\n. O\n"


def sentences(name: str, **options: object) -> list[list[str]]:
    return read(name, DataConfig(**options)).column("column1").to_pylist()  # type: ignore[arg-type]


def test_a_row_is_a_sentence_and_every_word_has_its_line(write: Write) -> None:
    rows = read(write("a.conll", "-DOCSTART- -X-\n\n" + PLAIN), DataConfig())
    assert rows.columns == ["column1", "column2"]
    assert rows.column("column2").to_pylist() == [["B-ORG", "O"], ["B-MISC", "O", "O"]]
    assert [rows.where(i) for i in range(2)] == ["a.conll:3, row 1", "a.conll:6, row 2"]
    assert rows.where(1, 2) == "a.conll:8, row 2, word 3"
    for part in (rows.take([1]), rows.slice(1, 1), rows.take([1, 0])):
        assert part.where(0, 1) == "a.conll:7, row 2, word 2"


@pytest.mark.parametrize("blank", ["", " ", "\t", " \t ", "\u3000", "\n\n"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_any_white_space_is_a_break(blank: str, end: str, write: Write) -> None:
    text = PLAIN.replace("\n\n", f"\n{blank}\n").replace("\n", end)
    assert sentences(write("a.conll", text)) == [["EU", "rejects"], ["German", "lamb", "."]]


def test_without_a_line_end_and_with_spaces_around(write: Write) -> None:
    assert sentences(write("a.conll", "EU  B-ORG \nis \tO\n\n\n\nok O")) == [["EU", "is"], ["ok"]]


def test_tabs_keep_spaces_inside_a_word(write: Write) -> None:
    assert sentences(write("a.conll", "New York\tB-LOC\nis\tO\n")) == [["New York", "is"]]


def test_an_ideographic_space_is_a_word(write: Write) -> None:
    assert sentences(write("a.bmes", "\u4e2d B-LOC\n\u3000 O\n")) == [["\u4e2d", "\u3000"]]


def test_documents_and_comments_are_skipped_and_counted(write: Write) -> None:
    notes: list[str] = []
    text = "# sent_id = 1 a\n-DOCSTART- -X- O\nEU B-ORG\n# O\n\n# text = x y\nis O\n-DOCSTART- -X- O\nok O\n"
    rows = read(write("a.conll", text), DataConfig(), notes=notes)
    assert rows.column("column1").to_pylist() == [["EU", "#"], ["is"], ["ok"]]
    assert notes == ["a.conll: 2 document lines skipped", "a.conll: 2 comments skipped"]


def test_columns_have_the_names_given(write: Write) -> None:
    name = write("a.conll", "EU NNP B-ORG\n")
    assert read(name, DataConfig(columns=["word", "pos", "tag"])).columns == ["word", "pos", "tag"]
    assert read(write("b.conll", "EU\nis\n"), DataConfig(columns=["word", "tag"])).columns == ["word"]


@pytest.mark.parametrize(
    ("name", "text", "is_conll"),
    [
        ("eng.train", PLAIN, True),
        ("train.char.bmes", PLAIN, True),
        ("a.txt", PLAIN, True),
        ("a.tsv", PLAIN.replace(" ", "\t"), True),
        ("a.txt", "one text a line\n\nand one more\n", False),
        ("a.txt", "plan B\n\nplan O\n", True),
        ("a.tsv", "good\tB\nbad\tO\n", False),
        ("a.csv", PLAIN, False),
    ],
)
def test_what_is_taken_for_columns(name: str, text: str, is_conll: bool, write: Write) -> None:
    try:
        rows = read(write(name, text), DataConfig(header=False))
    except UserError:
        assert not is_conll
        return
    assert bool(rows.word_files) == is_conll


def test_columns_need_a_tag_on_every_line_and_a_break() -> None:
    assert looks_like_columns(PLAIN)
    for other in (PLAIN.replace("\n\n", "\n"), PLAIN.replace("lamb O", "lamb o"), PLAIN.replace("lamb O", "lamb"), "EU\n\nis\n\n", ""):
        assert not looks_like_columns(other)


def test_files_join_and_keep_their_lines(write: Write) -> None:
    rows = read([write("a.conll", PLAIN), write("b.conll", "is O\nok O\n")], DataConfig())
    assert rows.where(2, 1) == "b.conll:2, row 1, word 2"
    write("c.jsonl", '{"column1": ["a", "b"], "column2": ["O", "O"]}\n')
    rows = read(["a.conll", "c.jsonl"], DataConfig())
    assert rows.where(0, 1) == "a.conll:2, row 1, word 2" and rows.where(2, 1) == "c.jsonl:1, row 1, word 2"


def test_a_pipe_hands_out_whole_sentences() -> None:
    reading, writing = os.pipe()
    with open(reading, "rb") as source, open(writing, "wb", buffering=0) as sink:
        sink.write(b"EU B-ORG\nis O\n\nGerman ")
        parts = stream(source, DataConfig(), format=DataFormat.conll)
        assert next(parts).column("column1").to_pylist() == [["EU", "is"]]
        sink.write(b"B-MISC\n\n")
        second = next(parts)
        assert (second.column("column1").to_pylist(), second.where(0)) == ([["German"]], "standard input:4, row 2")
        sink.close()
        assert list(parts) == []
    assert list(stream(io.BytesIO(b""), DataConfig(), format=DataFormat.conll)) == []


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("EU B-ORG\nis\n", 2, "1 column"),
        ("EU B-ORG\n\nis O O\n", 3, "3 columns"),
        ("EU\tB-ORG\nis O\n", 2, "1 column"),
        ("EU B-ORG\n" + "x" * (1 << 20) + "y O\n", 2, "characters"),
    ],
)
def test_bad_lines_are_named(text: str, line: int, what: str, write: Write, refused: Callable[..., UserError]) -> None:
    error = refused(read, write("a.conll", text), DataConfig())
    assert what in error.what and error.where.startswith(f"a.conll:{line}")


@pytest.mark.skipif("FTUNE_DATA" not in os.environ, reason="FTUNE_DATA names no folder of real data sets")
@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("conll2003/eng.train", 14_041, 203_621),
        ("conll2003/eng.testa", 3_250, 51_362),
        ("conll2003/eng.testb", 3_453, 46_435),
        ("cner/train.char.bmes", 3_821, 124_099),
        ("cner/test.char.bmes", 477, 15_100),
    ],
)
def test_real_files_have_the_rows_they_are_known_for(name: str, rows: int, words: int) -> None:
    found = sentences(str(Path(os.environ["FTUNE_DATA"]) / name))
    assert (len(found), sum(map(len, found))) == (rows, words)
