"""Numbers as answers hold them: short, but with every digit that a score computed from them can need."""

from __future__ import annotations

import math

DIGITS = 12
"""Significant digits: nine bring any float32 back, three more keep apart what a softmax moves together."""


def figure(value: float) -> float:
    """The number to twelve significant digits; of a share also what it lacks to 1, so that neither ranks nor logarithms are lost."""
    value = float(value)
    size = min(value, 1 - value) if 0 < value < 1 else abs(value)
    if not size or not math.isfinite(size):
        return value
    return round(value, DIGITS - 1 - math.floor(math.log10(size)))
