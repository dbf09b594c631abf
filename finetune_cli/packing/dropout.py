"""Dropout of packed rows: on a CPU, four masks are cut from one 64-bit number instead of one from each."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

STEPS = 2**16
"""Rates that 16 bits know."""
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element to a type of as many bits."""


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
        return self.at(self.rate(module), x)

    def at(self, p: float, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Elements dropped at rate ``p``, the rest scaled up, and then cast to ``dtype``."""
        dtype = x.dtype if dtype is None else dtype
        dropped = round(p * STEPS)
        if self.bits is None or dropped == STEPS:
            return (F.dropout(x, p) if p else x).to(dtype)
        if not dropped:
            return x.to(dtype)
        words = np.asarray(self.bits.random_raw(-(-x.numel() // 4)), np.uint64).view(np.int16)[: x.numel()]
        least = dropped - STEPS // 2  # words from here on are kept; the next lines make them -1, every bit set, and the others 0
        mask = torch.from_numpy(words).view(x.shape).clamp_(least - 1, least).neg_().add_(least - 1)
        kept: Tensor = _Keep.apply(x, mask, STEPS / (STEPS - dropped), dtype)  # type: ignore[no-untyped-call]
        return kept


class _Keep(torch.autograd.Function):
    """Elements under a mask of bits, scaled and cast; the rest 0. Saves the mask alone, two bytes an element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale, ctx.dtype = scale, x.dtype
        return _under((x * scale).to(dtype), mask)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (mask,) = ctx.saved_tensors
        return _under(gradient.to(ctx.dtype) * ctx.scale, mask), None, None, None


def _under(x: Tensor, mask: Tensor) -> Tensor:
    """``x``, which is changed, with 0 where the mask is: PyTorch selects an element at a time, and joins bits by the vector."""
    bits = BITS[x.element_size()]
    x.view(bits).bitwise_and_(mask.to(bits))
    return x
