"""Metrics of several answers a row: each one's own under ``name/metric``, and means over all of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np

from finetune_cli.metrics.bootstrap import Floats, Measures
from finetune_cli.metrics.classification import Ints

Part = tuple[Measures, Ints]
"""Measures of the rows that carry one answer, and which rows these are."""


def joint_measures(parts: Mapping[str, Part], n: int, *, means: Collection[str]) -> Measures:
    """Every metric of each part as ``part/metric``, and those of ``means`` as the mean over parts, drawn on the same ``n`` rows.

    A mean is not defined where one of its parts is not.
    """

    def family(which: Callable[[Measures], Callable[[Floats], Mapping[str, Floats]] | None]) -> Callable[[Floats], dict[str, Floats]]:
        def weighted(w: Floats) -> dict[str, Floats]:
            found = {name: dict(call(w[:, rows])) for name, (part, rows) in parts.items() if (call := which(part)) is not None}
            shared = [metric for metric in means if found and all(metric in one for one in found.values())]
            averaged = {metric: np.mean([one[metric] for one in found.values()], axis=0) for metric in shared}
            return averaged | {f"{name}/{metric}": value for name, one in found.items() for metric, value in one.items()}

        return weighted

    notes = {f"{name}/{metric}": note for name, (part, _) in parts.items() for metric, note in part.notes.items()}
    rankings = sum(part.rankings for part, _ in parts.values())
    return Measures(n, family(lambda m: m.plain), family(lambda m: m.ranked) if rankings else None, rankings, notes)
