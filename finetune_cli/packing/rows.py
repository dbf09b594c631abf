"""Packed rows: where the samples lie that stand end to end, and how attention sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune_cli.encoded import Ragged

HIDDEN = -1e9
"""Added to the score of a token that must not be seen; its probability is exactly 0."""
WORTH_A_GROUP = 1024
"""Padded tokens that attention handles at once before shorter samples get a rectangle of their own."""
PLACES = "position_ids"
"""A column of places that begin anew inside a sequence: each beginning is a sample of its own."""


@dataclass(frozen=True, slots=True)
class Group:
    """Samples of like length, as attention sees them: a rectangle of ``rows`` by ``width`` tokens."""

    rows: int
    width: int
    tokens: Tensor
    """[rows * width] index of each token in the packed row; past a sample's end, its first token."""
    bias: Tensor | None
    """[rows, 1, 1, width] added to scores; None where every sample fills its row."""
    samples: Tensor
    """[rows] which samples these are."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Group:
        """The same group with every tensor changed."""
        bias = None if self.bias is None else change(self.bias)
        return Group(self.rows, self.width, change(self.tokens), bias, change(self.samples))


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the samples of a packed row lie; counted on the CPU, so that nothing waits for the device."""

    position: Tensor
    """[N] place of each token in its sample."""
    first: Tensor
    """[B] index of each sample's first token."""
    groups: tuple[Group, ...]
    back: Tensor
    """[N] where a token's context lies among the groups' rectangles, end to end."""
    back_first: Tensor
    """[B] where a sample lies among the groups, end to end."""
    bounds: Tensor
    """int32 [B + 1] where each sample begins, and where the last one ends; one more where tokens are left over."""
    longest: int
    """Tokens of the longest sample."""
    varlen: bool = False
    """Whether attention may take PyTorch's kernel for sequences end to end."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Packing:
        """The same packing with every tensor changed, such as moved to a device."""
        groups = tuple(group.each(change) for group in self.groups)
        names = ("position", "first", "back", "back_first", "bounds")
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        return replace(self, groups=groups, **changed)

    @classmethod
    def of(cls, lengths: np.ndarray, *, size: int, varlen: bool = False) -> Packing:
        """For samples of ``lengths``, end to end in a row of ``size`` tokens; what is left over at its end belongs to nobody."""
        starts = np.cumsum(lengths) - lengths
        total = int(lengths.sum())
        position = np.zeros(size, np.int64)
        position[:total] = np.arange(total) - np.repeat(starts, lengths)
        back, back_first = np.zeros(size, np.int64), np.zeros(len(lengths), np.int64)
        groups, cells, rows = [], 0, 0
        for samples in _like_lengths(lengths):
            width = int(lengths[samples].max())
            inside = np.arange(width)[None, :] < lengths[samples][:, None]
            tokens = starts[samples][:, None] + np.where(inside, np.arange(width)[None, :], 0)
            back[tokens[inside]] = cells + np.flatnonzero(inside)
            back_first[samples] = rows + np.arange(len(samples))
            bias = None if inside.all() else torch.from_numpy(np.where(inside, np.float32(0), np.float32(HIDDEN))[:, None, None, :])
            groups.append(Group(len(samples), width, torch.from_numpy(tokens.reshape(-1)), bias, torch.from_numpy(samples)))
            cells, rows = cells + inside.size, rows + len(samples)
        bounds = np.array([*starts, total, *([size] if size > total else [])], np.int32)
        position_of, first, back_of, first_of, bounds_of = map(torch.from_numpy, (position, starts, back, back_first, bounds))
        return cls(position_of, first, tuple(groups), back_of, first_of, bounds_of, int(lengths.max()), varlen)

    def sample(self) -> Tensor:
        """[N] the number of each token's sample; B for tokens that belong to nobody."""
        return torch.bucketize(torch.arange(len(self.position), dtype=torch.int32, device=self.bounds.device), self.bounds[1:], right=True)


def _like_lengths(lengths: np.ndarray) -> list[np.ndarray]:
    """Samples, longest first, in groups whose shortest is not much shorter than their longest."""
    order = np.argsort(-lengths, kind="stable")
    groups, start = [], 0
    for i in range(1, len(order)):
        width = int(lengths[order[start]])
        if lengths[order[i]] <= 0.6 * width and (i - start) * width >= WORTH_A_GROUP:
            groups.append(order[start:i])
            start = i
    return [*groups, order[start:]]


def _samples(columns: Mapping[str, Ragged]) -> np.ndarray:
    """[B] lengths of what attention keeps apart: the sequences, or their parts where places begin anew inside them."""
    sequences = next(iter(columns.values()))
    if PLACES not in columns:
        return sequences.lengths()
    begins = np.asarray(columns[PLACES].values) == 0
    begins[sequences.offsets[:-1][sequences.lengths() > 0]] = True
    return np.diff(np.append(np.flatnonzero(begins), len(begins)))


@dataclass(frozen=True, slots=True)
class Packed:
    """Lays sequences end to end in one row, rounded up to a multiple of tokens."""

    pad_ids: Mapping[str, int]
    """Column to the value of the tokens left over at the end; 0 where absent."""
    multiple: int
    varlen: bool = False
    """Whether attention may take PyTorch's kernel for sequences end to end."""

    def lay(self, columns: Mapping[str, Ragged]) -> dict[str, Any]:
        """``input_ids`` and its companions, each int64 [1, N], and where the samples lie."""
        lengths = _samples(columns)
        size = -(-int(lengths.sum()) // self.multiple) * self.multiple
        inputs: dict[str, Any] = {"packing": Packing.of(lengths, size=size, varlen=self.varlen)}
        for name, column in columns.items():
            if name == PLACES:
                continue
            row = np.full((1, size), self.pad_ids.get(name, 0), np.int64)
            row[0, : len(column.values)] = column.values
            inputs[name] = torch.from_numpy(row)
        return inputs

    def tight(self) -> Packed:
        """The same without a token beyond the sequences' own."""
        return replace(self, multiple=1)
