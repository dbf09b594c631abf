"""Label facts: which labels there are, what their rows weigh in the loss, and how probabilities become answers.

A ``LabelSet`` is the part of a task's facts that belongs to one set of labels: a classification has one, several label columns have one
each. It turns logits into probabilities and answers; what it decides by (temperature, thresholds, least confidence) is settled on the
validation rows and saved with the checkpoint.
"""

# ruff: noqa: RUF009 (option() makes a dataclass field, not a shared default)

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Self

from finetune_cli.config.schema import TaskConfig, option
from finetune_cli.errors import UserError
from finetune_cli.storage import is_number
from finetune_cli.tasks.figures import figure
from finetune_cli.tasks.labelling.decisions import Decisions, chosen, settled

if TYPE_CHECKING:
    import numpy as np

    from finetune_cli.metrics import Answers, Measures

HALF = 0.5


class LabelLoss(str, Enum):
    cross_entropy = "cross_entropy"
    focal = "focal"


@dataclass(kw_only=True, slots=True)
class LabelOptions(TaskConfig):
    """Options of every task that gives labels to rows."""

    loss: LabelLoss = LabelLoss.cross_entropy
    """``cross_entropy`` (of several labels a row: binary, of each label), or ``focal``: sure and right answers count less."""
    focal_gamma: float = option(2.0, least=0, most=10, applies="task.loss=focal")
    """How much less: a term counts as (1 - its probability) to this power; 0 is cross-entropy."""
    label_smoothing: float = option(0.0, least=0, below=1)
    """Share of the target that is spread over all labels."""
    class_weights: Any = option(None, training=True)
    """null: all alike; a weight by label name; or ``auto``: a label's rows weigh inversely to its frequency.
    Several labels a row: what rows with the label weigh beside 1 for rows without it (auto: rows without, divided by rows with)."""
    threshold: Any = option(None, form="threshold")
    """Probability from which a label is given (of two labels: the second): a number, or ``auto``: that of highest F1 on the validation
    rows, saved with the model. null: what the model has saved, else 0.5."""
    calibrate: bool = option(False, training=True)
    """Divide the logits by the temperature of lowest log loss on the validation rows; the likeliest label stays, and the exported model's
    probabilities are the calibrated ones."""
    abstain_precision: float | None = option(None, above=0, most=1, training=True)
    """Withhold answers less sure than it takes for this share of the given ones to be right on the validation rows; one label a row."""

    def needs_validation(self) -> list[str]:
        """Keys of the options that validation rows settle."""
        asked = {
            "task.threshold": self.threshold == "auto",
            "task.calibrate": self.calibrate,
            "task.abstain_precision": self.abstain_precision is not None,
        }
        return [key for key, wanted in asked.items() if wanted]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSet:
    """One set of labels. ``names`` are in the order of the logits, ``cells`` how data files write them."""

    names: tuple[str, ...]
    cells: tuple[str, ...]
    multi: bool = False
    """Whether a row may have any number of them."""
    weights: tuple[float, ...] | None = None
    """One label a row: weight of a label's rows. Several: weight of the rows that have it, beside 1 for those that lack it."""
    decisions: Decisions = field(default_factory=Decisions)

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Self:
        """From its JSON form. Raises ValueError and its like for one that is not of ftune's making."""
        weights = facts["weights"]
        if type(facts["multi"]) is not bool or len(set(facts["labels"])) < len(facts["labels"]):
            raise ValueError("labels are named twice, or multi is neither true nor false")
        if not (weights is None or (len(weights) == len(facts["labels"]) and all(is_number(weight) and weight >= 0 for weight in weights))):
            raise ValueError("weights are not one number a label")
        if len(facts["labels"]) != len(facts["cells"]) or not all(isinstance(text, str) for text in (*facts["labels"], *facts["cells"])):
            raise ValueError("labels and their cells are no pairs of texts")
        return cls(
            names=tuple(facts["labels"]),
            cells=tuple(facts["cells"]),
            multi=facts["multi"],
            weights=None if weights is None else tuple(weights),
            decisions=Decisions.of(facts.get("decisions") or {}),
        )

    def facts(self) -> dict[str, Any]:
        """JSON form."""
        weights = None if self.weights is None else list(self.weights)
        named = {"labels": list(self.names), "cells": list(self.cells), "multi": self.multi, "weights": weights}
        return named | {"decisions": asdict(self.decisions)}

    def __len__(self) -> int:
        return len(self.names)

    # -- what the options make of it ---------------------------------------------------------------
    @property
    def thresholded(self) -> bool:
        """Whether a threshold decides: several labels a row, or one of two."""
        return self.multi or len(self) == 2

    def refuse_misfits(self, options: LabelOptions, *, training: bool, what: str = "task") -> None:
        """Raise UserError for a threshold where none can decide, or where the model has none saved."""
        if options.threshold is not None and not self.thresholded:
            raise UserError(
                f"task.threshold decides between two labels or of several a row; this {what} gives one of {len(self)}",
                where="task.threshold",
                fix="leave it out: the likeliest label is given",
            )
        if options.threshold == "auto" and not training and self.decisions.tuned is None:
            raise UserError(
                "the model has no thresholds saved", where="task.threshold=auto", fix="train with task.threshold=auto, or give a number"
            )
        if options.abstain_precision is not None and self.multi:
            raise UserError(
                "abstaining needs one label a row, and these rows have any number",
                where="task.abstain_precision",
                fix="leave it out; task.threshold=auto sets what it takes for a label to be given",
            )

    def thresholds(self, options: LabelOptions) -> list[float] | None:
        """What a probability must reach for its label to be given, [K], of two labels a row's second [1]; None: the likeliest is given.

        A number in the options wins over what is saved.
        """
        if not self.thresholded:
            return None
        size = len(self) if self.multi else 1
        if isinstance(options.threshold, (int, float)):
            return [float(options.threshold)] * size
        saved = self.decisions.tuned or self.decisions.given
        return saved or ([HALF] * size if self.multi else None)

    # -- logits to answers ---------------------------------------------------------------------------
    def raw(self, logits: Any) -> Any:
        """Logits before calibration, of an array or a tensor: the loss keeps its units in a model that has the temperature folded in."""
        return logits * self.decisions.temperature if self.decisions.folded else logits

    def calibrated(self, logits: Any) -> Any:
        """Logits of the probabilities in use: what the exported model gives."""
        if self.decisions.temperature == 1 or self.decisions.folded:
            return logits
        return logits / self.decisions.temperature

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Softmax over labels, or a sigmoid of each label, calibrated; float64 [N, K]."""
        from finetune_cli import metrics

        temperature = 1.0 if self.decisions.folded else self.decisions.temperature
        return metrics.probabilities(logits, multi=self.multi, temperature=temperature)

    def answers(self, p: np.ndarray, options: LabelOptions) -> Answers:
        """The label given to each row [N], and whether it is sure enough to be given; of sets with one label a row."""
        import numpy as np

        from finetune_cli import metrics

        labels = chosen(p, self.thresholds(options))
        if self.decisions.least_confidence is None:
            return metrics.Answers(labels)
        return metrics.Answers(labels, p[np.arange(len(p)), labels] >= self.decisions.least_confidence)

    def measures(self, p: np.ndarray, targets: np.ndarray, options: LabelOptions) -> Measures:
        """Metrics of probabilities against label numbers [N], or 0/1 targets [N, K]."""
        import numpy as np

        from finetune_cli import metrics

        if self.multi:
            return metrics.multilabel_measures(p, targets, np.asarray(self.thresholds(options)), self.names)
        return metrics.classification_measures(p, targets, self.names, self.answers(p, options))

    def metric_names(self, options: LabelOptions) -> set[str]:
        """What ``measures`` gives."""
        names = {"accuracy", "roc_auc", "pr_auc", "log_loss", "ece", "brier"}
        names |= {"f1_macro", "f1_micro", "f1_weighted", "precision_macro", "recall_macro"}
        if self.multi:
            return names
        names |= {"mcc"} | ({"f1", "precision", "recall"} if len(self) == 2 else set())
        abstains = options.abstain_precision is not None or self.decisions.least_confidence is not None
        return names | ({"coverage", "answered_accuracy"} if abstains else set())

    def settled(self, logits: np.ndarray, targets: np.ndarray, options: LabelOptions) -> LabelSet:
        """The same set with what the validation rows say: temperature first, then thresholds, then the least confidence."""
        decisions = settled(
            self.raw(logits),
            targets,
            multi=self.multi,
            given=self.thresholds(options),
            tune=options.threshold == "auto" and self.thresholded,
            calibrate=options.calibrate,
            precision=options.abstain_precision,
            before=self.decisions,
        )
        return replace(self, decisions=decisions)

    def folded(self) -> Self:
        """The same set, for weights that hold the temperature."""
        return replace(self, decisions=replace(self.decisions, folded=True))

    def decoded(self, p: np.ndarray, options: LabelOptions) -> list[tuple[str | None, float, bool | None]]:
        """(label or None, its probability, whether it is withheld or None where nothing ever is) of each row."""
        answers = self.answers(p, options)
        found: list[tuple[str | None, float, bool | None]] = []
        for i, label in enumerate(answers.labels.tolist()):
            withheld = None if answers.given is None else not answers.given[i]
            found.append((None if withheld else self.names[label], figure(p[i, label]), withheld))
        return found

    def named(self, p: np.ndarray) -> dict[str, float]:
        """Probabilities of one row by label."""
        return {name: figure(value) for name, value in zip(self.names, p, strict=True)}

    def told(self, options: LabelOptions) -> list[tuple[str, str]]:
        """The facts in words."""
        kind = "any number a row" if self.multi else "one a row"
        named = [f"{i} = {name!r}" if _is_number(name) else f"{i} {name}" for i, name in enumerate(self.names[:40])]
        told = [("labels", f"{', '.join(named)} ({len(self)}, {kind})")]
        if self.weights:
            told.append(("class weights", ", ".join(f"{name} {w:.3g}" for name, w in zip(self.names, self.weights, strict=True))))
        deciding = () if not self.thresholded else self.names if self.multi else self.names[1:]
        return told + self.decisions.told(deciding, self.thresholds(options), options)


def _is_number(name: str) -> bool:
    """Whether a label reads like its own number."""
    return natural(name)[0] == 0


def refuse_unsettled(sets: Collection[LabelSet], options: LabelOptions) -> None:
    """Raise UserError where options of training wait for validation rows that had not been scored when a checkpoint was saved."""
    waiting = options.needs_validation()
    if waiting and not any(labels.decisions.rows for labels in sets):
        raise UserError(
            f"the checkpoint was saved before validation rows had settled {waiting[0]}",
            where=waiting[0],
            fix="name the run, or a checkpoint after its first scoring",
        )


def natural(label: str) -> tuple[int, float, str]:
    """Numbers in numeric order before words in alphabetic order."""
    try:
        return (0, float(label), label)
    except ValueError:
        return (1, 0.0, label)


def class_weights(wanted: Any, labels: Sequence[str], counts: Sequence[int], rows: int, *, multi: bool) -> tuple[float, ...] | None:
    """``task.class_weights`` for labels that occur ``counts`` times in ``rows`` rows.

    ``auto``, one label a row: inverse frequency, scaled so that the mean row weighs 1. Several: rows without the label
    divided by rows with it. A label that never (or always) occurs weighs 1.
    """
    if wanted in (None, "null"):
        return None
    if wanted == "auto" and multi:
        return tuple((rows - count) / count if 0 < count < rows else 1.0 for count in counts)
    if wanted == "auto":
        return tuple(rows / (len(counts) * count) if count else 1.0 for count in counts)
    if not isinstance(wanted, Mapping):
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
    return tuple(float(given[name]) for name in labels)


def counted(cells: Sequence[Sequence[str]]) -> Counter[str]:
    """How many rows have each label."""
    return Counter(label for cell in cells for label in cell)


def class_names(model_config: Any) -> list[str]:
    """Names of a plain model's classes in the order of its logits. Raises UserError where its config.json does not give each one name."""
    names, where = model_config.id2label, f"{getattr(model_config, '_name_or_path', None) or 'the model'}: config.json: id2label"
    numbers, fix = sorted(names, key=str), "mend config.json: every class has a number from 0 on, and a name of its own"
    if set(numbers) != set(range(len(names))):
        raise UserError(f"the model's classes are numbered {', '.join(map(str, numbers[:9]))}, not from 0 on", where=where, fix=fix)
    found = [str(names[number]) for number in range(len(names))]
    if twice := next((name for name in found if found.count(name) > 1), None):
        raise UserError(f"two of the model's classes are named {twice!r}", where=where, fix=fix)
    told = getattr(model_config, "label2id", None) or {}
    if wrong := next((name for i, name in enumerate(found) if str(told.get(name, i)) != str(i)), None):
        what = f"the model's class {wrong!r} is number {found.index(wrong)} in id2label and {told[wrong]} in label2id"
        raise UserError(what, where=where, fix=fix)
    return found
