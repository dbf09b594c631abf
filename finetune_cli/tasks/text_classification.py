"""text-classification: one text or a pair in; one label of several, or any number of labels, out."""

# ruff: noqa: RUF009 (option() makes a dataclass field, not a shared default)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from finetune_cli.config.schema import DataConfig, TaskConfig, option
from finetune_cli.errors import UserError
from finetune_cli.tasks import contrastive
from finetune_cli.tasks.base import Batch, Evaluation, Facts, Flat, Layout, Outputs, Prediction, Score, Task
from finetune_cli.tasks.tokens import encode_texts

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from finetune_cli.data import Roles, Rows
    from finetune_cli.encoded import Columns, Examples
    from finetune_cli.tasks.sections import Section


class Labels(str, Enum):
    auto = "auto"
    single = "single"
    multi = "multi"


class FewShot(str, Enum):
    none = "none"
    contrastive = "contrastive"


class ZeroShot(str, Enum):
    none = "none"
    embedding = "embedding"


@dataclass(kw_only=True, slots=True)
class TextClassificationConfig(TaskConfig):
    """``task=text-classification``."""

    name: str = "text-classification"
    """One text or a pair in, labels out."""
    labels: Labels = Labels.auto
    """``single``: exactly one label a row; ``multi``: any number; auto: multi where a cell is a list or several columns are labels."""
    label_smoothing: float = option(0.0, least=0, below=1, applies="task.few_shot=none")
    """Share of the target that is spread over all labels."""
    class_weights: Any = None
    """null: every row counts alike; ``auto``: a label's rows count inversely to its frequency; or a weight by label name."""
    threshold: float = option(0.5, above=0, below=1)
    """Multi-label: probability from which a label is given."""
    few_shot: FewShot = option(FewShot.none, applies="model.pooling=mean|first")
    """``contrastive``: the encoder learns from pairs of rows and a logistic regression on its embeddings is the head (as in SetFit)."""
    zero_shot: ZeroShot = option(ZeroShot.none, applies="model.pooling=mean|first")
    """``embedding``: the head begins as the embeddings of the labels' descriptions; a few-shot head counts them as rows."""
    descriptions: dict[str, str] = option({}, applies="task.zero_shot=embedding")
    """What a label means, by label: ``{sport: news about sport}``; a label without one is described by its name."""


class TextClassification(Task[TextClassificationConfig]):
    """Facts: ``labels`` (names in the order of the logits), ``multi``, ``weights`` (one a label, or null)."""

    name = "text-classification"
    Config = TextClassificationConfig
    auto_class = "AutoModelForSequenceClassification"
    plain_texts = True
    pipeline = "text-classification"
    _embeds = False  # whether ``infer`` gives the embeddings that the head is fitted to

    # -- rows ----------------------------------------------------------------------------------
    @classmethod
    def learn(cls, config: TextClassificationConfig, data: DataConfig, rows: Rows, roles: Roles) -> Facts:
        from collections import Counter

        from finetune_cli.data import has_several_labels, label_cells, label_names

        cells = label_cells(rows, roles, data)
        multi = config.labels == Labels.multi or (config.labels == Labels.auto and has_several_labels(rows, roles, data))
        counts = Counter(label for cell in cells for label in cell)
        if not multi and (bad := next((i for i, cell in enumerate(cells) if len(cell) != 1), None)) is not None:
            raise UserError(
                f"a row has {len(cells[bad])} labels, expected one", where=rows.where(bad), fix="task.labels=multi, or mend the row"
            )
        if len(counts) < (1 if multi else 2):
            only = f"only one label, {next(iter(counts))!r}" if counts else "no label at all"
            raise UserError(f"the training rows hold {only}", where=rows.files[0], fix="give rows of at least two labels")
        names = label_names(data, list(counts))
        if multi and (config.few_shot != FewShot.none or config.zero_shot != ZeroShot.none):
            key = "task.few_shot" if config.few_shot != FewShot.none else "task.zero_shot"
            raise UserError(f"{key} is for one label a row, and a row may have several", where=key, fix=f"leave {key} out")
        known = sorted(counts, key=_natural) if len(roles.labels) == 1 else list(roles.labels)
        contrastive.descriptions(config.descriptions, [names.get(label, label) for label in known])
        return {
            "labels": [names.get(label, label) for label in known],
            "cells": known,
            "multi": multi,
            "weights": _weights(config.class_weights, [names.get(label, label) for label in known], [counts[k] for k in known]),
        }

    @classmethod
    def facts_of(cls, model_config: Any) -> Facts:
        names = [str(model_config.id2label[i]) for i in range(len(model_config.id2label))]
        multi = getattr(model_config, "problem_type", None) == "multi_label_classification"
        return {"labels": names, "cells": names, "multi": multi, "weights": None}

    @property
    def labels(self) -> list[str]:
        """Label names in the order of the logits."""
        names: list[str] = self.facts["labels"]
        return names

    @property
    def multi(self) -> bool:
        """Whether a row may have any number of labels."""
        return bool(self.facts["multi"])

    def read_targets(self, data: DataConfig, rows: Rows, roles: Roles) -> np.ndarray:
        import numpy as np

        from finetune_cli.data import label_cells, unknown_label

        index = {cell: i for i, cell in enumerate(self.facts["cells"])}
        index |= {name: i for i, name in enumerate(self.labels) if name not in index}
        cells = label_cells(rows, roles, data)
        for i, cell in enumerate(cells):
            if (strange := next((label for label in cell if label not in index), None)) is not None:
                raise unknown_label(strange, list(index), rows.where(i))
            if len(cell) != 1 and not self.multi:
                raise UserError(f"a row has {len(cell)} labels, expected one", where=rows.where(i), fix="mend the row")
        if not self.multi:
            return np.array([index[cell[0]] for cell in cells], np.int64)
        targets = np.zeros((len(cells), len(self.labels)), np.float32)
        for i, cell in enumerate(cells):
            targets[i, [index[label] for label in cell]] = 1
        return targets

    def label_cells(self, data: DataConfig, rows: Rows, roles: Roles) -> list[Any] | None:
        from finetune_cli.data import label_cells

        names = dict(zip(self.facts["cells"], self.labels, strict=True))
        return [[names.get(label, label) for label in cell] for cell in label_cells(rows, roles, data)]

    def told_facts(self) -> list[tuple[str, str]]:
        kind = "any number a row" if self.multi else "one a row"
        told = [("labels", f"{', '.join(f'{i} {name}' for i, name in enumerate(self.labels[:40]))} ({len(self.labels)}, {kind})")]
        if weights := self.facts["weights"]:
            told.append(("class weights", ", ".join(f"{name} {w:.3g}" for name, w in zip(self.labels, weights, strict=True))))
        return told

    def encode(self, rows: Rows, roles: Roles, tokenizer: Any, *, max_length: int, first_row: int, asked: bool = False) -> Examples:
        return encode_texts(rows, roles, tokenizer, max_length=max_length, first_row=first_row)

    def collate(self, columns: Columns, targets: Any, layout: Layout, *, key: int) -> Batch:
        import numpy as np
        import torch

        inputs = layout.lay({name: column for name, column in columns.items() if not isinstance(column, np.ndarray)})
        if targets is None:
            return Batch(inputs, None)
        weights = self.facts["weights"]
        count = float(len(targets)) if weights is None or self.multi else float(np.asarray(weights)[targets].sum())
        weights_of = {"loss": count} | ({"contrastive": contrastive.pairs(len(targets))} if self.contrastive else {})
        return Batch(inputs, torch.from_numpy(np.ascontiguousarray(targets)), weights_of)

    # -- model ---------------------------------------------------------------------------------
    def head(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {name: i for i, name in enumerate(self.labels)},
            "problem_type": "multi_label_classification" if self.multi else "single_label_classification",
        }

    @property
    def contrastive(self) -> bool:
        """Whether pairs of rows train the encoder, and the head is fitted."""
        return self.config.few_shot == FewShot.contrastive

    @property
    def rows_interact(self) -> bool:
        return self.contrastive

    def prepare(self, model: nn.Module) -> list[str]:
        known = self._described(model)
        return [] if known is None else contrastive.describe(model, known)

    def _described(self, model: nn.Module) -> np.ndarray | None:
        """Embeddings of the labels' descriptions, [K, H]; None where the task does not look at them."""
        if self.config.zero_shot == ZeroShot.none:
            return None
        return contrastive.embed(model, self.tokenizer, contrastive.descriptions(self.config.descriptions, self.labels))

    def fitting_head(self) -> Self | None:
        if not self.contrastive:
            return None
        task = self.knowing(self.facts)
        task._embeds = True
        return task

    def fit_head(self, model: nn.Module, evaluation: Evaluation) -> None:
        seen, targets = evaluation.outputs["embeddings"], evaluation.targets[evaluation.rows]
        contrastive.fit(model, seen, targets, weights=self.facts["weights"], known=self._described(model))

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        return contrastive.see(model, batch) if self.contrastive else super().forward(model, batch)

    def infer(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor | Flat], dict[str, Tensor]]:
        outputs = self.forward(model, batch)
        if self._embeds:
            return {"embeddings": outputs.embeddings.float()}, {}
        return {"logits": outputs.logits.float()}, self.label_loss(outputs, batch) if batch.targets is not None else {}

    def loss(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        if self.contrastive:
            assert batch.targets is not None, "a loss needs targets"
            return {"contrastive": contrastive.pair_loss(outputs.embeddings, batch.targets)}
        return self.label_loss(outputs, batch)

    def label_loss(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """Sum of the rows' cross-entropies: the loss of a head that gradients train, and what scoring reports of any head."""
        import torch
        from torch.nn import functional as F

        logits = outputs.logits.float()  # [B, K]
        smoothing, targets = self.config.label_smoothing, batch.targets
        assert targets is not None, "a loss needs targets"
        given = self.facts["weights"]
        weights = None if given is None else torch.tensor(given, dtype=torch.float32, device=logits.device)
        if self.multi:
            soft = targets * (1 - smoothing) + smoothing / 2
            losses = F.binary_cross_entropy_with_logits(logits, soft, weight=weights, reduction="none")
            return {"loss": losses.mean(-1).sum()}
        return {"loss": F.cross_entropy(logits, targets, weight=weights, label_smoothing=smoothing, reduction="sum")}

    def answers(self, outputs: Outputs) -> np.ndarray:
        logits: np.ndarray = outputs["logits"]
        return logits

    # -- results -------------------------------------------------------------------------------
    @property
    def monitor(self) -> str:
        return "f1_micro" if self.multi else "accuracy"

    def metric_names(self) -> frozenset[str]:
        averaged = {"f1_macro", "f1_micro", "f1_weighted", "precision_macro", "recall_macro"}
        both = {"loss", "accuracy", "roc_auc", "pr_auc", "log_loss", "ece", "brier"} | averaged
        if self.multi:
            return frozenset(both)
        return frozenset(both | {"mcc"} | ({"f1", "precision", "recall"} if len(self.labels) == 2 else set()))

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Softmax over labels, or a sigmoid of each label; float64 [N, K]."""
        import numpy as np

        x = logits.astype(np.float64)
        if self.multi:
            return np.exp(-np.logaddexp(0.0, -x))
        shifted = np.exp(x - x.max(-1, keepdims=True))
        result: np.ndarray = shifted / shifted.sum(-1, keepdims=True)
        return result

    def metrics(self, evaluation: Evaluation) -> dict[str, float]:
        from finetune_cli import metrics

        p = self.probabilities(evaluation.outputs["logits"])
        if self.multi:
            return metrics.multilabel(p, evaluation.targets, self.config.threshold)
        return metrics.classification(p, evaluation.targets, self.labels)

    def score(self, evaluation: Evaluation) -> Score:
        from finetune_cli import metrics

        p, y = self.probabilities(evaluation.outputs["logits"]), evaluation.targets
        if self.multi:
            threshold = self.config.threshold
            return metrics.score(lambda rows: metrics.multilabel_measures(p[rows], y[rows], threshold), len(y), seed=evaluation.seed)
        return metrics.score(lambda rows: metrics.classification_measures(p[rows], y[rows], self.labels), len(y), seed=evaluation.seed)

    def decode(self, outputs: Outputs, rows: Rows, roles: Roles) -> Iterator[Prediction]:
        for p in self.probabilities(outputs["logits"]):
            named = {name: round(float(value), 6) for name, value in zip(self.labels, p, strict=True)}
            if self.multi:
                given = [name for name, value in zip(self.labels, p, strict=True) if value >= self.config.threshold]
                yield {"labels": given, "probabilities": named}
            else:
                best = int(p.argmax())
                yield {"label": self.labels[best], "score": round(float(p[best]), 6), "probabilities": named}

    def told(self, target: Any) -> Any:
        if self.multi:
            return [name for name, has in zip(self.labels, target, strict=True) if has]
        return self.labels[int(target)]

    def baselines(self, train: tuple[Sequence[str], Any], test: tuple[Sequence[str], Any]) -> dict[str, dict[str, float]]:
        from finetune_cli import baselines

        if self.multi:
            return baselines.multilabel(*train, *test, threshold=self.config.threshold)
        return baselines.classification(*train, *test, names=self.labels)

    def sections(self, evaluation: Evaluation, rows: Rows, roles: Roles, *, lengths: np.ndarray) -> list[Section]:
        from finetune_cli.data import text_of
        from finetune_cli.tasks import findings

        texts = partial(text_of, rows, roles)
        p = self.probabilities(evaluation.outputs["logits"])
        if self.multi:
            return findings.of_multilabel(p, evaluation.targets, self.labels, self.config.threshold, texts, lengths)
        return findings.of_classification(p, evaluation.targets, self.labels, texts, lengths)


TASK = TextClassification


def _natural(label: str) -> tuple[int, float, str]:
    """Numbers in numeric order before words in alphabetic order."""
    try:
        return (0, float(label), label)
    except ValueError:
        return (1, 0.0, label)


def _weights(wanted: Any, labels: list[str], counts: list[int]) -> list[float] | None:
    """Weight of each label's rows; ``auto`` is inverse frequency, scaled so that the mean row weighs 1."""
    if wanted in (None, "null"):
        return None
    if wanted == "auto":
        return [sum(counts) / (len(counts) * count) for count in counts]
    if not isinstance(wanted, dict):
        raise UserError(
            f"class weights are {wanted!r}", where="task.class_weights", fix="null, auto, or a weight by label: {no: 1, yes: 4}"
        )
    odd = [str(k) for k, v in wanted.items() if isinstance(v, bool) or not isinstance(v, (int, float)) or not 0 < v < float("inf")]
    given = {str(k): v for k, v in wanted.items()}
    if set(given) != set(labels) or odd:
        wrong = sorted(set(given) ^ set(labels)) or odd
        raise UserError(
            f"class weights do not fit the labels: {', '.join(map(repr, wrong))}",
            where="task.class_weights",
            fix=f"give a positive weight to each of {', '.join(labels)}",
        )
    return [float(given[name]) for name in labels]
