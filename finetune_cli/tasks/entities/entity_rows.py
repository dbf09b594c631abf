"""Rows with marked names as arrays: true labels with the places of their words, tags end to end, and texts with the names marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from finetune_cli.data import Roles, Rows
    from finetune_cli.data.tags import Span
    from finetune_cli.encoded import Ragged


@dataclass(frozen=True, slots=True)
class Gold:
    """The true labels of rows, a number a word, and the places of the words in the rows' texts, in characters."""

    labels: Ragged
    starts: Ragged
    ends: Ragged

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Any) -> Gold:
        """Some rows; a single number gives that row alone."""
        import numpy as np

        at = np.atleast_1d(np.asarray(indices, np.int64))
        return Gold(self.labels.take(at), self.starts.take(at), self.ends.take(at))


def tags_of(rows: Rows, roles: Roles) -> tuple[list[str], np.ndarray]:
    """The IOB2 tags of all words, end to end, and where each row's begin."""
    import numpy as np

    column = rows.column(roles.labels[0]).combine_chunks()
    lengths = np.asarray(column.value_lengths().fill_null(0), np.int64)
    return column.flatten().to_pylist(), np.concatenate([[0], np.cumsum(lengths)])


def lists_of(rows: Rows, name: str) -> Ragged:
    """A column of lists of numbers."""
    import numpy as np

    from finetune_cli.encoded import Ragged

    column = rows.column(name).combine_chunks()
    lengths = np.asarray(column.value_lengths(), np.int64)
    return Ragged(np.asarray(column.flatten()), np.concatenate([[0], np.cumsum(lengths)]))


def cells_of(rows: Rows, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The cells of some columns, row by row."""
    for chunk in rows.chunks(1024):
        yield from zip(*(chunk.column(name).to_pylist() for name in names), strict=True)


def words_of(texts: Sequence[str], gold: Gold) -> list[list[str]]:
    """The words of each row."""
    made = []
    for i, text in enumerate(texts):
        places = zip(gold.starts.sequence(i).tolist(), gold.ends.sequence(i).tolist(), strict=True)
        made.append([text[start:end] for start, end in places])
    return made


def marked_text(text: str, spans: Sequence[Span]) -> str:
    """A text with its names in brackets: ``[Tamar LOC] in flood``; spans in characters."""
    parts, at = [], 0
    for start, end, name in spans:
        parts += [text[at:start], f"[{text[start:end]} {name}]"]
        at = end
    return "".join([*parts, text[at:]])
