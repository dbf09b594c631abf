"""True names beside predicted ones: the metrics of token-classification, and what it shows in the report.

That is scores per type, types confused, worst errors with the names marked, and error by length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune_cli.tasks.sections import Bars, Examples, Heatmap, Section, Table

if TYPE_CHECKING:
    import numpy as np

    from finetune_cli.data.tags import Span
    from finetune_cli.metrics import Measures

    Marked = Callable[[int, Sequence[Span]], str]
    """The text of an answer's row with these names marked."""

WORST = 20
"""Errors shown."""
NONE = "none"


@dataclass(frozen=True, slots=True)
class Compared:
    """True and predicted spans row by row, and which words, end to end, have another label than the true one."""

    gold: list[list[Span]]
    predicted: list[list[Span]]
    wrong: np.ndarray
    offsets: np.ndarray

    def by_row(self, values: np.ndarray, how: Any) -> np.ndarray:
        """A NumPy function such as ``np.add`` over the words of each row; 0 where there are none."""
        import numpy as np

        found = np.zeros(len(self.gold))
        how.at(found, np.repeat(np.arange(len(self.gold)), np.diff(self.offsets)), values)
        return found

    def measures(self) -> Callable[[Any], Measures]:
        """Entity metrics, and ``accuracy``: the share of words with their true label."""
        import numpy as np

        from finetune_cli.metrics import Measures
        from finetune_cli.metrics.entities import measures, per_row

        spans = measures(per_row(self.gold, self.predicted))
        words, wrong = np.diff(self.offsets).astype(np.float64), self.by_row(self.wrong.astype(np.float64), np.add)

        def build(rows: Any) -> Measures:
            inner, w_words, w_wrong = spans(rows), words[rows], wrong[rows]

            def plain(w: Any) -> dict[str, Any]:
                total = w @ w_words
                share = np.divide(w @ w_wrong, total, out=np.full_like(total, np.nan), where=total > 0)
                return {**inner.plain(w), "accuracy": 1 - share}

            return Measures(inner.n, plain)

        return build


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
