"""Matrix products without gradients, in bf16 on a CPU: oneDNN is given every weight once, cast and laid out as it multiplies, and GELU
comes with the product. Under autocast alone a weight is laid out anew for every batch, and GELU is a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROWS = 1024
"""For which oneDNN chooses the layout; others are multiplied in the same."""
LEAST = 2**14
"""Weights of a layer that is worth it."""
TOLERANCE = 2e-2
"""How far a product may lie from PyTorch's, relative to its size: one step of bf16 is 8e-3."""


@contextmanager
def ready_products(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Lay the linear layers of a model out for products without gradients in ``dtype``; nothing changes them until the context ends."""
    layers: list[nn.Linear] = []
    try:
        if device.type == "cpu" and dtype == torch.bfloat16 and _works():
            for module in model.modules():
                if type(module) is nn.Linear and "forward" not in vars(module) and module.weight.numel() >= LEAST:
                    module.forward = _Product(module)  # type: ignore[method-assign]
                    layers.append(module)
        yield
    finally:
        for module in layers:
            del module.forward


def activated(layer: nn.Module, activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``activation`` of what a layer gives; GELU comes with the product where one is ready."""
    product = vars(layer).get("forward")
    if isinstance(product, _Product) and product.applies() and type(activation).__name__ == "GELUActivation":
        return product.times(x, "gelu", "none")
    return activation(layer(x))


class _Product:
    """x W^T + b of one layer: [..., in] to [..., out]. Where gradients or full precision are wanted, it is the layer's own."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        with torch.no_grad():
            self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(layer.weight.to(torch.bfloat16), ROWS)
            self.bias = None if layer.bias is None else layer.bias.to(torch.bfloat16)

    def __call__(self, input: Tensor) -> Tensor:  # torch's own name
        if self.applies():
            return self.times(input, "none", "")
        return F.linear(input, self.layer.weight, self.layer.bias)

    def applies(self) -> bool:
        return torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()

    def times(self, x: Tensor, then: str, how: str) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(torch.bfloat16), self.weight, self.bias, then, [], how)
        return found


@cache
def _works() -> bool:
    """Whether this PyTorch has such products, and they are what its own are."""
    draw = torch.Generator().manual_seed(0)
    layer = nn.Linear(256, 192)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
        x = torch.randn(3, 70, 256, generator=draw)
        own = layer(x).float()
        try:
            product = _Product(layer)
            found = [product(x).float(), product.times(x, "gelu", "none").float()]
        except (AttributeError, RuntimeError):
            return False
        wanted = [own, F.gelu(own)]
    return all(bool((a - b).abs().max() <= TOLERANCE * b.abs().max()) for a, b in zip(found, wanted, strict=True))
