"""The shipped corpora: counts, balance, allowed values, and no text that nearly stands twice."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune_cli import corpora
from finetune_cli.errors import UserError

SPLITS = ("train", "validation", "test")
ROWS = {"reviews": (1476, 216, 432), "reviews_zh": (306, 36, 90)}
LABELS = {"negative", "neutral", "positive"}
KINDS = {"book", "clothing", "film", "gadget", "hotel", "restaurant"}
ASPECTS = {"comfort", "look", "price", "quality", "service", "speed"}
STARS = {"negative": {1, 2}, "neutral": {2, 3, 4}, "positive": {4, 5}}


def read(name: str, split: str) -> list[dict[str, Any]]:
    text = corpora.path(f"corpus:{name}/{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", ROWS)
def test_rows_and_values(name: str) -> None:
    for split, count in zip(SPLITS, ROWS[name], strict=True):
        rows = read(name, split)
        assert len(rows) == count
        for row in rows:
            assert list(row) == ["text", "label", "kind", "stars", "aspects"]
            assert row["label"] in LABELS and row["kind"] in KINDS and row["stars"] in STARS[row["label"]]
            assert 1 <= len(row["aspects"]) <= 3 and set(row["aspects"]) <= ASPECTS and len(set(row["aspects"])) == len(row["aspects"])
            assert row["text"] == row["text"].strip() and row["text"].isprintable()


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("split", SPLITS)
def test_every_kind_has_every_label_equally_often(name: str, split: str) -> None:
    counts = Counter((row["kind"], row["label"]) for row in read(name, split))
    assert len(counts) == len(KINDS) * len(LABELS) and len(set(counts.values())) == 1


@pytest.mark.parametrize("name", ROWS)
def test_files_are_shuffled(name: str) -> None:
    labels = [row["label"] for row in read(name, "train")]
    assert max(len(run.group()) for run in re.finditer(r"(.)\1*", "".join(label[2] for label in labels))) < 12


@pytest.mark.parametrize("name", ROWS)
def test_no_text_names_its_label_or_nearly_stands_twice(name: str) -> None:
    texts = [row["text"] for split in SPLITS for row in read(name, split)]
    assert not [text for text in texts if re.search(r"positive|negative|neutral|正面|负面|中性", text, re.IGNORECASE)]
    size = 5 if name == "reviews" else 3
    assert most_alike([words(text) for text in texts]) < 0.35
    assert most_alike([pieces(text, size) for text in texts]) < 0.25


def test_the_measure_finds_a_near_duplicate() -> None:
    a, b = "The lift stopped twice and nobody came.", "The lift stopped twice, and nobody ever came!"
    assert most_alike([words(a), words(b), words("Not at all alike")]) > 0.6
    assert most_alike([pieces(a, 5), pieces(b, 5), pieces("Not at all alike", 5)]) > 0.5


def test_a_wrong_name_is_told_the_near_one() -> None:
    with pytest.raises(UserError, match="revews/train.jsonl") as error:
        corpora.path("corpus:revews/train.jsonl")
    assert "corpus:reviews/train.jsonl" in error.value.fix
    with pytest.raises(UserError) as error:
        corpora.path("corpus:reviews")
    assert error.value.fix.count("corpus:reviews/") == 3


@pytest.mark.parametrize("name", ["../errors.py", "reviews/../../errors.py", "/etc/passwd", "README.md", ""])
def test_only_corpus_files_can_be_named(name: str) -> None:
    with pytest.raises(UserError):
        corpora.path(name)


def test_the_page_tells_the_true_counts() -> None:
    page = (Path(corpora.__file__).parent / "README.md").read_text(encoding="utf-8")
    for name, counts in ROWS.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
        assert [int(n.replace(",", "")) for n in re.findall(r"\b[\d,]+\b", row)] == [sum(counts), *counts]


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z']+|[\u4e00-\u9fff]", text.lower()))


def pieces(text: str, size: int) -> set[str]:
    text = re.sub(r"\s+", " ", re.sub(r"[^\w\s]", "", text.lower()))
    return {text[i : i + size] for i in range(max(1, len(text) - size + 1))}


def most_alike(sets: list[set[str]]) -> float:
    """The largest Jaccard similarity of two of the sets."""
    number = {item: i for i, item in enumerate(sorted(set(chain.from_iterable(sets))))}
    sizes, best = np.array([len(s) for s in sets]), 0.0
    holders: list[list[int]] = [[] for _ in number]
    for i, items in enumerate(sets):
        for item in items:
            holders[number[item]].append(i)
    for i, items in enumerate(sets):
        shared = np.bincount(np.concatenate([holders[number[item]] for item in items]), minlength=len(sets))
        shared[i] = 0
        best = max(best, float((shared / (sizes + sizes[i] - shared)).max()))
    return best
