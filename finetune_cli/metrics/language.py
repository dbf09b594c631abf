"""Metrics of a language model: what the tokens of each example cost, in nats, over tokens and over bytes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from finetune_cli.metrics.bootstrap import Floats, Measures, values

Ints = npt.NDArray[np.int64]


def language(costs: Floats, tokens: Ints, bytes_: Ints, hits: Ints) -> dict[str, float]:
    """Scores of examples, each [N]: the sum of its tokens' cross-entropy in nats, how many tokens that is, how many bytes of text they
    stand for, and how many of them were the likeliest token."""
    return values(language_measures(costs, tokens, bytes_, hits))


def language_measures(costs: Floats, tokens: Ints, bytes_: Ints, hits: Ints) -> Measures:
    """The metrics of ``language``, for ``score``. Bits per byte do not depend on the vocabulary; marks cost, but are no text."""
    nats, counted, size, right = (np.asarray(a, dtype=np.float64) for a in (costs, tokens, bytes_, hits))

    def plain(w: Floats) -> dict[str, Floats]:
        total, n, length = w @ nats, w @ counted, w @ size
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return {
                "accuracy": (w @ right) / np.where(n > 0, n, np.nan),
                "perplexity": np.exp(total / np.where(n > 0, n, np.nan)),
                "bits_per_byte": total / np.log(2) / np.where(length > 0, length, np.nan),
            }

    return Measures(len(nats), plain, notes={"bits_per_byte": "the supervised tokens stand for no text"})
