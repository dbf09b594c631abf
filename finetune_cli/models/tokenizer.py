"""The tokenizer of a model: loaded, held against the model, and what tells it again."""

from __future__ import annotations

import hashlib
from typing import Any

from finetune_cli.config.schema import ModelConfig
from finetune_cli.errors import UserError
from finetune_cli.models.faults import loading
from finetune_cli.models.source import Source

UNLIMITED = 1_000_000
"""A tokenizer without a limit of its own reports an astronomic one."""


def load_tokenizer(source: Source, config: ModelConfig, *, offline: bool) -> Any:
    """The tokenizer of a located model, with a padding token."""
    from transformers import AutoTokenizer

    with loading(source):
        tokenizer = AutoTokenizer.from_pretrained(
            source.name, revision=source.revision, trust_remote_code=config.trust_remote_code, local_files_only=offline or not source.hub
        )
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what transformers makes up where no tokenizer's file is
        raise UserError("the model has no tokenizer", where=source.name, fix="copy tokenizer.json or the vocabulary beside config.json")
    for name in ("is_local", "local_files_only"):  # where it came from is not what it is: a resume must write the same files
        tokenizer.init_kwargs.pop(name, None)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def check_vocabulary(tokenizer: Any, model_config: Any, where: str) -> None:
    """Refuse a tokenizer with ids that the model has no row for."""
    rows, highest = getattr(model_config, "vocab_size", None), max(tokenizer.get_vocab().values())
    if rows is not None and highest >= rows:
        what = f"the tokenizer has ids up to {highest}, the model reads {rows}"
        raise UserError(what, where=where, fix="name a model whose tokenizer and weights belong together")


def length_limit(model_config: Any, tokenizer: Any) -> int:
    """Longest input of a model, in tokens."""
    limits = [n for n in (getattr(tokenizer, "model_max_length", None),) if n and n < UNLIMITED]
    if any(not isinstance(n, (int, float)) or n < 1 for n in limits):
        what = f"the tokenizer's model_max_length is {limits[0]}"
        raise UserError(what, where=f"{tokenizer.name_or_path}: tokenizer_config.json", fix="mend it there: the longest input in tokens")
    positions = getattr(model_config, "max_position_embeddings", None)
    if positions:
        padding_offset = 2 if "roberta" in str(getattr(model_config, "model_type", "")) else 0
        limits.append(positions - padding_offset)
    return min(limits) if limits else 512


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash of everything that decides how text becomes ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = repr(sorted(tokenizer.get_vocab().items()))
    else:
        backend.no_truncation()
        backend.no_padding()
        content = backend.to_str()
    return hashlib.sha256((content + str(getattr(tokenizer, "chat_template", None) or "")).encode()).hexdigest()
