"""Attention within documents: positions begin anew with every document of a block, and transformers keeps the documents apart by them.

Not every model does, so one is taken only after it showed, on documents of its own, that they come out as if each ran by itself.
"""

from __future__ import annotations

from typing import Any

from finetune_cli.errors import UserError

TOLERANCE = 1e-3
"""Largest difference of a hidden state, relative to its size; documents that see each other are off by far more."""


def require_apart(model: Any) -> None:
    """Raise UserError where the documents of a block see each other in this model."""
    off = _difference(model)
    if not off <= TOLERANCE:
        raise UserError(
            f"this model does not keep the documents of a block apart (hidden states differ by {off:.1g})",
            where="task.attention_within_documents",
            fix="task.attention_within_documents=false, or another model",
        )


def _difference(model: Any) -> float:
    """How far the hidden states of three documents in one block lie from those of each by itself."""
    import numpy as np
    import torch

    from finetune_cli.tasks.writing.token_loss import trunk

    draw = np.random.Generator(np.random.Philox(0))
    where = next(model.parameters()).device
    lengths = (5, 2, 7)
    vocabulary = model.config.get_text_config().vocab_size
    documents = [torch.from_numpy(draw.integers(0, vocabulary, n))[None].to(where) for n in lengths]
    places = torch.cat([torch.arange(n) for n in lengths])[None].to(where)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            whole = trunk(model)(input_ids=torch.cat(documents, 1), position_ids=places, use_cache=False).last_hidden_state[0].float()
            alone = torch.cat([trunk(model)(input_ids=d, use_cache=False).last_hidden_state[0].float() for d in documents])
    finally:
        model.train(was_training)
    return float((whole - alone).abs().max() / alone.abs().max().clamp(min=1.0))
