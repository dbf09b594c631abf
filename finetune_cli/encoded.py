"""Encoded rows: flat arrays that live on disk and are memory-mapped, never a Python object per row.

A split is encoded once, chunk by chunk, into a cache directory whose name is a hash of everything that could change it (file bytes,
rows chosen, tokenizer, length, task and its facts, code version). A second run maps the same files at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from finetune_cli.data import TokenCounts
from finetune_cli.errors import MachineError
from finetune_cli.storage import REAL, parsed

FORMAT = 1
"""Part of every cache key: raise it when the meaning of encoded columns changes."""


@dataclass(frozen=True, slots=True)
class Ragged:
    """Sequences of differing length, end to end: sequence ``i`` is ``values[offsets[i]:offsets[i + 1]]``."""

    values: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, indices: np.ndarray) -> Ragged:
        return self.take(indices)

    def lengths(self) -> np.ndarray:
        """Length of each sequence, int64 [N]."""
        return np.diff(self.offsets)

    def sequence(self, i: int) -> np.ndarray:
        """The values of sequence ``i``."""
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def take(self, indices: np.ndarray) -> Ragged:
        """The sequences at ``indices``, copied out of the map."""
        starts = self.offsets[indices]
        lengths = self.offsets[indices + 1] - starts
        offsets = np.zeros(len(indices) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        positions = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Ragged(self.values[positions], offsets)

    def replaced(self, indices: np.ndarray, sequences: Iterable[Iterable[int]]) -> Ragged:
        """The same with other sequences at ``indices``, which ascend."""
        new = Ragged.of(sequences, self.values.dtype)
        order = np.arange(len(self))
        order[indices] = len(self) + np.arange(len(new))
        return self.then(new).take(order)

    def then(self, more: Ragged) -> Ragged:
        """These sequences and ``more`` behind them."""
        offsets = np.concatenate([self.offsets, self.offsets[-1] + more.offsets[1:]])
        return Ragged(np.concatenate([self.values, more.values]), offsets)

    @classmethod
    def of(cls, sequences: Iterable[Iterable[int]], dtype: Any = np.int32) -> Ragged:
        """Ragged form of a chunk of Python sequences."""
        arrays = [np.asarray(s, dtype) for s in sequences]
        offsets = np.zeros(len(arrays) + 1, np.int64)
        np.cumsum([len(a) for a in arrays], out=offsets[1:])
        return cls(np.concatenate(arrays) if arrays else np.zeros(0, dtype), offsets)


class Targets(Protocol):
    """What the rows of a split are compared with: an array [N, ...], ``Ragged``, or anything that can be indexed by rows."""

    def __len__(self) -> int: ...
    def __getitem__(self, indices: Any, /) -> Any: ...


Column = Ragged | np.ndarray
Columns = dict[str, Column]


def take(columns: Mapping[str, Column], indices: np.ndarray) -> Columns:
    """The examples at ``indices`` of every column."""
    return {name: c.take(indices) if isinstance(c, Ragged) else c[indices] for name, c in columns.items()}


@dataclass(frozen=True, slots=True)
class Examples:
    """Encoded examples of one split; ``row[i]`` is the index of the row that example ``i`` came from."""

    columns: Columns
    row: np.ndarray
    counts: TokenCounts
    entry: Path | None = None
    """Where the arrays are mapped from; None where they are in memory."""

    def __reduce__(self) -> Any:
        """Another process maps the same files instead of getting a copy."""
        if self.entry is not None:
            return _mapped, (self.entry,)
        return Examples, (self.columns, self.row, self.counts)

    def __len__(self) -> int:
        return len(self.row)

    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 [N]."""
        ids = self.columns["input_ids"]
        return ids.lengths() if isinstance(ids, Ragged) else np.full(len(self), ids.shape[1], np.int64)

    def take(self, indices: np.ndarray) -> Examples:
        """The examples at ``indices``; the counts stay those of the whole split."""
        return Examples(take(self.columns, indices), np.asarray(self.row[indices]), self.counts)


def cache_root() -> Path:
    """Where encoded splits are kept: ``$FTUNE_CACHE``, else ``$XDG_CACHE_HOME/ftune``, else ``~/.cache/ftune``."""
    if own := os.environ.get("FTUNE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ftune"


def key(**parts: Any) -> str:
    """Name of a cache entry: a hash of JSON-ready parts and of the code's format."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def encode_once(chunks: Callable[[], Iterable[Examples]], name: str) -> Examples:
    """The examples under cache key ``name``, encoding ``chunks()`` to disk first where they are not there yet.

    Where the cache cannot be written, the arrays are kept in memory instead.
    """
    entry = cache_root() / "encoded" / name
    if (found := _open(entry)) is not None:
        return found
    temporary = entry.with_name(f".{entry.name}-{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
    except OSError:
        return join(list(chunks()))
    try:
        _write(temporary, chunks())
        for file in temporary.iterdir():  # else a power loss could leave zeros of the right size under the name
            REAL.fsync(file)
        REAL.fsync_dir(temporary)
        os.rename(temporary, entry)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        found = _open(entry)
        return found if found is not None else join(list(chunks()))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    opened = _open(entry)
    assert opened is not None, "an entry just written must open"
    return opened


def _write(directory: Path, chunks: Iterable[Examples]) -> None:
    """Append chunk after chunk to raw files, then describe them in ``meta.json``."""
    meta: dict[str, Any] = {}
    counts = TokenCounts()
    files: dict[str, Any] = {}
    ends: dict[str, int] = {}
    base = 0

    def append(name: str, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array)
        if name not in files:
            files[name] = open(directory / f"{name}.bin", "wb")  # noqa: SIM115  # closed below, after many chunks
            meta[name] = {"dtype": array.dtype.str, "shape": [0, *array.shape[1:]]}
        files[name].write(array.tobytes())
        meta[name]["shape"][0] += array.shape[0]

    try:
        for chunk in chunks:
            for name, column in chunk.columns.items():
                if isinstance(column, Ragged):
                    first = ends.setdefault(name, 0)
                    append(f"{name}.values", column.values)
                    append(f"{name}.offsets", (column.offsets if name + ".offsets" not in meta else column.offsets[1:]) + first)
                    ends[name] = first + int(column.offsets[-1])
                else:
                    append(name, column)
            append("row", chunk.row)
            counts = counts + chunk.counts
            base += len(chunk)
    finally:
        for file in files.values():
            file.close()
    (directory / "meta.json").write_text(json.dumps({"arrays": meta, "counts": asdict(counts), "examples": base}))


def _open(entry: Path) -> Examples | None:
    """Map an entry, or None where it is absent or not whole."""
    try:
        meta = parsed((entry / "meta.json").read_text())
        arrays: dict[str, np.ndarray] = {}
        for name, a in meta["arrays"].items():
            shape, dtype = tuple(a["shape"]), np.dtype(a["dtype"])
            file = entry / f"{name}.bin"
            if file.stat().st_size != int(np.prod(shape)) * dtype.itemsize:
                return None
            arrays[name] = np.memmap(file, dtype, "r", shape=shape) if 0 not in shape else np.zeros(shape, dtype)
    except (OSError, ValueError, KeyError):
        return None
    columns: Columns = {}
    for name, array in arrays.items():
        stem, _, part = name.rpartition(".")
        if part == "values":
            columns[stem] = Ragged(array, arrays[f"{stem}.offsets"])
        elif part != "offsets" and name != "row":
            columns[name] = array
    if os.access(entry / "meta.json", os.W_OK):
        os.utime(entry / "meta.json")  # when it was last of use
    return Examples(columns, arrays["row"], TokenCounts(**meta["counts"]), entry)


def _mapped(entry: Path) -> Examples:
    """The entry that another process of the same work has mapped."""
    found = _open(entry)
    if found is None:
        raise MachineError(
            "the encoded rows are not there in every process",
            where=str(entry),
            fix="let FTUNE_CACHE be a directory that every machine sees",
        )
    return found


def join(chunks: list[Examples]) -> Examples:
    """The same in memory."""
    columns: Columns = {}
    for name, first in chunks[0].columns.items():
        parts = [c.columns[name] for c in chunks]
        if isinstance(first, Ragged):
            lengths = np.concatenate([p.lengths() for p in parts if isinstance(p, Ragged)])
            values = np.concatenate([p.values for p in parts if isinstance(p, Ragged)])
            columns[name] = Ragged(values, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        else:
            columns[name] = np.concatenate([p for p in parts if isinstance(p, np.ndarray)])
    counts = chunks[0].counts
    for chunk in chunks[1:]:
        counts = counts + chunk.counts
    return Examples(columns, np.concatenate([c.row for c in chunks]), counts)
