"""Whether a model is packed: it is let take packed rows, and must prove on samples of its own that it answers as its own forward does."""

from __future__ import annotations

from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune_cli.batching import Padded
from finetune_cli.device import DevicePlan
from finetune_cli.encoded import Ragged
from finetune_cli.models import never_wait
from finetune_cli.packing import heads
from finetune_cli.packing.encoders import FAMILIES, encode
from finetune_cli.packing.rows import Packed, Packing
from finetune_cli.tasks.base import Batch, Layout

ONEDNN_ROWS = 64
"""In bf16 a CPU compiles a matrix product for every new number of rows; rows are rounded up to this, so that there are few."""
TOLERANCE = 1e-4
"""How far packed answers may lie from the model's own in fp32, relative to their size; mixed samples are off by far more."""


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
    """Let the model take packed rows beside padded ones; why it cannot, where it cannot."""
    config, name = model.config, type(model).__name__
    kind = getattr(config, "model_type", "this model")
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return "gradient checkpointing goes by the model's own layers"
    if kind not in FAMILIES:
        return f"no packed form is known for {kind}"
    if name not in heads.FIRST_TOKEN | heads.EVERY_TOKEN:
        return f"no packed form is known for {name}"
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return "the encoder is configured as a decoder"
    _install_encoder(model)
    if not (off := _difference(model)) <= TOLERANCE:
        vars(model.base_model).pop("forward")
        return f"its packed answers differ from its own by {off:.1e}"
    return None


def _install_encoder(model: Any) -> None:
    """The base model of a family of ``FAMILIES`` computes packed rows layer by layer, as ``encode`` does."""
    base: Any = model.base_model
    family, first_only = FAMILIES[model.config.model_type], type(model).__name__ in heads.FIRST_TOKEN

    def forward(self: Any, input_ids: Any = None, *others: Any, packing: Packing | None = None, **inputs: Any) -> Any:
        if packing is None:
            return type(self).forward(self, input_ids, *others, **inputs)
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        found = encode(self, family, packing, input_ids, inputs.get("token_type_ids"), first_only=first_only)
        hidden = found[:, None] if first_only else found[None]  # [B, 1, H] or [1, N, H]
        pooler = getattr(self, "pooler", None) if first_only else None
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=None if pooler is None else pooler(hidden))

    base.forward = MethodType(forward, base)


# -- the proof -----------------------------------------------------------------------------------
@torch.no_grad()
def _difference(model: Any) -> float:
    """How far packed hidden states and logits lie from the model's own for three samples in one row, relative to their size."""
    config, where = model.config, next(model.parameters()).device
    draw = np.random.Generator(np.random.Philox(0))
    pad = config.pad_token_id or 0
    ids = Ragged.of([draw.integers(pad + 1, max(pad + 2, config.vocab_size), n) for n in (3, 9, 5)])
    was_training = model.training
    model.eval()
    try:
        own, packed = (
            _answers(model, Batch(way.lay({"input_ids": ids}), None).to(where).inputs, ids.lengths())
            for way in (Padded({"input_ids": pad}, 16), Packed({"input_ids": pad}, 1))
        )
    finally:
        model.train(was_training)
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1.0)) for a, b in zip(own, packed, strict=True))


def _answers(model: Any, inputs: dict[str, Any], lengths: np.ndarray) -> list[Tensor]:
    """(hidden states that the head reads, logits), both of real tokens alone, end to end: [B or N, ...]."""
    states, logits = model.base_model(**inputs).last_hidden_state.float(), model(**inputs).logits.float()
    if type(model).__name__ in heads.FIRST_TOKEN:
        return [states[:, 0], logits]
    return [_end_to_end(states, lengths), _end_to_end(logits, lengths)]


def _end_to_end(values: Tensor, lengths: np.ndarray) -> Tensor:
    """[B, T, ...], or the packed [1, N, ...], as [N, ...]."""
    return values[0] if len(values) < len(lengths) else torch.cat([row[:n] for row, n in zip(values, lengths.tolist(), strict=True)])
