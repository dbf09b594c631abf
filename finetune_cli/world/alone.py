"""One process, in the words that hold for several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

T = TypeVar("T")


class Stopping(Protocol):
    """What a signal leaves behind (``engine/signals.py``)."""

    name: str | None
    advice: str

    def check(self) -> None:
        """Raise if a signal has come."""


class Alone:
    """A world of one process; every exchange gives back what it was given."""

    rank = 0
    size = 1
    local_rank = 0

    def __init__(self, stop: Stopping) -> None:
        self.stop = stop

    @property
    def leads(self) -> bool:
        """Whether this process reads, writes and speaks."""
        return self.rank == 0

    def on(self, device: torch.device) -> None:
        """Gradients and weights will be on ``device``."""

    def check(self) -> None:
        """Between two micro-batches of an update: raise if a signal has come."""
        self.stop.check()

    def pause(self) -> None:
        """Between two batches of a scoring: raise if a signal has come."""
        self.stop.check()

    def part(self, rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """This process's rows of a batch."""
        return rows

    def totals(self, weights: dict[str, float]) -> dict[str, float]:
        """Sums over all processes, by name."""
        return weights

    def sum_gradients(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Add up the gradients of all processes, in place; returns the sum of their losses."""
        return loss

    def share(self, value: T) -> T:
        """The leader's value, to everybody."""
        return value

    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank, to everybody."""
        return [value]

    def same(self, model: nn.Module) -> None:
        """Give everybody the leader's weights."""

    @contextmanager
    def patience(self) -> Iterator[None]:
        """The others wait for what happens in the block, however long it takes."""
        yield

    def close(self) -> None:
        """The common work is done: the leader goes on alone."""

    def abandon(self) -> None:
        """The common work has failed: nobody goes on."""
