"""The lock of a run directory: one writer at a time.

The kernel holds it (``flock``; ``msvcrt`` on Windows), so any kind of death frees it and none is ever stale. The file's text
only tells people who holds it. A file system without locks falls back on that text: a live process of this host is believed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from finetune_cli.errors import UserError
from finetune_cli.storage.system import BINARY, NO_FOLLOW
from finetune_cli.storage.trouble import cause

BUSY = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK}

if sys.platform == "win32":
    import msvcrt

    def _acquire(handle: int) -> None:
        os.lseek(handle, 1 << 30, os.SEEK_SET)  # far behind the text, which others must be able to read
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _acquire(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


_held: set[Lock] = set()


def _drop_in_child() -> None:
    """A forked worker must not keep the run locked after its parent died."""
    for lock in list(_held):
        lock.release()


class Lock:
    """Held from construction to ``release`` (or the death of the process). Held by another: ``UserError`` that names the holder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = -1
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | NO_FOLLOW | BINARY, 0o600)
        except OSError as error:
            what = f"cannot write in {path.parent}: {cause(error)}"
            raise UserError(what, where=str(path), fix="choose another run.root or run.dir") from error
        try:
            self._take(handle)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        _held.add(self)

    def _take(self, handle: int) -> None:
        try:
            _acquire(handle)
        except OSError as error:
            if error.errno in BUSY or _alive(_holder(handle)):
                raise self._refusal(handle) from error
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
            os.write(handle, f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())

    def _refusal(self, handle: int) -> UserError:
        who = _holder(handle) or "another process"
        fix = "wait for it or stop it, or choose another run.dir"
        return UserError(f"the run directory is in use by {who}", where=str(self.path.parent), fix=fix)

    @property
    def held(self) -> bool:
        return self._handle >= 0

    def release(self) -> None:
        """Gives the lock back; a second call does nothing."""
        handle, self._handle = self._handle, -1
        _held.discard(self)
        if handle >= 0:
            os.close(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def holder(path: Path) -> str | None:
    """Who holds the lock at ``path``, where that is a live process of this host; None where nobody is known to."""
    try:
        handle = os.open(path, os.O_RDWR | NO_FOLLOW | BINARY)
    except OSError:
        return None
    try:
        who = _holder(handle)
        if not _alive(who):  # nobody is kept from a lock that is free
            return None
        _acquire(handle)
    except OSError:
        return who
    finally:
        os.close(handle)
    return None


def _holder(handle: int) -> str:
    os.lseek(handle, 0, os.SEEK_SET)
    return os.read(handle, 300).decode("utf-8", "replace").strip()


def _alive(holder: str) -> bool:
    """Whether the holder's text names another live process of this host."""
    words = holder.split()
    if (
        os.name == "nt"
        or len(words) < 4
        or words[0] != "pid"
        or not words[1].isdigit()
        or words[3] != socket.gethostname()
        or int(words[1]) == os.getpid()
    ):
        return False
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_in_child)
