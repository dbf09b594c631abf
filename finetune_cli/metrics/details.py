"""What stands behind the scores: per class, confusion, calibration, error by length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune_cli.metrics.bootstrap import Floats
from finetune_cli.metrics.classification import BINS, Ints, bin_of
from finetune_cli.metrics.ranking import Ranking


@dataclass(frozen=True, slots=True)
class ClassRow:
    """One line of the classification report. ``support``: rows that truly are of the class; ``predicted``: rows said to be."""

    name: str
    precision: float
    recall: float
    f1: float
    roc_auc: float
    """This class against the rest; NaN where it never or always occurs."""
    support: int
    predicted: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """Bins of confidence that hold rows: mean confidence, share that was right, rows."""

    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    counts: tuple[int, ...]


def per_class(probabilities: Floats, labels: Ints, names: Sequence[str], answers: Ints | None = None) -> list[ClassRow]:
    """Precision, recall and F1 of each class, as in scikit-learn's ``classification_report``; ``answers`` [N] where not the likeliest."""
    guess = np.asarray(probabilities).argmax(axis=1) if answers is None else answers
    one_hot = np.arange(len(names))[None, :]
    return _rows(probabilities, guess[:, None] == one_hot, np.asarray(labels)[:, None] == one_hot, names)


def per_label(probabilities: Floats, targets: Ints, thresholds: Floats | float, names: Sequence[str]) -> list[ClassRow]:
    """The same for several labels per row."""
    p = np.asarray(probabilities)
    return _rows(p, p >= thresholds, np.asarray(targets).astype(bool), names)


def _rows(p: Floats, guess: np.ndarray, truth: np.ndarray, names: Sequence[str]) -> list[ClassRow]:
    once = np.ones((1, len(p)))
    rows = []
    for c, name in enumerate(names):
        hits, given, true = (int(column.sum()) for column in (guess[:, c] & truth[:, c], guess[:, c], truth[:, c]))
        area = float(Ranking(p[:, c], truth[:, c]).areas(once)[0][0])
        rows.append(ClassRow(name, hits / given if given else 0.0, hits / true if true else 0.0, _f1(hits, given, true), area, true, given))
    return rows


def _f1(hits: int, given: int, true: int) -> float:
    return 2 * hits / (given + true) if given + true else 0.0


def confusion(labels: Ints, predicted: Ints, classes: int) -> Ints:
    """Counts [true, predicted]."""
    flat = np.asarray(labels, dtype=np.int64) * classes + np.asarray(predicted, dtype=np.int64)
    return np.bincount(flat, minlength=classes * classes).reshape(classes, classes)


def calibration(confidence: Floats, right: np.ndarray) -> Calibration:
    """Bins behind the ECE: of top probabilities and whether they were right, or of label probabilities and truths (flattened)."""
    confidence, right = np.asarray(confidence, dtype=np.float64).ravel(), np.asarray(right, dtype=np.float64).ravel()
    bins = bin_of(confidence)
    counts = np.bincount(bins, minlength=BINS)
    full = counts > 0
    sums = [np.bincount(bins, weights=values, minlength=BINS)[full] / counts[full] for values in (confidence, right)]
    return Calibration(tuple(sums[0].tolist()), tuple(sums[1].tolist()), tuple(counts[full].tolist()))


def by_length(lengths: Ints, errors: Floats, *, groups: int = 8) -> tuple[list[str], list[float], list[int]]:
    """Mean error in up to ``groups`` ranges of length with about equally many rows: (names such as ``12-17``, means, rows)."""
    lengths, errors = np.asarray(lengths), np.asarray(errors, dtype=np.float64)
    if not len(lengths):
        return [], [], []
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, groups + 1), method="lower"))
    group = np.clip(np.searchsorted(edges, lengths, side="right") - 1, 0, max(0, len(edges) - 2))
    names, means, counts = [], [], []
    for g in np.unique(group):
        mine = lengths[group == g]
        low, high = int(mine.min()), int(mine.max())
        names.append(f"{low}" if low == high else f"{low}-{high}")
        means.append(float(errors[group == g].mean()))
        counts.append(int((group == g).sum()))
    return names, means, counts
