"""Attention inside each sample of a packed row, for models that reach theirs through transformers' attention interface.

On a CPU, and wherever nothing better was proved, samples of like length share a rectangle. Past a sample's end a rectangle repeats its
first token: a causal model never looks there, any other is told not to. On CUDA PyTorch's kernel for sequences end to end does without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune_cli.packing.dropout import Dropout
from finetune_cli.packing.rows import HIDDEN, Group, Packing

PACKED_ATTENTION = "ftune_packed"
"""Our name in transformers' table of attention functions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What the tokens of a layer see of their sample, and how."""

    causal: bool
    """Nothing that comes after a token."""
    window: int | None
    """Nothing that is so many tokens or more away; None: everything."""
    scale: float
    dropout: float = 0.0


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    packing: Packing | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function in transformers' table, [1, heads, N, size] to [1, N, heads, size]; without a packing it is transformers' own."""
    if packing is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        own = partial(sdpa_attention_forward, module, query, key, value, attention_mask, dropout=dropout, scaling=scaling)
        found: tuple[Tensor, Tensor | None] = own(is_causal=is_causal, sliding_window=sliding_window, **options)
        return found
    how = Sight(
        causal=bool(getattr(module, "is_causal", True) if is_causal is None else is_causal),
        window=sliding_window,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
    )
    attend = inside_samples if packing.varlen else _apart
    return attend(query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), packing, how)[None], None


def keep_apart() -> None:
    """Leave rectangles out of what is compiled: their number differs from batch to batch, and each would be a graph of its own."""
    global _apart
    _apart = torch.compiler.disable(inside_samples)  # type: ignore[no-untyped-call]


def inside_samples(query: Tensor, key: Tensor, value: Tensor, packing: Packing, how: Sight) -> Tensor:
    """softmax(q k^T) v of each sample, [N, heads, size]; keys and values may have fewer heads than queries."""
    if (cast := autocast_type(query)) is not None:  # rotary embeddings leave queries and keys in fp32
        query, key, value = (t.to(cast) for t in (query, key, value))
    if packing.varlen and not how.dropout and query.dtype in (torch.bfloat16, torch.float16):
        return varlen(query, key, value, packing, how)
    drop = Dropout(how.dropout > 0, query.device)
    shared = query.shape[1] // key.shape[1]
    parts = []
    for group in packing.groups:
        q, k, v = (t.index_select(0, group.tokens).view(group.rows, group.width, *t.shape[1:]).transpose(1, 2) for t in (query, key, value))
        k, v = (t if shared == 1 else t.repeat_interleave(shared, 1) for t in (k, v))
        context = _rectangle(q, k, v, group, how, drop)
        parts.append(context.transpose(1, 2).reshape(-1, *query.shape[1:]))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).index_select(0, packing.back)


_apart: Callable[[Tensor, Tensor, Tensor, Packing, Sight], Tensor] = inside_samples
"""The same where layers around it may be compiled."""


def varlen(query: Tensor, key: Tensor, value: Tensor, packing: Packing, how: Sight) -> Tensor:
    """The same by PyTorch's kernel for sequences end to end, which knows no dropout."""
    from torch.nn.attention.varlen import varlen_attn

    before = -1 if how.window is None else how.window - 1
    query, key, value = (t.contiguous() for t in (query, key, value))
    bounds, longest = packing.bounds, packing.longest
    sides, shared = (before, 0 if how.causal else before), query.shape[1] != key.shape[1]
    found = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=how.scale, window_size=sides, enable_gqa=shared)
    assert isinstance(found, Tensor)
    return found


def _rectangle(q: Tensor, k: Tensor, v: Tensor, group: Group, how: Sight, drop: Dropout) -> Tensor:
    """Attention of samples of like length, [rows, heads, width, size]."""
    near = how.window is not None and group.width > how.window
    by_hand = how.dropout > 0 and q.device.type == "cpu"
    if how.causal and not near and not by_hand:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=how.dropout, is_causal=True, scale=how.scale)
    bias = None if how.causal else group.bias
    if how.causal or near:
        seen = _seen(group.width, how.window if near else None, how.causal, q.device)
        bias = seen if bias is None else torch.minimum(bias, seen)
    if not by_hand:
        mask = None if bias is None else bias.clamp(min=torch.finfo(q.dtype).min / 2).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=how.dropout, scale=how.scale)
    scores = torch.matmul(q * how.scale, k.transpose(2, 3)).float()
    weights = torch.softmax(scores if bias is None else scores + bias, -1)
    return torch.matmul(drop.at(how.dropout, weights, v.dtype), v)


def _seen(width: int, window: int | None, causal: bool, device: torch.device) -> Tensor:
    """[1, 1, width, width] added to scores: nothing after a token where ``causal``, nothing ``window`` or more away from it."""
    place = torch.arange(width, device=device)
    apart = place[:, None] - place[None, :]
    hidden = apart < 0 if causal else torch.zeros_like(apart, dtype=torch.bool)
    if window is not None:
        hidden = hidden | (apart.abs() >= window)
    return torch.zeros(apart.shape, device=device).masked_fill(hidden, HIDDEN)[None, None]


def autocast_type(x: Tensor) -> torch.dtype | None:
    """The type that autocast would cast to, so that one cast serves several products."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
