"""Models that reach attention through transformers' interface, run over a packed row with their own forward: only attention is ours.

Where the samples lie goes down to attention as a keyword. In the place of a mask stands a single NaN: attention that did not get the
keyword answers with NaN, which nothing takes for an answer, where it would otherwise mix the samples and say nothing.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch

from finetune_cli.models import attend_as_before, attend_by
from finetune_cli.packing.attention import PACKED_ATTENTION, attention
from finetune_cli.packing.rows import Packing

FAMILIES = {"llama": True, "mistral": True, "qwen2": True, "qwen3": True, "gpt2": True, "modernbert": False}
"""``model_type`` to whether it keeps a cache of what it has read. Each is held equal to the Hugging Face module by a test."""
FIXED_ROTARY = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary embeddings that do not depend on the longest row of a batch."""


def obstacle(model: Any) -> str | None:
    """What a config of these families may say that a packed row cannot follow."""
    config = model.config
    if getattr(config, "add_cross_attention", False):
        return "the model looks across at another"
    kinds = _rotary_kinds(getattr(config, "rope_parameters", None) or {})
    if strange := sorted(kinds - FIXED_ROTARY):
        return f"its {strange[0]} rotary embedding depends on the longest row of a batch"
    if config._attn_implementation not in ("sdpa", PACKED_ATTENTION):
        return f"its attention is {config._attn_implementation}, not PyTorch's kernel"
    return None


def _rotary_kinds(parameters: dict[str, Any]) -> set[str]:
    """The kinds of rotary embedding of a config, one for all layers or one for each kind of layer."""
    if "rope_type" in parameters:
        return {str(parameters["rope_type"])}
    return {str(each["rope_type"]) for each in parameters.values() if isinstance(each, dict)}


def windows(config: Any) -> list[int]:
    """How far the layers with a sliding window see, in the words of ``inside_samples``."""
    found = getattr(config, "sliding_window", None)
    return [] if found is None else [int(found) + (not FAMILIES[config.model_type])]


def install(model: Any) -> None:
    """Let the base model take packed rows beside all others."""
    base: Any = model.base_model
    caches = FAMILIES[model.config.model_type]

    def forward(self: Any, input_ids: Any = None, *others: Any, packing: Packing | None = None, **inputs: Any) -> Any:
        if packing is None:
            return type(self).forward(self, input_ids, *others, **inputs)
        given = [name for name in ("attention_mask", "position_ids", "cache", "past_key_values") if inputs.get(name) is not None]
        assert not others and not given, "a packed row brings its own places and masks, and no cache"
        unseen = torch.full((1, 1, 1, 1), torch.nan, device=input_ids.device)
        inputs |= {"attention_mask": unseen, "position_ids": packing.position[None], **({"use_cache": False} if caches else {})}
        return type(self).forward(self, input_ids, packing=packing, **inputs)

    base.forward = MethodType(forward, base)
    attend_by(model, PACKED_ATTENTION, attention)


def take_back(model: Any) -> None:
    """Let the model attend as before ``install``."""
    attend_as_before(model)
