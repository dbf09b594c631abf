"""The last layer of a model: what learnt scales are folded into, so that plain transformers gives the same answers."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn


def output_layer(model: nn.Module, size: int) -> nn.Linear:
    """The linear layer whose ``size`` outputs are the logits."""
    import torch

    return [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == size][-1]


def answer_in_fp32(layer: nn.Linear) -> None:
    """Let a layer whose outputs are the answers compute in fp32 under autocast: near 100,000 bf16 knows only every 512th number."""
    layer.__class__ = _full_linear()


@cache
def _full_linear() -> type[nn.Linear]:
    import torch

    class FullLinear(torch.nn.Linear):
        """A linear layer that autocast leaves alone."""

        def forward(self, input: Tensor) -> Tensor:  # torch's own name
            with torch.autocast(input.device.type, enabled=False):
                return super().forward(input.to(self.weight.dtype))

    return FullLinear


def fold_scale(model: nn.Module, scale: np.ndarray) -> None:
    """Multiply the logits [K] by ``scale`` in place, in float64 before they are rounded to the layer's type."""
    import torch

    last = output_layer(model, len(scale))
    factor = torch.tensor(scale, dtype=torch.float64, device=last.weight.device)
    with torch.no_grad():
        last.weight.copy_(last.weight.double() * factor[:, None])
        if last.bias is not None:
            last.bias.copy_(last.bias.double() * factor)
