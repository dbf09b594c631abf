"""text-classification: one text or a pair in; one label of several, or any number of labels, out."""

# ruff: noqa: RUF009 (option() makes a dataclass field, not a shared default)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from finetune_cli.config.schema import DataConfig, option
from finetune_cli.errors import UserError
from finetune_cli.tasks.base import Batch, Evaluation, Facts, Flat, Layout, Outputs, Prediction, Score, Task
from finetune_cli.tasks.labelling import contrastive, label_loss
from finetune_cli.tasks.labelling.decisions import Decisions
from finetune_cli.tasks.labelling.labels import (
    HALF,
    LabelLoss,
    LabelOptions,
    LabelSet,
    class_names,
    class_weights,
    counted,
    natural,
    refuse_unsettled,
)
from finetune_cli.tasks.tokens import encode_texts, lay_tokens

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
class TextClassificationConfig(LabelOptions):
    """``task=text-classification``."""

    name: str = "text-classification"
    """One text or a pair in, labels out."""
    labels: Labels = option(Labels.auto, training=True)
    """``single``: exactly one label a row; ``multi``: any number; auto: multi where a cell is a list or several columns are labels."""
    few_shot: FewShot = option(FewShot.none, applies="model.pooling=mean|first", training=True)
    """``contrastive``: the encoder learns from pairs of rows and a logistic regression on its embeddings is the head (as in SetFit)."""
    zero_shot: ZeroShot = option(ZeroShot.none, applies="model.pooling=mean|first", training=True)
    """``embedding``: the head begins as the embeddings of the labels' descriptions; a few-shot head counts them as rows."""
    descriptions: dict[str, str] = option({}, applies="task.zero_shot=embedding", training=True)
    """What a label means, by label: ``{sport: news about sport}``; a label without one is described by its name."""


class TextClassification(Task[TextClassificationConfig]):
    """Facts: those of one ``LabelSet``."""

    name = "text-classification"
    Config = TextClassificationConfig
    auto_class = "AutoModelForSequenceClassification"
    heads = ("ForSequenceClassification",)
    fallback = True
    plain_texts = True
    pipeline = "text-classification"
    _embeds = False  # whether ``infer`` gives the embeddings that the head is fitted to

    # -- rows ----------------------------------------------------------------------------------
    @classmethod
    def learn(cls, config: TextClassificationConfig, data: DataConfig, rows: Rows, roles: Roles) -> Facts:
        from finetune_cli.data import has_several_labels, label_cells, label_names

        cells = label_cells(rows, roles, data)
        multi = config.labels == Labels.multi or (config.labels == Labels.auto and has_several_labels(rows, roles, data))
        counts = counted(cells)
        if not multi and (bad := next((i for i, cell in enumerate(cells) if len(cell) != 1), None)) is not None:
            raise UserError(
                f"a row has {len(cells[bad])} labels, expected one", where=rows.where(bad), fix="task.labels=multi, or mend the row"
            )
        if len(counts) < (1 if multi else 2):
            only = f"only one label, {next(iter(counts))!r}" if counts else "no label at all"
            raise UserError(f"the training rows hold {only}", where=rows.files[0], fix="give rows of at least two labels")
        told = label_names(data, list(counts))
        known = sorted(counts, key=natural) if len(roles.labels) == 1 else list(roles.labels)
        names = [told.get(label, label) for label in known]
        _refuse_mixtures(config, multi)
        contrastive.descriptions(config.descriptions, names)
        weights = class_weights(config.class_weights, names, [counts[label] for label in known], len(rows), multi=multi)
        labels = LabelSet(names=tuple(names), cells=tuple(known), multi=multi, weights=weights)
        stated = labels.thresholds(config) if isinstance(config.threshold, float) else None
        return replace(labels, decisions=Decisions(given=stated)).facts()

    @classmethod
    def facts_of(cls, model_config: Any) -> Facts:
        names = class_names(model_config)
        multi = getattr(model_config, "problem_type", None) == "multi_label_classification"
        return LabelSet(names=tuple(names), cells=tuple(names), multi=multi).facts()

    @property
    def labels(self) -> LabelSet:
        """The labels, and what decides between them."""
        return LabelSet.of(self.facts)

    @classmethod
    def needs_validation(cls, config: TextClassificationConfig) -> list[str]:
        return config.needs_validation()

    def refuse_misfits(self, *, training: bool) -> None:
        self.labels.refuse_misfits(self.config, training=training)
        if not training:
            refuse_unsettled([self.labels], self.config)

    def read_targets(self, data: DataConfig, rows: Rows, roles: Roles) -> np.ndarray:
        import numpy as np

        from finetune_cli.data import label_cells, unknown_label

        labels = self.labels
        index = {cell: i for i, cell in enumerate(labels.cells)}
        index |= {name: i for i, name in enumerate(labels.names) if name not in index}
        cells = label_cells(rows, roles, data)
        for i, cell in enumerate(cells):
            if (strange := next((label for label in cell if label not in index), None)) is not None:
                raise unknown_label(strange, list(index), rows.where(i))
            if len(cell) != 1 and not labels.multi:
                raise UserError(f"a row has {len(cell)} labels, expected one", where=rows.where(i), fix="mend the row")
        if not labels.multi:
            return np.array([index[cell[0]] for cell in cells], np.int64)
        targets = np.zeros((len(cells), len(labels)), np.float32)
        for i, cell in enumerate(cells):
            targets[i, [index[label] for label in cell]] = 1
        return targets

    def label_cells(self, data: DataConfig, rows: Rows, roles: Roles) -> list[Any] | None:
        from finetune_cli.data import label_cells

        names = dict(zip(self.labels.cells, self.labels.names, strict=True))
        return [[names.get(label, label) for label in cell] for cell in label_cells(rows, roles, data)]

    def told_facts(self) -> list[tuple[str, str]]:
        return self.labels.told(self.config)

    def encode(self, rows: Rows, roles: Roles, tokenizer: Any, *, max_length: int, first_row: int, asked: bool = False) -> Examples:
        return encode_texts(rows, roles, tokenizer, max_length=max_length, first_row=first_row)

    def collate(self, columns: Columns, targets: Any, layout: Layout, *, key: int) -> Batch:
        import numpy as np
        import torch

        inputs = lay_tokens(columns, layout)
        if targets is None:
            return Batch(inputs, None)
        weights = {"loss": label_loss.weight(targets, self.labels)}
        if self.contrastive:
            weights |= contrastive.pairs(targets)
        return Batch(inputs, torch.from_numpy(np.ascontiguousarray(targets)), weights)

    # -- model ---------------------------------------------------------------------------------
    def head(self) -> dict[str, Any]:
        labels = self.labels
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels.names)),
            "label2id": {name: i for i, name in enumerate(labels.names)},
            "problem_type": "multi_label_classification" if labels.multi else "single_label_classification",
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
        return contrastive.embed(model, self.tokenizer, contrastive.descriptions(self.config.descriptions, self.labels.names))

    def fitting_head(self) -> Self | None:
        if not self.contrastive:
            return None
        task = self.knowing(self.facts)
        task._embeds = True
        return task

    def fit_head(self, model: nn.Module, evaluation: Evaluation) -> None:
        seen, targets = evaluation.outputs["embeddings"], evaluation.targets[evaluation.rows]
        contrastive.fit(model, seen, targets, weights=self.labels.weights, known=self._described(model))

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
            return contrastive.pair_losses(outputs.embeddings, batch.targets)
        return self.label_loss(outputs, batch)

    def label_loss(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """The loss of a head that gradients train, and what scoring reports of any head."""
        assert batch.targets is not None, "a loss needs targets"
        return {"loss": label_loss.total(outputs.logits.float(), batch.targets, self.labels, self.config)}

    def settle(self, evaluation: Evaluation) -> Facts | None:
        if not self.needs_validation(self.config):
            return None
        return self.labels.settled(evaluation.outputs["logits"], evaluation.targets, self.config).facts()

    def fold(self, model: nn.Module) -> Facts | None:
        import numpy as np

        from finetune_cli.tasks.labelling.heads import fold_scale

        labels = self.labels
        if labels.decisions.temperature == 1 or labels.decisions.folded:
            return None
        fold_scale(model, np.full(len(labels), 1 / labels.decisions.temperature))
        return labels.folded().facts()

    def answers(self, outputs: Outputs) -> np.ndarray:
        logits: np.ndarray = self.labels.calibrated(outputs["logits"])
        return logits

    # -- results -------------------------------------------------------------------------------
    @property
    def monitor(self) -> str:
        return "f1_micro" if self.labels.multi else "accuracy"

    def metric_names(self) -> frozenset[str]:
        return frozenset({"loss"} | self.labels.metric_names(self.config))

    def metrics(self, evaluation: Evaluation) -> dict[str, float]:
        from finetune_cli import metrics

        p = self.labels.probabilities(evaluation.outputs["logits"])
        return metrics.values(self.labels.measures(p, evaluation.targets, self.config))

    def score(self, evaluation: Evaluation) -> Score:
        from finetune_cli import metrics

        labels, y = self.labels, evaluation.targets
        p = labels.probabilities(evaluation.outputs["logits"])
        return metrics.score(lambda rows: labels.measures(p[rows], y[rows], self.config), len(y), seed=evaluation.seed)

    def decode(self, outputs: Outputs, rows: Rows, roles: Roles) -> Iterator[Prediction]:
        labels = self.labels
        p = labels.probabilities(outputs["logits"])
        if labels.multi:
            thresholds = labels.thresholds(self.config) or []
            for row in p:
                given = [name for name, value, least in zip(labels.names, row, thresholds, strict=True) if value >= least]
                yield {"labels": given, "probabilities": labels.named(row)}
            return
        for row, (label, score, withheld) in zip(p, labels.decoded(p, self.config), strict=True):
            told = {"label": label, "score": score, "probabilities": labels.named(row)}
            yield told if withheld is None else told | {"abstained": withheld}

    def told(self, target: Any) -> Any:
        names = self.labels.names
        if self.labels.multi:
            return [name for name, has in zip(names, target, strict=True) if has]
        return names[int(target)]

    def baselines(self, train: tuple[Sequence[str], Any], test: tuple[Sequence[str], Any]) -> dict[str, dict[str, float]]:
        from finetune_cli import baselines

        if not self.labels.multi:
            return baselines.classification(*train, *test, names=self.labels.names)
        stated = self.config.threshold if isinstance(self.config.threshold, float) else HALF
        found = baselines.multilabel(*train, *test, threshold=stated)
        return {f"{name}, threshold {stated:g}": scores for name, scores in found.items()} if self.labels.decisions.tuned else found

    def sections(self, evaluation: Evaluation, rows: Rows, roles: Roles, *, lengths: np.ndarray) -> list[Section]:
        from finetune_cli.data import text_of
        from finetune_cli.tasks import findings

        texts = partial(text_of, rows, roles)
        return findings.of_labels(self.labels, self.config, evaluation.outputs["logits"], evaluation.targets, texts, lengths)


TASK = TextClassification


def _refuse_mixtures(config: TextClassificationConfig, multi: bool) -> None:
    """Raise UserError for options that few-shot and zero-shot leave nothing to act on."""
    if multi and (config.few_shot != FewShot.none or config.zero_shot != ZeroShot.none):
        key = "task.few_shot" if config.few_shot != FewShot.none else "task.zero_shot"
        raise UserError(f"{key} is for one label a row, and a row may have several", where=key, fix=f"leave {key} out")
    if config.few_shot == FewShot.contrastive:
        for key, set_ in (("task.loss", config.loss != LabelLoss.cross_entropy), ("task.label_smoothing", config.label_smoothing > 0)):
            if set_:
                raise UserError(f"task.few_shot trains by pairs of rows: {key} has nothing to act on", where=key, fix=f"leave {key} out")
