"""How one batch becomes losses. A technique wraps an objective and returns an objective; loop and tasks stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from finetune_cli.device import DevicePlan
from finetune_cli.tasks.base import Batch, Task

Objective = Callable[[nn.Module, Batch], Iterator[dict[str, Tensor]]]
"""Yields the summed losses of a batch by name. The loop back-propagates each yield before it asks for the next, so that a technique may
read the gradients of the loss it yielded and holds one graph at a time. The first yield is what is reported."""


def plain(task: Task[Any], device: DevicePlan) -> Objective:
    """The task's own loss."""

    def losses(model: nn.Module, batch: Batch) -> Iterator[dict[str, Tensor]]:
        with device.autocast():  # closed before the yield: the backward pass must not run under autocast
            sums = task.loss(task.forward(model, batch), batch)
        yield sums

    return losses
