"""What is tuned on held-out rows: the temperature of probabilities, the threshold of each label, the confidence that earns a precision.

All of it is deterministic and in float64: the same logits give the same numbers, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from finetune_cli.metrics.bootstrap import Floats
from finetune_cli.metrics.classification import Ints

COLDEST, HOTTEST = 0.05, 20.0
"""Bounds of the temperature: rows that are all answered right would have it at 0."""
_MOST_STEPS = 100


@dataclass(frozen=True, slots=True)
class Confidence:
    """The lowest confidence from which answers reach a precision, and what the rows that found it gave."""

    least: float
    """Answers at or above it count as sure; 0 where every answer does."""
    reached: bool
    """Whether the precision was reached; where not, ``least`` is that of the surest answers."""
    precision: float
    coverage: float


def probabilities(logits: Floats, *, multi: bool, temperature: float = 1.0) -> Floats:
    """Softmax over the last axis, or (``multi``) a sigmoid of each number; float64."""
    x = np.asarray(logits, dtype=np.float64) / temperature
    if multi:
        return np.exp(-np.logaddexp(0.0, -x))
    shifted = np.exp(x - x.max(-1, keepdims=True))
    result: Floats = shifted / shifted.sum(-1, keepdims=True)
    return result


def best_temperature(logits: Floats, targets: Ints, *, multi: bool) -> float:
    """The temperature whose probabilities have the lowest log loss (Guo et al. 2017, arXiv:1706.04599), between 0.05 and 20.

    ``logits`` [N, K] against label numbers [N], or (``multi``) against 0/1 targets [N, K]. The loss is convex in 1 / temperature, so
    Newton's method, kept inside a bracket, finds its only minimum.
    """
    z = np.asarray(logits, dtype=np.float64)
    if not len(z):
        return 1.0
    y = np.asarray(targets)
    wanted = float((z * (y > 0)).sum()) if multi else float(z[np.arange(len(z)), y].sum())
    low, high = 1 / HOTTEST, 1 / COLDEST
    inverse = 1.0
    for _ in range(_MOST_STEPS):
        slope, curvature = _slope(z, inverse, multi)
        slope -= wanted
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        step = inverse - slope / curvature if curvature > 0 else -1.0
        following = step if low < step < high else (low + high) / 2
        if abs(following - inverse) <= 1e-12 * inverse:
            break
        inverse = following
    return 1 / inverse


def _slope(z: Floats, inverse: float, multi: bool) -> tuple[float, float]:
    """Expected logit under the model, summed over rows, and its variance: first and second derivative of the log of the partition."""
    p = probabilities(z, multi=multi, temperature=1 / inverse)
    if multi:
        return float((p * z).sum()), float((p * (1 - p) * z**2).sum())
    mean = (p * z).sum(-1)
    return float(mean.sum()), float((p * (z - mean[:, None]) ** 2).sum())


def best_thresholds(probabilities: Floats, targets: Ints) -> Floats:
    """Per label the threshold of highest F1 [K], halfway between two scores; 0.5 where a label never occurs."""
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(targets).astype(bool)
    found = np.full(p.shape[1], 0.5)
    for c in range(p.shape[1]):
        if not y[:, c].any():
            continue
        order = np.argsort(-p[:, c], kind="stable")
        scores = p[order, c]
        hits = np.cumsum(y[order, c])
        f1 = 2 * hits / (np.arange(1, len(scores) + 1) + y[:, c].sum())
        last = np.r_[scores[1:] != scores[:-1], True]  # a cut between equal scores is none
        best = int(np.where(last, f1, -1.0).argmax())
        below = scores[best + 1] if best + 1 < len(scores) else 0.0
        found[c] = (scores[best] + below) / 2
    return found


def least_confidence(confidence: Floats, right: np.ndarray, precision: float) -> Confidence:
    """The lowest confidence from which at least ``precision`` of the answers [N] are right, halfway to the next answer below it."""
    sure, right = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=bool)
    if not len(sure):
        return Confidence(0.0, False, float("nan"), 0.0)
    order = np.argsort(-sure, kind="stable")
    scores = sure[order]
    shares = np.cumsum(right[order]) / np.arange(1, len(scores) + 1)
    cuts = np.flatnonzero(np.r_[scores[1:] != scores[:-1], True])  # a cut between equal scores is none
    enough = cuts[shares[cuts] >= precision]
    at = int(enough[-1] if len(enough) else cuts[0])
    least = (scores[at] + scores[at + 1]) / 2 if at + 1 < len(scores) else 0.0
    return Confidence(float(least), bool(len(enough)), float(shares[at]), (at + 1) / len(scores))
