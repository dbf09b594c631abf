"""Texts to tokens: one text or a pair a row, cut and counted, never padded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from finetune_cli.data import Roles, Rows, TokenCounts
    from finetune_cli.encoded import Columns, Examples, Ragged
    from finetune_cli.tasks.base import Layout


def encode_texts(rows: Rows, roles: Roles, tokenizer: Any, *, max_length: int, first_row: int, prefix: str = "") -> Examples:
    """One example a row with ``input_ids`` (and ``token_type_ids`` where the tokenizer makes them for a pair).

    ``prefix`` is put before every text. Rows longer than ``max_length`` tokens are cut as the tokenizer cuts (pairs: the longer text
    first); how many and how much is counted.
    """
    import numpy as np

    from finetune_cli.data import texts
    from finetune_cli.encoded import Examples

    first = texts(rows, roles.text)
    second = texts(rows, roles.text_pair) if roles.text_pair else None
    columns, counts = encode_sequences(tokenizer, [prefix + text for text in first] if prefix else first, second, max_length=max_length)
    return Examples(columns, np.arange(first_row, first_row + len(rows), dtype=np.int64), counts)


def lay_tokens(columns: Columns, layout: Layout) -> dict[str, Any]:
    """The model's inputs of some examples: their columns of a length of their own; what is one number an example is the task's."""
    import numpy as np

    return layout.lay({name: column for name, column in columns.items() if not isinstance(column, np.ndarray)})


def encode_sequences(tokenizer: Any, first: list[str], second: list[str] | None, *, max_length: int) -> tuple[Columns, TokenCounts]:
    """The columns of texts or pairs, and the counts of what was cut."""
    import numpy as np

    from finetune_cli.data import TokenCounts

    segmented = second is not None and "token_type_ids" in tokenizer.model_input_names
    lengths, columns = tokenise(tokenizer, first, second, max_length=max_length, segmented=segmented)
    kept = np.minimum(lengths, max_length)
    unknown = int((columns["input_ids"].values == tokenizer.unk_token_id).sum()) if tokenizer.unk_token_id is not None else 0
    counts = TokenCounts(
        tokens=int(kept.sum()),
        longest=int(lengths.max(initial=0)),
        cut_rows=int((lengths > max_length).sum()),
        lost=int((lengths - kept).sum()),
        unknown=unknown,
    )
    return {**columns}, counts


def tokenise(
    tokenizer: Any, first: list[str], second: list[str] | None = None, *, max_length: int, segmented: bool = False
) -> tuple[np.ndarray, dict[str, Ragged]]:
    """The whole length of each row, int64 [N], and its ``input_ids`` (``segmented``: and ``token_type_ids``), cut at ``max_length``."""
    import numpy as np

    columns = _uncut(tokenizer, first, second, segmented=segmented)
    lengths = columns["input_ids"].lengths()
    if len(longer := np.flatnonzero(lengths > max_length)):
        chosen = [[texts[i] for i in longer] for texts in (first, second) if texts is not None]
        cut = tokenizer(*chosen, truncation="longest_first", max_length=max_length, return_token_type_ids=segmented)
        columns = {name: column.replaced(longer, cut[name]) for name, column in columns.items()}
    return lengths, columns


def _uncut(tokenizer: Any, first: list[str], second: list[str] | None, *, segmented: bool) -> dict[str, Ragged]:
    """The same of whole rows. A fast tokenizer works through the chunk on every core."""
    import numpy as np

    from finetune_cli.encoded import Ragged
    from finetune_cli.word_table import looked_up

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        plain = tokenizer(first, second, truncation=False, return_token_type_ids=segmented)
        ids, segments = plain["input_ids"], plain.get("token_type_ids")
    else:
        backend.no_truncation()
        backend.no_padding()
        if (found := looked_up(tokenizer, first, second)) is not None:
            return found if segmented else {"input_ids": found["input_ids"]}
        encoded = backend.encode_batch_fast(first if second is None else list(zip(first, second, strict=True)))
        ids, segments = [e.ids for e in encoded], [e.type_ids for e in encoded] if segmented else None
    return {"input_ids": Ragged.of(ids)} | ({"token_type_ids": Ragged.of(segments, np.int8)} if segmented else {})


def tokenise_targets(tokenizer: Any, texts: list[str], limit: int) -> tuple[np.ndarray, Ragged]:
    """The whole length of each target, int64 [N], and its ids cut at ``limit``; tokenizers that treat targets otherwise than sources are
    asked to.
    """
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from finetune_cli.encoded import Ragged

    own = getattr(type(tokenizer), "_switch_to_target_mode", None)
    if own is None or own is PreTrainedTokenizerBase._switch_to_target_mode:
        lengths, columns = tokenise(tokenizer, texts, max_length=limit)
        return lengths, columns["input_ids"]
    whole = tokenizer(text_target=texts)["input_ids"]
    cut = tokenizer(text_target=texts, truncation=True, max_length=limit)["input_ids"]
    return np.array([len(ids) for ids in whole], np.int64), Ragged.of(cut)
