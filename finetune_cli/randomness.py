"""Keyed randomness: every draw is a function of (seed, purpose, counters), so nothing random is ever saved or restored.

Order, dropout, masking and augmentation each have a purpose of their own; evaluation, logging or a resume cannot disturb them.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def key(seed: int, purpose: str, *counters: int) -> int:
    """A 63-bit key for one draw; equal arguments give equal keys on every machine and Python."""
    text = "\x1f".join([str(seed), purpose, *map(str, counters)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """A NumPy generator for one draw (Philox: the same stream on every platform)."""
    import numpy as np

    return np.random.Generator(np.random.Philox(key(seed, purpose, *counters)))


def uniform(key: int, *counters: Any) -> np.ndarray:
    """Numbers in [0, 1), float64, each a function of ``key`` and its own counters alone: arrays of integers that broadcast.

    What stands beside a number never changes it, so a draw for many examples is the same however they are batched. The finaliser of
    splitmix64 (Steele, Lea, Flood 2014) is applied once a counter.
    """
    import numpy as np

    state = np.full(1, key, np.uint64)
    with np.errstate(over="ignore"):
        for counter in counters:
            state = (state ^ np.asarray(counter).astype(np.int64).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    numbers: np.ndarray = (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers
