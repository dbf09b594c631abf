"""Texts to examples whose tokens can be masked, and the masks themselves.

A unit is what is masked together: a token, or a whole word. Each example draws for itself, from the key and its own place, so its masks
are the same in any batch and any micro-batch. Shares follow BERT (Devlin et al. 2018, arXiv 1810.04805): of the tokens chosen, most are
shown as the mask token, some as a random token, some as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune_cli.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from finetune_cli.encoded import Columns, Examples, Ragged

NEVER = -1
"""The unit of a token that is never masked."""
WRITTEN = re.compile(r"\[MASK\]|<mask>|_{3,}")
"""How people write a mask."""
_CHOICE, _SHOWN, _OTHER, _COUNT = range(4)
"""Purposes of draws."""


@dataclass(frozen=True, slots=True)
class Masking:
    """How much is masked and how it is shown."""

    probability: float
    whole_words: bool
    random_share: float
    keep_share: float
    blocks: bool


@dataclass(frozen=True, slots=True)
class Masked:
    """What became of the tokens of some examples; every array runs over all their tokens."""

    chosen: np.ndarray
    """Whether a token is to be found out."""
    shown: np.ndarray
    """The ids that the model sees."""


# -- examples ------------------------------------------------------------------------------------
@dataclass(slots=True)
class _Pieces:
    """Examples under construction: ids, units and rows of their tokens, and (row, number) of each."""

    ids: list[list[int]]
    units: list[np.ndarray]
    rows: list[np.ndarray]
    place: list[tuple[int, int]]


def encode(texts: Sequence[str], tokenizer: Any, masking: Masking, *, max_length: int, first_row: int, asked: bool) -> Examples:
    """Examples of at most ``max_length`` tokens in which no token of a text is lost: a long row gives several, blocks hold several rows.

    Columns: ``input_ids``; ``place`` [N, 2], the row and the number of the example in it; unless ``asked``, ``unit``, which tokens are
    masked together, and in blocks ``token_row``, whose tokens they are. A row without a token gives no example unless it is asked.
    """
    import numpy as np

    from finetune_cli.data import TokenCounts
    from finetune_cli.encoded import Examples, Ragged

    if tokenizer.mask_token_id is None:
        raise UserError(
            "the tokenizer has no mask token",
            where=str(tokenizer.name_or_path),
            fix="name an encoder, such as model=minilm",
        )
    before, after = _frame(tokenizer)
    room = max_length - len(before) - len(after)
    contents = _contents(texts, tokenizer, words=masking.whole_words and not asked)
    blocks = masking.blocks and not asked
    pieces = _Pieces([], [], [], [])
    for some, units, rows, place in _cut_blocks(contents, after, room) if blocks else _cut_rows(contents, room, keep_blank=asked):
        pieces.ids.append([*before, *some, *after])
        pieces.units.append(np.r_[[NEVER] * len(before), units, [NEVER] * len(after)].astype(np.int32))
        if blocks:
            pieces.rows.append(np.r_[rows[:1] * len(before), rows, rows[-1:] * len(after)].astype(np.int64) + first_row)
        pieces.place.append((place[0] + first_row, place[1]))
    ids = Ragged.of(pieces.ids)
    columns: Columns = {"input_ids": ids, "place": np.array(pieces.place, np.int64).reshape(-1, 2)}
    if not asked:
        columns["unit"] = _maskable(ids, Ragged.of(pieces.units), tokenizer, len(before), len(after))
    if blocks:
        columns["token_row"] = Ragged.of(pieces.rows, np.int64)
    lengths = [len(c) + len(before) + len(after) for c, _ in contents]
    unknown = 0 if tokenizer.unk_token_id is None else int((ids.values == tokenizer.unk_token_id).sum())
    counts = TokenCounts(tokens=len(ids.values), longest=max(lengths, default=0), unknown=unknown)
    row = columns["place"]
    assert isinstance(row, np.ndarray)
    return Examples(columns, np.ascontiguousarray(row[:, 0]), counts)


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that stand before a text and after it."""
    told = tokenizer("a", return_special_tokens_mask=True)
    ids, special = told["input_ids"], told["special_tokens_mask"]
    first = special.index(0) if 0 in special else len(ids)
    last = len(special) - special[::-1].index(0) if 0 in special else len(ids)
    return list(ids[:first]), list(ids[last:])


def _contents(texts: Sequence[str], tokenizer: Any, *, words: bool) -> list[tuple[list[int], list[int]]]:
    """(ids, units) of each text without special tokens. The fast tokenizer works through the chunk on every core."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        if words:
            raise UserError(
                "this tokenizer does not say where words begin",
                where="task.whole_words",
                fix="task.whole_words=false, or a model with a fast tokenizer (tokenizer.json)",
            )
        return [(ids, list(range(len(ids)))) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    backend.no_truncation()
    backend.no_padding()
    if not words:
        fast = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [(ids := e.ids, list(range(len(ids)))) for e in fast]
    whole = backend.encode_batch(list(texts), add_special_tokens=False)
    return [(e.ids, [NEVER if w is None else w for w in e.word_ids]) for e in whole]


_Piece = tuple[list[int], list[int], list[int], tuple[int, int]]
"""Ids, units, rows of the tokens, (row, number): without special tokens around them."""


def _cut_rows(contents: Sequence[tuple[list[int], list[int]]], room: int, *, keep_blank: bool) -> Iterator[_Piece]:
    """Each row by itself, in windows of ``room`` tokens."""
    for row, (ids, units) in enumerate(contents):
        for number, start in enumerate(range(0, max(len(ids), int(keep_blank)), room)):
            some = ids[start : start + room]
            yield some, units[start : start + room], [row] * len(some), (row, number)


def _cut_blocks(contents: Sequence[tuple[list[int], list[int]]], after: Sequence[int], room: int) -> Iterator[_Piece]:
    """All rows end to end, each closed as a text is closed, in blocks of ``room`` tokens; the last may be short."""
    close = list(after[-1:])
    ids, units, rows = [], [], []
    base = 0
    for row, (some, its) in enumerate(contents):
        if not some:
            continue
        ids += [*some, *close]
        units += [*(u if u == NEVER else u + base for u in its), *[NEVER] * len(close)]
        rows += [row] * (len(some) + len(close))
        base += max(its) + 1
    for number, start in enumerate(range(0, len(ids), room)):
        end = start + room
        if any(id_ not in close for id_ in ids[start:end]):
            yield ids[start:end], units[start:end], rows[start:end], (rows[start], number)


def _maskable(ids: Ragged, units: Ragged, tokenizer: Any, before: int, after: int) -> Ragged:
    """The units without those of special and unknown tokens; where an example has no other, its own tokens all are units."""
    import numpy as np

    from finetune_cli.encoded import Ragged

    values = np.where(np.isin(ids.values, tokenizer.all_special_ids), NEVER, units.values).astype(np.int32)
    made = Ragged(values, ids.offsets)
    lengths = ids.lengths()
    for i in np.flatnonzero(np.bincount(np.repeat(np.arange(len(ids)), lengths)[values >= 0], minlength=len(ids)) == 0):
        inner = slice(int(ids.offsets[i]) + before, int(ids.offsets[i + 1]) - after)
        values[inner] = np.arange(inner.stop - inner.start)
    return made


# -- masks ---------------------------------------------------------------------------------------
def mask(columns: Columns, masking: Masking, tokenizer: Any, *, key: int) -> Masked:
    """The masks of some examples under a key; each has at least one masked token, and the share expected is the probability."""
    import numpy as np

    from finetune_cli.encoded import Ragged
    from finetune_cli.randomness import uniform

    ids, units, place = columns["input_ids"], columns["unit"], columns["place"]
    assert isinstance(ids, Ragged) and isinstance(units, Ragged) and isinstance(place, np.ndarray)
    chosen = choose(units, place, masking.probability, key=key)
    at = np.flatnonzero(chosen)
    lengths = ids.lengths()
    example = np.repeat(np.arange(len(ids)), lengths)[at]
    position = at - ids.offsets[example]
    row, number = place[example, 0], place[example, 1]
    turn = uniform(key, row, number, position, _SHOWN)
    ordinary = np.ones(len(tokenizer), bool)
    ordinary[tokenizer.all_special_ids] = False
    others = np.flatnonzero(ordinary)
    other = others[(uniform(key, row, number, position, _OTHER) * len(others)).astype(np.int64)]
    shown = np.array(ids.values, np.int64)
    kept = np.where(turn < masking.random_share + masking.keep_share, shown[at], tokenizer.mask_token_id)
    shown[at] = np.where(turn < masking.random_share, other, kept)
    return Masked(chosen, shown)


def choose(units: Ragged, place: np.ndarray, probability: float, *, key: int) -> np.ndarray:
    """Which tokens are masked, bool over all of them: in each example a share of its units, drawn without replacement.

    Of n units, probability * n are chosen, rounded up or down at random so that the expectation is exact, and at least one.
    """
    import numpy as np

    from finetune_cli.randomness import uniform

    count = len(units)
    may = units.values >= 0
    unit = units.values[may].astype(np.int64)
    width = int(unit.max(initial=0)) + 1
    code = np.repeat(np.arange(count, dtype=np.int64), units.lengths())[may] * width + unit
    distinct, of_token = np.unique(code, return_inverse=True)
    example, which = distinct // width, distinct % width
    have = np.bincount(example, minlength=count)
    rounding = uniform(key, place[:, 0], place[:, 1], 0, _COUNT)
    wanted = np.maximum(1, np.floor(have * probability + rounding)).astype(np.int64)
    draw = uniform(key, place[example, 0], place[example, 1], which, _CHOICE)
    order = np.lexsort((draw, example))
    rank = np.empty(len(distinct), np.int64)
    rank[order] = np.arange(len(distinct)) - (np.cumsum(have) - have)[example[order]]
    chosen = np.zeros(len(units.values), bool)
    chosen[may] = (rank < wanted[example])[of_token]
    return chosen


# -- masks that people write ---------------------------------------------------------------------
def with_mask_token(text: str, tokenizer: Any) -> str:
    """The text with ``[MASK]``, ``<mask>`` and three or more underscores written as the tokenizer's own mask token."""
    return WRITTEN.sub(lambda _: str(tokenizer.mask_token), text)


def continues(token: str) -> bool:
    """Whether a token of a vocabulary goes on with the word before it, as WordPiece writes it."""
    return token.startswith("##")


def filled(text: str, mask_token: str, best: Sequence[tuple[str, bool]]) -> str | None:
    """The text with its masks replaced by (token, whether it goes on with the word before it); None where the tokenizer saw other masks."""
    first, *rest = text.split(mask_token)
    if len(rest) != len(best):
        return None
    for (token, goes_on), after in zip(best, rest, strict=True):
        first = (first.rstrip() + token.removeprefix("##") if goes_on else first + token) + after
    return first
