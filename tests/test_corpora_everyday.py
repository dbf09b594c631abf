"""The shipped sentence pairs: counts, form, no sentence twice, and words of test that a model can have learnt."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_cli import corpora

ROWS = {"train": 357, "validation": 50, "test": 80}


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[dict[str, str]]]:
    def read(split: str) -> Iterator[dict[str, str]]:
        for line in corpora.path(f"corpus:everyday_de/{split}.jsonl").read_text(encoding="utf-8").splitlines():
            yield json.loads(line)

    return {split: list(read(split)) for split in ROWS}


def words(rows: list[dict[str, str]]) -> list[str]:
    return [word for row in rows for word in re.findall(r"\w+", row["de"].lower())]


def test_counts_and_form(pairs: dict[str, list[dict[str, str]]]) -> None:
    assert {split: len(rows) for split, rows in pairs.items()} == ROWS
    for rows in pairs.values():
        for row in rows:
            assert list(row) == ["en", "de"]
            for text in row.values():
                assert text == text.strip() and text.isprintable() and text[-1] in ".?" and 2 <= len(text.split()) <= 12
            assert (row["en"][-1] == "?") == (row["de"][-1] == "?")
    folder = Path(corpora.__file__).parent / "everyday_de"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 300_000


def test_no_sentence_stands_twice(pairs: dict[str, list[dict[str, str]]]) -> None:
    sentences = [row["en"].casefold() for rows in pairs.values() for row in rows]
    assert len(set(sentences)) == len(sentences)


def test_the_page_tells_the_true_counts(pairs: dict[str, list[dict[str, str]]]) -> None:
    page = (Path(corpora.__file__).parent / "everyday_de" / "README.md").read_text(encoding="utf-8")
    for split, count in ROWS.items():
        assert f"| `{split}.jsonl` | {count} |" in page
    known, wanted = set(words(pairs["train"])), words(pairs["test"])
    assert (
        f"({len(known)} different German words in train; {sum(w in known for w in wanted) / len(wanted):.0%} of".replace("%", " %") in page
    )
    assert json.loads(page[page.index('{"en"') :].splitlines()[0]) in [row for rows in pairs.values() for row in rows]
