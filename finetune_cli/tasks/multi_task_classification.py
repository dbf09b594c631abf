"""multi-task-classification: one text or a pair in; one label of each of several columns out, on one encoder and one head.

The head's logits are those of all columns end to end, named ``column=label``, so plain transformers loads it as one sequence classifier;
a softmax goes over the logits of one column. Every column has its own labels, class weights, loss (divided by what its own rows weigh),
temperature and least confidence. A row that lacks the label of a column teaches and scores the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from finetune_cli.config.schema import DataConfig
from finetune_cli.errors import UserError
from finetune_cli.tasks.base import Batch, Evaluation, Facts, Layout, Outputs, Prediction, Score, Task
from finetune_cli.tasks.labelling import label_loss
from finetune_cli.tasks.labelling.decisions import Decisions
from finetune_cli.tasks.labelling.label_columns import LABELS, in_one_column, split_name
from finetune_cli.tasks.labelling.labels import LabelOptions, LabelSet, class_names, class_weights, counted, natural, refuse_unsettled
from finetune_cli.tasks.tokens import encode_texts, lay_tokens

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from finetune_cli.data import Roles, Rows
    from finetune_cli.encoded import Columns, Examples
    from finetune_cli.metrics import Measures
    from finetune_cli.tasks.sections import Section

MEANS = ("accuracy", "f1_macro")
"""Metrics that are also given as the mean over columns."""
NONE = -1
"""Target of a row that lacks the label."""


@dataclass(kw_only=True, slots=True)
class MultiTaskClassificationConfig(LabelOptions):
    """``task=multi-task-classification``."""

    name: str = "multi-task-classification"
    """One text or a pair in, one label of each of several columns out."""


class MultiTaskClassification(Task[MultiTaskClassificationConfig]):
    """Facts: ``columns``, the facts of one ``LabelSet`` by column, in the order of the logits."""

    name = "multi-task-classification"
    Config = MultiTaskClassificationConfig
    auto_class = "AutoModelForSequenceClassification"
    plain_texts = True

    # -- options -------------------------------------------------------------------------------
    @classmethod
    def needs_validation(cls, config: MultiTaskClassificationConfig) -> list[str]:
        return config.needs_validation()

    def refuse_misfits(self, *, training: bool) -> None:
        sets = self.columns.values()
        deciding = [labels for labels in sets if labels.thresholded]
        for labels in deciding or sets:
            labels.refuse_misfits(self.config, training=training)
        if not training:
            refuse_unsettled(sets, self.config)

    # -- rows ----------------------------------------------------------------------------------
    @classmethod
    def arrange(
        cls, config: MultiTaskClassificationConfig, rows: Rows, data: DataConfig, *, labelled: bool
    ) -> tuple[Rows, Roles, list[str]]:
        from finetune_cli.data import find_roles

        roles, notes = find_roles(rows, data, labelled=labelled)
        if not labelled:
            return rows, roles, notes
        arranged, more = in_one_column(rows, roles, data)
        return arranged, replace(roles, labels=(LABELS,), found_by=roles.options), notes + more

    @classmethod
    def learn(cls, config: MultiTaskClassificationConfig, data: DataConfig, rows: Rows, roles: Roles) -> Facts:
        from finetune_cli.data import label_cells

        counts = counted(label_cells(rows, roles, data))
        columns = {}
        for column in roles.options["label"]:
            mine = {label: n for cell, n in counts.items() for of, label in [split_name(cell)] if of == column}
            if len(mine) < 2:
                only = f"only one label, {next(iter(mine))!r}" if mine else "no label at all"
                raise UserError(f"the training rows hold {only} in column {column!r}", where=rows.files[0], fix="leave the column out")
            names = sorted(mine, key=natural)
            rows_there = sum(mine.values())
            weights = class_weights(_of_column(config.class_weights, column), names, [mine[n] for n in names], rows_there, multi=False)
            labels = LabelSet(names=tuple(names), cells=tuple(names), weights=weights)
            stated = labels.thresholds(config) if isinstance(config.threshold, float) else None
            columns[column] = replace(labels, decisions=Decisions(given=stated)).facts()
        if isinstance(config.class_weights, Mapping) and (strange := sorted(set(map(str, config.class_weights)) - set(columns))):
            raise UserError(
                f"class weights name {strange[0]!r}, which is no label column",
                where="task.class_weights",
                fix=f"auto, or weights by column and label: {{{next(iter(columns))}: {{{names[0]}: 2, …}}}}",
            )
        return {"columns": columns}

    @classmethod
    def facts_of(cls, model_config: Any) -> Facts:
        names: dict[str, list[str]] = {}
        for name in class_names(model_config):
            column, label = split_name(name)
            names.setdefault(column, []).append(label)
        return {"columns": {c: LabelSet(names=tuple(found), cells=tuple(found)).facts() for c, found in names.items()}}

    @property
    def columns(self) -> dict[str, LabelSet]:
        """The labels of each column, in the order of the logits."""
        return {column: LabelSet.of(facts) for column, facts in self.facts["columns"].items()}

    def parts(self, logits: Any) -> dict[str, Any]:
        """The logits of each column, [N, K of the column], of an array or a tensor [N, K]."""
        found, start = {}, 0
        for column, labels in self.columns.items():
            found[column] = logits[:, start : start + len(labels)]
            start += len(labels)
        return found

    def read_targets(self, data: DataConfig, rows: Rows, roles: Roles) -> np.ndarray:
        """Label numbers [N, columns], -1 where a row lacks one."""
        import numpy as np

        from finetune_cli.data import label_cells, unknown_label

        columns = self.columns
        place = {f"{c}={name}": (j, k) for j, (c, labels) in enumerate(columns.items()) for k, name in enumerate(labels.names)}
        targets = np.full((len(rows), len(columns)), NONE, np.int64)
        for i, cell in enumerate(label_cells(rows, roles, data)):
            for name in cell:
                if name not in place:
                    column, label = split_name(name)
                    known = columns[column].names if column in columns else list(columns)
                    raise unknown_label(label if column in columns else column, known, rows.where(i))
                j, k = place[name]
                targets[i, j] = k
        return targets

    def label_cells(self, data: DataConfig, rows: Rows, roles: Roles) -> list[Any] | None:
        from finetune_cli.data import label_cells

        return label_cells(rows, roles, data)

    def told_facts(self) -> list[tuple[str, str]]:
        return [(f"{column}: {what}", text) for column, labels in self.columns.items() for what, text in labels.told(self.config)]

    def encode(self, rows: Rows, roles: Roles, tokenizer: Any, *, max_length: int, first_row: int, asked: bool = False) -> Examples:
        return encode_texts(rows, roles, tokenizer, max_length=max_length, first_row=first_row)

    def collate(self, columns: Columns, targets: Any, layout: Layout, *, key: int) -> Batch:
        import numpy as np
        import torch

        inputs = lay_tokens(columns, layout)
        if targets is None:
            return Batch(inputs, None)
        weights = {column: label_loss.weight(targets[:, j], labels) for j, (column, labels) in enumerate(self.columns.items())}
        return Batch(inputs, torch.from_numpy(np.ascontiguousarray(targets)), weights)

    # -- model ---------------------------------------------------------------------------------
    def head(self) -> dict[str, Any]:
        names = [f"{column}={name}" for column, labels in self.columns.items() for name in labels.names]
        return {"num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}

    def loss(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        targets, columns = batch.targets, self.columns
        assert targets is not None, "a loss needs targets"
        parts = self.parts(outputs.logits.float())
        return {
            column: label_loss.total(parts[column], targets[:, j], labels, self.config)
            for j, (column, labels) in enumerate(columns.items())
        }

    def settle(self, evaluation: Evaluation) -> Facts | None:
        if not self.needs_validation(self.config):
            return None
        settled = {}
        for column, (labels, logits, targets, _) in self._labelled(evaluation).items():
            settled[column] = (labels.settled(logits, targets, self.config) if len(targets) else labels).facts()
        return {"columns": settled}

    def fold(self, model: nn.Module) -> Facts | None:
        import numpy as np

        from finetune_cli.tasks.labelling.heads import fold_scale

        sets = self.columns
        scale = np.concatenate([np.full(len(s), 1.0 if s.decisions.folded else 1 / s.decisions.temperature) for s in sets.values()])
        if (scale == 1).all():
            return None
        fold_scale(model, scale)
        return {"columns": {column: labels.folded().facts() for column, labels in sets.items()}}

    def answers(self, outputs: Outputs) -> np.ndarray:
        import numpy as np

        sets = self.columns
        return np.concatenate([sets[column].calibrated(logits) for column, logits in self.parts(outputs["logits"]).items()], axis=1)

    # -- results -------------------------------------------------------------------------------
    @property
    def monitor(self) -> str:
        return "accuracy"

    def metric_names(self) -> frozenset[str]:
        own = {f"{column}/{name}" for column, labels in self.columns.items() for name in labels.metric_names(self.config)}
        return frozenset({"loss", *MEANS} | own)

    def _labelled(self, evaluation: Evaluation) -> dict[str, tuple[LabelSet, np.ndarray, np.ndarray, np.ndarray]]:
        """Of each column: its labels, the logits and targets of the rows that have one, and which rows these are."""
        import numpy as np

        found = {}
        parts = self.parts(evaluation.outputs["logits"])
        for j, (column, labels) in enumerate(self.columns.items()):
            there = np.flatnonzero(evaluation.targets[:, j] != NONE)
            found[column] = (labels, parts[column][there], evaluation.targets[there, j], there)
        return found

    def _measures(self, evaluation: Evaluation) -> Measures:
        from finetune_cli import metrics

        found = {
            column: (labels.measures(labels.probabilities(logits), targets, self.config), there)
            for column, (labels, logits, targets, there) in self._labelled(evaluation).items()
        }
        return metrics.joint_measures(found, len(evaluation.targets), means=MEANS)

    def metrics(self, evaluation: Evaluation) -> dict[str, float]:
        from finetune_cli import metrics

        return metrics.values(self._measures(evaluation))

    def score(self, evaluation: Evaluation) -> Score:
        from finetune_cli import metrics

        logits, targets = evaluation.outputs["logits"], evaluation.targets

        def some(rows: Any) -> Measures:
            return self._measures(replace(evaluation, outputs={"logits": logits[rows]}, targets=targets[rows]))

        found = metrics.score(some, len(targets), seed=evaluation.seed)
        there = {column: int((targets[:, j] != NONE).sum()) for j, column in enumerate(self.columns)}
        return {name: entry | {"n": there.get(name.rpartition("/")[0], entry["n"])} for name, entry in found.items()}

    def decode(self, outputs: Outputs, rows: Rows, roles: Roles) -> Iterator[Prediction]:
        columns = self.columns
        p = {column: columns[column].probabilities(logits) for column, logits in self.parts(outputs["logits"]).items()}
        answers = {column: labels.decoded(p[column], self.config) for column, labels in columns.items()}
        for i in range(len(outputs["logits"])):
            row = {column: found[i] for column, found in answers.items()}
            told: Prediction = {
                "labels": {column: label for column, (label, _, _) in row.items()},
                "scores": {column: score for column, (_, score, _) in row.items()},
                "probabilities": {column: labels.named(p[column][i]) for column, labels in columns.items()},
            }
            abstained = {column: withheld for column, (_, _, withheld) in row.items() if withheld is not None}
            yield told | ({"abstained": abstained} if abstained else {})

    def told(self, target: Any) -> Any:
        return {c: None if k == NONE else labels.names[int(k)] for k, (c, labels) in zip(target, self.columns.items(), strict=True)}

    def baselines(self, train: tuple[Sequence[str], Any], test: tuple[Sequence[str], Any]) -> dict[str, dict[str, float]]:
        import numpy as np

        from finetune_cli import baselines

        found: dict[str, dict[str, float]] = {}
        for j, (column, labels) in enumerate(self.columns.items()):
            sides = []
            for texts, targets in (train, test):
                there = np.flatnonzero(targets[:, j] != NONE)
                sides.append(([texts[int(i)] for i in there], targets[there, j]))
            if not len(sides[1][0]):
                continue
            for name, scores in baselines.classification(*sides[0], *sides[1], names=labels.names).items():
                found.setdefault(name, {}).update({f"{column}/{metric}": value for metric, value in scores.items()})
        for scores in found.values():
            own = {m: [scores[f"{c}/{m}"] for c in self.columns if f"{c}/{m}" in scores] for m in MEANS}
            scores |= {metric: float(np.mean(values)) for metric, values in own.items() if len(values) == len(self.columns)}
        return found

    def sections(self, evaluation: Evaluation, rows: Rows, roles: Roles, *, lengths: np.ndarray) -> list[Section]:
        from finetune_cli.data import text_of
        from finetune_cli.tasks import findings

        texts = partial(text_of, rows, roles)
        found: list[Section] = []
        for column, (labels, logits, targets, there) in self._labelled(evaluation).items():
            if len(there):
                own = findings.of_labels(labels, self.config, logits, targets, texts, lengths[there], there)
                found += [replace(section, title=f"{column}: {section.title}") for section in own]
        return found


TASK = MultiTaskClassification


def _of_column(weights: Any, column: str) -> Any:
    """``task.class_weights`` of one column: the same word for all, or its own part."""
    if not isinstance(weights, Mapping):
        return weights
    return next((value for name, value in weights.items() if str(name) == column), None)
