"""The shipped corpus of named entities: counts, offsets, and test names that cannot be known from train."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from finetune_cli import corpora

SPLITS = ("train", "validation", "test")
ROWS = {"train": 436, "validation": 73, "test": 144}
TYPES = ("PER", "ORG", "LOC", "PROD")
AT_LEAST = {"train": 60, "validation": 15, "test": 15}


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[dict[str, Any]]]:
    return {split: read(split) for split in SPLITS}


def read(split: str) -> list[dict[str, Any]]:
    text = corpora.path(f"corpus:entities/{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def names(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Every marked string with its type."""
    return [(row["text"][e["start"] : e["end"]], e["label"]) for row in rows for e in row["entities"]]


def pieces(text: str) -> set[str]:
    text = re.sub(r"\s+", " ", re.sub(r"[^\w\s]", "", text.lower()))
    return {text[i : i + 5] for i in range(max(1, len(text) - 4))}


def alike(a: set[str], b: set[str]) -> float:
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


@pytest.mark.parametrize("split", SPLITS)
def test_rows_and_offsets(corpus: dict[str, list[dict[str, Any]]], split: str) -> None:
    assert len(corpus[split]) == ROWS[split]
    for row in corpus[split]:
        text, end = row["text"], 0
        assert list(row) == ["text", "entities"] and text == text.strip() and text.isprintable() and "  " not in text
        assert 6 <= len(text.split()) <= 28
        for entity in row["entities"]:
            assert list(entity) == ["start", "end", "label"] and entity["label"] in TYPES
            assert end <= entity["start"] < entity["end"] <= len(text), "in order, without overlap, inside the text"
            start, end = entity["start"], entity["end"]
            assert text[start:end] == text[start:end].strip() and len(text[start:end].split()) <= 6
            assert not text[start - 1 : start].isalnum() and not text[end : end + 1].isalnum(), "a name is whole words"


@pytest.mark.parametrize("split", SPLITS)
def test_balance(corpus: dict[str, list[dict[str, Any]]], split: str) -> None:
    rows = corpus[split]
    counts = Counter(label for _, label in names(rows))
    assert set(counts) == set(TYPES) and min(counts.values()) >= AT_LEAST[split]
    assert 0.09 <= sum(not row["entities"] for row in rows) / len(rows) <= 0.15
    assert max(len(row["entities"]) for row in rows) >= 3


def test_no_sentence_nearly_stands_twice(corpus: dict[str, list[dict[str, Any]]]) -> None:
    texts = [row["text"] for split in SPLITS for row in corpus[split]]
    assert len({text.casefold() for text in texts}) == len(texts)
    assert max(alike(a, b) for a, b in combinations([pieces(text) for text in texts], 2)) < 0.25


def test_the_measure_finds_a_near_duplicate() -> None:
    assert alike(pieces("The lift stopped twice and nobody came."), pieces("The lift stopped twice, and nobody ever came!")) > 0.5


@pytest.mark.parametrize("split", ["validation", "test"])
def test_most_names_are_new(corpus: dict[str, list[dict[str, Any]]], split: str) -> None:
    known = {name.casefold() for name, _ in names(corpus["train"])}
    mentions = [name.casefold() for name, _ in names(corpus[split])]
    for here in (mentions, sorted(set(mentions))):
        assert sum(name not in known for name in here) / len(here) >= 0.6


def test_some_names_have_several_types(corpus: dict[str, list[dict[str, Any]]]) -> None:
    types: dict[str, set[str]] = {}
    for name, label in names([row for split in SPLITS for row in corpus[split]]):
        types.setdefault(name.casefold(), set()).add(label)
    assert sum(len(found) > 1 for found in types.values()) >= 40


def test_the_page_tells_the_true_counts(corpus: dict[str, list[dict[str, Any]]]) -> None:
    page = (Path(corpora.__file__).parent / "entities" / "README.md").read_text(encoding="utf-8")
    known = {name.casefold() for name, _ in names(corpus["train"])}
    for split in SPLITS:
        found = names(corpus[split])
        counts = Counter(label for _, label in found)
        row = next(line for line in page.splitlines() if line.startswith(f"| `{split}.jsonl`"))
        true = [ROWS[split], sum(not r["entities"] for r in corpus[split]), *(counts[label] for label in TYPES), len(found)]
        if split != "train":
            true.append(round(100 * sum(name.casefold() not in known for name, _ in found) / len(found)))
        assert [int(n) for n in re.findall(r"\d+", row)] == true
    start = page.index('{"text"')
    assert json.JSONDecoder().raw_decode(page[start:])[0] in corpus["train"]
