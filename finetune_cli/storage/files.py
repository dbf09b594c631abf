"""The file-system layer: every call that changes a disk, in one small class that a test can replace.

On top of it, the ways ftune writes: a file or folder is made under a temporary name, synced, then renamed, so it is whole or
absent after a kill or a power loss; a pointer is a relative link, or a small text file where links are not to be had. An
``OSError`` becomes a ``MachineError`` that names file, cause and free space.
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
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from finetune_cli.errors import MachineError

Content = bytes | Path | Callable[[BinaryIO], None]
"""What a new file holds: bytes, a file to copy, or a function that writes into a binary handle (big tensors, held only once)."""

CHUNK = 1 << 20
TEMPORARY = (".tmp-", ".trash-")
NO_DIRECTORY_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
NO_LINKS = {errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
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


def human_bytes(count: float) -> str:
    """A size for people, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


CAUSES = {
    "ENOSPC": "disk full",
    "EDQUOT": "disk quota used up",
    "EROFS": "the file system is read-only",
    "EIO": "input/output error",
    "ESTALE": "the network file system lost the file",
    "EACCES": "permission denied",
    "EFBIG": "file size limit reached",
}


RUST = re.compile(r"\(os error (\d+)\)$")
"""How a library in Rust (safetensors, tokenizers) tells an ``OSError`` in an error of its own."""


def cause(error: OSError) -> str:
    """The reason of an ``OSError`` in plain words, with its name."""
    name = errno.errorcode.get(error.errno or 0, "")
    return (CAUSES.get(name) or error.strerror or str(error)) + (f" ({name})" if name else "")


def machine_error(fs: FileSystem, doing: str, path: Path, error: OSError, *, needed: int = 0, fix: str = "") -> MachineError:
    """An ``OSError`` as a ``MachineError``: what was being done, why it failed, bytes needed and free."""
    if error.errno == errno.ENOENT and not path.parent.is_dir():
        gone = next(folder for folder in reversed(path.parents) if not folder.is_dir())
        return MachineError(
            f"{doing}: {gone} is gone", where=str(path), fix="leave the directory where it is, and run the same command again"
        )
    sizes = [f"needs {human_bytes(needed)}"] if needed else []
    with contextlib.suppress(OSError):
        sizes.append(f"{human_bytes(fs.free(next(folder for folder in [path, *path.parents] if folder.is_dir())))} free")
    what = f"{doing}: {cause(error)}" + (f" ({', '.join(sizes)})" if sizes else "")
    where = error.filename if isinstance(error.filename, str) else str(path)
    return MachineError(what, where=where, fix=fix or "mend the disk or free space on it, then go on with resume=RUN")


@contextlib.contextmanager
def disk_trouble(fs: FileSystem, doing: str, path: Path, *, needed: int = 0, fix: str = "", any_cause: bool = True) -> Iterator[None]:
    """Turns an ``OSError`` of the block into a ``MachineError``; not ``any_cause``: only one of a disk, others may be bugs."""
    try:
        yield
    except OSError as error:
        if not any_cause and errno.errorcode.get(error.errno or 0) not in CAUSES:
            raise
        raise machine_error(fs, doing, path, error, needed=needed, fix=fix) from error
    except Exception as error:
        found = RUST.search(str(error))
        if found is None:
            raise
        told = OSError(int(found[1]), os.strerror(int(found[1])))
        raise machine_error(fs, doing, path, told, needed=needed, fix=fix) from error


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
