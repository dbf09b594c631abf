"""CSV and TSV: every cell as it was written, every row where it was, everything else refused with its line."""

from __future__ import annotations

import csv
import gzip
import io
import random
from typing import Any

import numpy as np
import pytest

from finetune_cli.config.choices import DataFormat, ExtraFields, Quoting
from finetune_cli.config.schema import DataConfig
from finetune_cli.data import Caution, Rows, read
from finetune_cli.data import rows as rows_module


def cells(rows: Rows) -> list[tuple[Any, ...]]:
    return list(zip(*(rows.table.column(name).to_pylist() for name in rows.columns), strict=True))


NASTY = ["NA", "null", "None", "nan", "0045", "1e5", "True", " pos ", "", "a,b", 'say "hi"', '"', "two\nlines", "cr\rinside"]
NASTY += [
    "tab\there",
    "line\u2028separator",
    "\x0b\x0c\x1c\x85",
    "größe",
    "中文，逗号",
    "emoji 🙂",
    "\ufeffbom inside",
    "'",
    "\\",
    "\\n",
    "#",
    "=1+1",
]


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_what_csv_writes_is_read_back_to_the_letter(write: Any, ends: str, encoding: str, delimiter: str) -> None:
    draw = random.Random(f"{ends}{encoding}{delimiter}")
    want = [(draw.choice(NASTY) + draw.choice(NASTY), draw.choice(["pos", "neg", "NA"])) for _ in range(200)]
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter, lineterminator=ends, quoting=csv.QUOTE_ALL)  # else it leaves a lone CR bare
    writer.writerows([("text", "label"), *want])
    write("a.csv", out.getvalue().encode(encoding))
    assert cells(read("a.csv", DataConfig(delimiter=delimiter, quoting=Quoting.csv))) == want


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False])
def test_every_line_end_gives_the_same_rows(write: Any, ends: str, last: bool) -> None:
    text = ends.join(["text,label", "good,1", "bad,0"]) + (ends if last else "")
    rows = read(write("a.csv", text), DataConfig())
    assert cells(rows) == [("good", "1"), ("bad", "0")]
    assert rows.line_of.tolist() == [2, 3] and rows.row_of.tolist() == [1, 2]


def test_mixed_line_ends(write: Any) -> None:
    assert len(read(write("a.csv", "text,label\r\na,1\nb,0\rc,1"), DataConfig())) == 3


def test_lines_are_physical_lines_also_behind_a_cell_of_several(write: Any) -> None:
    rows = read(write("a.csv", 'text,label\n"one\n\ntwo",1\n\nthree,0\n"x\ny",1\n'), DataConfig())
    assert cells(rows) == [("one\n\ntwo", "1"), ("three", "0"), ("x\ny", "1")]
    assert rows.line_of.tolist() == [2, 6, 7]
    assert rows.where(1) == "a.csv:6, row 2"


def test_rows_across_batches(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_cli.data.delimited.BATCH", 7)
    want = [(f"text {i}\nmore" if i % 5 == 0 else f"text {i}", str(i)) for i in range(100)]
    out = io.StringIO(newline="")
    csv.writer(out).writerows([("text", "label"), *want])
    rows = read(write("a.csv", out.getvalue()), DataConfig())
    assert cells(rows) == want
    assert rows.row_of.tolist() == list(range(1, 101))
    assert [cells(c)[0][1] for c in rows.chunks(30)] == ["0", "30", "60", "90"]
    taken = rows.take([99, 3, 50])
    assert [c[1] for c in cells(taken)] == ["99", "3", "50"] and taken.row_of.tolist() == [100, 4, 51]
    ascending = rows.take(np.arange(0, 100, 3))
    assert [c[1] for c in cells(ascending)] == [str(i) for i in range(0, 100, 3)]
    assert cells(rows.take([])) == []


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("text,label\na good, really good,pos\n", ":2, row 1", "3 fields where 2"),
        ("text,label\nok,1\ngood\nx,1\n", ":3, row 2", "1 field where 2"),
        ("text,label\nok,1\ngood", ":3, row 2", "ends in the middle of a row"),
        ('text,label\nok,1\n"good,1\nbad,0\n', ":3, row 2", "never closed"),
        ('text,label\nok,1\n"good" film,1\n', ":3, row 2", "followed by more text"),
        ("text,label\nok,1\nnul\0inside,1\n", ":3", "NUL"),
        ("text,label\n", ":1", "no rows"),
        ("", "a.csv", "empty (0 bytes)"),
        ("\n\n", "a.csv", "blank lines"),
        ("text,text\na,b\n", ":1", "more than once"),
    ],
)
def test_what_does_not_fit_is_named_with_its_line(write: Any, refused: Any, text: str, line: str, what: str) -> None:
    error = refused(read, write("a.csv", text), DataConfig())
    assert what in error.what and line in error.where


def test_ragged_rows_are_counted(write: Any, refused: Any) -> None:
    text = "text,label\n" + "".join(f"row {i}{', oops' if i % 2 else ''},1\n" for i in range(40))
    error = refused(read, write("a.csv", text), DataConfig())
    assert "line 5 (3)" in error.what and "and 15 more" in error.what and error.where == "a.csv:3, row 2"


def test_surplus_fields_are_ignored_only_when_asked_and_then_counted(write: Any) -> None:
    notes: list[str] = []
    rows = read(write("a.csv", "text,label\na,1,x\nb,0\n"), DataConfig(extra_fields=ExtraFields.ignore), notes=notes)
    assert cells(rows) == [("a", "1"), ("b", "0")]
    assert any("1 row has more" in note for note in notes)


def test_a_semicolon_is_found_and_said(write: Any) -> None:
    notes: list[str] = []
    rows = read(write("a.csv", "text;label\ngood, really;1\nbad;0\n"), DataConfig(), notes=notes)
    assert cells(rows) == [("good, really", "1"), ("bad", "0")]
    assert "semicolon" in notes[0]


def test_a_wrong_delimiter_is_refused_with_the_right_one(write: Any, refused: Any) -> None:
    error = refused(read, write("a.csv", "text;label\ngood;1\n"), DataConfig(delimiter=","))
    assert "'text;label'" in error.what and "data.delimiter=';'" in error.fix


@pytest.mark.parametrize("spelled", ["\t", "\\t", "tab"])
def test_a_tab_as_people_type_it(write: Any, spelled: str) -> None:
    assert cells(read(write("a.csv", "text\tlabel\ngood\t1\n"), DataConfig(delimiter=spelled))) == [("good", "1")]


@pytest.mark.parametrize("bad", ["", ",,", '"', "\n"])
def test_a_delimiter_is_one_character(write: Any, refused: Any, bad: str) -> None:
    assert refused(read, write("a.csv", "text,label\na,1\n"), DataConfig(delimiter=bad)).where == "data.delimiter"


QUOTED = {
    'text\tlabel\n"good" film\t1\n': [('"good" film', "1")],  # no closing quote before the tab: text
    'text\tlabel\n" a bare quote\t1\nb\t0\n': [('" a bare quote', "1"), ("b", "0")],
    'text\tlabel\n"good"\t1\n': [('"good"', "1")],  # well-formed, but nothing needs it: text
    'text\tlabel\n"a\tb"\t1\n"c"\t0\n': [("a\tb", "1"), ("c", "0")],
    'text\tlabel\n"say ""hi"""\t1\n': [('say "hi"', "1")],
    'text\tlabel\n"two\nlines"\t1\nb\t0\n': [("two\nlines", "1"), ("b", "0")],
    'text\tlabel\n"two\tb"\t1\n"c\t0\n': None,
    '"text"\t"label"\n"good"\t"1"\n': [("good", "1")],  # every field of the first line is wrapped
    'text\tlabel\nan "inner" quote\t1\n': [('an "inner" quote', "1")],
    'text\tlabel\n""\t1\n"a\tb"\t1\n': [("", "1"), ("a\tb", "1")],
}


@pytest.mark.parametrize("text", QUOTED)
def test_quotes_in_tsv_wrap_fields_only_where_the_whole_file_agrees(write: Any, text: str) -> None:
    want = QUOTED[text]
    if want is None:
        with pytest.raises(Exception, match="fields"):
            read(write("a.tsv", text), DataConfig())
    else:
        assert cells(read(write("a.tsv", text), DataConfig())) == want


def test_the_choice_of_quoting_is_a_note_and_can_be_overruled(write: Any) -> None:
    notes: list[str] = []
    write("a.tsv", 'text\tlabel\n"a ""b"""\t1\n')
    assert cells(read("a.tsv", DataConfig(), notes=notes)) == [('a "b"', "1")]
    assert "wrap fields" in notes[-1]
    assert cells(read("a.tsv", DataConfig(quoting=Quoting.plain))) == [('"a ""b"""', "1")]


def test_glue_style_quotes_lose_no_row(write: Any) -> None:
    lines = [f'{i}\t" said {i}\the "said" so' if i % 3 else f'{i}\tplain\t"' for i in range(300)]
    rows = read(write("a.tsv", "Quality\tsentence1\tsentence2\n" + "\n".join(lines)), DataConfig())
    assert len(rows) == 300


def test_a_cell_of_a_million_characters_and_one_beyond(write: Any, refused: Any) -> None:
    most = 1 << 20
    assert len(read(write("a.csv", f"text,label\n{'x' * most},1\n"), DataConfig())) == 1
    assert "1,048,576 characters" in refused(read, write("b.csv", f"text,label\n{'x' * (most + 1)},1\n"), DataConfig()).what
    assert "1,048,576 characters" in refused(read, write("c.tsv", f"text\tlabel\n{'x' * (most + 1)}\t1\n"), DataConfig()).what


# -- headers ---------------------------------------------------------------------------------------
def test_no_header_is_refused_with_the_keys_that_say_so(write: Any, refused: Any) -> None:
    error = refused(read, write("a.csv", "good film,pos\nbad film,neg\n"), DataConfig())
    assert "'good film'; 'pos'" in error.what and "data.header=false data.columns=[text,label]" in error.fix
    swapped = refused(read, write("b.csv", "1,a very good film\n0,bad\n"), DataConfig())
    assert "data.columns=[label,text]" in swapped.fix


def test_a_known_word_among_the_cells_does_not_make_a_header(write: Any, refused: Any) -> None:
    assert "data.header=false" in refused(read, write("a.csv", "what is love,question\nhe said,topic here\n"), DataConfig()).fix


@pytest.mark.parametrize(
    ("first", "config", "columns"),
    [
        ("label,review", {}, ["label", "review"]),
        ("index,sentence", {}, ["index", "sentence"]),
        ("foo,bar", {"text": "foo"}, ["foo", "bar"]),
        ("foo,bar", {"label": ["bar"]}, ["foo", "bar"]),
        ("foo,bar", {"header": True}, ["foo", "bar"]),
        ("foo,bar", {"columns": ["foo", "bar"]}, ["foo", "bar"]),
        (",text,label", {}, ["column1", "text", "label"]),
        ("Label ,Text", {"label": "label"}, ["Label ", "Text"]),
    ],
)
def test_headers_that_are_recognised(write: Any, first: str, config: dict[str, Any], columns: list[str]) -> None:
    row = ",".join("x" * first.count(",")) + ",y"
    rows = read(write("a.csv", f"{first}\n{row}\n"), DataConfig(**config))
    assert rows.columns == columns and len(rows) == 1


def test_files_without_header(write: Any, refused: Any) -> None:
    name = write("a.csv", "good,1\nbad,0\n")
    assert read(name, DataConfig(header=False)).columns == ["column1", "column2"]
    assert len(read(name, DataConfig(header=False))) == 2
    assert read(name, DataConfig(columns=["text", "label"])).columns == ["text", "label"]
    assert len(read(name, DataConfig(text="column1", label="column2"))) == 2
    assert "names 3" in refused(read, name, DataConfig(header=False, columns=["a", "b", "c"])).what
    assert "twice" in refused(read, name, DataConfig(header=False, columns=["a", "a"])).what
    assert "without a header" in refused(read, name, DataConfig(header=True, columns=["a", "b"])).what


def test_a_column_that_is_missing_under_an_unknown_header_names_the_nearest(write: Any, refused: Any) -> None:
    error = refused(read, write("a.csv", "foo,txet\na,1\n"), DataConfig(text="text"))
    assert "did you mean 'txet'" in error.fix


def test_a_header_that_is_repeated_is_told(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_cli.data.delimited.BATCH", 2)
    notes: list[str] = []
    rows = read(write("a.csv", 'text,label\na,1\n"b\nc",2\ntext,label\nd,1\ntext,x\n'), DataConfig(), notes=notes)
    assert len(rows) == 5 and notes == ["a.csv: row 3 in line 5 repeats the header and is read as data"]
    assert isinstance(notes[0], Caution)
    assert read(write("b.csv", "a,b\na,b\n"), DataConfig(header=False), notes=notes) is not None and len(notes) == 1


def test_two_files_of_one_source(write: Any, refused: Any) -> None:
    write("a.csv", "text,label\na,1\n")
    write("b.csv", "label,text\n0,b\n1,c\n")
    rows = read(["a.csv", "b.csv"], DataConfig())
    assert sorted(cells(rows)) == [("a", "1"), ("b", "0"), ("c", "1")]
    assert [rows.where(i) for i in range(3)] == ["a.csv:2, row 1", "b.csv:2, row 1", "b.csv:3, row 2"]


def test_compressed(write: Any, refused: Any) -> None:
    whole = gzip.compress(b"text,label\n" + b"".join(f"row {i},1\n".encode() for i in range(5000)))
    assert len(read(write("a.csv.gz", whole), DataConfig())) == 5000
    assert len(read(write("misnamed.csv", whole), DataConfig())) == 5000
    assert "cut off" in refused(read, write("b.csv.gz", whole[:-20]), DataConfig()).what
    assert "not compressed" in refused(read, write("c.csv.gz", "text,label\na,1\n"), DataConfig()).what
    two = gzip.compress(b"text,label\na,1\n") + gzip.compress(b"b,0\n")
    assert len(read(write("d.csv.gz", two), DataConfig())) == 2


def test_zstandard(write: Any, refused: Any) -> None:
    import pyarrow as pa

    packed = pa.compress(b"text,label\n" + b"".join(f"row {i},1\n".encode() for i in range(5000)), codec="zstd", asbytes=True)
    assert len(read(write("a.csv.zst", packed), DataConfig())) == 5000
    assert "cut off" in refused(read, write("b.csv.zst", packed[:-20]), DataConfig()).what


def test_a_format_that_the_user_names_wins_over_the_file_name(write: Any) -> None:
    assert cells(read(write("a.dat", "text,label\na,1\n"), DataConfig(), format=DataFormat.csv)) == [("a", "1")]
    assert cells(read(write("b.txt", "text,label\na,1\n"), DataConfig(format=DataFormat.csv))) == [("a", "1")]


def test_a_message_names_five_places_at_most() -> None:
    assert rows_module.listed([str(i) for i in range(9)]) == "0; 1; 2; 3; 4; and 4 more"
