"""Tables of embeddings on a CPU: the gradient of one lies in memory that is kept from update to update, where only the rows that were
touched are zeroed. A fresh one is tens of megabytes to fill, for a few hundred rows that a batch looks up.
"""

from __future__ import annotations

from collections import Counter
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

LEAST, MOST = 2**20, 2**26
"""Weights of a table: smaller ones cost nothing to fill, of larger ones the memory is worth more."""

_gradients: Any = WeakTensorKeyDictionary()
"""Weight to its ``_Gradient``."""


def keep_table_gradients(model: nn.Module) -> None:
    """Let the tables of a model keep the memory of their gradients; what they compute is the same, to the bit where a pass looks up once.

    A table that another module shares is left alone: a language model's head gives every row a gradient.
    """
    held = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    for module in model.modules():
        if type(module) is not nn.Embedding or module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            continue
        if LEAST <= module.weight.numel() <= MOST and held[id(module.weight)] == 1:
            module.forward = MethodType(_looked_up, module)  # type: ignore[method-assign]


def drop_table_gradients(model: nn.Module) -> None:
    """Give the memory back: no further update will be made."""
    for weight in model.parameters():
        _gradients.pop(weight, None)


def _looked_up(table: nn.Embedding, ids: Tensor) -> Tensor:
    """The forward of such a table: ids int64 [...], result [..., H]."""
    weight = table.weight
    if weight.device.type != "cpu" or not (torch.is_grad_enabled() and weight.requires_grad):
        return F.embedding(ids, weight, table.padding_idx)
    gradient = _gradients.get(weight)
    if gradient is None:
        gradient = _gradients[weight] = _Gradient(weight)
    found: Tensor = _LookUp.apply(weight, ids.flatten(), gradient, table.padding_idx)  # type: ignore[no-untyped-call]
    return found.view(*ids.shape, -1)


class _Gradient:
    """The memory of one table's gradient: 0 but for the rows that were touched since it was cleared."""

    def __init__(self, weight: Tensor) -> None:
        self.values = torch.zeros_like(weight, requires_grad=False)
        self.touched: list[Tensor] = []
        self.sent: Any = lambda: None

    def of(self, ids: Tensor, gradient: Tensor, padding: int | None, held: Tensor | None) -> Tensor | None:
        """The gradient of these rows; None where it was added to ``held``, what the table has already."""
        goes_on = held is not None and held.data_ptr() == self.values.data_ptr()
        if not goes_on and self.sent() is not None:  # looked up twice in one pass, and autograd has yet to add the two
            apart: Tensor = torch.ops.aten.embedding_dense_backward(
                gradient, ids, len(self.values), -1 if padding is None else padding, False
            )
            return apart
        if not goes_on:
            for rows in self.touched:
                self.values.index_fill_(0, rows, 0.0)
            self.touched.clear()
        self.touched.append(ids)  # before they are: a pass that fails is cleared away too
        if goes_on:  # each row's sum first, as torch adds up two passes: the same to the last bit
            ids, place = torch.unique(ids, return_inverse=True)
            gradient = torch.zeros(len(ids), gradient.shape[1], dtype=gradient.dtype).index_add_(0, place, gradient)
        self.values.index_add_(0, ids, gradient)
        if padding is not None:
            self.values[padding] = 0.0
        if goes_on:
            return None
        view = self.values.view_as(self.values)
        self.sent = TensorWeakRef(view)
        return view


class _LookUp(torch.autograd.Function):
    """``F.embedding`` over kept memory."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, gradient: _Gradient, padding: int | None) -> Tensor:
        ctx.weight, ctx.gradient, ctx.padding = weight, gradient, padding
        ctx.save_for_backward(ids)
        return weight.index_select(0, ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        (ids,) = ctx.saved_tensors
        return ctx.gradient.of(ids, gradient, ctx.padding, ctx.weight.grad), None, None, None
