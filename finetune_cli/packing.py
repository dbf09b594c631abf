"""Padding-free execution: the samples of a batch lie end to end in one row of tokens, and only attention sees where each begins.

A family of encoders whose layers are known here runs over that row with the modules of the Hugging Face model itself, so weights, names
and exports stay what they are. Two more things are left out because nothing reads them: where the head looks at first tokens alone, the
last layer computes nothing else; and dropout on a CPU draws four masks from one 64-bit number instead of one from each. A model is
packed only after it proved, on samples of its own, that it answers as its own forward does; every other model is padded, and says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune_cli.batching import Padded
from finetune_cli.device import DevicePlan
from finetune_cli.encoded import Ragged
from finetune_cli.models import never_wait
from finetune_cli.tasks.base import Batch, Layout

FIRST_TOKEN_HEADS = frozenset(
    f"{family}ForSequenceClassification" for family in ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "DistilBert")
)
"""Heads that read the first token of a sample and nothing else."""
ONEDNN_ROWS = 64
"""In bf16 a CPU compiles a matrix product for every new number of rows; rows are rounded up to this, so that there are few."""
HIDDEN = -1e9
"""Added to the score of a token that lies outside the sample; its probability is exactly 0."""
WORTH_A_GROUP = 1024
"""Padded tokens that attention handles at once before shorter samples get a rectangle of their own."""
TOLERANCE = 1e-4
"""How far packed hidden states may lie from the model's own in fp32, relative to their size; mixed samples are off by far more."""


# -- where samples lie ---------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Group:
    """Samples of like length, as attention sees them: a rectangle of ``rows`` by ``width`` tokens."""

    rows: int
    width: int
    tokens: Tensor
    """[rows * width] index of each token in the packed row; past a sample's end, its first token."""
    bias: Tensor | None
    """[rows, 1, 1, width] added to scores; None where every sample fills its row."""
    samples: Tensor
    """[rows] which samples these are."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Group:
        """The same group with every tensor changed."""
        bias = None if self.bias is None else change(self.bias)
        return Group(self.rows, self.width, change(self.tokens), bias, change(self.samples))


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the samples of a packed row lie; counted on the CPU, so that nothing waits for the device."""

    position: Tensor
    """[N] place of each token in its sample."""
    first: Tensor
    """[B] index of each sample's first token."""
    groups: tuple[Group, ...]
    back: Tensor
    """[N] where a token's context lies among the groups' rectangles, end to end."""
    back_first: Tensor
    """[B] where a sample lies among the groups, end to end."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Packing:
        """The same packing with every tensor changed, such as moved to a device."""
        groups = tuple(group.each(change) for group in self.groups)
        return Packing(change(self.position), change(self.first), groups, change(self.back), change(self.back_first))

    @classmethod
    def of(cls, lengths: np.ndarray, *, size: int) -> Packing:
        """For samples of ``lengths``, end to end in a row of ``size`` tokens; what is left over at its end belongs to nobody."""
        starts = np.cumsum(lengths) - lengths
        total = int(lengths.sum())
        position = np.zeros(size, np.int64)
        position[:total] = np.arange(total) - np.repeat(starts, lengths)
        back, back_first = np.zeros(size, np.int64), np.zeros(len(lengths), np.int64)
        groups, cells, rows = [], 0, 0
        for samples in _like_lengths(lengths):
            width = int(lengths[samples].max())
            inside = np.arange(width)[None, :] < lengths[samples][:, None]
            tokens = starts[samples][:, None] + np.where(inside, np.arange(width)[None, :], 0)
            back[tokens[inside]] = cells + np.flatnonzero(inside)
            back_first[samples] = rows + np.arange(len(samples))
            bias = None if inside.all() else torch.from_numpy(np.where(inside, np.float32(0), np.float32(HIDDEN))[:, None, None, :])
            groups.append(Group(len(samples), width, torch.from_numpy(tokens.reshape(-1)), bias, torch.from_numpy(samples)))
            cells, rows = cells + inside.size, rows + len(samples)
        position_of, first, back_of, first_of = map(torch.from_numpy, (position, starts, back, back_first))
        return cls(position_of, first, tuple(groups), back_of, first_of)


def _like_lengths(lengths: np.ndarray) -> list[np.ndarray]:
    """Samples, longest first, in groups whose shortest is not much shorter than their longest."""
    order = np.argsort(-lengths, kind="stable")
    groups, start = [], 0
    for i in range(1, len(order)):
        width = int(lengths[order[start]])
        if lengths[order[i]] <= 0.6 * width and (i - start) * width >= WORTH_A_GROUP:
            groups.append(order[start:i])
            start = i
    return [*groups, order[start:]]


@dataclass(frozen=True, slots=True)
class Packed:
    """Lays sequences end to end in one row, rounded up to a multiple of tokens."""

    pad_ids: Mapping[str, int]
    """Column to the value of the tokens left over at the end; 0 where absent."""
    multiple: int

    def lay(self, columns: Mapping[str, Ragged]) -> dict[str, Any]:
        """``input_ids`` and its companions, each int64 [1, N], and where the samples lie."""
        lengths = next(iter(columns.values())).lengths()
        size = -(-int(lengths.sum()) // self.multiple) * self.multiple
        inputs: dict[str, Any] = {"packing": Packing.of(lengths, size=size)}
        for name, column in columns.items():
            row = np.full((1, size), self.pad_ids.get(name, 0), np.int64)
            row[0, : len(column.values)] = column.values
            inputs[name] = torch.from_numpy(row)
        return inputs


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
    up: Callable[[Tensor], Tensor]
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
            up=layer.intermediate,
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
            up=lambda x, ffn=layer.ffn: ffn.activation(ffn.lin1(x)),  # type: ignore[misc]
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


# -- the forward pass ----------------------------------------------------------------------------
def encode(base: Any, family: Family, packing: Packing, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
    """Hidden states of the first tokens, [B, H], of a packed row [1, N]."""
    dropout = Dropout(base.training, input_ids.device)
    x = _embed(base, family, packing, input_ids[0], None if token_type_ids is None else token_type_ids[0], dropout)
    blocks = family.blocks(base)
    for number, block in enumerate(blocks):
        x = _layer(block, family.heads(base.config), x, packing, dropout, first_only=number == len(blocks) - 1)
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


def _layer(block: Block, heads: int, x: Tensor, packing: Packing, dropout: Dropout, *, first_only: bool) -> Tensor:
    """One layer over [N, H]; with ``first_only`` its result is [B, H], for first tokens alone."""
    cast = _autocast_type(x)
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
    context = context.index_select(0, packing.back_first if first_only else packing.back)
    x = block.out_norm(residual + dropout(block.out(context), block.out_dropout))
    return block.down_norm(x + dropout(block.down(block.up(x)), block.down_dropout))  # type: ignore[no-any-return]


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rate: nn.Dropout, dropout: Dropout) -> Tensor:
    """softmax(q k^T) v inside each sample of a group; [rows, heads, tokens, head size]."""
    p = dropout.rate(rate)
    if not p or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype), dropout_p=p)
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(2, 3)).float()
    weights = torch.softmax(scores if bias is None else scores + bias, -1)
    return torch.matmul(dropout(weights, rate).to(v.dtype), v)


def _autocast_type(x: Tensor) -> torch.dtype | None:
    """The type that autocast would cast to, so that one cast serves three products."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


# -- dropout -------------------------------------------------------------------------------------
class Dropout:
    """Dropout of one forward pass, keyed by torch's seed. On a CPU, masks are cut from a stream of 64-bit numbers, 16 bits an element:
    the rate is rounded to 1/65,536 and the scale follows the rounded rate, so the expectation is exact."""

    def __init__(self, active: bool, device: torch.device) -> None:
        self.active = active
        self.bits: np.random.SFC64 | None = None
        if active and device.type == "cpu":
            self.bits = np.random.SFC64(int(torch.empty((), dtype=torch.int64).random_().numpy()))

    def rate(self, module: nn.Dropout | None) -> float:
        """The rate of a module of the model, 0 outside training."""
        return 0.0 if module is None or not self.active else float(module.p)

    def __call__(self, x: Tensor, module: nn.Dropout | None) -> Tensor:
        p = self.rate(module)
        if not p:
            return x
        if self.bits is None or p >= 1:
            return F.dropout(x, p)
        dropped = round(p * 65536)
        count = x.numel()
        words = np.asarray(self.bits.random_raw(-(-count // 4)), np.uint64).view(np.int16)[:count]
        keep = torch.from_numpy(words).view(x.shape) >= dropped - 32768
        kept: Tensor = _Keep.apply(x, keep, 65536 / (65536 - dropped))  # type: ignore[no-untyped-call]
        return kept


class _Keep(torch.autograd.Function):
    """Elements under a mask, scaled; the rest 0. Saves the mask alone, one byte an element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return torch.where(keep, x, 0.0).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return torch.where(keep, gradient, 0.0).mul_(ctx.scale), None, None


# -- choosing ------------------------------------------------------------------------------------
def layout(model: nn.Module, *, pad_id: int, limit: int, device: DevicePlan, saved: bool | None = None) -> tuple[Layout, str]:
    """How batches of this model are laid out, and why. Afterwards the model takes what the layout gives.

    ``saved``: what a run that goes on was: a padded one stays padded.
    """
    pad_ids = {"input_ids": pad_id}
    obstacle = "as the run began" if saved is False else install(model)
    if obstacle is None:
        rounded = ONEDNN_ROWS if device.device.type == "cpu" and device.precision == "bf16" else 1
        return Packed(pad_ids, rounded), "packed (no padding; proved equal to the model's own forward)"
    never_wait(model)
    return Padded(pad_ids, limit), f"padded ({obstacle})"


def install(model: Any) -> str | None:
    """Let the model's encoder take packed rows beside padded ones; why it cannot, where it cannot."""
    config = model.config
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return "gradient checkpointing goes by the model's own layers"
    family = FAMILIES.get(getattr(config, "model_type", ""))
    if family is None:
        return f"no packed form is known for {getattr(config, 'model_type', 'this model')}"
    if type(model).__name__ not in FIRST_TOKEN_HEADS:
        return f"no packed form is known for {type(model).__name__}"
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return "the encoder is configured as a decoder"
    base: Any = model.base_model
    own = base.forward

    def forward(self: Any, input_ids: Any = None, *others: Any, packing: Packing | None = None, **inputs: Any) -> Any:
        if packing is None:
            return own(input_ids, *others, **inputs)
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        hidden = encode(self, family, packing, input_ids, inputs.get("token_type_ids"))[:, None]  # [B, 1, H]
        pooler = getattr(self, "pooler", None)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=None if pooler is None else pooler(hidden))

    base.forward = MethodType(forward, base)
    if (off := _difference(model)) > TOLERANCE:
        base.forward = own
        return f"its packed answers differ from its own by {off:.1e}"
    return None


@torch.no_grad()
def _difference(model: Any) -> float:
    """How far packed hidden states lie from the model's own for three samples in one row, relative to their size."""
    config, base, where = model.config, model.base_model, next(model.parameters()).device
    draw = np.random.Generator(np.random.Philox(0))
    pad = config.pad_token_id or 0
    ids = Ragged.of([draw.integers(pad + 1, max(pad + 2, config.vocab_size), n) for n in (3, 9, 5)])
    was_training = model.training
    model.eval()
    try:
        told = [
            base(**Batch(way.lay({"input_ids": ids}), None).to(where).inputs).last_hidden_state[:, 0].float()
            for way in (Padded({"input_ids": pad}, 16), Packed({"input_ids": pad}, 1))
        ]
    finally:
        model.train(was_training)
    return float((told[0] - told[1]).abs().max() / told[0].abs().max().clamp(min=1.0))
