"""Dropout of packed rows: on a CPU, four masks are cut from one 64-bit number instead of one from each."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


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

    def at(self, p: float, x: Tensor) -> Tensor:
        """Elements dropped at rate ``p``, the rest scaled up."""
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
