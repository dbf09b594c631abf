"""What token-classification shows in the report: scores per type, types confused, worst errors with the names marked, error by length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from finetune_cli.tasks.sections import Bars, Examples, Heatmap, Section, Table

if TYPE_CHECKING:
    import numpy as np

    from finetune_cli.data.tags import Span

    Marked = Callable[[int, Sequence[Span]], str]
    """The text of an answer's row with these names marked."""

WORST = 20
"""Errors shown."""
NONE = "none"


def of_entities(
    gold: Sequence[Sequence[Span]],
    predicted: Sequence[Sequence[Span]],
    sure: np.ndarray,
    types: Sequence[str],
    marked: Marked,
    lengths: np.ndarray,
) -> list[Section]:
    """``sure``: the highest probability of a wrong label in each row; ``lengths``: tokens of each row."""
    import numpy as np

    from finetune_cli import metrics
    from finetune_cli.metrics.entities import report

    wrong = np.array([set(a) != set(b) for a, b in zip(gold, predicted, strict=True)], bool)
    worst = np.flatnonzero(wrong)[np.argsort(-sure[wrong], kind="stable")][:WORST]
    names, shares, counts = metrics.by_length(lengths, wrong.astype(np.float64))
    kinds = [*types, NONE]
    return [
        Table(
            "Scores per type",
            ("type", "precision", "recall", "F1", "names", "predicted"),
            [(r.name, r.precision, r.recall, r.f1, r.support, r.predicted) for r in report(gold, predicted)],
            note="a name is right if its words and its type are",
        ),
        Heatmap("Confusion of types", kinds, kinds, confused(gold, predicted, kinds), note="names by the words that they share"),
        Examples(
            "Worst errors",
            ("row", "probability", "true", "predicted"),
            [(int(i) + 1, round(float(sure[i]), 3), marked(int(i), gold[i]), marked(int(i), predicted[i])) for i in worst],
            note=f"the surest of {int(wrong.sum())} rows with a wrong name among {len(wrong)}",
        ),
        Bars("Error by length", "tokens", "share of rows with a wrong name", names, shares, counts),
    ]


def confused(gold: Sequence[Sequence[Span]], predicted: Sequence[Sequence[Span]], kinds: Sequence[str]) -> list[list[int]]:
    """How often names of a type (rows) were given which type (columns). The last kind is no name at all.

    A true name goes with the predicted one of the same words, else with the first that shares a word; one without such a partner
    counts under none, and so does a predicted name that shares no word with a true one.
    """
    at = {name: i for i, name in enumerate(kinds)}
    counts = [[0] * len(kinds) for _ in kinds]
    for true, found in zip(gold, predicted, strict=True):
        for start, end, name in true:
            sharing = sorted((span[:2] != (start, end), span) for span in found if span[0] < end and start < span[1])
            counts[at[name]][at[sharing[0][1][2]] if sharing else -1] += 1
        for start, end, name in found:
            if not any(a < end and start < b for a, b, _ in true):
                counts[-1][at[name]] += 1
    return counts
