"""text-regression: one text or a pair in, one number or several out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

from finetune_cli.config.schema import DataConfig, TaskConfig
from finetune_cli.errors import UserError
from finetune_cli.tasks.base import Batch, Evaluation, Facts, Layout, Outputs, Prediction, Score, Task
from finetune_cli.tasks.figures import figure
from finetune_cli.tasks.labelling.heads import answer_in_fp32, output_layer
from finetune_cli.tasks.labelling.labels import class_names
from finetune_cli.tasks.tokens import encode_texts, lay_tokens

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from finetune_cli.data import Roles, Rows
    from finetune_cli.encoded import Columns, Examples
    from finetune_cli.tasks.sections import Section


class RegressionLoss(str, Enum):
    mse = "mse"
    mae = "mae"
    huber = "huber"


@dataclass(kw_only=True, slots=True)
class TextRegressionConfig(TaskConfig):
    """``task=text-regression``."""

    name: str = "text-regression"
    """One text or a pair in, numbers out."""
    loss: RegressionLoss = RegressionLoss.mse
    """What a difference costs, in units of the target's standard deviation."""


class TextRegression(Task[TextRegressionConfig]):
    """Facts: ``targets`` (names), ``mean`` and ``std`` (of the training rows), ``folded`` (whether the weights hold the scale).

    The model learns standardised targets, and the loss is always in their units.
    """

    name = "text-regression"
    Config = TextRegressionConfig
    auto_class = "AutoModelForSequenceClassification"
    heads = ("ForSequenceClassification",)
    precedence = 1
    plain_texts = True
    stratified = False

    @classmethod
    def recognises(cls, model_config: Mapping[str, Any]) -> bool:
        """A head of one number, or one that says so."""
        classes, count = model_config.get("id2label"), model_config.get("num_labels")
        numbers = len(classes) if classes and isinstance(classes, (dict, list)) else count
        return numbers == 1 or model_config.get("problem_type") == "regression"

    # -- rows ----------------------------------------------------------------------------------
    @classmethod
    def learn(cls, config: TextRegressionConfig, data: DataConfig, rows: Rows, roles: Roles) -> Facts:
        from finetune_cli.data import targets

        values = targets(rows, roles)  # [N, T]
        flat = [name for name, std in zip(roles.labels, values.std(0), strict=True) if not std > 0]
        if flat:
            raise UserError(
                f"the target {', '.join(map(repr, flat))} has the same value in every training row",
                where=rows.files[0],
                fix="choose another data.label",
            )
        return {"targets": list(roles.labels), "mean": values.mean(0).tolist(), "std": values.std(0).tolist(), "folded": False}

    @classmethod
    def facts_of(cls, model_config: Any) -> Facts:
        names = class_names(model_config)
        return {"targets": names, "mean": [0.0] * len(names), "std": [1.0] * len(names), "folded": True}

    def read_targets(self, data: DataConfig, rows: Rows, roles: Roles) -> np.ndarray:
        from finetune_cli.data import targets

        return targets(rows, roles)

    def label_cells(self, data: DataConfig, rows: Rows, roles: Roles) -> list[Any] | None:
        return None

    def told_facts(self) -> list[tuple[str, str]]:
        scales = zip(self.facts["targets"], self.facts["mean"], self.facts["std"], strict=True)
        return [("targets", ", ".join(f"{name} (mean {mean:.3g}, standard deviation {std:.3g})" for name, mean, std in scales))]

    def encode(self, rows: Rows, roles: Roles, tokenizer: Any, *, max_length: int, first_row: int, asked: bool = False) -> Examples:
        return encode_texts(rows, roles, tokenizer, max_length=max_length, first_row=first_row)

    def collate(self, columns: Columns, targets: Any, layout: Layout, *, key: int) -> Batch:
        import numpy as np
        import torch

        inputs = lay_tokens(columns, layout)
        if targets is None:
            return Batch(inputs, None)
        scaled = (targets - np.asarray(self.facts["mean"])) / np.asarray(self.facts["std"])
        return Batch(inputs, torch.from_numpy(scaled.astype(np.float32)), {"loss": float(scaled.size)})

    # -- model ---------------------------------------------------------------------------------
    def head(self) -> dict[str, Any]:
        names = self.facts["targets"]
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        return {"num_labels": len(names), **labels, "problem_type": "regression"}

    def adjust(self, model: nn.Module) -> None:
        answer_in_fp32(output_layer(model, len(self.facts["targets"])))

    def loss(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        from torch.nn import functional as F

        predicted, targets = outputs.logits.float(), batch.targets  # [B, T]
        if self.facts["folded"]:
            scale = predicted.new_tensor([self.facts["mean"], self.facts["std"]])
            predicted = (predicted - scale[0]) / scale[1]
        assert targets is not None, "a loss needs targets"
        match self.config.loss:
            case RegressionLoss.mse:
                return {"loss": F.mse_loss(predicted, targets, reduction="sum")}
            case RegressionLoss.mae:
                return {"loss": F.l1_loss(predicted, targets, reduction="sum")}
            case RegressionLoss.huber:
                return {"loss": F.huber_loss(predicted, targets, reduction="sum")}

    def fold(self, model: nn.Module) -> Facts | None:
        import torch

        last = output_layer(model, len(self.facts["targets"]))
        std = torch.tensor(self.facts["std"], dtype=torch.float64)
        mean = torch.tensor(self.facts["mean"], dtype=torch.float64)
        with torch.no_grad():
            last.weight.copy_(last.weight.double() * std[:, None])
            last.bias.copy_(last.bias.double() * std + mean)
        return {**self.facts, "folded": True}

    def values(self, outputs: Outputs) -> np.ndarray:
        """Predictions in the target's own units, float64 [N, T]."""
        import numpy as np

        logits: np.ndarray = outputs["logits"].astype(np.float64)
        if self.facts["folded"]:
            return logits
        scaled: np.ndarray = logits * np.asarray(self.facts["std"]) + np.asarray(self.facts["mean"])
        return scaled

    def answers(self, outputs: Outputs) -> np.ndarray:
        return self.values(outputs)

    # -- results -------------------------------------------------------------------------------
    @property
    def monitor(self) -> str:
        return "rmse"

    def metric_names(self) -> frozenset[str]:
        return frozenset({"loss", "mae", "rmse", "r2", "pearson", "spearman"})

    def metrics(self, evaluation: Evaluation) -> dict[str, float]:
        from finetune_cli import metrics

        return metrics.regression(self.values(evaluation.outputs), evaluation.targets)

    def score(self, evaluation: Evaluation) -> Score:
        from finetune_cli import metrics

        values, targets = self.values(evaluation.outputs), evaluation.targets
        return metrics.score(lambda rows: metrics.regression_measures(values[rows], targets[rows]), len(targets), seed=evaluation.seed)

    def decode(self, outputs: Outputs, rows: Rows, roles: Roles) -> Iterator[Prediction]:
        for row in self.values(outputs):
            named = {name: figure(value) for name, value in zip(self.facts["targets"], row, strict=True)}
            yield {"value": next(iter(named.values()))} if len(named) == 1 else {"values": named}

    def told(self, target: Any) -> Any:
        return float(target[0]) if len(target) == 1 else [float(value) for value in target]

    def baselines(self, train: tuple[Sequence[str], Any], test: tuple[Sequence[str], Any]) -> dict[str, dict[str, float]]:
        from finetune_cli import baselines

        return baselines.regression(*train, *test)

    def sections(self, evaluation: Evaluation, rows: Rows, roles: Roles, *, lengths: np.ndarray) -> list[Section]:
        from finetune_cli.data import text_of
        from finetune_cli.tasks import findings

        texts = partial(text_of, rows, roles)
        return findings.of_regression(self.values(evaluation.outputs), evaluation.targets, self.facts["targets"], texts, lengths)


TASK = TextRegression
