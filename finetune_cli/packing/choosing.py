"""Whether a model is packed: it is let take packed rows, and must prove on samples of its own that it answers as its own forward does."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune_cli import models
from finetune_cli.batching import Padded
from finetune_cli.device import DevicePlan
from finetune_cli.encoded import Ragged
from finetune_cli.packing import attention, encoders, heads, interface, kernel
from finetune_cli.packing.rows import Packed
from finetune_cli.tasks.base import Batch, Layout

ONEDNN_ROWS = 32
"""In bf16 a CPU compiles a matrix product for every new number of rows; rows are rounded up to this, so that there are few."""
TOLERANCE = 1e-4
"""How far packed answers may lie from the model's own in fp32, relative to their size; mixed samples are off by far more."""
SHORT_WINDOW = 256
"""A sliding window up to this is tried in the proof; longer ones would cost a pass over thousands of tokens."""

REASONS = {
    **dict.fromkeys(("deberta", "deberta-v2"), "its attention counts distances between tokens in its own way, through a rectangle"),
    **dict.fromkeys(("t5", "mt5", "bart", "mbart", "pegasus", "marian"), "its decoder looks across at a row of the encoder's"),
}
"""``model_type`` to why it stays padded."""


def layout(model: nn.Module, *, pad_id: int, limit: int, device: DevicePlan, saved: bool | None = None) -> tuple[Layout, str]:
    """How batches of this model are laid out, and why. Afterwards the model takes what the layout gives.

    ``saved``: what a run that goes on was: a padded one stays padded.
    """
    pad_ids = {"input_ids": pad_id}
    obstacle = "as the run began" if saved is False else install(model)
    if obstacle is None:
        rounded = ONEDNN_ROWS if device.device.type == "cpu" and device.precision == "bf16" else 1
        told = "packed (no padding; proved equal to the model's own forward"
        if device.device.type != "cuda":
            return Packed(pad_ids, rounded), f"{told})"
        slower = kernel.obstacle(model, device)
        how = "attention by PyTorch's kernel for sequences end to end" if slower is None else f"attention in rectangles: {slower}"
        return Packed(pad_ids, rounded, varlen=slower is None), f"{told}; {how})"
    models.never_wait(model)
    return Padded(pad_ids, limit), f"padded ({obstacle})"


def compile_layers(model: Any) -> None:
    """Compile the layers of a model for training, and of a packed one what does not depend on how many rectangles a batch makes."""
    attention.keep_apart()
    models.compile_layers(model)


def install(model: Any) -> str | None:
    """Let the model take packed rows beside padded ones; why it cannot, where it cannot."""
    kind, name = getattr(model.config, "model_type", "this model"), type(model).__name__
    if kind in REASONS:
        return f"{kind}: {REASONS[kind]}"
    if kind not in encoders.FAMILIES and kind not in interface.FAMILIES:
        return f"no packed form is known for {kind}"
    if name not in heads.FIRST_TOKEN | heads.EVERY_TOKEN | set(heads.POOLS):
        return f"no packed form is known for {name}"
    own = kind in encoders.FAMILIES
    if found := (encoders.obstacle(model) if own else interface.obstacle(model)) or heads.obstacle(model):
        return found
    if own:
        encoders.install(model, first_only=name in heads.FIRST_TOKEN)
    else:
        interface.install(model)
    if name in heads.POOLS:
        heads.install_pool(model, heads.POOLS[name])
    if (off := _difference(model)) <= TOLERANCE:
        return None
    for module in (model, model.base_model):
        vars(module).pop("forward", None)
    if not own:
        interface.take_back(model)
    return f"its packed answers differ from its own by {off:.1e}"


# -- the proof -----------------------------------------------------------------------------------
@torch.no_grad()
def _difference(model: Any) -> float:
    """How far packed hidden states and logits lie from the model's own for three samples in one row, relative to their size."""
    config, where = model.config, next(model.parameters()).device
    draw = np.random.Generator(np.random.Philox(0))
    pad = config.pad_token_id or 0
    pad = pad if 0 <= pad < config.vocab_size else 0  # LLaMA's first configs name -1
    drawn = [draw.integers(0, config.vocab_size - 1, n) for n in _lengths(config)]
    ids = Ragged.of([some + (some >= pad) for some in drawn])  # any token but the padding one
    was_training, short_products = model.training, torch.backends.cuda.matmul.allow_tf32
    model.eval()
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        own, packed = (
            _answers(model, Batch(way.lay({"input_ids": ids}), None).to(where).inputs, ids.lengths())
            for way in (Padded({"input_ids": pad}, 16), Packed({"input_ids": pad}, 1))
        )
    finally:
        model.train(was_training)
        torch.backends.cuda.matmul.allow_tf32 = short_products
    return float(torch.stack([kernel.farthest(a, b) for a, b in zip(own, packed, strict=True)]).max())


def _lengths(config: Any) -> tuple[int, ...]:
    """Of the samples of the proof: one is longer than a short window, so that the window shows."""
    near = [window + 9 for window in interface.windows(config) if window <= SHORT_WINDOW]
    limit = getattr(config, "max_position_embeddings", 16)
    return (3, min(max([9, *near]), limit), 5)


def _answers(model: Any, inputs: dict[str, Any], lengths: np.ndarray) -> list[Tensor]:
    """(hidden states that the head reads, logits), both of real tokens alone, end to end: [B or N, ...]."""
    states, logits = model.base_model(**inputs).last_hidden_state.float(), model(**inputs).logits.float()
    name = type(model).__name__
    states = states[:, 0] if name in heads.FIRST_TOKEN else _end_to_end(states, lengths)
    return [states, _end_to_end(logits, lengths) if name in heads.EVERY_TOKEN else logits]


def _end_to_end(values: Tensor, lengths: np.ndarray) -> Tensor:
    """[B, T, ...], or the packed [1, N, ...], as [N, ...]."""
    return values[0] if len(values) < len(lengths) else torch.cat([row[:n] for row, n in zip(values, lengths.tolist(), strict=True)])
