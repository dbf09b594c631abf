"""Metrics of numbers against numbers; several targets: the mean over targets, undefined as soon as one is."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from finetune_cli.metrics.bootstrap import Floats, Measures, values
from finetune_cli.metrics.ranking import tie_groups

_FLAT = 1e-12
"""A variance below this share of the mean square is rounding, not variation."""
_ROUNDING = 1e-13
"""A deviation below this share of the largest value is rounding, too."""


def regression(predictions: Floats, targets: Floats) -> dict[str, float]:
    """Scores of predictions [N, T] (or [N]) against targets of that shape."""
    return values(regression_measures(predictions, targets))


def regression_measures(predictions: Floats, targets: Floats) -> Measures:
    """The metrics of ``regression``, for ``score``."""
    p, y = (np.asarray(a, dtype=np.float64) for a in (predictions, targets))
    p, y = p.reshape(len(p), -1), y.reshape(len(y), -1)
    columns = [(p[:, t], y[:, t]) for t in range(p.shape[1])]
    orders = [(_Ranks(a), _Ranks(b)) for a, b in columns]

    def plain(w: Floats) -> dict[str, Floats]:
        per_target = [_moments(a, b, w) for a, b in columns]
        return {name: np.mean([found[name] for found in per_target], axis=0) for name in ("mae", "rmse", "r2", "pearson")}

    def ranked(w: Floats) -> dict[str, Floats]:
        return {"spearman": np.mean([_correlation(a.of(w), b.of(w), w) for a, b in orders], axis=0)}

    flat = "the targets do not vary" if _any_flat(y) else "the predictions do not vary"
    notes = dict.fromkeys(("r2", "pearson", "spearman"), "there are fewer than two rows" if len(p) < 2 else flat)
    return Measures(len(p), plain, ranked, 2 * len(columns), notes)


def _any_flat(values_: Floats) -> bool:
    return bool(len(values_) == 0 or (np.ptp(values_, axis=0) == 0).any())


def _moments(p: Floats, y: Floats, w: Floats) -> dict[str, Floats]:
    rows = w.sum(axis=1)
    n = np.where(rows > 0, rows, np.nan)
    error = p - y
    squared = (w @ error**2) / n
    centre = y.mean() if len(y) else 0.0
    variance = _variance(y - centre, w)
    return {
        "mae": (w @ np.abs(error)) / n,
        "rmse": np.sqrt(squared),
        "r2": 1 - squared / variance,
        "pearson": _correlation(p[None, :], y[None, :], w),
    }


def _variance(x: Floats, w: Floats) -> Floats:
    """Variance of x [N] for multiplicities [R, N]; NaN where it is only rounding or there are fewer than two rows."""
    n = np.maximum(w.sum(axis=1), 1)
    square = (w @ x**2) / n
    variance = square - ((w @ x) / n) ** 2
    return np.where((variance > _FLAT * square) & (w.sum(axis=1) > 1), variance, np.nan)


def _correlation(x: Floats, y: Floats, w: Floats) -> Floats:
    """Pearson correlation of x and y ([R, N] or [1, N]) for multiplicities [R, N]; NaN where one of them does not vary."""
    n = np.maximum(w.sum(axis=1, keepdims=True), 1)
    dx = x - (w * x).sum(axis=1, keepdims=True) / n
    dy = y - (w * y).sum(axis=1, keepdims=True) / n
    product, xx, yy = ((w * a).sum(axis=1) / n[:, 0] for a in (dx * dy, dx * dx, dy * dy))
    correlation: Floats = product / np.sqrt(_varying(xx, x) * _varying(yy, y))
    return correlation


def _varying(variance: Floats, x: Floats) -> Floats:
    """Variances, NaN where they are only the rounding of x's mean."""
    scale = np.abs(x).max(axis=1) if x.shape[1] else np.zeros(len(x))
    return np.where(variance > (_ROUNDING * scale) ** 2, variance, np.nan)


class _Ranks:
    """Middle ranks of one column [N] on resamples: ties share the mean of their places."""

    def __init__(self, x: Floats) -> None:
        self.order = np.argsort(x, kind="stable")
        self.start, self.end = tie_groups(x[self.order])
        self.back: npt.NDArray[np.int64] = np.argsort(self.order, kind="stable")

    def of(self, w: Floats) -> Floats:
        """Ranks [R, N] in the rows' own order, for multiplicities [R, N]."""
        sums = np.zeros((w.shape[0], w.shape[1] + 1))
        np.cumsum(w[:, self.order], axis=1, out=sums[:, 1:])
        middle = (sums[:, self.start] + sums[:, self.end] + 1) / 2
        return np.asarray(middle[:, self.back])
