"""How a new run gets its directory: exactly one process wins it, and a place that cannot be written is found out first."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from finetune_cli.config.schema import RunConfig
from finetune_cli.errors import UserError
from finetune_cli.run import layout
from finetune_cli.storage import FileSystem, Lock, cause, machine_error, make_folders

UNWRITABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT, errno.EINVAL),
}


def unwritable(error: OSError) -> bool:
    """Whether an ``OSError`` says that the place is wrong (the user's to mend), not that the disk is in trouble."""
    return error.errno in UNWRITABLE


def numbered(path: Path) -> Iterator[Path]:
    """``path``, ``path-2``, ``path-3`` …"""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}-{number}")


def claim(config: RunConfig, *, name: str, now: datetime, fs: FileSystem) -> tuple[Path, list[Path], Lock]:
    """(directory, folders made for it, its lock)."""
    given = config.dir if config.dir is not None else config.root
    key = "run.dir" if config.dir is not None else "run.root"
    place = Path(os.path.abspath(os.path.expanduser(given)))
    made: list[Path] = []
    try:
        str(place).encode()
        if config.dir is not None:
            return _claim_given(place, made, fs)
        return _claim_stamped(place, layout.stamped(name, now), made, fs)
    except ValueError:  # not UTF-8, or a NUL
        _undo(made)
        raise UserError(
            f"{key} is no valid path: {str(place)!r}", where=key, fix="choose a name in UTF-8 without control characters"
        ) from None
    except OSError as error:
        _undo(made)
        if unwritable(error):
            raise UserError(f"cannot write in {place}: {cause(error)}", where=key, fix=f"choose a {key} that you may write in") from error
        raise machine_error(fs, f"making {place}", place, error) from error
    except UserError:
        _undo(made)
        raise


def _claim_stamped(root: Path, name: str, made: list[Path], fs: FileSystem) -> tuple[Path, list[Path], Lock]:
    made += make_folders(fs, root)
    for path in numbered(root / name):
        with contextlib.suppress(FileExistsError):
            fs.mkdir(path)
            made.append(path)
            break
    fs.fsync_dir(root)
    return path, made, Lock(path / layout.LOCK)


def _claim_given(path: Path, made: list[Path], fs: FileSystem) -> tuple[Path, list[Path], Lock]:
    """The user's directory: new, or empty; two processes that want it meet at the lock."""
    made += make_folders(fs, path)
    if not layout.is_unused(path):
        raise _used(path)
    lock = Lock(path / layout.LOCK)
    if not layout.is_unused(path):
        lock.release()
        raise _used(path)
    layout.remove_early_files(path, fs, but=layout.LOCK)
    return path, made, lock


def _used(path: Path) -> UserError:
    if layout.is_run(path):
        fix = f"go on with it: resume={path} (or resume=auto), or choose another run.dir"
        return UserError("run.dir already holds a run", where=str(path), fix=fix)
    return UserError("run.dir is not empty", where=str(path), fix="choose a directory that is new or empty")


def _undo(made: list[Path]) -> None:
    """Removes the folders we made, unless another process has moved in."""
    for path in reversed(made):
        with contextlib.suppress(OSError):
            os.rmdir(path)
