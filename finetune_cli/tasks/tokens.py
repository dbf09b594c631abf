"""Texts to tokens: one text or a pair a row, cut and counted, never padded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune_cli.data import Roles, Rows, TokenCounts
    from finetune_cli.encoded import Columns, Examples
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
    from finetune_cli.encoded import Ragged

    encodings = tokenise(tokenizer, first, second, max_length)
    lengths = np.array([n for n, _, _ in encodings], np.int64)
    kept = np.minimum(lengths, max_length)
    ids = Ragged.of([e for _, e, _ in encodings])
    columns: Columns = {"input_ids": ids}
    if second is not None and "token_type_ids" in tokenizer.model_input_names:
        columns["token_type_ids"] = Ragged.of([t for _, _, t in encodings], np.int8)
    unknown = int((ids.values == tokenizer.unk_token_id).sum()) if tokenizer.unk_token_id is not None else 0
    counts = TokenCounts(
        tokens=int(kept.sum()),
        longest=int(lengths.max(initial=0)),
        cut_rows=int((lengths > max_length).sum()),
        lost=int((lengths - kept).sum()),
        unknown=unknown,
    )
    return columns, counts


def tokenise(tokenizer: Any, first: list[str], second: list[str] | None, max_length: int) -> list[tuple[int, list[int], list[int]]]:
    """(full length, ids, segment ids) of each row. The fast tokenizer works through the chunk on every core."""
    pairs: list[Any] = first if second is None else list(zip(first, second, strict=True))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        plain = tokenizer(first, second, truncation=False)
        whole = [(len(ids), ids, plain.get("token_type_ids", [[]] * len(first))[i]) for i, ids in enumerate(plain["input_ids"])]
    else:
        backend.no_truncation()
        backend.no_padding()
        no_segments: list[int] = []
        encoded = backend.encode_batch_fast(pairs)
        whole = [(len(ids := e.ids), ids, no_segments if second is None else e.type_ids) for e in encoded]
    for i, (length, _, _) in enumerate(whole):
        if length > max_length:
            cut = tokenizer(first[i], None if second is None else second[i], truncation="longest_first", max_length=max_length)
            whole[i] = (length, cut["input_ids"], cut.get("token_type_ids", [0] * max_length))
    return whole


def tokenise_targets(tokenizer: Any, texts: list[str], limit: int) -> list[tuple[int, list[int], list[int]]]:
    """(full length, ids cut at ``limit``, nothing) of each target; tokenizers that treat targets otherwise than sources are asked to."""
    from transformers import PreTrainedTokenizerBase

    own = getattr(type(tokenizer), "_switch_to_target_mode", None)
    if own is None or own is PreTrainedTokenizerBase._switch_to_target_mode:
        return tokenise(tokenizer, texts, None, limit)
    whole = tokenizer(text_target=texts)["input_ids"]
    cut = tokenizer(text_target=texts, truncation=True, max_length=limit)["input_ids"]
    return [(len(every), kept, []) for every, kept in zip(whole, cut, strict=True)]
