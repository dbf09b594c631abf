"""Names of metrics: which way is better, and how a reader calls them."""

from __future__ import annotations

from typing import Literal

Direction = Literal["max", "min"]

_LOWER = ("loss", "log_loss", "ece", "brier", "mae", "rmse", "perplexity", "bits_per_byte")
_HIGHER = (
    *("accuracy", "f1", "precision", "recall", "f1_macro", "f1_micro", "f1_weighted", "precision_macro", "recall_macro"),
    *("mcc", "roc_auc", "pr_auc", "r2", "pearson", "spearman", "entity_f1", "entity_precision", "entity_recall"),
    *("coverage", "answered_accuracy", "entity_f1_macro", "entity_partial_f1"),
    *("bleu", "chrf", "rouge1", "rouge2", "rougeL", "mrr", "map"),
)
ORDER = (
    *("loss", "entity_f1", "entity_precision", "entity_recall", "entity_f1_macro", "entity_partial_f1"),
    *("accuracy", "coverage", "answered_accuracy"),
    *("f1", "precision", "recall", "f1_macro", "f1_micro", "f1_weighted", "precision_macro", "recall_macro"),
    *("mcc", "roc_auc", "pr_auc", "log_loss", "ece", "brier", "mae", "rmse", "r2", "pearson", "spearman"),
    *("perplexity", "bits_per_byte"),
    *("bleu", "chrf", "rouge1", "rouge2", "rougeL"),
)
"""The order in which scores are told."""
DIRECTIONS: dict[str, Direction] = {**dict.fromkeys(_LOWER, "min"), **dict.fromkeys(_HIGHER, "max")}
"""Every metric's better direction (``recall_at_K`` and ``ndcg_at_K`` carry a number, see ``better``)."""

_TITLES = {
    "f1": "F1",
    "f1_macro": "F1, macro",
    "f1_micro": "F1, micro",
    "f1_weighted": "F1, weighted",
    "precision_macro": "Precision, macro",
    "recall_macro": "Recall, macro",
    "coverage": "Coverage (rows answered)",
    "answered_accuracy": "Accuracy of the answered rows",
    "mcc": "Matthews correlation",
    "roc_auc": "ROC-AUC",
    "pr_auc": "PR-AUC",
    "ece": "Calibration error (ECE)",
    "brier": "Brier score",
    "mae": "Mean absolute error",
    "rmse": "Root mean squared error",
    "r2": "R²",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "entity_f1": "Entity F1",
    "entity_f1_macro": "Entity F1, macro",
    "entity_partial_f1": "Entity F1, half for overlaps",
    "bits_per_byte": "Bits per byte",
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
}


def better(metric: str) -> Direction:
    """``max`` or ``min``; what stands before a slash (a split, a label column) is ignored. Raises KeyError for a name that is no metric."""
    name = metric.rpartition("/")[2]
    if name.startswith(("recall_at_", "ndcg_at_")):
        return "max"
    return DIRECTIONS[name]


def title(metric: str) -> str:
    """A metric's name for people."""
    before, _, name = metric.rpartition("/")
    told = _TITLES.get(name, name.replace("_", " ").capitalize())
    return f"{before}: {told}" if before else told
