"""Rank-based areas on many resamples at once.

The rows are sorted once; on every resample the multiplicities, laid out in that order and summed up, say how many rows lie below
any score. Tied scores form one group, as in scikit-learn.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from finetune_cli.metrics.bootstrap import Floats


class Ranking:
    """One column of scores [N] against 0/1 truths [N], sorted."""

    def __init__(self, scores: Floats, positive: npt.NDArray[np.bool_]) -> None:
        self.order = np.argsort(scores, kind="stable")
        ordered = scores[self.order]
        starts, ends = tie_groups(ordered)
        self.at = np.flatnonzero(positive[self.order])
        """Places of the positives in the order."""
        self.start, self.end = starts[self.at], ends[self.at]
        self.positive_start = np.searchsorted(self.at, self.start, side="left")
        """How many positives lie before each positive's group."""
        self.positive_end = np.searchsorted(self.at, self.end, side="left")

    def areas(self, w: Floats) -> tuple[Floats, Floats]:
        """(ROC-AUC, average precision) for multiplicities [R, N]; NaN without positives or without negatives."""
        ordered = w[:, self.order]
        mine = ordered[:, self.at]
        below = _running(ordered)
        below_mine = _running(mine)
        total, positives = below[:, -1], below_mine[:, -1]
        negatives = total - positives
        before_all, before_positive = below[:, self.start], below_mine[:, self.positive_start]
        until_all, until_positive = below[:, self.end], below_mine[:, self.positive_end]
        beaten = (before_all - before_positive) + (until_all - until_positive)
        defined = (positives > 0) & (negatives > 0)
        pairs = np.where(defined, 2 * positives * negatives, np.nan)
        roc = np.einsum("rp,rp->r", mine, beaten) / pairs
        reached = total[:, None] - before_all
        precision = np.divide(positives[:, None] - before_positive, reached, out=np.zeros_like(reached), where=reached > 0)
        average = np.einsum("rp,rp->r", mine, precision) / np.where(defined, positives, np.nan)
        return roc, average


def tie_groups(ordered: Floats) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For each place of a sorted array: where its group of equal values starts, and where it ends (exclusive)."""
    n = len(ordered)
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if n else np.zeros(0, dtype=np.int64)
    sizes = np.diff(np.r_[first, n])
    return np.repeat(first, sizes), np.repeat(first + sizes, sizes)


def _running(w: Floats) -> Floats:
    """Running sums with a leading zero, [R, N + 1]."""
    sums = np.zeros((w.shape[0], w.shape[1] + 1))
    np.cumsum(w, axis=1, out=sums[:, 1:])
    return sums
