"""What the machine is to blame for, not ftune: memory or disk that ran out, wherever it was noticed, as the ``MachineError`` it is."""

from __future__ import annotations

import errno
import mmap
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from finetune_cli.errors import FtuneError, MachineError

NO_MEMORY = re.compile(
    r"can('t|not) allocate memory|not enough memory|out of memory|failed to map segment|std::bad_alloc|can't start new thread",
    re.IGNORECASE,
)
"""What libraries say where memory, or the right to more of it, ran out."""
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
"""What only a disk raises."""
_SPARE = [mmap.mmap(-1, 16 << 20)]
"""Given back where memory ran out, so that the end can be told and written. Nobody touches it: it takes addresses, not memory."""


def memory_ran_out(error: BaseException) -> bool:
    """Whether an exception means that the host's memory ran out."""
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, MemoryError) or isinstance(error, (RuntimeError, ImportError, OSError)) and bool(NO_MEMORY.search(str(error)))


def fault(error: BaseException) -> MachineError | None:
    """The machine's fault behind an exception that nobody foresaw; None where there is none."""
    if isinstance(error, FtuneError):
        return None
    if memory_ran_out(error):
        _SPARE.clear()
        traceback.clear_frames(error.__traceback__)
        told = " ".join(str(error).split())
        what = "out of memory" + (f": {told}" if told else "") + _limit()
        fix = "more memory; for training, device.memory_budget=GIB, a smaller data.max_length or a smaller model.path"
        return MachineError(what, where="the memory of this process", fix=fix)
    if isinstance(error, OSError) and error.errno in FULL:
        from finetune_cli.storage import cause  # late: help is printed without it

        where = error.filename if isinstance(error.filename, str) else ""
        return MachineError(cause(error), where=where, fix="mend the disk or free space on it, then run it again")
    return None


@contextmanager
def faults() -> Iterator[None]:
    """In the block, what is the machine's fault is raised as such."""
    try:
        yield
    except Exception as error:
        told = fault(error)
        if told is None:
            raise
        raise told from error


def _limit() -> str:
    """What this process may have, where it was given less than there is."""
    if sys.platform == "win32":
        return ""
    import resource

    from finetune_cli.storage import human_bytes

    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    return "" if most == resource.RLIM_INFINITY else f" (ulimit -v allows {human_bytes(most)})"
