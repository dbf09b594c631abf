"""The ways ftune writes: a file or folder is made under a temporary name, synced, then renamed, so that it is whole or absent after a kill
or a power loss; a pointer is a relative link, or a small text file where links are not to be had.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from finetune_cli.storage.system import BINARY, FileSystem
from finetune_cli.storage.trouble import disk_trouble

Content = bytes | Path | Callable[[BinaryIO], None]
"""What a new file holds: bytes, a file to copy, or a function that writes into a binary handle (big tensors, held only once)."""

CHUNK = 1 << 20
TEMPORARY = (".tmp-", ".trash-")
NO_LINKS = {errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


class Sink(io.RawIOBase):
    """A write-only handle that hashes and counts what passes into ``file``."""

    def __init__(self, fs: FileSystem, file: BinaryIO) -> None:
        super().__init__()
        self._fs, self._file = fs, file
        self._sha = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = self._fs.write(self._file, view)
        self._sha.update(view[:done])
        self.size += done
        return done

    def hexdigest(self) -> str:
        return self._sha.hexdigest()


def write_new(fs: FileSystem, path: Path, content: Content, *, sync: bool = True) -> tuple[int, str]:
    """Writes and syncs a new file in one pass; returns its size in bytes and its sha256. The name is durable only after ``fsync_dir``."""
    file = fs.create(path)
    try:
        sink = Sink(fs, file)
        handle = io.BufferedWriter(sink, CHUNK)
        if isinstance(content, Path):
            with open(content, "rb") as source:
                shutil.copyfileobj(source, handle, CHUNK)
        elif callable(content):
            content(cast(BinaryIO, handle))
        else:
            handle.write(content)
        try:
            handle.flush()
        finally:
            handle.detach()
    finally:
        file.close()
    if sync:
        fs.fsync(path)
    return sink.size, sink.hexdigest()


def temporary(folder: Path, name: str = "", *, kind: str = "tmp") -> Path:
    """A free name in ``folder`` that every reader ignores and ``sweep`` removes."""
    return folder / ("-".join(filter(None, [f".{kind}", name, secrets.token_hex(6)])))


def is_debris(name: str) -> bool:
    """Whether a name is a half-made or half-removed thing that may be swept."""
    return name.startswith(TEMPORARY)


def sweep(fs: FileSystem, folder: Path) -> None:
    """Removes what a death left half made or half removed in a folder."""
    with disk_trouble(fs, "cleaning up", folder):
        for name in os.listdir(folder):
            if is_debris(name):
                discard(fs, folder / name)


def discard(fs: FileSystem, path: Path) -> None:
    """Removes a file, link or folder that may be absent."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            fs.rmtree(path)
        else:
            fs.unlink(path)


@contextlib.contextmanager
def cleaned(fs: FileSystem, path: Path) -> Iterator[None]:
    """Removes ``path`` if the block fails, as far as the disk still lets us."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            discard(fs, path)
        raise


def write_whole(fs: FileSystem, path: Path, content: Content, *, durable: bool = True) -> None:
    """Replaces a file by ``content``: readers see the old one or the new one. Not ``durable``: a power loss may bring back the old one."""
    path = Path(path)
    new = temporary(path.parent)
    with cleaned(fs, new):
        write_new(fs, new, content, sync=durable)
        fs.replace(new, path)
    if durable:
        fs.fsync_dir(path.parent)


def write_folder(fs: FileSystem, folder: Path, files: Mapping[str, Content | Mapping[str, Content]], *, link: bool = False) -> None:
    """Makes a folder with exactly ``files`` in place of any that was there; files by name under a name are a folder in it.

    ``link``: share bytes with given files where possible.
    """
    new = temporary(folder.parent, folder.name)
    with cleaned(fs, new):
        _fill(fs, new, files, link=link)
        old = temporary(folder.parent, folder.name, kind="trash")
        if folder.is_dir():
            fs.rename(folder, old)
        fs.rename(new, folder)
    fs.fsync_dir(folder.parent)
    discard(fs, old)


def _fill(fs: FileSystem, folder: Path, files: Mapping[str, Content | Mapping[str, Content]], *, link: bool) -> None:
    fs.mkdir(folder)
    for name, content in files.items():
        if isinstance(content, Mapping):
            _fill(fs, folder / checked_name(name), content, link=link)
        else:
            _place(fs, folder / checked_name(name), content, link=link)
    fs.fsync_dir(folder)


def _place(fs: FileSystem, path: Path, content: Content, *, link: bool) -> None:
    if link and isinstance(content, Path):
        try:
            fs.link(content, path)
            return
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
    write_new(fs, path, content)


def checked_name(name: str) -> str:
    """A plain file name as it is; anything that could leave its folder or hide in it is a ``ValueError``."""
    if not name or name.startswith(".") or re.search(r'[/\\:\x00-\x1f"<>|?*]', name):
        raise ValueError(f"not a plain file name: {name!r}")
    return name


def make_folders(fs: FileSystem, path: Path) -> list[Path]:
    """Makes a folder and the missing ones above it; returns those that this call made, outermost first."""
    missing = [folder for folder in [path, *path.parents] if not folder.exists()]
    made = []
    for folder in reversed(missing):
        try:
            fs.mkdir(folder)
        except FileExistsError:
            if not folder.is_dir():
                raise
            continue
        made.append(folder)
        fs.fsync_dir(folder.parent)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    return made


def point(fs: FileSystem, link: Path, target: str) -> None:
    """Makes ``link`` a relative link to ``target`` in one step; a text file that holds the name where links cannot be made."""
    new = temporary(link.parent)
    with cleaned(fs, new):
        try:
            fs.symlink(target, new)
        except NotImplementedError:
            write_new(fs, new, f"{target}\n".encode())
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            write_new(fs, new, f"{target}\n".encode())
        if link.is_dir() and not link.is_symlink():  # a copy of the run that followed links left a real folder here
            old = temporary(link.parent, kind="trash")
            fs.rename(link, old)
            discard(fs, old)
        fs.replace(new, link)
    fs.fsync_dir(link.parent)


def pointed(link: Path) -> str | None:
    """The name that a link or text pointer holds; None where there is none."""
    try:
        if link.is_symlink():
            return os.readlink(link)
        return link.read_text("utf-8").strip() if link.is_file() and link.stat().st_size < 4096 else None
    except (OSError, ValueError):
        return None


def read_regular(path: Path, *, start: int = 0, size: int = -1) -> bytes:
    """A file's bytes, or ``size`` of them from ``start`` on; ``OSError`` for a pipe or a device in its place, which might never end."""
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | BINARY), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "no regular file", str(path))
        file.seek(start)
        return file.read(size)


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
