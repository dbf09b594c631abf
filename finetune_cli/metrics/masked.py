"""Metrics of a masked language model: means over the masked tokens, resampled by rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from finetune_cli.metrics.bootstrap import Floats, Measures, values

TOP = 5
"""``recall_at_5``: how often the true token is among so many."""


def masked(losses: Floats, ranks: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], n: int) -> dict[str, float]:
    """Scores of masked tokens [M]: loss in nats, rank (0: the model's first answer), and which of ``n`` rows each stands in."""
    return values(masked_measures(*by_row(losses, ranks, rows, n)))


def by_row(losses: Floats, ranks: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], n: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Per row [n]: masked tokens, sum of their losses, how many were found at once, how many among the first five."""

    def sums(weights: npt.NDArray[np.generic]) -> Floats:
        return np.bincount(rows, weights=np.asarray(weights, np.float64), minlength=n).astype(np.float64)

    return sums(np.ones(len(rows))), sums(losses), sums(ranks == 0), sums(ranks < TOP)


def masked_measures(tokens: Floats, losses: Floats, first: Floats, among: Floats) -> Measures:
    """``perplexity`` (exp of the mean loss), ``accuracy`` and ``recall_at_5``, for ``score``; arguments as ``by_row`` gives them."""

    def plain(w: Floats) -> dict[str, Floats]:
        count = w @ tokens
        count = np.where(count > 0, count, np.nan)
        with np.errstate(over="ignore"):
            return {"perplexity": np.exp((w @ losses) / count), "accuracy": (w @ first) / count, f"recall_at_{TOP}": (w @ among) / count}

    return Measures(len(tokens), plain)
