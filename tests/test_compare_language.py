"""The comparison of the language tasks with Trainer: what its peer reads and masks by itself is what ftune reads and masks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from finetune_cli import models
from finetune_cli.batching import BatchPlan, epoch_order
from finetune_cli.config.schema import DataConfig, ModelConfig
from finetune_cli.data import load_splits
from finetune_cli.data.conversations import find_form, with_conversations
from finetune_cli.data.rows import of_table
from finetune_cli.tasks import get

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import compare_language
import language_peers
import language_sets

GLAIVE = [
    {
        "conversations": [
            {"from": "human", "value": "How far is the moon?"},
            {"from": "function_call", "value": '{"name": "distance", "arguments": {"to": "moon", "exact": true}}'},
            {"from": "observation", "value": '{"km": 384400}'},
            {"from": "gpt", "value": "It is 384,400 km away."},
        ],
        "tools": '[{"name": "distance", "description": "how far", "parameters": {"type": "object"}}]',
    },
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello\n"}], "tools": "[]"},
]
ALPACA = [{"instruction": "Add.", "input": "1 and 2", "output": "3"}, {"instruction": "Say hi.", "input": "", "output": "hi"}]


@pytest.mark.parametrize(("cells", "read"), [(GLAIVE, language_sets.read_glaive), (ALPACA, language_sets.read_alpaca)])
def test_the_peer_learns_the_tokens_of_a_conversation_that_ftune_learns(cells: list[Any], read: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(cells), encoding="utf-8")
    texts = [json.dumps(cell) for cell in cells] * 3
    tokenizer = models.train_tokenizer(iter(texts), ModelConfig(shape={"vocabulary": 400, "positions": 512}), "decoder")
    rows = of_table(pa.Table.from_pylist(cells), "rows.json", np.arange(1, len(cells) + 1))
    form, _ = find_form(rows, DataConfig(), "auto")
    assert form is not None
    told, roles = with_conversations(rows, form, DataConfig())
    kind = get("text-generation")
    task = kind(kind.Config(), {"chat": True}).reading_with(tokenizer)
    ours = task.encode(told, roles, tokenizer, max_length=512, first_row=0).columns
    theirs = language_peers.examples(language_sets.SETS["chat"], tokenizer, read(file), {})
    for i, example in enumerate(theirs):
        ids, learnt = (ours[name].sequence(i) for name in ("input_ids", "supervised"))
        assert example["input_ids"] == ids.tolist()
        assert example["labels"] == np.where(learnt > 0, ids, language_peers.IGNORED).tolist()
        assert (learnt > 0).any()


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        ("I-PER I-PER B-PER O I-ORG I-LOC", "B-PER I-PER B-PER O B-ORG B-LOC"),
        ("B-NAME M-NAME E-NAME S-ORG S-ORG O", "B-NAME I-NAME I-NAME B-ORG B-ORG O"),
    ],
)
def test_the_peer_reads_the_tags_that_ftune_reads(tags: str, wanted: str, tmp_path: Path) -> None:
    assert language_sets.iob2(tags.split()) == wanted.split()
    file = tmp_path / "rows.conll"
    file.write_text("".join(f"w{i} {tag}\n" for i, tag in enumerate(tags.split())) + "\nalone O\n", encoding="utf-8")
    first, second = language_sets.read_columns(file)
    assert first == {"words": [f"w{i}" for i in range(6)], "tags": wanted.split()} and second["tags"] == ["O"]


def test_entities_become_the_tags_of_words() -> None:
    answer = {
        "text": "New York is by the sea",
        "entities": [{"start": 0, "end": 8, "label": "LOC"}, {"start": 19, "end": 22, "label": "X"}],
    }
    row = {"words": ["New", "York", "is", "by", "the", "sea"]}
    assert compare_language.tags(answer, row) == ["B-LOC", "I-LOC", "O", "O", "O", "B-X"]


@pytest.mark.parametrize("name", ["cner", "multi30k", "dialogsum"])
def test_the_files_of_a_set_are_cut_as_published(name: str, tmp_path: Path) -> None:
    kind, source = language_sets.SETS[name], tmp_path / name
    source.mkdir()
    for of in {*kind.names, *(n.replace(".en", ".de") for n in kind.names)}:
        cells = {
            "cner": "\n\n".join(f"字 B-NAME\n{i} E-NAME" for i in range(9)) + "\n\n",
            "multi30k": "".join(f"line {i}\n" for i in range(9)),
            "dialogsum": "".join(json.dumps({"dialogue": f"a {i}", "summary": f"s {i}", "summary1": f"t {i}"}) + "\n" for i in range(9)),
        }
        (source / of).write_text(cells[name], encoding="utf-8")
    train, test = (tmp_path / "cut" / of for of in kind.names)
    kind.cut(source, train, test, 5, 3)
    assert (len(kind.read(train)), len(kind.read(test))) == (5, 3)
    if name == "multi30k":
        rows = load_splits(DataConfig(train=str(train), validation=None, parallel="en:de"), seed=1).rows["train"]
        assert rows.column("text").to_pylist() == [row["text"] for row in kind.read(train)]


def test_curves_are_compared_where_both_sides_logged() -> None:
    assert compare_language.curves_apart([(10, 1.0), (20, 0.5), (23, 0.1)], [(10, 1.25), (20, 0.5)]) == 0.25


def test_the_peer_is_given_the_order_of_ftune() -> None:
    plan = BatchPlan(batch_size=4, micro_tokens=99, inference_tokens=99, order="shuffled", whole=False, reasons={})
    wanted = np.concatenate(epoch_order(np.ones(10, np.int64), plan=plan, seed=3, epoch=1)).tolist()
    assert compare_language.ftunes_order(3)(1, 10) == wanted
