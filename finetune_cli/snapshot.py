"""Tensors on their way to a file: copied aside into memory that is kept, and written as safetensors without another copy.

The library's own ``save`` copies every tensor and holds Python's lock all the while, so that a training loop beside it stands still.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import accumulate
from typing import BinaryIO

import torch
from torch import Tensor

from finetune_cli import console
from finetune_cli.device import free_host_memory, out_of_memory

ALIGNED = 64
"""Every copy begins at a multiple of so many bytes."""
ROOM = 2
"""So many times a snapshot's size must be free before its memory is taken."""
DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names in a safetensors file, in the order in which its tensors lie: wide ones first, so that all are aligned."""


class Snapshot:
    """Memory for copies of tensors, kept from one ``take`` to the next so that its pages are faulted in once."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None
        self._told = False

    def take(self, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]] | None:
        """The same names with copies on the CPU, whole until the next ``take``; None where memory is short.

        Copies from CUDA go into pinned memory and have only been begun: ``settle`` waits for them.
        """
        if not self.make_room(groups):
            return None
        tensors, ends = _places(groups)
        places = iter(zip(ends, tensors, strict=False))
        copies = {
            name: {key: self._copy(start, tensor) for key, (start, tensor) in zip(group, places, strict=False)}
            for name, group in groups.items()
        }
        self._copied = None
        if any(tensor.is_cuda for tensor in tensors):
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        return copies

    def settle(self) -> None:
        """Wait until the copies are whole; any thread may."""
        if self._copied is not None:
            self._copied.synchronize()

    def release(self) -> None:
        """Give the memory back."""
        self._memory = torch.empty(0, dtype=torch.uint8)

    def make_room(self, groups: Mapping[str, Mapping[str, Tensor]], *, touch: bool = False) -> bool:
        """Whether there is memory for a copy of these now; ``touch`` every page of it, too."""
        tensors, ends = _places(groups)
        size, pinned = ends[-1], any(tensor.is_cuda for tensor in tensors)
        if self._memory.numel() >= size and (self._memory.is_pinned() or not pinned):
            return True
        self.release()
        try:
            if free_host_memory() >= ROOM * size:
                self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
                if touch and not pinned:  # pinned memory is there already
                    self._memory.zero_()
                return True
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        if not self._told:
            console.warn(f"no room for a copy of {size / 2**20:,.0f} MiB in memory: training waits while a checkpoint is written")
        self._told = True
        return False

    def _copy(self, start: int, tensor: Tensor) -> Tensor:
        place = self._memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return place.copy_(tensor.detach(), non_blocking=True)


def _places(groups: Mapping[str, Mapping[str, Tensor]]) -> tuple[list[Tensor], list[int]]:
    """(all tensors, where in the memory each begins; last, where the last one ends)."""
    tensors = [tensor for group in groups.values() for tensor in group.values()]
    return tensors, list(accumulate((-(-tensor.nbytes // ALIGNED) * ALIGNED for tensor in tensors), initial=0))


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """The bytes of a safetensors file, as the library's ``save`` makes them, straight from the tensors' memory."""
    ranks = {dtype: rank for rank, dtype in enumerate(DTYPES)}
    names = sorted(tensors, key=lambda name: (ranks[tensors[name].dtype], name))
    ends = list(accumulate(tensors[name].nbytes for name in names))
    entries = {
        name: {"dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
        for name, start, end in zip(names, [0, *ends], ends, strict=False)
    }
    header = {**({"__metadata__": dict(metadata)} if metadata is not None else {}), **entries}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        file.write(flat.view(torch.uint8).numpy().data)


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first tensor, by name, that holds NaN or infinity."""
    return next((name for name, tensor in sorted(tensors.items()) if not bool(torch.isfinite(tensor).all())), None)
