"""Metrics of named entities: a predicted span is right if start, end and type are.

Spans are compared once and counted per row and type; a resample is then three products of matrices. Figures are those of
``conlleval`` (Tjong Kim Sang and De Meulder 2003, arXiv:cs/0306050), as shares and not per cent. Equal spans of a row count once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from finetune_cli.metrics.bootstrap import Floats, Measures, Rows, values

if TYPE_CHECKING:
    from finetune_cli.data.tags import Span

Counts = npt.NDArray[np.int32]
PARTIAL_CREDIT = 0.5


@dataclass(frozen=True, slots=True)
class EntityTable:
    """What the metrics need of gold and predicted spans of N rows and K types."""

    types: tuple[str, ...]
    """Those of gold or predicted spans, in alphabetical order."""
    hits: Counts
    """Exact predictions [N, K]."""
    predicted: Counts
    """[N, K]."""
    gold: Counts
    """[N, K]."""
    partial: Counts
    """Predictions that are not exact but overlap a gold span of their type [N], see ``measures``."""


@dataclass(frozen=True, slots=True)
class EntityRow:
    """One line of the entity report. ``support``: gold spans of the type; ``predicted``: predicted ones."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int
    predicted: int


def entities(gold: Sequence[Sequence[Span]], predicted: Sequence[Sequence[Span]]) -> dict[str, float]:
    """Scores of each row's predicted spans against its gold spans."""
    return values(measures(per_row(gold, predicted))(slice(None)))


def per_row(gold: Sequence[Sequence[Span]], predicted: Sequence[Sequence[Span]]) -> EntityTable:
    """Counts per row and type. Raises ValueError where gold and predicted have different numbers of rows."""
    types = sorted({name for rows in (gold, predicted) for row in rows for _, _, name in row})
    column = {name: k for k, name in enumerate(types)}
    hits, given, true = (np.zeros((len(gold), len(types)), dtype=np.int32) for _ in range(3))
    partial = np.zeros(len(gold), dtype=np.int32)
    for at, (wanted, found) in enumerate(zip(map(set, gold), map(set, predicted), strict=True)):
        exact = wanted & found
        for layer, members in ((hits, exact), (given, found), (true, wanted)):
            for _, _, name in members:
                layer[at, column[name]] += 1
        partial[at] = _overlapping(wanted - exact, found - exact)
    return EntityTable(tuple(types), hits, given, true, partial)


def _overlapping(gold: set[Span], predicted: set[Span]) -> int:
    """How many pairs of spans overlap and have one type, each span in at most one pair: from left to right, which finds the most."""
    left, right = (sorted((name, start, end) for start, end, name in side) for side in (gold, predicted))
    i = j = pairs = 0
    while i < len(left) and j < len(right):
        (name, start, end), (other, begin, stop) = left[i], right[j]
        if name == other and start < stop and begin < end:
            i, j, pairs = i + 1, j + 1, pairs + 1
        elif (name, end) <= (other, stop):
            i += 1
        else:
            j += 1
    return pairs


def measures(table: EntityTable) -> Callable[[Rows], Measures]:
    """The metrics of some of the rows, for ``score``: precision, recall and F1 over all spans, 0 where nothing is counted.

    ``entity_f1_macro`` is the mean F1 of the types that gold spans have. For ``entity_partial_f1`` a prediction that is not exact
    counts half if it overlaps a gold span of its type; a gold span is matched once, exactly if possible, and so is a prediction.
    Precision and recall are then (exact + half the partial) / predicted and / gold (MUC-5: Chinchor and Sundheim 1993).
    """

    def build(rows: Rows) -> Measures:
        hits, given, true = (layer[rows].astype(np.float64) for layer in (table.hits, table.predicted, table.gold))
        halves = PARTIAL_CREDIT * table.partial[rows].astype(np.float64)

        def plain(w: Floats) -> dict[str, Floats]:
            found = _from_counts(w @ hits, w @ given, w @ true, w @ halves)
            any_row = np.where(w.sum(axis=1) > 0, 1.0, np.nan)
            return {name: value * any_row for name, value in found.items()}

        return Measures(len(halves), plain)

    return build


def _from_counts(hits: Floats, given: Floats, true: Floats, partial: Floats) -> dict[str, Floats]:
    """Metrics [R] from exact predictions, predictions and gold spans, each [R, K], and the credit of partial ones [R]."""
    right, said, there = hits.sum(axis=1), given.sum(axis=1), true.sum(axis=1)
    present = (true > 0).astype(np.float64)
    return {
        "entity_f1": _or_zero(2 * right, said + there),
        "entity_precision": _or_zero(right, said),
        "entity_recall": _or_zero(right, there),
        "entity_f1_macro": _or_zero((_or_zero(2 * hits, given + true) * present).sum(axis=1), present.sum(axis=1)),
        "entity_partial_f1": _or_zero(2 * (right + partial), said + there),
    }


def _or_zero(top: Floats, bottom: Floats) -> Floats:
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)


def counts(gold: Sequence[Sequence[Span]], predicted: Sequence[Sequence[Span]]) -> dict[str, tuple[int, int, int]]:
    """(exact predictions, predictions, gold spans) of each type that occurs."""
    table = per_row(gold, predicted)
    sums = np.stack([layer.sum(axis=0) for layer in (table.hits, table.predicted, table.gold)], axis=1).tolist()
    return {name: (hits, given, true) for name, (hits, given, true) in zip(table.types, sums, strict=True)}


def report(gold: Sequence[Sequence[Span]], predicted: Sequence[Sequence[Span]]) -> list[EntityRow]:
    """Precision, recall and F1 of each type that occurs, 0 where nothing is counted."""
    return [
        EntityRow(name, hits / max(1, given), hits / max(1, true), 2 * hits / (given + true), true, given)
        for name, (hits, given, true) in counts(gold, predicted).items()
    ]
