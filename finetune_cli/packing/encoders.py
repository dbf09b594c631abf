"""Encoders whose layers are known here, run over a packed row with the modules of the Hugging Face model itself.

Where the head looks at first tokens alone, the last layer computes nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune_cli.models import activated, are_compiled, in_training
from finetune_cli.packing.attention import autocast_type
from finetune_cli.packing.dropout import Dropout
from finetune_cli.packing.rows import Packing


# -- families ------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Block:
    """One encoder layer in the order of its computation, whatever its family calls the parts."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    attention_dropout: nn.Dropout
    out: nn.Module
    out_dropout: nn.Dropout | None
    out_norm: nn.Module
    up: nn.Module
    activation: Callable[[Tensor], Tensor]
    down: nn.Module
    down_dropout: nn.Dropout
    down_norm: nn.Module


@dataclass(frozen=True, slots=True)
class Family:
    """How one family of models embeds tokens and what its layers consist of."""

    blocks: Callable[[Any], list[Block]]
    heads: Callable[[Any], int]
    counts_positions_from_pad: bool = False
    """RoBERTa's positions begin after the padding id, and padding tokens inside a text have none."""


def _bert_blocks(base: Any) -> list[Block]:
    return [
        Block(
            query=layer.attention.self.query,
            key=layer.attention.self.key,
            value=layer.attention.self.value,
            attention_dropout=layer.attention.self.dropout,
            out=layer.attention.output.dense,
            out_dropout=layer.attention.output.dropout,
            out_norm=layer.attention.output.LayerNorm,
            up=layer.intermediate.dense,
            activation=layer.intermediate.intermediate_act_fn,
            down=layer.output.dense,
            down_dropout=layer.output.dropout,
            down_norm=layer.output.LayerNorm,
        )
        for layer in base.encoder.layer
    ]


def _distilbert_blocks(base: Any) -> list[Block]:
    return [
        Block(
            query=layer.attention.q_lin,
            key=layer.attention.k_lin,
            value=layer.attention.v_lin,
            attention_dropout=layer.attention.dropout,
            out=layer.attention.out_lin,
            out_dropout=None,
            out_norm=layer.sa_layer_norm,
            up=layer.ffn.lin1,
            activation=layer.ffn.activation,
            down=layer.ffn.lin2,
            down_dropout=layer.ffn.dropout,
            down_norm=layer.output_layer_norm,
        )
        for layer in base.transformer.layer
    ]


_BERT = Family(_bert_blocks, lambda config: int(config.num_attention_heads))
_ROBERTA = Family(_bert_blocks, lambda config: int(config.num_attention_heads), counts_positions_from_pad=True)
FAMILIES = {
    "bert": _BERT,
    "electra": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "distilbert": Family(_distilbert_blocks, lambda config: int(config.n_heads)),
}
"""``model_type`` to family. Each is held equal to the Hugging Face module, logits and gradients, by a test."""


def obstacle(model: Any) -> str | None:
    """What a model of these families may be that ``encode`` does not follow."""
    config = model.config
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return "gradient checkpointing goes by the model's own layers"
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return "the encoder is configured as a decoder"
    return None


def install(model: Any, *, first_only: bool) -> None:
    """Let the base model take packed rows beside padded ones; ``first_only``: its head looks at first tokens alone."""
    base: Any = model.base_model
    family = FAMILIES[model.config.model_type]

    def forward(self: Any, input_ids: Any = None, *others: Any, packing: Packing | None = None, **inputs: Any) -> Any:
        if packing is None:
            return type(self).forward(self, input_ids, *others, **inputs)
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        found = encode(self, family, packing, input_ids, inputs.get("token_type_ids"), first_only=first_only)
        hidden = found[:, None] if first_only else found[None]  # [B, 1, H] or [1, N, H]
        pooler = getattr(self, "pooler", None) if first_only else None
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=None if pooler is None else pooler(hidden))

    base.forward = MethodType(forward, base)


SHORT = 64
"""Tokens up to which PyTorch's kernel is slower in bf16 on a CPU than two products and a softmax."""


# -- the forward pass ----------------------------------------------------------------------------
def encode(base: Any, family: Family, packing: Packing, input_ids: Tensor, token_type_ids: Tensor | None, *, first_only: bool) -> Tensor:
    """Hidden states of a packed row [1, N]: [N, H], or [B, H] of the first tokens alone."""
    dropout = Dropout(base.training, input_ids.device)
    x = _embed(base, family, packing, input_ids[0], None if token_type_ids is None else token_type_ids[0], dropout)
    blocks = family.blocks(base)
    after = in_training(_after) if base.training and are_compiled(base) else _after
    for number, block in enumerate(blocks):
        first = first_only and number == len(blocks) - 1
        context, residual = _attention(block, family.heads(base.config), x, packing, dropout, first_only=first)
        x = after(block, context, residual, dropout)
    return x


def _embed(base: Any, family: Family, packing: Packing, ids: Tensor, types: Tensor | None, dropout: Dropout) -> Tensor:
    parts = base.embeddings
    position = packing.position
    if family.counts_positions_from_pad:
        pad = parts.padding_idx
        real = ids.ne(pad).long()
        counted = torch.cumsum(real, 0)
        before = (counted - real)[torch.arange(len(ids), device=ids.device) - position]
        position = (counted - before) * real + pad
    x = parts.word_embeddings(ids)
    if hasattr(parts, "token_type_embeddings"):
        x = x + (parts.token_type_embeddings.weight[0] if types is None else parts.token_type_embeddings(types))
    x = dropout(parts.LayerNorm(x + parts.position_embeddings(position)), parts.dropout)
    project = getattr(base, "embeddings_project", None)
    return x if project is None else project(x)


def _attention(block: Block, heads: int, x: Tensor, packing: Packing, dropout: Dropout, *, first_only: bool) -> tuple[Tensor, Tensor]:
    """(what the tokens of one layer see, the tokens themselves), each [N, H]; with ``first_only`` [B, H], for first tokens alone."""
    cast = autocast_type(x)
    source = x if cast is None else x.to(cast)
    asked, residual = (source.index_select(0, packing.first), x.index_select(0, packing.first)) if first_only else (source, x)
    query, key, value = block.query(asked), block.key(source), block.value(source)
    parts = []
    for group in packing.groups:
        k, v = (t.index_select(0, group.tokens).view(group.rows, group.width, heads, -1) for t in (key, value))
        q = query.index_select(0, group.samples if first_only else group.tokens).view(group.rows, -1, heads, k.shape[-1])
        context = _attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), group.bias, block.attention_dropout, dropout)
        parts.append(context.transpose(1, 2).reshape(-1, query.shape[-1]))
    context = parts[0] if len(parts) == 1 else torch.cat(parts)
    return context.index_select(0, packing.back_first if first_only else packing.back), residual


def _after(block: Block, context: Tensor, residual: Tensor, dropout: Dropout) -> Tensor:
    """The rest of a layer, one token at a time: compiled, it is one graph for all layers and any number of tokens."""
    x = block.out_norm(residual + dropout(block.out(context), block.out_dropout))
    raised = activated(block.up, block.activation, x)
    return block.down_norm(x + dropout(block.down(raised), block.down_dropout))  # type: ignore[no-any-return]


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rate: nn.Dropout, dropout: Dropout) -> Tensor:
    """softmax(q k^T) v inside each sample of a group; [rows, heads, tokens, head size]."""
    p = dropout.rate(rate)
    by_hand = q.device.type == "cpu" and (p or (q.dtype == torch.bfloat16 and q.shape[2] <= SHORT))
    if not by_hand:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype), dropout_p=p)
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(2, 3)).float()
    weights = torch.softmax(scores if bias is None else scores + bias, -1)
    return torch.matmul(dropout.at(p, weights, v.dtype), v)
