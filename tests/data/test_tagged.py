"""Every form of marked names becomes the same words and tags; what cannot stand is refused or mended, and said."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_cli.config.schema import DataConfig
from finetune_cli.data import Rows, read
from finetune_cli.data.tagged import ENDS, STARTS, Policy, Reading, arrange
from finetune_cli.data.tags import Scheme, spans, write
from finetune_cli.data.words import cut, join
from finetune_cli.errors import UserError

Write = Callable[..., str]
WORDS = [["Ada", "Lovelace", "met", "Bo", "Li", "Oslo", "."], ["no", "name"], ["Oslo", "Rome"]]
IOB2 = [["B-PER", "I-PER", "O", "B-PER", "B-PER", "B-LOC", "O"], ["O", "O"], ["B-LOC", "B-LOC"]]
SPANS = [spans(tags, Scheme.iob2) for tags in IOB2]


def places(words: list[str]) -> list[tuple[int, int]]:
    return join(words)[1]


def in_characters(row: int, last: int = 0) -> list[tuple[int, int, str]]:
    """The spans of a row in its joined text; ``last`` -1: ends as inclusive ones are written."""
    at = places(WORDS[row])
    return [(at[start][0], at[end - 1][1] + last, name) for start, end, name in SPANS[row]]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def columns(scheme: Scheme, parted: str = " ") -> str:
    blocks = []
    for words, found in zip(WORDS, SPANS, strict=True):
        tags = write(found, len(words), scheme)
        blocks.append("".join(f"{word}{parted}X{parted}{tag}\n" for word, tag in zip(words, tags, strict=True)))
    return "\n".join(blocks)


def texts(keys: tuple[str, str, str] | None = None, last: int = 0, column: str = "entities") -> str:
    made = []
    for row, words in enumerate(WORDS):
        found = [list(span) if keys is None else dict(zip(keys, span, strict=True)) for span in in_characters(row, last)]
        made.append({"text": join(words)[0], column: found})
    return lines(made)


FORMS: dict[str, tuple[str, str, Reading]] = {
    **{
        scheme.value: (f"a.{scheme.value}", columns(scheme), Reading())
        for scheme in Scheme
        if scheme not in (Scheme.io, Scheme.iob1, Scheme.iobes)
    },
    "iobes": ("a.iobes", columns(Scheme.iobes), Reading(None, Policy.strict)),
    "iob1": ("eng.train", columns(Scheme.iob1), Reading()),
    "tabs": ("a.conll", columns(Scheme.iob2, "\t"), Reading(Scheme.iob2, Policy.strict)),
    "words and tags": ("a.jsonl", lines([{"tokens": w, "ner_tags": t} for w, t in zip(WORDS, IOB2, strict=True)]), Reading()),
    "words and spans": (
        "a.jsonl",
        lines([{"words": w, "entities": [{"start": a, "end": b, "type": t} for a, b, t in s]} for w, s in zip(WORDS, SPANS, strict=True)]),
        Reading(),
    ),
    "spans": ("a.jsonl", texts(("start", "end", "label")), Reading()),
    "spans of another kind": ("a.jsonl", texts(("start_offset", "end_offset", "entity"), column="spans"), Reading(None, Policy.strict)),
    "triples": ("a.jsonl", texts(), Reading()),
    "inclusive": ("a.jsonl", texts(("start", "end", "type"), last=-1), Reading(None, Policy.auto, inclusive=True)),
    "inclusive triples": ("a.json", "[" + ",".join(texts(last=-1).split("\n")[:-1]) + "]", Reading(None, Policy.auto, inclusive=True)),
}


def tagged(rows: Rows, reading: Reading, **options: Any) -> tuple[list[str], list[list[str]], list[list[str]], list[str]]:
    """(texts, words, tags, notes)."""
    made, roles, notes = arrange(rows, DataConfig(**options), reading, labelled=True)
    text = made.column(roles.text).to_pylist()
    starts, ends = (made.column(name).to_pylist() for name in (STARTS, ENDS))
    words = [[t[a:b] for a, b in zip(s, e, strict=True)] for t, s, e in zip(text, starts, ends, strict=True)]
    return text, words, made.column(roles.labels[0]).to_pylist(), notes


@pytest.mark.parametrize("form", FORMS)
def test_every_form_says_the_same(form: str, write: Write) -> None:
    name, content, reading = FORMS[form]
    text, words, found, notes = tagged(read(write(name, content), DataConfig()), reading)
    assert text == ["Ada Lovelace met Bo Li Oslo .", "no name", "Oslo Rome"]
    assert (words, found) == (WORDS, IOB2)
    assert not any("misplaced" in note for note in notes)


def test_the_columns_that_were_found_find_themselves_again(write: Write) -> None:
    for name, content, _ in (FORMS["words and tags"], FORMS["triples"], FORMS["iob1"]):
        rows = read(write(name, content), DataConfig())
        _, roles, _ = arrange(rows, DataConfig(), Reading(), labelled=True)
        _, again, notes = arrange(rows, DataConfig(**roles.options), Reading(), labelled=True)
        assert again.options == roles.options and not any("by its name" in note or "the last" in note for note in notes)


def test_numbers_have_names(write: Write) -> None:
    rows = read(write("a.jsonl", lines([{"tokens": ["EU", "is"], "tags": [1, 0]}])), DataConfig())
    assert tagged(rows, Reading(), label_names=["O", "B-ORG"])[2] == [["B-ORG", "O"]]
    rows = read(write("b.jsonl", lines([{"text": "EU is", "spans": [[0, 2, 1]]}])), DataConfig())
    assert tagged(rows, Reading(), label_names=["ORG", "LOC"])[2] == [["B-LOC", "O"]]


def test_misplaced_tags_are_counted_with_their_own_line(write: Write) -> None:
    rows = read(write("a.conll", "a O\nb I-X\nc B-X\n\nd B-X\nd I-Y\n"), DataConfig())
    _, _, found, notes = tagged(rows, Reading(Scheme.iob2))
    assert found == [["O", "B-X", "B-X"], ["B-X", "B-Y"]]
    assert notes[-1].startswith("2 misplaced tags read as conlleval does (first: a.conll:2, row 1, word 2: I-X")
    with pytest.raises(UserError) as caught:
        tagged(rows, Reading(Scheme.iob2, Policy.strict))
    assert caught.value.where == "a.conll:2, row 1, word 2"


def test_spans_that_cut_words_are_refused_or_mended(write: Write) -> None:
    row = {"text": "Porto Alegre won in Rome", "spans": [[0, 9, "ORG"], [2, 5, "LOC"], [20, 23, "LOC"]]}
    rows = read(write("a.jsonl", lines([row])), DataConfig())
    for policy in (Policy.auto, Policy.strict):
        with pytest.raises(UserError, match="cuts the word 'Alegre'"):
            tagged(rows, Reading(None, policy))
    _, _, found, notes = tagged(rows, Reading(None, Policy.repair))
    assert found == [["B-ORG", "I-ORG", "O", "O", "B-LOC"]]
    assert notes[-1].startswith("4 spans set to whole words, or left out under a longer one (first: a.jsonl:1, row 1: 0 to 9)")


def test_a_row_without_a_cell_has_no_tags_and_one_with_an_empty_list_no_names(write: Write) -> None:
    rows = read(
        write("a.jsonl", lines([{"text": "a b", "spans": []}, {"text": "c", "spans": None}, {"text": "", "spans": []}])), DataConfig()
    )
    assert tagged(rows, Reading())[2] == [["O", "O"], None, []]


def test_a_name_without_a_type_gets_one(write: Write) -> None:
    rows = read(write("a.conll", "EU B\nis O\n\na B\nb I\n"), DataConfig())
    assert tagged(rows, Reading())[2] == [["B-ENTITY", "O"], ["B-ENTITY", "I-ENTITY"]]


# words ------------------------------------------------------------------------------------------------------------------------


@given(st.text())
def test_every_visible_character_is_in_one_word(text: str) -> None:
    found = cut(text)
    assert all(start < end for start, end in found) and all(a[1] <= b[0] for a, b in pairwise(found))
    covered = {i for start, end in found for i in range(start, end)}
    assert all(text[i].isspace() for i in range(len(text)) if i not in covered)
    assert not any(text[start].isspace() for start, _ in found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Dr. O'Neill paid 100% (twice)!", ["Dr", ".", "O", "'", "Neill", "paid", "100", "%", "(", "twice", ")", "!"]),
        ("上海2号线,ok", ["上", "海", "2", "号", "线", ",", "ok"]),
        ("foo_bar a\u0301b नमस्ते", ["foo", "_", "bar", "a\u0301b", "नमस्ते"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        (" \t", []),
    ],
)
def test_the_rule_by_example(text: str, words: list[str]) -> None:
    assert [text[start:end] for start, end in cut(text)] == words


@given(st.lists(st.text(min_size=1)))
def test_joined_words_are_where_they_are_said_to_be(words: list[str]) -> None:
    text, found = join(words)
    assert [text[start:end] for start, end in found] == words


def test_characters_are_joined_without_spaces() -> None:
    assert join(["1", "9", "年", "A"])[0] == "19年A" and join(["1", "9"])[0] == "1 9"
    assert join(["中国", "and", "Rome"])[0] == "中国and Rome"
