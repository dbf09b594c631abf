"""What a disk may hold after a power loss: calls are recorded, then replayed on a model of the least that a POSIX file system owes us.

Data is safe after ``fsync`` of its file, names after ``fsync`` of their folder; changes of one folder's names arrive in their order, those
of different folders in any. Un-synced data is there in full, by half, not at all, or as zeros.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enemies import Quick

Call = tuple[Any, ...]
"""(name, parts of the path below the root, more); ``("acknowledge", step)`` in between says what may not be lost from there on."""
MODES = ("full", "half", "lost", "zeros")


class Recorder(Quick):
    """Does and notes every call under ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[Call] = []
        self.turn = threading.RLock()

    def note(self, name: str, path: Path, *more: Any) -> None:
        if path.is_relative_to(self.root):
            self.calls.append((name, path.relative_to(self.root).parts, *more))

    def mkdir(self, path: Path) -> None:
        with self.turn:
            super().mkdir(path)
            self.note("mkdir", path)

    def create(self, path: Path) -> Any:
        with self.turn:
            file = super().create(path)
            self.note("create", path)
            return file

    def write(self, file: Any, data: memoryview) -> int:
        with self.turn:
            done = super().write(file, data)
            self.note("append", Path(file.name), bytes(data[:done]))
            return done

    def append(self, path: Path, data: bytes) -> None:
        with self.turn:
            if not path.exists():
                self.note("create", path)
            super().append(path, data)
            self.note("append", path, data)

    def truncate(self, path: Path, size: int) -> None:
        with self.turn:
            super().truncate(path, size)
            self.note("truncate", path, size)

    def allocate(self, path: Path, size: int) -> bool:
        with self.turn:
            made = super().allocate(path, size)
            if made:
                self.note("create", path)
            return made

    def fsync(self, path: Path) -> None:
        with self.turn:
            self.note("fsync", path)

    def fsync_dir(self, path: Path) -> None:
        with self.turn:
            self.note("fsync_dir", path)

    def rename(self, source: Path, path: Path) -> None:
        with self.turn:
            super().rename(source, path)
            self._moved(source, path)

    def replace(self, source: Path, path: Path) -> None:
        with self.turn:
            super().replace(source, path)
            self._moved(source, path)

    def _moved(self, source: Path, path: Path) -> None:
        assert source.parent == path.parent, "within one folder a move is one change"
        self.note("move", path, source.name)

    def link(self, source: Path, path: Path) -> None:
        with self.turn:
            super().link(source, path)
            self.note("link", path, source.resolve().relative_to(self.root.resolve()).parts)

    def symlink(self, target: str, path: Path) -> None:
        with self.turn:
            super().symlink(target, path)
            self.note("symlink", path, target)

    def unlink(self, path: Path) -> None:
        with self.turn:
            super().unlink(path)
            self.note("remove", path)

    def rmtree(self, path: Path) -> None:
        with self.turn:
            below = sorted(path.rglob("*"), reverse=True)
            super().rmtree(path)
            for entry in [*below, path]:
                self.note("remove", entry)


@dataclass(frozen=True, slots=True)
class Bytes:
    """What a file holds in one state; equal ``key``: equal bytes."""

    data: bytes
    key: bytes


class File:
    """Bytes as written, and as they surely are on the disk."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = self.durable = data
        self._forms: dict[str, Bytes] = {}

    def change(self, data: bytes, *, durable: bool = False) -> None:
        self.data, self._forms = data, {}
        if durable:
            self.durable = data

    def form(self, mode: str) -> Bytes:
        mode = "full" if self.data == self.durable else mode
        if mode not in self._forms:
            kept = len(self.durable)
            if mode == "full" or not self.data.startswith(self.durable):  # or cut, which has arrived or not
                found = self.durable if mode == "lost" else self.data
            else:
                new = self.data[kept:]
                found = self.durable + {"half": new[: len(new) // 2], "lost": b"", "zeros": bytes(len(new))}[mode]
            self._forms[mode] = Bytes(found, hashlib.blake2b(found, digest_size=16).digest())
        return self._forms[mode]


class Folder:
    """Names as surely on the disk, and changes that may or may not have got there, in order."""

    def __init__(self) -> None:
        self.durable: dict[str, Any] = {}
        self.pending: list[dict[str, Any]] = []

    def names(self, arrived: int | None = None) -> dict[str, Any]:
        found = dict(self.durable)
        for change in self.pending[:arrived]:
            found.update(change)
        return {name: node for name, node in found.items() if node is not None}


class Disk:
    """The model; ``start`` is a folder whose content is durable from the beginning."""

    def __init__(self, start: Path | None = None) -> None:
        self.root = Folder()
        if start is not None:
            self._read(start, self.root)

    def _read(self, path: Path, folder: Folder) -> None:
        for entry in path.iterdir():
            if entry.is_symlink():
                folder.durable[entry.name] = os.readlink(entry)
            elif entry.is_dir():
                folder.durable[entry.name] = Folder()
                self._read(entry, folder.durable[entry.name])
            else:
                folder.durable[entry.name] = File(entry.read_bytes())

    def at(self, parts: tuple[str, ...]) -> Any:
        node: Any = self.root
        for part in parts:
            node = node.names()[part]
        return node

    def do(self, name: str, parts: tuple[str, ...], more: Any = None) -> None:
        """One recorded call."""
        if name == "append":
            self.at(parts).change(self.at(parts).data + more)
        elif name == "truncate":
            self.at(parts).change(self.at(parts).data[:more])
        elif name == "fsync":
            self.at(parts).change(self.at(parts).data, durable=True)
        elif name == "fsync_dir":
            folder = self.at(parts)
            folder.durable, folder.pending = folder.names(), []
        else:
            self.at(parts[:-1]).pending.append(self._change(name, parts, more))

    def _change(self, name: str, parts: tuple[str, ...], more: Any) -> dict[str, Any]:
        last = parts[-1]
        if name == "move":
            return {more: None, last: self.at((*parts[:-1], more))}
        if name == "link":
            return {last: self.at(more)}
        return {last: {"mkdir": Folder, "create": File, "symlink": lambda: more, "remove": lambda: None}[name]()}

    def folders(self, node: Folder | None = None) -> Iterator[Folder]:
        """The folders that some crash state may show."""
        node = node or self.root
        yield node
        children = {id(n): n for change in [node.durable, *node.pending] for n in change.values() if isinstance(n, Folder)}
        for child in children.values():
            yield from self.folders(child)

    def state(self, arrived: dict[int, int], mode: str, node: Folder | None = None) -> dict[str, Any]:
        """One crash state: ``arrived`` changes per folder (by ``id``), un-synced data as ``mode`` says."""
        node = node or self.root
        found: dict[str, Any] = {}
        for name, child in node.names(arrived.get(id(node), 0)).items():
            if isinstance(child, Folder):
                found[name] = self.state(arrived, mode, child)
            else:
                found[name] = child.form(mode) if isinstance(child, File) else child
        return found

    def states(self, draw: random.Random) -> Iterator[dict[str, Any]]:
        """The crash states of now: of every folder's changes none, all, and some."""
        sizes = {id(folder): len(folder.pending) for folder in self.folders()}
        choices = [{}, sizes, *({**sizes, key: 0} for key, size in sizes.items() if size)]
        choices += [{key: draw.randint(0, size) for key, size in sizes.items()} for _ in range(4)]
        unique = [dict(items) for items in {tuple(sorted(choice.items())) for choice in choices}]
        for arrived, mode in itertools.product(unique, MODES):
            yield self.state(arrived, mode)


def identity(state: dict[str, Any]) -> Any:
    """Equal for states that hold the same."""
    return tuple(
        (name, identity(child) if isinstance(child, dict) else child.key if isinstance(child, Bytes) else child)
        for name, child in sorted(state.items())
    )


def crash_states(
    calls: list[Call], start: Path | None = None, *, seen: set[Any] | None = None
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(number of the call, last acknowledged step, what is on the disk) for every prefix of the calls, each state once.

    ``seen``: identities with what was acknowledged that are left out, and to which those of here are added.
    """
    disk, acknowledged, draw = Disk(start), 0, random.Random(7)
    seen = set() if seen is None else seen
    for number, call in enumerate(calls):
        if call[0] == "acknowledge":
            acknowledged = call[1]
        else:
            disk.do(*call)
        for state in disk.states(draw):
            if (key := (acknowledged, identity(state))) not in seen:
                seen.add(key)
                yield number, acknowledged, state


def lay_out(path: Path, state: dict[str, Any]) -> None:
    """Make a state real in a new folder."""
    path.mkdir()
    for name, child in state.items():
        if isinstance(child, dict):
            lay_out(path / name, child)
        elif isinstance(child, str):
            os.symlink(child, path / name)
        else:
            (path / name).write_bytes(child.data)
