"""What generated texts show in the report, and the scores that anyone can have for free: the source itself, or its first sentence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune_cli.tasks.sections import Bars, Examples, Section, Table

if TYPE_CHECKING:
    import numpy as np

    from finetune_cli.data import References
    from finetune_cli.metrics import TextTable

WORST = 20
"""Rows shown."""


def sections(
    *,
    sources: Sequence[str],
    references: References,
    written: Sequence[str],
    tokens: np.ndarray,
    most: int,
    source_tokens: np.ndarray,
    table: TextTable,
    tokenize: str,
) -> list[Section]:
    """Worst rows by chrF, chrF by the length of the source, lengths of what was written, and how the metrics were computed."""
    import numpy as np

    from finetune_cli import metrics

    each = table.each_chrf()
    worst = np.argsort(each, kind="stable")[:WORST]
    names, means, counts = metrics.by_length(source_tokens, each)
    return [
        Examples(
            "Worst rows",
            ("row", "chrF", "source", "reference", "generated"),
            [(int(i) + 1, round(float(each[i]), 1), sources[i], " ‖ ".join(references[int(i)]), written[i]) for i in worst],
            note=f"the lowest chrF, each text by itself, of {len(written)} rows",
        ),
        Bars("Score by length", "tokens of the source", "mean chrF of a text", names, means, counts),
        _lengths(written, references, tokens, most),
        Table("How the metrics were computed", ("metric", "signature"), list(metrics.signatures(tokenize).items())),
    ]


def _lengths(written: Sequence[str], references: References, tokens: np.ndarray, most: int) -> Table:
    import numpy as np

    ours = np.array([len(text.split()) for text in written])
    theirs = np.array([len(several[0].split()) for several in references])
    cells = [
        ("words of a generated text, mean", round(float(ours.mean()), 1)),
        ("words of the first reference, mean", round(float(theirs.mean()), 1)),
        (f"texts that were cut at task.max_new_tokens={most}", int((tokens >= most).sum())),
        ("empty texts", sum(not text.strip() for text in written)),
        ("different texts", len(set(written))),
        ("texts equal to a reference", sum(text in several for text, several in zip(written, references, strict=True))),
    ]
    return Table("What was written", ("", "value"), cells, note=f"{len(written)} rows")


def baselines(sources: Sequence[str], references: References, *, tokenize: str) -> dict[str, dict[str, float]]:
    """``copy the source`` and, where most sources have several sentences, ``first sentence``."""
    from finetune_cli import metrics

    given = {"copy the source": list(sources)}
    first = [first_sentence(text) for text in sources]
    if 2 * sum(start != text.strip() for start, text in zip(first, sources, strict=True)) > len(first):
        given["first sentence"] = first
    return {name: metrics.generation(metrics.per_text(texts, references, tokenize=tokenize)) for name, texts in given.items()}


def first_sentence(text: str) -> str:
    """The text up to its first line break or end of a sentence."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return re.split(r"(?<=[.!?])\s+|(?<=[。！？])", line, maxsplit=1)[0]
