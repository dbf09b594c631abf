"""Whether PyTorch's attention kernel for sequences end to end is used: only after it proved, on the device, to be what rectangles give."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune_cli.device import DevicePlan
from finetune_cli.packing import interface
from finetune_cli.packing.attention import Sight, inside_samples, varlen
from finetune_cli.packing.rows import Packing

TOLERANCE = 2e-2
"""How far it may lie from rectangles in half precision, relative to their size."""
LENGTHS = (70, 3, 200, 1, 33)


def obstacle(model: Any, device: DevicePlan) -> str | None:
    """Why the kernel is not used for this model; None where it is."""
    if model.config.model_type not in interface.FAMILIES:
        return "its layers drop out attention"
    if device.device.type != "cuda" or device.precision == "fp32":
        return "the kernel is for CUDA in half precision"
    if device.deterministic:
        return "its gradients are not deterministic"
    try:
        off = difference(model, device.device, torch.bfloat16 if device.precision == "bf16" else torch.float16)
    except (ImportError, RuntimeError, TypeError, NotImplementedError) as error:
        return f"the kernel does not run here: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
    return None if off <= TOLERANCE else f"the kernel differs by {off:.1e} here"


def difference(model: Any, device: torch.device, dtype: torch.dtype) -> float:
    """How far the kernel's answers and gradients lie from those of rectangles, for heads and windows as the model has them."""
    config = model.config
    heads = int(config.num_attention_heads)
    shared = int(getattr(config, "num_key_value_heads", None) or heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    lengths = np.array(LENGTHS)
    packing = Packing.of(lengths, size=int(lengths.sum())).each(lambda t: t.to(device))
    draw = torch.Generator().manual_seed(0)
    query, key, value, weights = (
        torch.randn(int(lengths.sum()), n, size, generator=draw).to(device, dtype).requires_grad_() for n in (heads, shared, shared, heads)
    )
    off = []
    for window in {None, *interface.windows(config)}:
        how = Sight(causal=interface.FAMILIES[config.model_type], window=window, scale=size**-0.5)
        found = []
        for attend in (inside_samples, varlen):
            context = attend(query, key, value, packing, how)
            found.append([context, *torch.autograd.grad((context * weights).sum(), (query, key, value))])
        off += [farthest(own, other) for own, other in zip(*found, strict=True)]
    return float(torch.stack(off).max())


def farthest(own: Tensor, other: Tensor) -> Tensor:
    """How far apart two tensors lie at most, relative to the size of the first; NaN where either holds one."""
    own, other = own.detach().float(), other.detach().float()
    return (own - other).abs().max() / own.abs().max().clamp(min=1.0)
