"""zero-shot-classification: one text in, the label out whose hypothesis a model of natural language inference holds most likely.

A row becomes one example a label: the text, and a hypothesis such as "This text is about sport." As in transformers' pipeline of the same
name, the entailment logits of a row's examples are the logits of its labels. So any labels do, with a model that never saw them. Training
teaches a model which hypotheses hold (Wang et al. 2021, arXiv:2104.14690); ``train.steps=0`` scores and exports it as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from finetune_cli.config.schema import DataConfig, TaskConfig, option
from finetune_cli.errors import UserError
from finetune_cli.tasks.base import Batch, Evaluation, Facts, Flat, Layout, Outputs, Prediction, Score, Task
from finetune_cli.tasks.text_classification import TextClassification, TextClassificationConfig
from finetune_cli.tasks.tokens import encode_sequences, lay_tokens

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from finetune_cli.data import Roles, Rows
    from finetune_cli.encoded import Columns, Examples
    from finetune_cli.tasks.sections import Section

PLACE = "{label}"
HYPOTHESIS = f"This text is about {PLACE}."


@dataclass(kw_only=True, slots=True)
class ZeroShotConfig(TaskConfig):
    """``task=zero-shot-classification``."""

    name: str = "zero-shot-classification"
    """One text in, one of any labels out, by a model of natural language inference."""
    labels: list[str] = option([])  # noqa: RUF009  # makes a dataclass field, not a shared default
    """The labels to choose from; where there are labelled training rows, their labels."""
    hypothesis: str | None = None
    """What is judged of a text for each label, which ``{label}`` stands for; null: as in training, else that the text is about it."""


@dataclass(frozen=True, slots=True)
class Judged:
    """Logits [B, C] of the model's own classes, and which of them say that a hypothesis holds and that it does not."""

    logits: Tensor
    holds: int
    fails: int


class ZeroShotClassification(Task[ZeroShotConfig]):
    """Facts: those of text-classification, from which everything after the logits is borrowed, and ``hypothesis``."""

    name = "zero-shot-classification"
    Config = ZeroShotConfig
    auto_class = "AutoModelForSequenceClassification"
    pipeline = "zero-shot-classification"
    pairs = False

    def __init__(self, config: ZeroShotConfig, facts: Facts, tokenizer: Any = None) -> None:
        super().__init__(config, facts, tokenizer)
        if PLACE not in self.hypothesis:
            raise UserError(f"the hypothesis names no label: {self.hypothesis!r}", where="task.hypothesis", fix=f"write {PLACE} into it")
        if not self.labels:
            raise UserError("there are no labels to choose from", where="task.labels", fix="task.labels=[sport,politics]")
        if len(set(self.labels)) < len(self.labels) or not all(label.strip() for label in self.labels):
            raise UserError(f"the labels are {self.labels}", where="task.labels", fix="give each once, and none that is empty")

    @property
    def labels(self) -> list[str]:
        """Label names in the order of the logits."""
        names: list[str] = list(self.config.labels) or self.facts["labels"]
        return names

    @property
    def hypothesis(self) -> str:
        """What is judged for each label."""
        told: str = self.config.hypothesis or self.facts["hypothesis"]
        return told

    @property
    def answering(self) -> TextClassification:
        """The same labels as a task whose logits are given."""
        cells = dict(zip(self.facts["labels"], self.facts["cells"], strict=True))
        facts = {**self.facts, "labels": self.labels, "cells": [cells.get(name, name) for name in self.labels]}
        return TextClassification(TextClassificationConfig(), facts)

    # -- rows ----------------------------------------------------------------------------------
    @classmethod
    def learn(cls, config: ZeroShotConfig, data: DataConfig, rows: Rows, roles: Roles) -> Facts:
        facts = TextClassification.learn(TextClassificationConfig(), data, rows, roles)
        if facts["multi"]:
            raise UserError("a row may have several labels; expected one", where=rows.files[0], fix="task=text-classification")
        if config.labels and (strange := [name for name in facts["labels"] if name not in config.labels]):
            raise UserError(
                f"the training rows have labels that task.labels lacks: {', '.join(map(repr, strange[:5]))}",
                where="task.labels",
                fix="name them too, or leave task.labels out",
            )
        return {**facts, "hypothesis": config.hypothesis or HYPOTHESIS}

    @classmethod
    def facts_of(cls, model_config: Any) -> Facts:
        if _class(model_config, "entail") is None:
            names = ", ".join(map(str, model_config.id2label.values()))
            raise UserError(
                f"the model judges no hypotheses: none of its classes ({names}) is entailment",
                where="ckpt",
                fix="name a model of natural language inference, or task=text-classification",
            )
        return {**TextClassification.facts_of(SimpleNamespace(id2label={}, problem_type=None)), "hypothesis": HYPOTHESIS}

    def read_targets(self, data: DataConfig, rows: Rows, roles: Roles) -> np.ndarray:
        return self.answering.read_targets(data, rows, roles)

    def label_cells(self, data: DataConfig, rows: Rows, roles: Roles) -> list[Any] | None:
        return self.answering.label_cells(data, rows, roles)

    def told_facts(self) -> list[tuple[str, str]]:
        return [("labels", ", ".join(self.labels[:40])), ("hypothesis", self.hypothesis)]

    def encode(self, rows: Rows, roles: Roles, tokenizer: Any, *, max_length: int, first_row: int, asked: bool = False) -> Examples:
        import numpy as np

        from finetune_cli.data import texts
        from finetune_cli.encoded import Examples

        hypotheses = [self.hypothesis.replace(PLACE, label) for label in self.labels]
        first = [text for text in texts(rows, roles.text) for _ in hypotheses]
        columns, counts = encode_sequences(tokenizer, first, hypotheses * len(rows), max_length=max_length)
        columns["candidate"] = np.tile(np.arange(len(hypotheses), dtype=np.int64), len(rows))
        return Examples(columns, np.repeat(np.arange(first_row, first_row + len(rows), dtype=np.int64), len(hypotheses)), counts)

    def collate(self, columns: Columns, targets: Any, layout: Layout, *, key: int) -> Batch:
        import numpy as np
        import torch

        candidates = columns["candidate"]
        inputs = lay_tokens(columns, layout)
        if targets is None:
            return Batch(inputs, None)
        assert isinstance(candidates, np.ndarray), "one candidate an example"
        return Batch(inputs, torch.from_numpy(np.asarray(targets) == candidates), {"loss": float(len(candidates))})

    # -- model ---------------------------------------------------------------------------------
    def head(self) -> dict[str, Any]:
        names = {0: "contradiction", 1: "entailment"}
        return {"num_labels": 2, "id2label": names, "label2id": {name: i for i, name in names.items()}}

    def configure(self, model_config: Any) -> None:
        if _class(model_config, "entail") is None:
            super().configure(model_config)

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        holds, logits = _class(model.config, "entail"), model(**batch.inputs).logits
        assert holds is not None, "the model was configured for this task"
        fails = next((i for i in (_class(model.config, name) for name in ("contra", "not")) if i is not None), int(holds == 0))
        return Judged(logits, holds, fails)

    def loss(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        import torch
        from torch.nn import functional as F

        assert batch.targets is not None, "a loss needs targets"
        wanted = torch.where(batch.targets, outputs.holds, outputs.fails)
        return {"loss": F.cross_entropy(outputs.logits.float(), wanted, reduction="sum")}

    def infer(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor | Flat], dict[str, Tensor]]:
        outputs = self.forward(model, batch)
        return {"entailment": outputs.logits[:, outputs.holds].float()}, self.loss(outputs, batch) if batch.targets is not None else {}

    def gather(self, outputs: Outputs, examples: Examples) -> tuple[Outputs, np.ndarray]:
        number = len(self.labels)
        return {"logits": outputs["entailment"].reshape(-1, number)}, examples.row[::number]

    def answers(self, outputs: Outputs) -> np.ndarray:
        logits: np.ndarray = outputs["logits"]
        return logits

    # -- results -------------------------------------------------------------------------------
    @property
    def monitor(self) -> str:
        return self.answering.monitor

    def metric_names(self) -> frozenset[str]:
        return self.answering.metric_names()

    def metrics(self, evaluation: Evaluation) -> dict[str, float]:
        return self.answering.metrics(evaluation)

    def score(self, evaluation: Evaluation) -> Score:
        return self.answering.score(evaluation)

    def decode(self, outputs: Outputs, rows: Rows, roles: Roles) -> Iterator[Prediction]:
        return self.answering.decode(outputs, rows, roles)

    def told(self, target: Any) -> Any:
        return self.answering.told(target)

    def baselines(self, train: tuple[Sequence[str], Any], test: tuple[Sequence[str], Any]) -> dict[str, dict[str, float]]:
        return self.answering.baselines(train, test)

    def sections(self, evaluation: Evaluation, rows: Rows, roles: Roles, *, lengths: np.ndarray) -> list[Section]:
        return self.answering.sections(evaluation, rows, roles, lengths=lengths)


TASK = ZeroShotClassification


def _class(model_config: Any, beginning: str) -> int | None:
    """The model's class whose name begins so, as transformers' pipeline finds it; None where there is none."""
    return next((int(i) for i, name in model_config.id2label.items() if str(name).lower().startswith(beginning)), None)
