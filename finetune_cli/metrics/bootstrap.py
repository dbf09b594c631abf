"""Bootstrap intervals over rows: 95 %, percentile, seeded (Efron 1979).

A resample is a vector of multiplicities, so a thousand of them are one matrix and metrics run on all at once. Above
``MOST_ROWS`` rows the spread is found on that many rows, drawn once, and shrunk by the square root of the ratio (in the manner of
the m out of n bootstrap: Bickel, Götze, van Zwet 1997), so the work does not grow with the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune_cli import randomness
from finetune_cli.metrics.names import ORDER

Floats = npt.NDArray[np.float64]
Rows = slice | npt.NDArray[np.int64]
Entry = dict[str, Any]
"""``{"value", "low", "high", "n"}``, with ``resamples`` where it is not the usual number and ``note`` where something is undefined."""
Weighted = Callable[[Floats], Mapping[str, Floats]]
"""Multiplicities [R, N] to metrics [R]."""

RESAMPLES = 1000
FEWEST_RESAMPLES = 200
MOST_ROWS = 20_000
DEFINED = 0.95
"""Share of resamples on which a metric must be defined for its interval to be given."""
_CHUNK = 500_000
"""Multiplicities in memory at once."""
_RANK_WORK = 50_000_000
"""Resamples x rows x rankings that rank-based metrics may cost: a second or two."""


@dataclass(frozen=True, slots=True)
class Measures:
    """The metrics of one family bound to their arrays. ``ranked`` are the costly ones, one ranking of all rows each."""

    n: int
    plain: Weighted
    ranked: Weighted | None = None
    rankings: int = 0
    notes: Mapping[str, str] = field(default_factory=dict)
    """Why a metric is undefined on these rows."""


def values(measures: Measures) -> dict[str, float]:
    """Plain scores: every row counts once. All NaN where there are no rows."""
    once = np.ones((1, measures.n))
    found = dict(measures.plain(once))
    if measures.ranked is not None:
        found |= measures.ranked(once)
    return {name: float(found[name][0]) for name in _in_order(found)}


def _in_order(names: Iterable[str]) -> list[str]:
    """Metrics in the order in which they are told; those of ``part/metric`` part by part, after those of the whole."""
    given = list(names)
    parts = list(dict.fromkeys(["", *(name.rpartition("/")[0] for name in given)]))

    def place(name: str) -> tuple[int, int]:
        part, _, metric = name.rpartition("/")
        return parts.index(part), ORDER.index(metric) if metric in ORDER else len(ORDER)

    return sorted(given, key=place)


def score(build: Callable[[Rows], Measures], n: int, *, seed: int, resamples: int = RESAMPLES) -> dict[str, Entry]:
    """Every metric with its 95 % interval and n; ``build`` gives the measures of some of the n rows.

    Rank-based metrics on many rows and classes get fewer resamples, and their entries say so.
    """
    whole = build(slice(None))
    found = values(whole)
    some = whole if n <= MOST_ROWS else build(np.sort(randomness.generator(seed, "bootstrap rows").permutation(n)[:MOST_ROWS]))
    spans, used = _spans(some.plain, some.n, seed=seed, resamples=resamples), dict.fromkeys(found, resamples)
    if some.ranked is not None:
        fewer = min(resamples, max(FEWEST_RESAMPLES, _RANK_WORK // max(1, some.n * some.rankings)))
        ranked = _spans(some.ranked, some.n, seed=seed, resamples=fewer)
        spans, used = spans | ranked, used | dict.fromkeys(ranked, fewer)
    shrink = math.sqrt(some.n / n) if n else 1.0
    result = {}
    for name, value in found.items():
        low, high = (value + shrink * distance for distance in spans[name])
        result[name] = entry(value, low, high, n, resamples=used[name], note=whole.notes.get(name, ""))
    return result


def entry(
    value: float, low: float | None = None, high: float | None = None, n: int = 0, *, resamples: int = RESAMPLES, note: str = ""
) -> Entry:
    """One metric as metrics.json has it. JSON-ready: what is not a number is None, and a note says why."""
    low, high = _number(low), _number(high)
    if _number(value) is None:
        return {"value": None, "low": None, "high": None, "n": n, "note": note or "not defined on these rows"}
    result: Entry = {"value": float(value), "low": low, "high": high, "n": n}
    return result if low is None or resamples == RESAMPLES else result | {"resamples": resamples}


def _spans(weighted: Weighted, n: int, *, seed: int, resamples: int) -> dict[str, tuple[float, float]]:
    """How far the ends of each metric's interval lie from its value on all n rows; NaN where too few resamples define it."""
    once = weighted(np.ones((1, n)))
    if n == 0:
        return {name: (math.nan, math.nan) for name in once}
    generator = randomness.generator(seed, "bootstrap")
    per_chunk = max(1, _CHUNK // n)
    sizes = [min(per_chunk, resamples - start) for start in range(0, resamples, per_chunk)]
    parts = [weighted(_multiplicities(generator, size, n)) for size in sizes]
    return {name: _span(np.concatenate([part[name] for part in parts]), float(value[0])) for name, value in once.items()}


def _multiplicities(generator: np.random.Generator, resamples: int, n: int) -> Floats:
    rows = generator.integers(0, n, size=(resamples, n))
    rows += np.arange(resamples)[:, None] * n
    return np.bincount(rows.ravel(), minlength=resamples * n).reshape(resamples, n).astype(np.float64)


def _span(draws: Floats, value: float) -> tuple[float, float]:
    defined = draws[np.isfinite(draws)]
    if not math.isfinite(value) or len(defined) < DEFINED * len(draws):
        return math.nan, math.nan
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low) - value, float(high) - value


def _number(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
