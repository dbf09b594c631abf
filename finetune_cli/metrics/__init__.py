"""Metrics: pure functions on arrays; scores, bootstrap intervals, tables behind the plots.

Every metric is a function of *how often each row counts*: multiplicities [R, N] in, values [R] out. A plain score has one row of
ones, a bootstrap a thousand rows of draws, and both go through the same lines, which the tests prove equal to scikit-learn's.
What is not defined (ROC-AUC where a class never occurs, correlation with a constant) is NaN, in JSON ``null`` with a note; it is
never dropped from a mean.
"""

from __future__ import annotations

from finetune_cli.metrics.bootstrap import RESAMPLES, Entry, Measures, entry, score, values
from finetune_cli.metrics.classification import Answers, classification, classification_measures, multilabel, multilabel_measures, quality
from finetune_cli.metrics.details import Calibration, ClassRow, by_length, calibration, confusion, per_class, per_label
from finetune_cli.metrics.generation import TextTable, generation, generation_measures, per_text, require_generation, signatures
from finetune_cli.metrics.joint import joint_measures
from finetune_cli.metrics.language import language, language_measures
from finetune_cli.metrics.masked import by_row, masked, masked_measures
from finetune_cli.metrics.names import DIRECTIONS, Direction, better, title
from finetune_cli.metrics.regression import regression, regression_measures
from finetune_cli.metrics.tuning import Confidence, best_temperature, best_thresholds, least_confidence, probabilities

__all__ = [
    "DIRECTIONS",
    "RESAMPLES",
    "Answers",
    "Calibration",
    "ClassRow",
    "Confidence",
    "Direction",
    "Entry",
    "Measures",
    "TextTable",
    "best_temperature",
    "best_thresholds",
    "better",
    "by_length",
    "by_row",
    "calibration",
    "classification",
    "classification_measures",
    "confusion",
    "entry",
    "generation",
    "generation_measures",
    "joint_measures",
    "language",
    "language_measures",
    "least_confidence",
    "masked",
    "masked_measures",
    "multilabel",
    "multilabel_measures",
    "per_class",
    "per_label",
    "per_text",
    "probabilities",
    "quality",
    "regression",
    "regression_measures",
    "require_generation",
    "score",
    "signatures",
    "title",
    "values",
]
