"""Metrics of one label per row and of several labels per row, from probabilities.

F1, precision and recall follow scikit-learn: a class that is never predicted counts as 0, it is not left out. ECE has 15 bins of
equal width on the top probability (Guo et al. 2017, arXiv:1706.04599). The Brier score of two classes is the squared error of the
second one's probability (0 to 1), of more classes the sum over classes (0 to 2), as in scikit-learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from finetune_cli.metrics.bootstrap import Floats, Measures, values
from finetune_cli.metrics.ranking import Ranking

Ints = npt.NDArray[np.int64]

BINS = 15


@dataclass(frozen=True, slots=True)
class Answers:
    """What was decided from probabilities: a label number a row [N], and whether the answer was given or withheld [N] (None: all given)."""

    labels: Ints
    given: npt.NDArray[np.bool_] | None = None


def classification(probabilities: Floats, labels: Ints, names: Sequence[str], answers: Answers | None = None) -> dict[str, float]:
    """Scores of probabilities [N, K] against label numbers [N]; ``answers`` where they are not the likeliest labels."""
    return values(classification_measures(probabilities, labels, names, answers))


def multilabel(probabilities: Floats, targets: Ints, thresholds: Floats | float = 0.5) -> dict[str, float]:
    """Scores of probabilities [N, K] against 0/1 targets [N, K]; a label is given where its probability reaches its threshold.

    ``accuracy`` is the share of rows whose labels are all right; log loss, Brier score and ECE are means over rows and labels.
    """
    return values(multilabel_measures(probabilities, targets, thresholds))


def classification_measures(probabilities: Floats, labels: Ints, names: Sequence[str], answers: Answers | None = None) -> Measures:
    """The metrics of ``classification``, for ``score``.

    Where answers were withheld, ``coverage`` is the share of rows that were answered and ``answered_accuracy`` the accuracy on them;
    every other metric takes a withheld answer as if it had been given. Calibration is that of the likeliest label.
    """
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    n, k = p.shape
    likeliest = p.argmax(axis=1) if n else np.zeros(0, dtype=np.int64)
    guess = likeliest if answers is None else answers.labels
    given_rows = None if answers is None or answers.given is None else answers.given.astype(np.float64)
    columns = _row_columns(p, y, likeliest)
    classes = [1] if k == 2 else range(k)
    rankings = [Ranking(p[:, c], y == c) for c in classes]

    def plain(w: Floats) -> dict[str, Floats]:
        hits, given, true = (_count(group, w, k) for group in (np.where(guess == y, y, k), guess, y))
        found = _from_counts(hits, given, true)
        found |= {"accuracy": _divide(hits.sum(axis=1), w.sum(axis=1)), "mcc": _mcc(hits.sum(axis=1), given, true)}
        if k == 2:
            found |= _binary(hits[:, 1], given[:, 1], true[:, 1])
        if given_rows is not None:
            answered = w @ given_rows
            found |= {"coverage": _divide(answered, w.sum(axis=1)), "answered_accuracy": _divide(w @ (given_rows * (guess == y)), answered)}
        return found | _from_columns(w, columns)

    def ranked(w: Floats) -> dict[str, Floats]:
        return _areas(rankings, w)

    absent = [names[c] for c in range(k) if not (y == c).any()]
    note = f"no row has the label {', '.join(map(repr, absent[:5]))}" if absent else ""
    notes = {"roc_auc": note, "pr_auc": note} if note else {}
    if given_rows is not None and not given_rows.any():
        notes["answered_accuracy"] = "no answer is sure enough to be given"
    return Measures(n, plain, ranked, len(rankings), notes)


def multilabel_measures(
    probabilities: Floats, targets: Ints, thresholds: Floats | float = 0.5, names: Sequence[str] | None = None
) -> Measures:
    """The metrics of ``multilabel``, for ``score``; ``names`` serve the notes."""
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(targets, dtype=bool)
    n, k = p.shape
    guess = p >= thresholds
    layers = [(guess & y).astype(np.float64), guess.astype(np.float64), y.astype(np.float64)]
    exact = (guess == y).all(axis=1).astype(np.float64)[:, None]
    columns = _label_columns(p, y)
    rankings = [Ranking(p[:, c], y[:, c]) for c in range(k)]

    def plain(w: Floats) -> dict[str, Floats]:
        hits, given, true = (w @ layer for layer in layers)
        rows = w.sum(axis=1)
        return _from_counts(hits, given, true, all_labels=True) | {"accuracy": _divide((w @ exact)[:, 0], rows)} | _from_columns(w, columns)

    def ranked(w: Floats) -> dict[str, Floats]:
        return _areas(rankings, w)

    labels = list(names) if names is not None else [str(c) for c in range(k)]
    flat = [labels[c] for c in range(k) if n == 0 or y[:, c].all() or not y[:, c].any()]
    note = f"all rows agree on the label {', '.join(map(repr, flat[:5]))}" if flat else ""
    notes = {"roc_auc": note, "pr_auc": note} if note else {}
    return Measures(n, plain, ranked, k, notes)


def quality(probabilities: Floats, targets: Ints, *, multi: bool) -> dict[str, float]:
    """Log loss, Brier score and ECE alone, as ``classification`` and (``multi``) ``multilabel`` have them."""
    p = np.asarray(probabilities, dtype=np.float64)
    columns = _label_columns(p, np.asarray(targets) > 0) if multi else _row_columns(p, np.asarray(targets), p.argmax(axis=1))
    return {name: float(value[0]) for name, value in _from_columns(np.ones((1, len(p))), columns).items()}


def _count(group: Ints, w: Floats, k: int) -> Floats:
    """How often each of ``k`` groups counts, [R, k]; group number ``k`` is dropped."""
    return np.stack([np.bincount(group, weights=row, minlength=k + 1)[:k].astype(np.float64) for row in w])


def _from_counts(hits: Floats, given: Floats, true: Floats, *, all_labels: bool = False) -> dict[str, Floats]:
    """Averaged F1, precision, recall from true positives, predictions and truths, each [R, K].

    The mean is over classes that occur among predictions or truths (scikit-learn's rule for one label per row) or over all labels.
    """
    precision, recall = _or_zero(hits, given), _or_zero(hits, true)
    f1 = _or_zero(2 * hits, given + true)
    present = np.ones_like(hits) if all_labels else (given + true > 0).astype(np.float64)
    total = present.sum(axis=1)
    weight = true.sum(axis=1)
    any_row = np.where(total > 0, 1.0, np.nan)
    return {
        "f1_macro": _divide((f1 * present).sum(axis=1), total),
        "f1_micro": _or_zero(2 * hits.sum(axis=1), given.sum(axis=1) + weight) * any_row,
        "f1_weighted": _or_zero((f1 * true).sum(axis=1), weight) * any_row,
        "precision_macro": _divide((precision * present).sum(axis=1), total),
        "recall_macro": _divide((recall * present).sum(axis=1), total),
    }


def _binary(hits: Floats, given: Floats, true: Floats) -> dict[str, Floats]:
    return {"f1": _or_zero(2 * hits, given + true), "precision": _or_zero(hits, given), "recall": _or_zero(hits, true)}


def _mcc(hits: Floats, given: Floats, true: Floats) -> Floats:
    """Matthews correlation of K classes (Gorodkin 2004); 0 where predictions or truths have one class only, as in scikit-learn."""
    n = true.sum(axis=1)
    covariance = hits * n - (given * true).sum(axis=1)
    spread = (n**2 - (given**2).sum(axis=1)) * (n**2 - (true**2).sum(axis=1))
    return np.where(n > 0, _or_zero(covariance, np.sqrt(np.maximum(spread, 0))), np.nan)


def _row_columns(p: Floats, y: Ints, guess: Ints) -> Floats:
    """Per row: log loss, Brier term, and the gap between being right and being sure in the column of its bin. [N, 2 + BINS]."""
    n, k = p.shape
    rows = np.arange(n)
    columns = np.zeros((n, 2 + BINS))
    tiny = np.finfo(np.float64).eps
    columns[:, 0] = -np.log(np.clip(p[rows, y], tiny, 1 - tiny))
    columns[:, 1] = (p**2).sum(axis=1) - 2 * p[rows, y] + 1
    if k == 2:
        columns[:, 1] /= 2
    top = p[rows, guess]
    columns[rows, 2 + bin_of(top)] = (guess == y) - top
    return columns


def _label_columns(p: Floats, y: npt.NDArray[np.bool_]) -> Floats:
    """As ``_row_columns``, a row's terms being means over its labels; confidence is the probability of the label itself."""
    n, k = p.shape
    rows = np.arange(n)
    columns = np.zeros((n, 2 + BINS))
    tiny = np.finfo(np.float64).eps
    right = np.where(y, p, 1 - p)
    columns[:, 0] = -np.log(np.clip(right, tiny, 1 - tiny)).mean(axis=1)
    columns[:, 1] = ((p - y) ** 2).mean(axis=1)
    for c in range(k):
        np.add.at(columns, (rows, 2 + bin_of(p[:, c])), (y[:, c] - p[:, c]) / k)
    return columns


def bin_of(confidence: Floats) -> Ints:
    """Bin of each confidence: 15 of equal width, each open below and closed above, 0 in the first."""
    return np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)


def _from_columns(w: Floats, columns: Floats) -> dict[str, Floats]:
    means = (w @ columns) / np.where((rows := w.sum(axis=1)) > 0, rows, np.nan)[:, None]
    return {"log_loss": means[:, 0], "brier": means[:, 1], "ece": np.abs(means[:, 2:]).sum(axis=1)}


def _areas(rankings: Sequence[Ranking], w: Floats) -> dict[str, Floats]:
    """Means over classes, each against the rest; undefined as soon as one class is."""
    areas = [ranking.areas(w) for ranking in rankings]
    return {"roc_auc": np.mean([a for a, _ in areas], axis=0), "pr_auc": np.mean([b for _, b in areas], axis=0)}


def _divide(top: Floats, bottom: Floats) -> Floats:
    return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)


def _or_zero(top: Floats, bottom: Floats) -> Floats:
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
