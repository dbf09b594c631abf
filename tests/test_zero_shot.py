"""zero-shot-classification is transformers' pipeline of that name: the same scores from a plain NLI model, in predict, eval and train."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from ran import Ran, labelled_rows, write_rows

from finetune_cli import models
from finetune_cli.config import ModelConfig

LABELS = ["food", "travel", "politics"]
TASK = ["task=zero-shot-classification", "device=cpu", "device.threads=1", "device.precision=fp32"]
TEXTS = ["the soup was late and dull", "a quick train", "the usual square garden, plain and grey and standard"]


@pytest.fixture(scope="module")
def nli(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with the three classes of natural language inference, in an order of its own."""
    folder = tmp_path_factory.mktemp("nli")
    told = (row["text"] for row in labelled_rows(200, ("negative", "neutral", "positive")))
    tokenizer = models.train_tokenizer(told, ModelConfig(shape={"vocabulary": 300}), "encoder")
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": len(tokenizer)}
    names = {0: "ENTAILMENT", 1: "neutral", 2: "contradiction"}
    config = transformers.BertConfig(**shape, id2label=names, label2id={v: k for k, v in names.items()})
    model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.ndim > 1 else None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def peer(folder: Path, labels: list[str], template: str) -> list[dict[str, float]]:
    """What transformers' own pipeline gives."""
    pipe: Any = transformers.pipeline("zero-shot-classification", model=str(folder), device="cpu")
    answers = pipe(TEXTS, candidate_labels=labels, hypothesis_template=template)
    return [dict(zip(a["labels"], a["scores"], strict=True)) for a in answers]


def test_predict_is_the_pipeline_of_that_name(nli: Path, ftune_inside: Callable[..., Ran]) -> None:
    keys = [f"task.labels=[{','.join(LABELS)}]", "task.hypothesis='It is about {label}!'"]
    found = ftune_inside("predict", nli, *TASK, *keys, stdin="\n".join(TEXTS) + "\n").ok().lines
    expected = peer(nli, LABELS, "It is about {}!")
    assert len({json.dumps(row) for row in expected}) == len(TEXTS)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["probabilities"] == pytest.approx(theirs, abs=2e-5)
        assert ours["label"] == max(theirs, key=theirs.__getitem__)


def test_no_step_scores_and_exports_the_model_itself(nli: Path, ftune_inside: Callable[..., Ran], tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.csv", labelled_rows(30))
    test = write_rows(tmp_path / "test.csv", labelled_rows(20, shift=30))
    data = [f"data.train={file}", f"data.test={test}", "data.validation=null"]
    ran = ftune_inside("train", *TASK, f"model.path={nli}", *data, "train.steps=0").ok()
    assert "stays random" not in ran.err
    before, after = (transformers.AutoModelForSequenceClassification.from_pretrained(p) for p in (nli, ran.run / "model"))
    assert all(torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True))
    assert after.config.id2label == before.config.id2label
    trained = json.loads((ran.run / "metrics.json").read_text())["test"]
    assert ftune_inside("eval", ran.run).ok().json["test"] == trained
    plain = ftune_inside("eval", nli, *TASK, "task.labels=[negative,positive]", f"data.test={test}").ok().json["test"]
    assert plain["accuracy"] == trained["accuracy"]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ([], "no labels to choose from"),
        (["task.labels=[a,a]"], "give each once"),
        (["task.labels=[a,b]", "task.hypothesis='It is so.'"], "{label}"),
    ],
)
def test_labels_and_hypotheses_that_cannot_be_used(nli: Path, ftune_inside: Callable[..., Ran], keys: list[str], told: str) -> None:
    assert told in "\n".join(ftune_inside("predict", nli, *TASK, *keys, stdin="a text\n").fails(2))


def test_a_model_without_entailment_is_refused(ftune_inside: Callable[..., Ran], nli: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(nli)
    model.config.id2label = {0: "good", 1: "bad", 2: "so-so"}
    model.save_pretrained(tmp_path / "other")
    transformers.AutoTokenizer.from_pretrained(nli).save_pretrained(tmp_path / "other")
    told = ftune_inside("predict", tmp_path / "other", *TASK, "task.labels=[a,b]", stdin="a text\n").fails(2)
    assert "judges no hypotheses" in told[0] and "good" in told[0]
