"""What goes wrong with a disk, in words: an ``OSError`` becomes a ``MachineError`` that names file, cause and free space."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from finetune_cli.errors import MachineError
from finetune_cli.storage.system import FileSystem

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


def human_bytes(count: float) -> str:
    """A size for people, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


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
