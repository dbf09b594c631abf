"""The file-system layer: every call that changes a disk, in one small class that a test can replace."""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path
from typing import BinaryIO, cast

NO_DIRECTORY_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
BINARY = getattr(os, "O_BINARY", 0)
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
"""How a file of a run is opened: a link is not followed out of it, and a pipe in its place does not hang."""


class FileSystem:
    """The calls that change a disk (and two that ask). Tests subclass it to kill, fail or record at any of them."""

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)

    def create(self, path: Path) -> BinaryIO:
        """A new, unbuffered file; the name must be free."""
        return cast(BinaryIO, open(path, "xb", buffering=0))

    def write(self, file: BinaryIO, data: memoryview) -> int:
        return file.write(data)

    def append(self, path: Path, data: bytes) -> None:
        """Adds ``data`` at the end of a file, made if absent; it is out of this process when the call returns."""
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_FOLLOW | BINARY, 0o666)
        try:
            while data:
                data = data[os.write(handle, data) :]
        finally:
            os.close(handle)

    def truncate(self, path: Path, size: int) -> None:
        os.truncate(path, size)

    def allocate(self, path: Path, size: int) -> bool:
        """A new file that really occupies ``size`` bytes; False where the platform cannot promise that."""
        if not hasattr(os, "posix_fallocate"):
            return False
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, 0o666)
        try:
            os.posix_fallocate(handle, 0, max(size, 1))
        finally:
            os.close(handle)
        return True

    def fsync(self, path: Path) -> None:
        handle = os.open(path, (os.O_RDWR if os.name == "nt" else os.O_RDONLY) | BINARY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def fsync_dir(self, path: Path) -> None:
        """Makes the names in a directory durable; skipped where the platform refuses to sync directories."""
        if os.name == "nt":
            return
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in NO_DIRECTORY_SYNC:
                raise
        finally:
            os.close(handle)

    def rename(self, source: Path, path: Path) -> None:
        os.rename(source, path)

    def replace(self, source: Path, path: Path) -> None:
        os.replace(source, path)

    def link(self, source: Path, path: Path) -> None:
        os.link(source, path)

    def symlink(self, target: str, path: Path) -> None:
        os.symlink(target, path, target_is_directory=True)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def rmtree(self, path: Path) -> None:
        shutil.rmtree(path)

    def free(self, path: Path) -> int:
        """Bytes that this user may still write on the disk of ``path``."""
        return shutil.disk_usage(path).free

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)


REAL = FileSystem()
