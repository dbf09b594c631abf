"""What a masked language model shows in the report and in its predictions: losses by kind of token, confusions, the hardest rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune_cli.tasks.figures import figure
from finetune_cli.tasks.sections import Bars, Examples, Section, Table

if TYPE_CHECKING:
    import numpy as np

    from finetune_cli.encoded import Ragged

WORST = 20
"""Rows and confusions shown."""
NAMED = 12
"""Tokens of a row that are named at most."""


@dataclass(frozen=True, slots=True)
class Found:
    """The masked tokens of each answered row; every field runs over the same tokens."""

    tokenizer: Any
    place: Ragged
    """Position in the example."""
    true: Ragged
    shown: Ragged
    """What stood in its place."""
    guess: Ragged
    score: Ragged
    """Probability of the guess."""
    loss: Ragged
    rank: Ragged
    """How many tokens were thought at least as likely as the true one."""

    def names(self, ids: np.ndarray) -> list[str]:
        """Tokens as the vocabulary writes them."""
        named: list[str] = self.tokenizer.convert_ids_to_tokens(ids.tolist())
        return named


def told_tokens(found: Found) -> Iterator[dict[str, Any]]:
    """A row's answer in ``predictions.jsonl``: its mean loss, and every masked token with the best guess."""
    for i in range(len(found.loss)):
        losses = found.loss.sequence(i)
        tokens = zip(
            found.names(found.true.sequence(i)),
            found.names(found.shown.sequence(i)),
            found.names(found.guess.sequence(i)),
            found.score.sequence(i).tolist(),
            found.rank.sequence(i).tolist(),
            strict=True,
        )
        yield {
            "loss": figure(losses.mean()),
            "masked": [
                {"token": true, "shown": shown, "guess": guess, "score": figure(score), "rank": rank + 1}
                for true, shown, guess, score, rank in tokens
            ],
        }


def of_masked(found: Found, rows: np.ndarray, texts: Callable[[int], str], lengths: np.ndarray | None) -> list[Section]:
    """How the token was shown, loss by frequency and by length, commonest confusions, the hardest rows. ``lengths``: tokens of each row."""
    sections: list[Section] = [_by_showing(found), _by_frequency(found)]
    if lengths is not None:
        sections.append(_by_length(found, lengths))
    return [*sections, _confusions(found), _hardest(found, rows, texts)]


def _by_showing(found: Found) -> Table:
    """Scores of tokens hidden by the mask token, replaced, and left as they are."""
    import numpy as np

    from finetune_cli import metrics

    true, shown = found.true.values, found.shown.values
    hidden = shown == found.tokenizer.mask_token_id
    cells = []
    for name, these in (("mask token", hidden), ("another token", ~hidden & (shown != true)), ("itself", shown == true)):
        if these.any():
            count = int(these.sum())
            told = metrics.masked(found.loss.values[these], found.rank.values[these], np.zeros(count, np.int64), 1)
            cells.append((name, count, float(found.loss.values[these].mean()), told["accuracy"], told["recall_at_5"]))
    return Table("Masked tokens by what was shown", ("shown as", "tokens", "loss", "top-1 accuracy", "top-5 accuracy"), cells)


def _by_frequency(found: Found) -> Bars:
    """Mean loss by how often a token stands among the masked ones."""
    import numpy as np

    _, of_token, counts = np.unique(found.true.values, return_inverse=True, return_counts=True)
    level = np.floor(np.log2(counts[of_token])).astype(np.int64)  # 1, 2-3, 4-7, ...
    levels = np.unique(level)
    return Bars(
        "Loss by frequency of the token",
        "times among the masked tokens of these rows",
        "mean loss",
        [f"{2**k}" if k == 0 else f"{2**k}-{2 ** (k + 1) - 1}" for k in levels.tolist()],
        [float(found.loss.values[level == k].mean()) for k in levels],
        [int((level == k).sum()) for k in levels],
        note="counts are masked tokens",
    )


def _by_length(found: Found, lengths: np.ndarray) -> Bars:
    from finetune_cli import metrics

    names, means, counts = metrics.by_length(lengths, _mean_by_row(found))
    return Bars("Loss by length", "tokens", "mean loss of a row", names, means, counts)


def _mean_by_row(found: Found) -> np.ndarray:
    import numpy as np

    lengths = found.loss.lengths()
    means: np.ndarray = np.bincount(np.repeat(np.arange(len(lengths)), lengths), found.loss.values, len(lengths)) / lengths
    return means


def _confusions(found: Found) -> Table:
    wrong = found.guess.values != found.true.values
    pairs = Counter(zip(found.true.values[wrong].tolist(), found.guess.values[wrong].tolist(), strict=True)).most_common(WORST)
    name = found.tokenizer.convert_ids_to_tokens
    return Table(
        "Commonest wrong guesses",
        ("true", "guess", "times"),
        [(name(true), name(guess), times) for (true, guess), times in pairs],
        note=f"of {int(wrong.sum())} wrong guesses for {len(wrong)} masked tokens",
    )


def _hardest(found: Found, rows: np.ndarray, texts: Callable[[int], str]) -> Examples:
    import numpy as np

    means = _mean_by_row(found)
    cells = []
    for i in np.argsort(-means, kind="stable")[:WORST].tolist():
        pairs = list(zip(found.names(found.true.sequence(i)), found.names(found.guess.sequence(i)), strict=True))
        told = ", ".join(f"{true} → {guess}" for true, guess in pairs[:NAMED]) + (", …" if len(pairs) > NAMED else "")
        cells.append((int(rows[i]) + 1, round(float(means[i]), 3), len(pairs), told, texts(int(rows[i]))))
    return Examples("Hardest rows", ("row", "mean loss", "masked tokens", "true → guess", "text"), cells)


def frequencies(train: Sequence[str], test: Sequence[str], tokenizer: Any) -> dict[str, dict[str, float]]:
    """What the frequencies of the training tokens alone give, for any token of the test rows: the same answer everywhere.

    Every token of the test rows counts, since each is as likely to be masked; add-one smoothing over the vocabulary.
    """
    import numpy as np

    from finetune_cli import metrics

    counts = np.bincount(_tokens(train, tokenizer), minlength=len(tokenizer)) + 1.0
    true = _tokens(test, tokenizer)
    if not len(true):
        return {}
    order = np.argsort(-counts, kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    losses = -np.log(counts[true] / counts.sum())
    found = metrics.masked(losses, rank[true], np.zeros(len(true), np.int64), 1)
    return {"majority (token frequencies)": found | {"loss": float(losses.mean())}}


def _tokens(texts: Sequence[str], tokenizer: Any) -> np.ndarray:
    """Ids of all texts end to end, without special tokens."""
    import numpy as np

    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    flat = np.fromiter((i for some in ids for i in some), np.int64)
    return flat[~np.isin(flat, tokenizer.all_special_ids)]
