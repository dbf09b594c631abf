"""What a classification or regression shows in the report: tables and plots as plain data, shared by the tasks that have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from finetune_cli.tasks.sections import Bars, Examples, Heatmap, Reliability, Scatter, Section, Table

if TYPE_CHECKING:
    import numpy as np

    from finetune_cli.metrics import ClassRow

    Texts = Callable[[int], str]

WORST = 20
"""Errors shown."""
POINTS = 2000
"""Points of a scatter plot; more are thinned evenly."""


def of_classification(
    probabilities: np.ndarray, labels: np.ndarray, names: Sequence[str], texts: Texts, lengths: np.ndarray
) -> list[Section]:
    """Per class, confusion, calibration, worst errors, error by length, for one label a row."""
    import numpy as np

    from finetune_cli import metrics

    guess = probabilities.argmax(1)
    wrong = guess != labels
    top = probabilities[np.arange(len(guess)), guess]
    worst = np.flatnonzero(wrong)[np.argsort(-top[wrong], kind="stable")][:WORST]
    counted = metrics.calibration(top, ~wrong)
    return [
        _classes("Scores per class", metrics.per_class(probabilities, labels, names)),
        Heatmap("Confusion", names, names, metrics.confusion(labels, guess, len(names)).tolist()),
        Reliability("Calibration", counted.confidence, counted.accuracy, counted.counts, note="top probability in 15 bins"),
        Examples(
            "Worst errors",
            ("row", "true", "predicted", "probability", "text"),
            [(int(i) + 1, names[labels[i]], names[guess[i]], round(float(top[i]), 3), texts(int(i))) for i in worst],
            note=f"the surest of {int(wrong.sum())} wrong answers among {len(labels)} rows",
        ),
        _by_length(lengths, wrong.astype(np.float64), "error rate"),
    ]


def of_multilabel(
    probabilities: np.ndarray, targets: np.ndarray, names: Sequence[str], threshold: float, texts: Texts, lengths: np.ndarray
) -> list[Section]:
    """Per label with its threshold, calibration, worst errors, error by length, for any number of labels a row."""
    import numpy as np

    from finetune_cli import metrics

    given, true = probabilities >= threshold, targets.astype(bool)
    wrong = (given != true).any(1)
    off = np.abs(probabilities - true).max(1)
    worst = np.flatnonzero(wrong)[np.argsort(-off[wrong], kind="stable")][:WORST]

    def told(row: np.ndarray) -> str:
        return ", ".join(name for name, has in zip(names, row, strict=True) if has) or "none"

    counted = metrics.calibration(probabilities, true)
    return [
        _classes(f"Scores per label (threshold {threshold:g})", metrics.per_label(probabilities, true, threshold, names)),
        _thresholds(probabilities, true, names, threshold),
        Reliability("Calibration", counted.confidence, counted.accuracy, counted.counts, note="probability of each label in 15 bins"),
        Examples(
            "Worst errors",
            ("row", "true", "predicted", "furthest off", "text"),
            [(int(i) + 1, told(true[i]), told(given[i]), round(float(off[i]), 3), texts(int(i))) for i in worst],
            note=f"of {int(wrong.sum())} rows with a wrong label among {len(targets)}",
        ),
        _by_length(lengths, wrong.astype(np.float64), "share of rows with a wrong label"),
    ]


def of_regression(values: np.ndarray, targets: np.ndarray, names: Sequence[str], texts: Texts, lengths: np.ndarray) -> list[Section]:
    """Prediction against target for each target, worst errors, error by length."""
    import numpy as np

    errors = np.abs(values - targets)
    worst = np.argsort(-errors.mean(1), kind="stable")[:WORST]
    thin = slice(None, None, max(1, len(values) // POINTS))
    scatters = [
        Scatter(
            f"{name}: prediction against target", "target", "prediction", targets[thin, t].tolist(), values[thin, t].tolist(), diagonal=True
        )
        for t, name in enumerate(names)
    ]

    def told(row: np.ndarray) -> str:
        return ", ".join(f"{value:.3g}" for value in row)

    return [
        *scatters,
        Examples(
            "Worst errors",
            ("row", "target", "prediction", "error", "text"),
            [(int(i) + 1, told(targets[i]), told(values[i]), round(float(errors[i].mean()), 3), texts(int(i))) for i in worst],
        ),
        _by_length(lengths, errors.mean(1), "mean absolute error"),
    ]


def _thresholds(probabilities: np.ndarray, true: np.ndarray, names: Sequence[str], threshold: float) -> Table:
    """The threshold in use beside the one that these rows would have liked best."""
    from finetune_cli import metrics

    best = metrics.best_thresholds(probabilities, true)
    used, ideal = (metrics.per_label(probabilities, true, t, names) for t in (threshold, best))
    rows = [(name, threshold, a.f1, round(float(t), 3), b.f1) for name, t, a, b in zip(names, best, used, ideal, strict=True)]
    columns = ("label", "threshold used", "F1 there", "best threshold here", "F1 there")
    return Table("Thresholds", columns, rows, note="the best ones were found on these very rows, so they flatter themselves")


def _classes(title: str, rows: Sequence[ClassRow]) -> Table:
    cells = [(r.name, r.precision, r.recall, r.f1, r.roc_auc if r.roc_auc == r.roc_auc else None, r.support, r.predicted) for r in rows]
    return Table(title, ("label", "precision", "recall", "F1", "ROC-AUC", "rows", "predicted"), cells)


def _by_length(lengths: np.ndarray, errors: np.ndarray, label: str) -> Bars:
    from finetune_cli import metrics

    names, means, counts = metrics.by_length(lengths, errors)
    return Bars("Error by length", "tokens", label, names, means, counts)
