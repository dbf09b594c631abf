"""Keyed randomness: every draw is a function of (seed, purpose, counters), so nothing random is ever saved or restored.

Order, dropout, masking and augmentation each have a purpose of their own; evaluation, logging or a resume cannot disturb them.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

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
