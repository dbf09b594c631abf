"""Plain text to blocks: documents end to end with the end-of-text token between them, cut into blocks of one length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune_cli.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from finetune_cli.data import Roles, Rows
    from finetune_cli.encoded import Columns, Examples


@dataclass(frozen=True, slots=True)
class Stream:
    """The tokens of a chunk of rows, end to end; each [N]."""

    ids: np.ndarray
    row: np.ndarray
    """Index of the row in its chunk."""
    bytes: np.ndarray
    """UTF-8 bytes of the text that a token stands for; their sum over a row is the row's text, whatever was normalised."""
    starts: np.ndarray
    """Whether a document begins here."""
    ends: np.ndarray
    """Whether this is the end-of-text token of a document."""


def encode_blocks(rows: Rows, roles: Roles, tokenizer: Any, *, max_length: int, first_row: int, apart: bool) -> Examples:
    """Examples of at most ``max_length`` tokens that span rows; a block belongs to the row of its first token.

    Every token is kept. The first token of a block, and with ``apart`` that of a document, is predicted from nothing and so not supervised.
    A chunk's last block ends with the chunk.
    """
    import numpy as np

    from finetune_cli.data import TokenCounts
    from finetune_cli.encoded import Examples, Ragged

    stream = _stream(rows, roles, tokenizer)
    counted = ~stream.starts if apart else np.ones(len(stream.ids), bool)
    offsets = _cuts(counted, max_length)
    if len(offsets) > 1:
        counted = counted.copy()
        counted[offsets[:-1]] = False
        if not counted.any():
            raise UserError(
                "there is nothing to learn from: one token cannot be predicted from nothing", where=rows.where(0), fix="give more text"
            )
    lengths = np.diff(offsets)

    def totals(values: np.ndarray) -> np.ndarray:
        sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return np.asarray(sums[offsets[1:]] - sums[offsets[:-1]])

    columns: Columns = {
        "input_ids": Ragged(stream.ids, offsets),
        "supervised": Ragged(counted.astype(np.int8), offsets),
        "bytes": totals(stream.bytes * counted),
        "turns": totals(stream.ends),
        "ended": totals(stream.ends & counted),
    }
    if apart:
        columns["starts"] = Ragged(stream.starts.astype(np.int8), offsets)
    unknown = int((stream.ids == tokenizer.unk_token_id).sum()) if tokenizer.unk_token_id is not None else 0
    counts = TokenCounts(tokens=len(stream.ids), longest=int(lengths.max(initial=0)), unknown=unknown)
    return Examples(columns, stream.row[offsets[:-1]] + first_row, counts)


def _cuts(counted: np.ndarray, max_length: int) -> np.ndarray:
    """Where blocks begin and end; the last one takes tokens of the one before until it has something to predict."""
    import numpy as np

    total = len(counted)
    if not total:
        return np.zeros(1, np.int64)
    offsets = np.append(np.arange(0, total, max_length, dtype=np.int64), total)
    while len(offsets) > 2 and not counted[offsets[-2] + 1 :].any() and offsets[-2] - offsets[-3] > 2:
        offsets[-2] -= 1
    return offsets


def _stream(rows: Rows, roles: Roles, tokenizer: Any) -> Stream:
    """The documents of a chunk; a passage that goes on where the one before it ended is one document with it. Empty texts give nothing."""
    import numpy as np

    from finetune_cli.data import texts
    from finetune_cli.data.passages import PASSAGE, goes_on

    cells = texts(rows, roles.text)
    on = goes_on(rows) if roles.text == PASSAGE else np.zeros(len(cells), bool)
    end = end_of_text(tokenizer)
    begin = beginning(tokenizer)
    ids: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    starts: list[int] = []
    ends: list[int] = []
    place = 0

    def add(tokens: list[int], row: int, bytes_: np.ndarray) -> None:
        nonlocal place
        ids.append(np.array(tokens, np.int32))
        owners.append(np.full(len(tokens), row, np.int64))
        sizes.append(bytes_)
        place += len(tokens)

    for i, (text, encoding) in enumerate(zip(cells, backend(tokenizer).encode_batch(cells, add_special_tokens=False), strict=True)):
        if not encoding.ids:
            continue
        if not on[i] or not place:
            starts.append(place)
            if begin is not None:
                add([begin], i, np.zeros(1, np.int64))
        add(encoding.ids, i, token_bytes(text, encoding.offsets))
        if i + 1 == len(cells) or not on[i + 1]:
            ends.append(place)
            add([end], i, np.zeros(1, np.int64))
    marks = np.zeros((2, place), bool)
    marks[0, starts] = True
    marks[1, ends] = True
    if not ids:
        return Stream(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64), *marks)
    return Stream(np.concatenate(ids), np.concatenate(owners), np.concatenate(sizes), *marks)


def backend(tokenizer: Any) -> Any:
    """The fast tokenizer, which knows where each token stands in its text."""
    found = getattr(tokenizer, "backend_tokenizer", None)
    if found is None:
        raise UserError(
            "the model's tokenizer is a slow one, which cannot say where a token stands in its text",
            where="model.path",
            fix="name a model with a tokenizer.json",
        )
    found.no_truncation()
    found.no_padding()
    return found


def end_of_text(tokenizer: Any) -> int:
    """The token that ends a document."""
    found = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if found is None:
        raise UserError("the tokenizer has no end-of-text token", where="model.path", fix="name a model that writes, such as gpt2")
    return int(found)


def beginning(tokenizer: Any) -> int | None:
    """The token with which this tokenizer begins every text, if it does."""
    bos = tokenizer.bos_token_id
    return int(bos) if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def token_bytes(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """UTF-8 bytes that each token adds to the text before it, int64: a character of several tokens counts once, all add up to the text."""
    import numpy as np

    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    upto = np.concatenate([[0], np.cumsum(1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF))]).astype(np.int64)
    reached = np.maximum.accumulate(np.array([stop for _, stop in offsets], np.int64))
    reached[-1] = len(points)
    return np.diff(upto[reached], prepend=0)
