"""Plain text, patterns, encodings: a line is a row, a byte that does not fit is named."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_cli.config.schema import DataConfig
from finetune_cli.data import read


@pytest.mark.parametrize("text", ["a\n\n b \u2028c\x0b\x0c\x85\n", "a\r\n\r\n b \u2028c\x0b\x0c\x85", "a\r\r b \u2028c\x0b\x0c\x85\r"])
def test_every_line_is_a_row_a_blank_one_too(write: Any, text: str) -> None:
    rows = read(write("a.txt", text), DataConfig())
    assert rows.table.to_pydict() == {"text": ["a", "", " b \u2028c\x0b\x0c\x85"]}
    assert rows.line_of.tolist() == [1, 2, 3]


def test_the_column_is_called_as_the_config_calls_the_text(write: Any) -> None:
    assert read(write("a.txt", "a\n"), DataConfig(text="sentence")).columns == ["sentence"]


def test_tabs_in_every_line_make_it_tsv(write: Any) -> None:
    notes: list[str] = []
    rows = read(write("a.txt", "中 文\t3\nb\t0"), DataConfig(header=False, columns=["text", "label"]), notes=notes)
    assert rows.table.to_pylist() == [{"text": "中 文", "label": "3"}, {"text": "b", "label": "0"}]
    assert "TSV" in notes[0]


@pytest.mark.parametrize(
    ("pattern", "line", "want"),
    [
        ("{label} {text}", "pos a good film", {"label": "pos", "text": "a good film"}),
        ("{text}@{label}", "write me@home@pos", {"text": "write me@home", "label": "pos"}),
        ("__label__{label} {text}", "__label__a b c", {"label": "a", "text": "b c"}),
        ("{label}|{text}|{text_pair}", "1|a|b", {"label": "1", "text": "a", "text_pair": "b"}),
        ("{label}\t{text}", "x\ty\tz", {"label": "x", "text": "y\tz"}),
        ("({label}) {text}.", "(a) b c.", {"label": "a", "text": "b c"}),
    ],
)
def test_patterns(write: Any, pattern: str, line: str, want: dict[str, str]) -> None:
    rows = read(write("a.txt", f"{line}\n\n{line}"), DataConfig(pattern=pattern))
    assert rows.table.to_pylist() == [want, want] and rows.line_of.tolist() == [1, 3]


def test_lines_and_patterns_that_are_refused(write: Any, refused: Any) -> None:
    error = refused(read, write("a.txt", "pos good\nbad\n"), DataConfig(pattern="{label} {text}"))
    assert error.where == "a.txt:2, row 2" and "'bad'" in error.what
    for pattern in ("label text", "{label}{text}", "{text} {text}", "{text} {"):
        assert refused(read, "a.txt", DataConfig(pattern=pattern)).where == "data.pattern"
    assert "empty" in refused(read, write("b.txt", ""), DataConfig()).what
    assert "characters" in refused(read, write("c.txt", "x" * (1 << 20) + "y\n"), DataConfig()).what


# -- encodings -------------------------------------------------------------------------------------
ROWS = "text,label\ngröße,1\n中文,0\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_encodings_that_are_found(write: Any, encoding: str) -> None:
    rows = read(write("a.csv", (ROWS + "plain text,0\n" * 20).encode(encoding)), DataConfig())
    assert rows.columns == ["text", "label"] and rows.table.column("text")[:2].to_pylist() == ["größe", "中文"]


@pytest.mark.parametrize("encoding", ["utf-32", "cp1252", "gb18030", "utf-8", "utf-8-sig", "UTF16", "latin-1", "shift_jis"])
def test_encodings_that_are_named(write: Any, encoding: str) -> None:
    text = "größe" if encoding in ("cp1252", "latin-1") else "文書"
    rows = read(write("a.csv", f"text,label\n{text},1\n".encode(encoding)), DataConfig(encoding=encoding))
    assert rows.table.to_pylist() == [{"text": text, "label": "1"}]


@pytest.mark.parametrize("block", [1 << 20, 7])
def test_a_byte_that_is_not_utf8_is_named_with_line_and_place(
    write: Any, refused: Any, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr("finetune_cli.data.encoding.BLOCK", block)
    error = refused(read, write("a.csv", "text,label\r\ngood,1\r\nö café,0\r\n".encode().replace("é".encode(), b"\xe9")), DataConfig())
    assert error.where == "a.csv:3" and "byte 7 of the line, 0xE9, is not UTF-8" in error.what
    assert "cp1252" not in error.what and "mend the byte" in error.fix, "as cp1252 the other letter would be two"


@pytest.mark.parametrize("bad", [b"\xc0\xaf", b"\xed\xa0\x80", b"\xed\xa0\xbd\xed\xb8\x80", b"\x80", b"\x81", b"\xbf\xbd"], ids=repr)
def test_a_stray_byte_that_is_no_letter_is_no_other_encoding(write: Any, refused: Any, bad: bytes) -> None:
    error = refused(read, write("a.csv", b"text,label\ngood,1\na " + bad + b" b,0\n"), DataConfig())
    assert error.what == f"byte 3 of the line, 0x{bad[0]:02X}, is not UTF-8" and error.where == "a.csv:3" and "mend the byte" in error.fix


@pytest.mark.parametrize("text", ["caf\u00e9", "\u201eGr\u00f6\u00dfe\u201c \u2013 5 \u20ac", "\u00ab \u00e7a \u00bb"])
def test_letters_of_the_west_are_cp1252(write: Any, refused: Any, text: str) -> None:
    assert "data.encoding=cp1252" in refused(read, write("a.csv", f"text,label\n{text},1\n".encode("cp1252")), DataConfig()).fix


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_byte_order_mark_that_stands_twice(write: Any, encoding: str) -> None:
    rows = read(write("a.csv", "\ufeff\ufefftext,label\na,1\n".encode(encoding)), DataConfig())
    assert rows.columns == ["text", "label"] and len(rows) == 1


def test_chinese_encodings_are_guessed_as_such(write: Any, refused: Any) -> None:
    error = refused(read, write("a.csv", ("text,label\n" + "这个电影非常好看,1\n" * 5).encode("gb18030")), DataConfig())
    assert "gb18030" in error.fix


def test_a_character_cut_at_the_end_of_the_file(write: Any, refused: Any) -> None:
    assert refused(read, write("a.txt", "abc\nd中".encode()[:-1]), DataConfig()).where == "a.txt:2"


def test_utf32_and_unknown_encodings_are_refused_with_the_key(write: Any, refused: Any) -> None:
    assert "data.encoding=utf-32" in refused(read, write("a.csv", ROWS.encode("utf-32")), DataConfig()).fix
    assert refused(read, "a.csv", DataConfig(encoding="utf-9")).where == "data.encoding"
    assert refused(read, "a.csv", DataConfig(encoding="rot13")).where == "data.encoding"


@pytest.mark.parametrize(("start", "what"), [(b"PK\x03\x04", "ZIP"), (b"%PDF-1.7", "PDF"), (b"SQLite format 3\0", "SQLite")])
def test_other_files_are_named_for_what_they_are(write: Any, refused: Any, start: bytes, what: str) -> None:
    assert what in refused(read, write("a.csv", start + b"rest"), DataConfig()).what
