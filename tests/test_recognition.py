"""Which task a plain Hugging Face model is for, told by the tasks themselves from its config.json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_cli.tasks import recognise, tasks

ROOT = Path(__file__).parents[1]
HEADS = [
    ("BertForSequenceClassification", {"id2label": {"0": "a", "1": "b"}}, "text-classification"),
    ("BertForSequenceClassification", {}, "text-classification"),
    ("BertForSequenceClassification", {"id2label": {"0": "x"}}, "text-regression"),
    ("BertForSequenceClassification", {"num_labels": 1}, "text-regression"),
    ("BertForSequenceClassification", {"id2label": {"0": "x", "1": "y"}, "problem_type": "regression"}, "text-regression"),
    ("BertForSequenceClassification", {"id2label": {"0": "entailment", "1": "neutral", "2": "contradiction"}}, "text-classification"),
    ("RobertaForTokenClassification", {"id2label": {"0": "O"}}, "token-classification"),
    ("DistilBertForMaskedLM", {}, "fill-mask"),
    ("T5ForConditionalGeneration", {}, "text2text-generation"),
    ("MarianMTModel", {}, "text2text-generation"),
    ("LlamaForCausalLM", {}, "text-generation"),
    ("GPT2LMHeadModel", {}, "text-generation"),
    ("BertModel", {"id2label": {"0": "x"}}, "text-classification"),
]
ODD: list[dict[str, Any]] = [
    {},
    {"architectures": []},
    {"architectures": None},
    {"architectures": "BertForMaskedLM"},
    {"architectures": {"a": 1}},
    {"architectures": [None]},
    {"architectures": ["BertForSequenceClassification"], "id2label": 3, "num_labels": "x", "problem_type": []},
]


@pytest.mark.parametrize(("head", "more", "task"), HEADS, ids=[f"{head}-{task}" for head, _, task in HEADS])
def test_a_task_knows_its_models(head: str, more: dict[str, Any], task: str) -> None:
    assert recognise({"architectures": [head], **more}) == task


@pytest.mark.parametrize("config", ODD, ids=json.dumps)
def test_any_json_is_read(config: dict[str, Any]) -> None:
    assert recognise(config) == "text-classification"


def test_a_head_that_two_tasks_claim_is_decided_by_precedence() -> None:
    """Of two tasks on one head one must look closer, or the names would decide."""
    claims = [(head, task.precedence) for task in tasks().values() for head in task.heads]
    assert len(claims) == len(set(claims))
    assert [name for name, task in tasks().items() if task.fallback] == ["text-classification"]


OTHERS = """
from finetune_cli.tasks.text_classification import TextClassification, TextClassificationConfig
class A(TextClassification):  # stands before text-classification by name, and claims what it claims
    name = "a-classification"
class B(TextClassification):
    name = "b-classification"
    heads = ("ForPrettyLabels",)
class C(TextClassification):
    name = "c-classification"
    precedence = 5
    @classmethod
    def recognises(cls, model_config):
        return model_config.get("mine") is True
"""
ASKS = """
import json, sys
from finetune_cli.tasks import recognise
for config in json.loads(sys.argv[1]):
    print(recognise(config))
print(*[name for name in ("torch", "transformers", "numpy") if name in sys.modules])
"""


def test_tasks_of_other_packages_take_part(tmp_path: Path) -> None:
    (tmp_path / "others.py").write_text(OTHERS)
    about = tmp_path / "others-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[ftune.tasks]\na = others:A\nb = others:B\nc = others:C\n")
    plain = {"architectures": ["BertForSequenceClassification"]}
    asked = [plain, {"architectures": ["BertForPrettyLabels"]}, {**plain, "mine": True}, {}]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", ASKS, json.dumps(asked)], env=env, capture_output=True, text=True, timeout=60, check=True)
    *found, heavy = done.stdout.splitlines()
    assert found == ["text-classification", "b-classification", "c-classification", "text-classification"]
    assert heavy == ""
