"""File systems that mean harm: each counts the calls that change a disk and kills the process or raises at one of them.

``half`` is what a call has done when it is interrupted in the middle. ``take_over`` puts an enemy in the place of the real file system,
for everything in this process: it is for a fork that runs a whole command.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_cli.storage import REAL, FileSystem

CALLS = (
    *("mkdir", "create", "write", "append", "truncate", "allocate", "fsync", "fsync_dir"),
    *("rename", "replace", "link", "symlink", "unlink", "rmtree"),
)
COMMIT = re.compile(r"step-(\d{8,})")


class Quick(FileSystem):
    """Without waiting for a real disk."""

    def fsync(self, path: Path) -> None:
        assert path.exists()

    def fsync_dir(self, path: Path) -> None:
        assert path.is_dir()

    def wait(self, seconds: float) -> None:
        pass


class Enemy(Quick):
    """Counts the calls and does something at the ``at``-th, counted from 1.

    ``commits``: a file outside the layer to which the step of each checkpoint is added as soon as it has its name.
    """

    def __init__(self, at: int = 0, *, commits: Path | None = None) -> None:
        self.count, self.at, self.commits = 0, at, commits
        self.turn = threading.Lock()

    def meet(self, count: int, name: str, arguments: tuple[Any, ...]) -> None:
        pass

    def done(self, name: str, arguments: tuple[Any, ...]) -> None:
        if self.commits is not None and name == "rename" and (found := COMMIT.fullmatch(arguments[1].name)):
            with open(self.commits, "a", encoding="ascii") as file:
                file.write(f"{int(found[1])}\n")


def _counted(name: str) -> Callable[..., Any]:
    def call(self: Enemy, *arguments: Any) -> Any:
        with self.turn:  # a writer thread calls too
            self.count += 1
            count = self.count
        self.meet(count, name, arguments)
        result = getattr(Quick, name)(self, *arguments)
        self.done(name, arguments)
        return result

    return call


for _name in CALLS:
    setattr(Enemy, _name, _counted(_name))


def half(name: str, arguments: tuple[Any, ...]) -> None:
    """What a call has done when it is interrupted in the middle."""
    if name == "write":
        file, data = arguments
        file.write(data[: len(data) // 2])
    elif name == "append":
        Quick().append(arguments[0], arguments[1][: len(arguments[1]) // 2])
    elif name == "rmtree":
        for entry in sorted(arguments[0].iterdir())[::2]:
            entry.unlink()
    else:
        getattr(Quick, name)(Quick(), *arguments)


class Killer(Enemy):
    """Kills its process before the ``at``-th call, or ``inside`` it."""

    def __init__(self, at: int, inside: bool, *, commits: Path | None = None) -> None:
        super().__init__(at, commits=commits)
        self.inside = inside

    def meet(self, count: int, name: str, arguments: tuple[Any, ...]) -> None:
        if count == self.at:
            with contextlib.suppress(OSError):  # such as unlink of what is not there
                if self.inside:
                    half(name, arguments)
                    self.done(name, arguments)
            os.kill(os.getpid(), signal.SIGKILL)


class Failing(Enemy):
    """Fails at the ``at``-th call and ``times - 1`` more; a write fails half way."""

    def __init__(self, at: int, code: int, times: int, *, commits: Path | None = None) -> None:
        super().__init__(at, commits=commits)
        self.code, self.times = code, times

    def meet(self, count: int, name: str, arguments: tuple[Any, ...]) -> None:
        if self.at <= count < self.at + self.times:
            if name in ("write", "append"):
                half(name, arguments)
            raise OSError(self.code, os.strerror(self.code), str(arguments[0]))


def take_over(enemy: FileSystem) -> None:
    """From now on every write of this process that goes through the layer meets ``enemy``."""
    REAL.__class__ = type(enemy)
    REAL.__dict__.update(enemy.__dict__)
