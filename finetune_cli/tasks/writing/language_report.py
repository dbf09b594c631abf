"""What is said of a language model: the ledger of supervision, rows as the model gets them, and where the loss is high."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from finetune_cli.tasks.base import Evaluation, Outputs, Shown
from finetune_cli.tasks.sections import Bars, Cell, Curve, Section, Series, Table
from finetune_cli.tasks.sections import Examples as Rows_

if TYPE_CHECKING:
    import numpy as np

    from finetune_cli.data import Roles, Rows
    from finetune_cli.encoded import Examples

VIEWED = 3
"""Examples that are shown before the first step."""
LONGEST_VIEW = 160
"""Tokens of an example that are shown: its beginning and its end."""
WORST = 20
FIRST_TOKENS = "a block's first token is predicted from nothing and so not supervised; a block also ends with every 8,192 rows"
BINS = 32
"""Points of the curve of loss by position."""


def ledger(examples: Mapping[str, Examples], rows: Mapping[str, Rows], *, chat: bool) -> Table:
    """What of each split is learnt from, and what is not."""
    import numpy as np

    from finetune_cli.encoded import Ragged

    cells: list[list[Cell]] = []
    ends = 0
    for name, found in examples.items():
        supervised, turns, ended = found.columns["supervised"], found.columns["turns"], found.columns["ended"]
        assert isinstance(supervised, Ragged) and isinstance(turns, np.ndarray) and isinstance(ended, np.ndarray)
        tokens, learnt = len(supervised.values), int(np.sum(supervised.values, dtype=np.int64))
        sums = np.add.reduceat(supervised.values.astype(np.int64), supervised.offsets[:-1])
        dropped = len(rows[name]) - len(np.unique(found.row)) if chat else 0
        ends += int(ended.sum())
        closed = f"{int(ended.sum()):,} of {int(turns.sum()):,}"
        cells.append(
            [
                *(name, len(rows[name]), len(found), tokens, learnt, f"{learnt / tokens:.1%}"),
                *(found.counts.cut_rows, found.counts.lost, dropped, int((sums == 0).sum()), closed),
            ]
        )
    unit, end = ("conversations", "end of turn supervised") if chat else ("blocks", "end of text supervised")
    headers = ["split", "rows", unit, "tokens", "supervised", "share", "cut", "tokens lost", "dropped", "none supervised", end]
    note = FIRST_TOKENS
    if chat:
        note = "" if ends else "no end of a turn is supervised: only task.stop_strings and task.max_new_tokens end what is generated"
    return Table("Supervision", headers, cells, note=note)


def shown(examples: Examples, rows: Rows, tokenizer: Any) -> list[Shown]:
    """The first examples, their tokens put together to stretches that are supervised or not."""
    from finetune_cli.encoded import Ragged

    ids, supervised = examples.columns["input_ids"], examples.columns["supervised"]
    assert isinstance(ids, Ragged) and isinstance(supervised, Ragged)
    views = []
    for i in range(min(VIEWED, len(examples))):
        tokens, marks = ids.sequence(i).tolist(), supervised.sequence(i).tolist()
        ends = [(0, len(tokens))]
        if len(tokens) > LONGEST_VIEW:
            ends = [(0, LONGEST_VIEW // 2), (len(tokens) - LONGEST_VIEW // 2, len(tokens))]
        pieces: list[tuple[str, bool]] = []
        for start, stop in ends:
            if start:
                pieces.append((f" … {start - ends[0][1]} tokens … ", False))
            at = start
            while at < stop:
                upto = next((t for t in range(at, stop) if marks[t] != marks[at]), stop)
                pieces.append((str(tokenizer.decode(tokens[at:upto], clean_up_tokenization_spaces=False)), bool(marks[at])))
                at = upto
        views.append(Shown(f"{rows.where(int(examples.row[i]))}: {len(tokens)} tokens, {sum(marks)} supervised", tuple(pieces)))
    return views


def sums(outputs: Outputs) -> tuple[np.ndarray, ...]:
    """(nats, tokens, bytes, hits) of each example, [N]."""
    import numpy as np

    losses, hits = outputs["losses"], outputs["hits"]

    def each(values: np.ndarray, kind: Any) -> np.ndarray:
        upto = np.concatenate([[0], np.cumsum(values, dtype=kind)])
        return np.asarray(upto[losses.offsets[1:]] - upto[losses.offsets[:-1]])

    return each(losses.values, np.float64), losses.lengths(), outputs["bytes"], each(hits.values, np.int64)


def sections(evaluation: Evaluation, rows: Rows, roles: Roles, lengths: np.ndarray) -> list[Section]:
    """Loss by position and by length, and the rows that cost most."""
    import numpy as np

    from finetune_cli import metrics
    from finetune_cli.data import text_of

    nats, tokens, _, _ = sums(evaluation.outputs)
    means = nats / np.maximum(tokens, 1)
    names, by_length, counts = metrics.by_length(tokens, means)
    worst = np.argsort(-means, kind="stable")[:WORST]
    table = [
        (int(evaluation.rows[i]) + 1, int(tokens[i]), round(float(means[i]), 3), text_of(rows, roles, int(evaluation.rows[i])))
        for i in worst
    ]
    return [
        _by_position(evaluation.outputs),
        Bars("Loss by length", "supervised tokens", "loss of a token", names, by_length, counts),
        Rows_(
            "Highest loss", ("row", "supervised tokens", "loss of a token", "text"), table, note="a block shows the row that it begins in"
        ),
    ]


def _by_position(outputs: Outputs) -> Curve:
    """The mean loss of tokens at like places."""
    import numpy as np

    places, losses = outputs["places"].values, outputs["losses"].values.astype(np.float64)
    last = int(places.max(initial=1))
    edges = np.unique(np.linspace(1, last + 1, min(BINS, last) + 1).astype(np.int64))
    bins = np.clip(np.searchsorted(edges, places, side="right") - 1, 0, len(edges) - 2)
    counts = np.bincount(bins, minlength=len(edges) - 1)
    totals = np.bincount(bins, losses, minlength=len(edges) - 1)
    there = counts > 0
    middle = (edges[:-1] + edges[1:] - 1) / 2
    line = Series("loss", middle[there].tolist(), (totals[there] / counts[there]).tolist())
    return Curve("Loss by position", "tokens before it", "loss of a token", [line], note="more context should cost less")
