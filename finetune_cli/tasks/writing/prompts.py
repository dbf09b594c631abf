"""What is to be gone on with: one example a row, as many of its last tokens as there is room for, and its number in the whole input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetune_cli.errors import UserError
from finetune_cli.tasks.writing.blocks import backend, beginning, end_of_text
from finetune_cli.tasks.writing.supervision import Unfit, render

if TYPE_CHECKING:
    from finetune_cli.data import Roles, Rows
    from finetune_cli.encoded import Examples


Question = tuple[list[dict[str, Any]], list[Any] | None]
"""Messages up to what is to be answered, and tools."""


def room(max_length: int, new_tokens: int) -> int:
    """Tokens that a prompt may have, so that what is written fits behind it."""
    if max_length <= new_tokens:
        raise UserError(
            f"task.max_new_tokens={new_tokens} leaves no room for a prompt in {max_length} tokens",
            where="task.max_new_tokens",
            fix=f"task.max_new_tokens={max(1, max_length // 2)}, or a larger data.max_length",
        )
    return max_length - new_tokens


def of_texts(rows: Rows, roles: Roles, tokenizer: Any, *, room: int, first_row: int) -> Examples:
    """Texts as they stand; an empty one begins as a document does."""
    from finetune_cli.data import texts

    begin = beginning(tokenizer)
    first = [] if begin is None else [begin]
    encodings = backend(tokenizer).encode_batch_fast(texts(rows, roles.text), add_special_tokens=False)
    return _examples(rows, [(first + e.ids) or [end_of_text(tokenizer)] for e in encodings], tokenizer, room=room, first_row=first_row)


def of_chats(rows: Rows, asked: Sequence[Question], tokenizer: Any, *, room: int, first_row: int) -> Examples:
    """Conversations as the template writes them when the assistant is to speak next."""
    written = []
    for i, (messages, tools) in enumerate(asked):
        try:
            written.append(render(tokenizer, messages, tools, ask=True))
        except Unfit as error:
            raise UserError(str(error), where=rows.where(i), fix="mend the row, or another task.template") from error
    encodings = backend(tokenizer).encode_batch_fast(written, add_special_tokens=False)
    return _examples(rows, [e.ids or [end_of_text(tokenizer)] for e in encodings], tokenizer, room=room, first_row=first_row)


def _examples(rows: Rows, prompts: list[list[int]], tokenizer: Any, *, room: int, first_row: int) -> Examples:
    import numpy as np

    from finetune_cli.data import TokenCounts
    from finetune_cli.encoded import Examples, Ragged

    lengths = np.array([len(p) for p in prompts], np.int64)
    ids = Ragged.of([p[-room:] for p in prompts])
    unknown = int((ids.values == tokenizer.unk_token_id).sum()) if tokenizer.unk_token_id is not None else 0
    over = np.maximum(lengths - room, 0)
    counts = TokenCounts(
        tokens=len(ids.values), longest=int(lengths.max(initial=0)), cut_rows=int((over > 0).sum()), lost=int(over.sum()), unknown=unknown
    )
    return Examples({"input_ids": ids, "number": rows.row_of}, np.arange(first_row, first_row + len(rows), dtype=np.int64), counts)
