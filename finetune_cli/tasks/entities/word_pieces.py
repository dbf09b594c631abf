"""Words to pieces and back: every word has pieces of its own, no word is left out, and a row too long for the model becomes windows.

Each distinct word of a chunk is tokenised once, by itself, as ``is_split_into_words`` does it; examples are then put together in NumPy. A
word without a piece gets the unknown token. Windows of one row overlap and end between words; ``gather`` takes each word's answer
from the window in which it has most context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from finetune_cli.data import Roles, Rows
    from finetune_cli.encoded import Columns, Examples, Ragged

WORD = "word"
"""Column: the number of each piece's word in its row; -1 for special tokens."""


def encode_words(rows: Rows, roles: Roles, tokenizer: Any, *, max_length: int, stride: int, first_row: int) -> Examples:
    """Examples with ``input_ids`` and ``word``; ``stride``: pieces that neighbouring windows share at least, where half of one allows it.

    Only a single word that is longer than a whole window is cut.
    """
    import numpy as np

    from finetune_cli.data import TokenCounts
    from finetune_cli.encoded import Examples, Ragged

    words, counts = _words(rows, roles, spaced=_spaces_matter(tokenizer))
    vocabulary: dict[str, int] = {}
    codes = np.fromiter((vocabulary.setdefault(word, len(vocabulary)) for word in words), np.int64, len(words))
    before, after = _special_ids(tokenizer)
    room = max_length - len(before) - len(after)
    pieces = Ragged.of(_pieces(tokenizer, list(vocabulary)))
    lost = np.maximum(pieces.lengths() - room, 0)[codes]
    kept = _slices(pieces, pieces.offsets[:-1], np.minimum(pieces.lengths(), room)).take(codes)  # pieces of every word
    ends = np.concatenate([[0], np.cumsum(counts)])  # of rows, in words
    row_of = np.repeat(np.arange(len(counts)), counts)  # of words
    rows_pieces = kept.offsets[ends[1:]] - kept.offsets[ends[:-1]]
    if (rows_pieces <= room).all():
        of_row, first, last = np.arange(len(counts)), ends[:-1], ends[1:]
    else:
        of_row, first, last = _windows(kept.offsets, ends, rows_pieces, room=room, shared=min(stride, room // 2))
    starts, lengths = kept.offsets[first], kept.offsets[last] - kept.offsets[first]
    numbers = np.repeat(np.arange(len(words)) - ends[row_of], kept.lengths()).astype(np.int32)
    columns: Columns = {
        "input_ids": _framed(_slices(kept, starts, lengths), before, after),
        WORD: _framed(_slices(Ragged(numbers, kept.offsets), starts, lengths), [-1] * len(before), [-1] * len(after)),
    }
    specials = len(before) + len(after)
    told = TokenCounts(
        tokens=int(rows_pieces.sum()) + specials * len(counts),
        longest=int((rows_pieces + np.bincount(row_of, lost, len(counts)).astype(np.int64)).max(initial=0)) + specials,
        cut_rows=len(np.unique(row_of[lost > 0])),
        lost=int(lost.sum()),
        unknown=0 if tokenizer.unk_token_id is None else int((kept.values == tokenizer.unk_token_id).sum()),
    )
    return Examples(columns, (first_row + of_row).astype(np.int64), told)


def _words(rows: Rows, roles: Roles, *, spaced: bool) -> tuple[list[str], np.ndarray]:
    """All words end to end, and how many each row has; ``spaced``: with the space before a word where the text has one."""
    import numpy as np

    from finetune_cli.data import texts
    from finetune_cli.data.tagged import ENDS, STARTS

    words: list[str] = []
    counts = []
    starts, ends = (rows.column(name).to_pylist() for name in (STARTS, ENDS))
    for text, firsts, lasts in zip(texts(rows, roles.text), starts, ends, strict=True):
        if spaced:
            words += [text[a - (a > 0 and text[a - 1] == " ") : b] for a, b in zip(firsts, lasts, strict=True)]
        else:
            words += [text[a:b] for a, b in zip(firsts, lasts, strict=True)]
        counts.append(len(firsts))
    return words, np.array(counts, np.int64)


def _spaces_matter(tokenizer: Any) -> bool:
    """Whether a word has other pieces with a space before it, as for byte-level tokenizers."""
    found: list[Sequence[int]] = _pieces(tokenizer, [" a", "a"])
    return list(found[0]) != list(found[1])


def _pieces(tokenizer: Any, words: list[str]) -> list[Sequence[int]]:
    """The ids of each word, at least one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        found = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    else:
        backend.no_truncation()
        backend.no_padding()
        found = [e.ids for e in backend.encode_batch_fast([[word] for word in words], is_pretokenized=True, add_special_tokens=False)]
    stand_in = next(i for i in (tokenizer.unk_token_id, tokenizer.pad_token_id, 0) if i is not None)
    return [ids or [stand_in] for ids in found]


def _special_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that stand before and after a text."""
    inner = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    at = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
    return whole[:at], whole[at + len(inner) :]


def _windows(offsets: np.ndarray, ends: np.ndarray, sizes: np.ndarray, *, room: int, shared: int) -> tuple[np.ndarray, ...]:
    """(row, first word, word behind the last) of every example: a row that fits is one, a longer one becomes windows of ``room`` pieces.

    ``offsets``: where each word's pieces begin. The last window is as full as the others: it begins earlier.
    """
    import numpy as np

    found: list[tuple[int, int, int]] = []
    for row, size in enumerate(sizes.tolist()):
        first, end = int(ends[row]), int(ends[row + 1])
        if size <= room:
            found.append((row, first, end))
            continue
        while True:
            last = int(np.searchsorted(offsets, offsets[first] + room, side="right")) - 1
            if last >= end:
                first = int(np.searchsorted(offsets, offsets[end] - room, side="left"))
                found.append((row, first, end))
                break
            found.append((row, first, last))
            back = int(np.searchsorted(offsets, offsets[last] - shared, side="right")) - 1
            next_fits = int(np.searchsorted(offsets, offsets[last + 1] - room, side="left"))
            first = max(first + 1, back, next_fits)
    return tuple(np.array(column, np.int64) for column in zip(*found, strict=True))


def _slices(flat: Ragged, starts: np.ndarray, lengths: np.ndarray) -> Ragged:
    """Stretches of values, which may overlap, as sequences."""
    import numpy as np

    from finetune_cli.encoded import Ragged

    offsets = np.zeros(len(starts) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return Ragged(flat.values[np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])], offsets)


def _framed(inner: Ragged, before: list[int], after: list[int]) -> Ragged:
    """Each sequence with the same values before and after it."""
    import numpy as np

    from finetune_cli.encoded import Ragged

    offsets = inner.offsets + np.arange(len(inner) + 1) * (len(before) + len(after))
    values = np.empty(offsets[-1], inner.values.dtype)
    for i, value in enumerate(before):
        values[offsets[:-1] + i] = value
    for i, value in enumerate(after):
        values[offsets[1:] - len(after) + i] = value
    values[np.arange(len(inner.values)) + np.repeat(offsets[:-1] + len(before) - inner.offsets[:-1], inner.lengths())] = inner.values
    return Ragged(values, offsets)


def first_pieces(word: Ragged) -> np.ndarray:
    """[pieces] bool: where a word begins in its example."""
    import numpy as np

    begins = np.ones(len(word.values), bool)
    begins[1:] = word.values[1:] != word.values[:-1]
    starts = word.offsets[:-1]
    begins[starts[starts < len(begins)]] = True
    found: np.ndarray = begins & (np.asarray(word.values) >= 0)
    return found


def gather_words(answers: Ragged, examples: Examples) -> tuple[Ragged, np.ndarray]:
    """Answers word by word of examples, put together row by row: of words in several windows, the answer with most context.

    ``answers.values`` may be [words, K]. Also gives the row that each answer is about.
    """
    import numpy as np

    from finetune_cli.encoded import Ragged

    rows, counts = np.unique(examples.row, return_counts=True)
    if (counts == 1).all():
        return answers, np.asarray(examples.row)
    word: Any = examples.columns[WORD]
    at = np.flatnonzero(first_pieces(word))
    example = np.searchsorted(word.offsets, at, side="right") - 1
    context = np.minimum(at - word.offsets[example], word.offsets[example + 1] - 1 - at)
    row, number = np.asarray(examples.row)[example], np.asarray(word.values)[at]
    order = np.lexsort((example, -context, number, row))
    chosen = np.ones(len(order), bool)
    chosen[1:] = (np.diff(row[order]) != 0) | (np.diff(number[order]) != 0)
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(np.bincount(np.searchsorted(rows, row[order][chosen]), minlength=len(rows)), out=offsets[1:])
    return Ragged(answers.values[order[chosen]], offsets), rows
