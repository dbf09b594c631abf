"""Rows to steps to micro-batches.

The order of rows is a pure function of seed and epoch, so a resume computes it again instead of replaying it. A step always holds
``train.batch_size`` rows; how many of them pass through the device at a time is the plan's business and never changes the mathematics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune_cli import randomness
from finetune_cli.config.schema import Order
from finetune_cli.encoded import Ragged

POOL = 50
"""Batches whose rows are sorted by length together; larger saves little padding and shuffles less."""
PAD_TO = 8
"""Padded length is a multiple of this: few shapes, aligned matrix products."""
INFERENCE_TOKENS = 4096
"""Padded tokens of one inference batch; on a CPU 16,384 was slower."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """``batch_size`` rows an update, at most ``micro_tokens`` padded tokens a forward pass."""

    batch_size: int
    micro_tokens: int
    inference_tokens: int
    order: str
    whole: bool
    reasons: dict[str, str]

    def saved(self) -> dict[str, Any]:
        """JSON form for the run's plan."""
        return asdict(self)

    def halved(self) -> BatchPlan:
        """Half the tokens a pass, after memory ran out."""
        return replace(self, micro_tokens=self.micro_tokens // 2, reasons={**self.reasons, "micro_tokens": "halved: out of memory"})

    def steps_per_epoch(self, rows: int) -> int:
        """Updates of one pass; the last batch of an epoch may be short."""
        return math.ceil(rows / self.batch_size)


def epoch_order(lengths: np.ndarray, *, plan: BatchPlan, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of one epoch, as indices of examples: a permutation cut into batches.

    ``buckets``: the permutation is sorted by length inside pools of 50 batches, then the batches are shuffled.
    """
    draw = randomness.generator(seed, "order", epoch)
    order = draw.permutation(len(lengths))
    size = plan.batch_size
    if plan.order == Order.shuffled.value:
        return [order[i : i + size] for i in range(0, len(order), size)]
    pools = (order[i : i + size * POOL] for i in range(0, len(order), size * POOL))
    order = np.concatenate([pool[np.argsort(-lengths[pool], kind="stable")] for pool in pools])
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    return [batches[i] for i in draw.permutation(len(batches))]


def micro_batches(batch: np.ndarray, lengths: np.ndarray, *, plan: BatchPlan) -> list[np.ndarray]:
    """One step's rows, longest first, cut so that each part stays within the plan's padded tokens (one row always passes)."""
    if plan.whole:
        return [batch]
    batch = batch[np.argsort(-lengths[batch], kind="stable")]
    return cut(batch, lengths, plan.micro_tokens)


def cut(order: np.ndarray, lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Cut a longest-first order into runs of at most ``tokens`` padded tokens each."""
    parts: list[np.ndarray] = []
    start = 0
    while start < len(order):
        width = padded(int(lengths[order[start]]))
        count = max(1, tokens // width)
        parts.append(order[start : start + count])
        start += count
    return parts


def inference_batches(lengths: np.ndarray, *, tokens: int) -> list[np.ndarray]:
    """All examples, longest first (so that memory runs out at once or never), within a token budget."""
    return cut(np.argsort(-lengths, kind="stable"), lengths, tokens)


def padded(length: int) -> int:
    """A length rounded up to the next multiple of ``PAD_TO``."""
    return -(-max(1, length) // PAD_TO) * PAD_TO


@dataclass(frozen=True, slots=True)
class Padded:
    """Lays sequences out as rows of one rectangle, padded on the right, with a mask only where something was padded."""

    pad_ids: Mapping[str, int]
    """Column to padding value; 0 where absent."""
    limit: int
    """No rectangle is wider than this (the model's positions)."""

    def lay(self, columns: Mapping[str, Ragged]) -> dict[str, Tensor]:
        """``input_ids``, its companions and, where anything was padded, ``attention_mask``; each int64 [B, T]."""
        lengths = next(iter(columns.values())).lengths()
        width = min(padded(int(lengths.max())), max(self.limit, int(lengths.max())))
        real = np.arange(width)[None, :] < lengths[:, None]
        inputs = {}
        for name, column in columns.items():
            block = np.full(real.shape, self.pad_ids.get(name, 0), np.int64)
            block[real] = column.values
            inputs[name] = torch.from_numpy(block)
        if not real.all():
            inputs["attention_mask"] = torch.from_numpy(real.astype(np.int64))
        return inputs


def find(
    batch_size: int,
    order: Order,
    lengths: np.ndarray,
    *,
    memory_bytes: float,
    bytes_per_token: float,
    whole: bool,
    saved: dict[str, Any] | None,
) -> BatchPlan:
    """Choose how many padded tokens pass at a time, from free memory and the activations of one token; a run's own plan is kept."""
    if saved is not None:
        return BatchPlan(**saved)
    widest = padded(int(lengths.max(initial=1)))
    room = int(memory_bytes * 0.5 / max(bytes_per_token, 1.0))
    wanted = widest * batch_size
    micro = max(widest, min(wanted, room))
    reason = "a whole batch of the longest rows fits" if micro >= wanted else f"about {memory_bytes / 2**30:.1f} GiB are free"
    return BatchPlan(
        batch_size=batch_size,
        micro_tokens=micro,
        inference_tokens=max(INFERENCE_TOKENS, widest),
        order=order.value,
        whole=whole,
        reasons={"micro_tokens": reason, "order": "rows of like length share a batch" if order == Order.buckets else "asked for"},
    )
