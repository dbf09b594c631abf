"""The chat corpus: counts, form, and no conversation or question that stands twice."""

from __future__ import annotations

import json
from typing import Any

from finetune_cli import corpora

ROWS = {"train": 116, "validation": 22, "test": 22}


def read(split: str) -> list[list[dict[str, Any]]]:
    text = corpora.path(f"corpus:chat/{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["messages"] for line in text.splitlines()]


def test_every_row_is_a_conversation_that_ends_with_an_answer() -> None:
    for split, count in ROWS.items():
        found = read(split)
        assert len(found) == count
        for messages in found:
            said = messages[1:] if messages[0]["role"] == "system" else messages
            assert [m["role"] for m in said] == ["user", "assistant"] * (len(said) // 2) and said
            assert all(set(m) == {"role", "content"} and m["content"] == m["content"].strip() != "" for m in messages)


def test_nothing_stands_twice() -> None:
    found = [messages for split in ROWS for messages in read(split)]
    questions = [next(m["content"] for m in messages if m["role"] == "user") for messages in found]
    assert len(set(questions)) == len(found) == 160
    answers = [m["content"] for messages in found for m in messages if m["role"] == "assistant" and len(m["content"]) > 20]
    assert len(set(answers)) == len(answers)
