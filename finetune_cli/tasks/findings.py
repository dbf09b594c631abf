"""What labels or numbers show in the report: tables and plots as plain data, shared by the tasks that give them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from finetune_cli.tasks.sections import Bars, Examples, Heatmap, Reliability, Scatter, Section, Table

if TYPE_CHECKING:
    import numpy as np

    from finetune_cli.metrics import ClassRow
    from finetune_cli.tasks.labelling.labels import LabelOptions, LabelSet

    Texts = Callable[[int], str]

WORST = 20
"""Errors shown."""
FEW_ROWS = 300
"""Below so many rows a bin of 15 holds too few to judge it."""
POINTS = 2000
"""Points of a scatter plot; more are thinned evenly."""


def _calibration(counted: Any, what: str, rows: int) -> Reliability:
    """How sure against how often right, and what a reader must know where few rows made it."""
    few = f"; {rows:,} rows say little of it: a point far from the line may be chance" if rows < FEW_ROWS else ""
    return Reliability("Calibration", counted.confidence, counted.accuracy, counted.counts, note=f"{what} in 15 bins{few}")


def of_labels(
    labels: LabelSet,
    options: LabelOptions,
    logits: np.ndarray,
    targets: np.ndarray,
    texts: Texts,
    lengths: np.ndarray,
    about: np.ndarray | None = None,
) -> list[Section]:
    """Scores per label, confusion or thresholds, calibration, worst errors, error by length; ``about`` is the row of each answer."""
    import numpy as np

    p = labels.probabilities(logits)
    about = np.arange(len(p)) if about is None else about
    if labels.multi:
        found = _of_multilabel(labels, np.asarray(labels.thresholds(options)), p, targets, texts, lengths, about)
    else:
        found = _of_classification(labels, options, p, targets, texts, lengths, about)
    if labels.decisions.temperature == 1:
        return found
    return [*found, _calibrated(labels, logits, p, targets)]


def _of_classification(
    labels: LabelSet,
    options: LabelOptions,
    p: np.ndarray,
    targets: np.ndarray,
    texts: Texts,
    lengths: np.ndarray,
    about: np.ndarray,
) -> list[Section]:
    import numpy as np

    from finetune_cli import metrics

    names, answers = labels.names, labels.answers(p, options)
    guess = answers.labels
    wrong = guess != targets
    sure, top = p[np.arange(len(guess)), guess], p.max(1)
    worst = np.flatnonzero(wrong)[np.argsort(-sure[wrong], kind="stable")][:WORST]
    counted = metrics.calibration(top, p.argmax(1) == targets)
    found: list[Section] = [
        _classes("Scores per class", metrics.per_class(p, targets, names, guess)),
        Heatmap("Confusion", names, names, metrics.confusion(targets, guess, len(names)).tolist()),
        _calibration(counted, "top probability", len(targets)),
        Examples(
            "Worst errors",
            ("row", "true", "predicted", "probability", "text"),
            [(int(about[i]) + 1, names[targets[i]], names[guess[i]], round(float(sure[i]), 3), texts(int(about[i]))) for i in worst],
            note=f"the surest of {int(wrong.sum())} wrong answers among {len(targets)} rows",
        ),
        _by_length(lengths, wrong.astype(np.float64), "error rate"),
    ]
    if (thresholds := labels.thresholds(options)) is not None:
        found.append(_thresholds(p[:, 1:], (targets == 1)[:, None], names[1:], np.asarray(thresholds)))
    if answers.given is not None:
        found.append(_abstaining(sure, ~wrong, answers.given, labels.decisions.least_confidence or 0.0))
    return found


def _of_multilabel(
    labels: LabelSet, thresholds: np.ndarray, p: np.ndarray, targets: np.ndarray, texts: Texts, lengths: np.ndarray, about: np.ndarray
) -> list[Section]:
    import numpy as np

    from finetune_cli import metrics

    names = labels.names
    given, true = p >= thresholds, targets.astype(bool)
    wrong = (given != true).any(1)
    off = np.abs(p - true).max(1)
    worst = np.flatnonzero(wrong)[np.argsort(-off[wrong], kind="stable")][:WORST]

    def told(row: np.ndarray) -> str:
        return ", ".join(name for name, has in zip(names, row, strict=True) if has) or "none"

    counted = metrics.calibration(p, true)
    same = f"threshold {thresholds[0]:g}" if len(set(thresholds.tolist())) == 1 else "a threshold each"
    return [
        _classes(f"Scores per label ({same})", metrics.per_label(p, true, thresholds, names)),
        _thresholds(p, true, names, thresholds),
        _calibration(counted, "probability of each label", len(true)),
        Examples(
            "Worst errors",
            ("row", "true", "predicted", "furthest off", "text"),
            [(int(about[i]) + 1, told(true[i]), told(given[i]), round(float(off[i]), 3), texts(int(about[i]))) for i in worst],
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


def _thresholds(p: np.ndarray, true: np.ndarray, names: Sequence[str], thresholds: np.ndarray) -> Table:
    """The threshold in use beside the one that these rows would have liked best."""
    from finetune_cli import metrics

    best = metrics.best_thresholds(p, true)
    used, ideal = (metrics.per_label(p, true, t, names) for t in (thresholds, best))
    rows = [
        (name, round(float(t), 3), a.f1, round(float(b), 3), c.f1)
        for name, t, a, b, c in zip(names, thresholds, used, best, ideal, strict=True)
    ]
    columns = ("label", "threshold used", "F1 there", "best threshold here", "F1 there")
    return Table("Thresholds", columns, rows, note="the best ones were found on these very rows, so they flatter themselves")


def _abstaining(sure: np.ndarray, right: np.ndarray, given: np.ndarray, least: float) -> Table:
    """What is gained and lost by withholding answers."""
    rows = [
        (name, int(some.sum()), float(some.mean()) if len(some) else None, float(right[some].mean()) if some.any() else None)
        for name, some in (("given", given), ("withheld", ~given))
    ]
    return Table("Abstaining", ("answers", "rows", "share", "right"), rows, note=f"withheld below a confidence of {least:.4g}")


def _calibrated(labels: LabelSet, logits: np.ndarray, p: np.ndarray, targets: np.ndarray) -> Table:
    """What the temperature does on these rows."""
    from finetune_cli import metrics
    from finetune_cli.tasks.labelling.decisions import compared

    found = compared(metrics.probabilities(labels.raw(logits), multi=labels.multi), p, targets, multi=labels.multi)
    rows = [(metrics.title(name), before, after) for name, (before, after) in found.items()]
    note = f"logits divided by {labels.decisions.temperature:.4g}, found on {labels.decisions.rows:,} validation rows"
    return Table("Before and after calibration", ("on these rows", "before", "after"), rows, note=note)


def _classes(title: str, rows: Sequence[ClassRow]) -> Table:
    cells = [(r.name, r.precision, r.recall, r.f1, r.roc_auc if r.roc_auc == r.roc_auc else None, r.support, r.predicted) for r in rows]
    return Table(title, ("label", "precision", "recall", "F1", "ROC-AUC", "rows", "predicted"), cells)


def _by_length(lengths: np.ndarray, errors: np.ndarray, label: str) -> Bars:
    from finetune_cli import metrics

    names, means, counts = metrics.by_length(lengths, errors)
    return Bars("Error by length", "tokens", label, names, means, counts)
