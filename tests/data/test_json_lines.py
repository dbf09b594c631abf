"""JSON and JSON Lines: types kept, and line and column for what is not one meaning."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_cli.config.schema import DataConfig
from finetune_cli.data import read

OBJECTS = [
    {"text": f'row {i} \u2028 é 中 " \\ [,]{{}}', "label": i % 3, "score": i / 2, "tags": ["a"] * (i % 3), "more": {"x": i}}
    for i in range(50)
]


def lines(objects: list[Any]) -> str:
    return "".join(json.dumps(o, ensure_ascii=False) + "\n" for o in objects)


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_lines_keep_values_and_lines(write: Any, ends: str, encoding: str) -> None:
    rows = read(write("a.jsonl", lines(OBJECTS).replace("\n", ends).encode(encoding)), DataConfig())
    assert rows.table.to_pylist() == OBJECTS
    assert rows.line_of.tolist() == list(range(1, 51))


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("block", [1 << 20, 64])
def test_a_json_array_keeps_values_and_lines(write: Any, monkeypatch: pytest.MonkeyPatch, indent: int | None, block: int) -> None:
    monkeypatch.setattr("finetune_cli.data.encoding.BLOCK", block)
    text = json.dumps(OBJECTS, ensure_ascii=False, indent=indent)
    rows = read(write("a.json", text), DataConfig())
    assert rows.table.to_pylist() == OBJECTS
    want = [n for n, line in enumerate(text.split("\n"), 1) if line == "  {"] if indent else [1] * 50
    assert rows.line_of.tolist() == want


def test_batches_join_types(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_cli.data.json_lines.BATCH", 2)
    objects: list[dict[str, Any]] = [
        {"text": "a", "n": None},
        {"text": "b", "n": None},
        {"text": "c", "n": 1},
        {"text": "d", "n": 2.5},
        {"text": "e"},
    ]
    rows = read(write("a.jsonl", lines(objects)), DataConfig())
    assert rows.table.column("n").to_pylist() == [None, None, 1.0, 2.5, None]


def test_blank_lines_are_skipped_and_said(write: Any) -> None:
    notes: list[str] = []
    rows = read(write("a.jsonl", '{"text": "a"}\n\n  \n{"text": "b"}\n'), DataConfig(), notes=notes)
    assert rows.line_of.tolist() == [1, 4] and "2 blank lines" in notes[0]


def test_a_json_file_of_json_lines_is_read_and_said(write: Any) -> None:
    notes: list[str] = []
    assert len(read(write("a.json", lines(OBJECTS)), DataConfig(), notes=notes)) == 50
    assert "JSON Lines" in notes[0]


ROW = '{"text": "a", "label": 1}\n'


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        (ROW + '{"text": "b" "label": 2}\n', "a.jsonl:2:14, row 2", "expecting ',' delimiter"),
        (ROW + '{"text": "b"},\n', "a.jsonl:2:14, row 2", "second value"),
        (ROW + ROW.strip() + ROW, "a.jsonl:2:26, row 2", "second value"),
        (ROW + '{"text": "b", "la', "a.jsonl:2:15, row 2", "ends in the middle of a row"),
        (ROW + '{"text": "b", "label": ', "a.jsonl:2:24, row 2", "ends in the middle of a row"),
        (ROW + '{"text": "b", "text": "c"}\n', "a.jsonl:2, row 2", "'text' stands twice"),
        (ROW + '{"text": "b", "label": NaN}\n', "a.jsonl:2, row 2", "NaN is not JSON"),
        (ROW + '{"text": "b", "label": -Infinity}\n', "a.jsonl:2, row 2", "-Infinity"),
        (ROW + '{"text": "b", "label": "x"}\n', "a.jsonl:2, row 2", "a text here, but a number"),
        (ROW + '{"text": "b", "label": true}\n', "a.jsonl:2, row 2", "true or false here, but a number"),
        (ROW + '{"text": "\\ud800", "label": 1}\n', "a.jsonl:2, row 2", "surrogate"),
        (ROW + '{"text": "b", "label": 99999999999999999999999}\n', "a.jsonl:2, row 2", "a whole number of 23 digits"),
        (ROW + '["a"]\n', "a.jsonl:2, row 2", "a list, not an object"),
        (ROW + "3\n", "a.jsonl:2, row 2", "a whole number"),
        (ROW + '{"text": "a\tb"}\n', "a.jsonl:2:12, row 2", "control character"),
        (ROW + '{"text": "b", "label": ' + "[" * 100_000 + "\n", "a.jsonl:2, row 2", "nested too deeply"),
        (ROW + "{'text': 'b'}\n", "a.jsonl:2:2, row 2", "property name"),
        ("[\n" + ROW + "]\n", "a.jsonl:1", "one JSON array"),
        ("{}\n", "a.jsonl:1, row 1", "no keys"),
        ("", "a.jsonl", "empty (0 bytes)"),
        ("\n\n", "a.jsonl", "no rows"),
    ],
)
def test_json_lines_that_are_refused(write: Any, refused: Any, text: str, where: str, what: str) -> None:
    error = refused(read, write("a.jsonl", text), DataConfig())
    assert what in error.what and error.where == where


def test_a_type_that_changes_behind_a_batch(write: Any, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_cli.data.json_lines.BATCH", 2)
    error = refused(read, write("a.jsonl", ROW * 3 + '{"text": "b", "label": "x"}\n' * 2), DataConfig())
    assert "'label'" in error.what and error.where.startswith("a.jsonl:4")


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ('[\n{"text": "a"},\n{"text": "b"\n]', "a.json:4:1", "expecting ',' delimiter"),
        ('[\n{"text": "a"},\n]', "a.json:3:1", "expecting value"),
        ('[\n{"text": "a"}\n{"text": "b"}]', "a.json:3:1", "expecting ',' or ']'"),
        ('[{"text": "a"}', "a.json:1:15", "ends inside"),
        ('[{"text": "a"}, {"te', "a.json:1:18", "unterminated"),
        ('[{"text": "a"}] x', "a.json:1:17", "second value"),
        ('[{"text": "a"}, 3]', "a.json:1, row 2", "a whole number, not an object"),
        ('{\n"text": [{"text": "a"}]}', "a.json:1:1", "not a list"),
        ('{\n"data": [{"text": "a"}]}', "a.json:1", "a list in its key 'data'"),
        ('{"version": 1,\n"train": [\n{"text": "a"}],"test": [{"text": "b"}]}', "a.json:1", "key 'train' and key 'test'"),
        ('{"data": [{"text": "a"}]}', "a.json:1", "a list in its key 'data'"),
        ('{"version": 1, "data": [{"text": "a", "label": 1}]}\n', "a.json:1", "a list in its key 'data'"),
        ("[]", "a.json", "no rows"),
        ("", "a.json", "empty"),
        ('[{"text": "a", "text": "b"}]', "a.json:1:2", "stands twice"),
    ],
)
def test_json_arrays_that_are_refused(write: Any, refused: Any, text: str, where: str, what: str) -> None:
    error = refused(read, write("a.json", text), DataConfig())
    assert what in error.what and error.where == where


def test_a_value_that_no_column_holds_is_mended_by_its_own_fix(write: Any, refused: Any) -> None:
    cases = (("1", "9" * 400, "as text"), ('"x"', '"\\ud800"', "both halves"), ("1", '"x"', "one type in every row"))
    for first, second, fix in cases:
        error = refused(read, write("a.jsonl", f'{{"label": {first}}}\n{{"label": {second}}}\n'), DataConfig())
        assert fix in error.fix and "'label'" in error.what and error.where == "a.jsonl:2, row 2"


def test_one_conversation_is_a_row(write: Any) -> None:
    assert len(read(write("a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n'), DataConfig())) == 1
