"""What the heads of packed models read: the first token of a sample, its last or the mean of all, or every token by itself."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from finetune_cli.packing.rows import Packing

_ENCODERS = ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "DistilBert")
_DECODERS = ("Llama", "Mistral", "Qwen2", "Qwen3", "GPT2")

FIRST_TOKEN = frozenset(f"{family}ForSequenceClassification" for family in _ENCODERS)
"""Heads that read the first token of a sample and nothing else."""
EVERY_TOKEN = frozenset(
    [f"{family}{head}" for family in (*_ENCODERS, "ModernBert") for head in ("ForTokenClassification", "ForMaskedLM")]
    + [f"{family}ForTokenClassification" for family in _DECODERS]
    + [f"{family}ForCausalLM" for family in _DECODERS if family != "GPT2"]
    + ["GPT2LMHeadModel"]
)
"""Heads that read one hidden state at a time, so that they run over a packed row as they run over a rectangle."""

Pool = Callable[[Any, Tensor, Tensor, Packing], Tensor]
"""(model, hidden states [N, H], ids [N], where the samples lie) to the logits of the samples, [B, K]."""


def last_token(model: Any, hidden: Tensor, ids: Tensor, packing: Packing) -> Tensor:
    """The head over the last token of each sample that is no padding token, wherever in a text one stands."""
    samples = len(packing.first)
    place = torch.where(ids == model.config.pad_token_id, 0, packing.position)
    last = torch.zeros(samples + 1, dtype=torch.int64, device=ids.device).scatter_reduce(0, packing.sample(), place, "amax")
    logits: Tensor = model.score(hidden.index_select(0, packing.first + last[:samples]))
    return logits


def modernbert(model: Any, hidden: Tensor, ids: Tensor, packing: Packing) -> Tensor:
    """ModernBERT's head over first tokens, or over the mean of every sample's tokens."""
    if model.config.classifier_pooling == "cls":
        pooled = hidden.index_select(0, packing.first)
    else:
        samples = len(packing.first)
        sums = hidden.new_zeros(samples + 1, hidden.shape[1], dtype=torch.float32).index_add(0, packing.sample(), hidden.float())
        pooled = (sums[:samples] / packing.bounds.diff()[:samples, None]).to(hidden.dtype)
    logits: Tensor = model.classifier(model.drop(model.head(pooled)))
    return logits


POOLS: dict[str, Pool] = {f"{family}ForSequenceClassification": last_token for family in _DECODERS}
POOLS["ModernBertForSequenceClassification"] = modernbert
"""Heads that read one vector a sample, made of a packed row by other means than of a rectangle."""


def obstacle(model: Any) -> str | None:
    """What a head may lack that a packed row needs."""
    if POOLS.get(type(model).__name__) is last_token and getattr(model.config, "pad_token_id", None) is None:
        return "its config names no padding token, without which its head takes no batch"
    return None


def install_pool(model: Any, pool: Pool) -> None:
    """Let the whole model take packed rows; its base model does already."""

    def forward(self: Any, input_ids: Any = None, *others: Any, packing: Packing | None = None, **inputs: Any) -> Any:
        if packing is None:
            return type(self).forward(self, input_ids, *others, **inputs)
        from transformers.modeling_outputs import SequenceClassifierOutput

        hidden = self.base_model(input_ids=input_ids, packing=packing, **inputs).last_hidden_state[0]
        return SequenceClassifierOutput(logits=pool(self, hidden, input_ids[0], packing))

    model.forward = MethodType(forward, model)
