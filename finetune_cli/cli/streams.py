"""The three standard streams, made safe before anything else is opened.

One that is closed becomes the null device: no file of a run may land on its number. A result that cannot be written is the machine's
fault, told once; what cannot be said on stderr is lost without a word, because it must never end a run.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any

from finetune_cli.errors import MachineError


def guard() -> None:
    """Open what is closed of 0, 1 and 2, and let stdout and stderr of the process fail as they should."""
    opened = -1
    while opened < 2:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened <= 2:
            os.set_inheritable(opened, True)
        else:
            os.close(opened)
    sys.stdout = _safe(sys.stdout, 1, _Result)
    sys.stderr = _safe(sys.stderr, 2, _Said)


class _Result(io.FileIO):
    """Standard output: whoever reads the result must learn that it is not whole. A reader that went away is no error."""

    lost: MachineError | None = None
    """Why something could not be written, for those whose writer hid it (Hydra's logging)."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # what is left in buffers has somewhere to go
            what = f"the result cannot be written: {error.strerror}"
            _Result.lost = lost = MachineError(what, where="standard output", fix="send it to a file with room, then run it again")
            raise lost from error


def whole() -> None:
    """Raise MachineError where a part of the result was not written."""
    sys.stdout.flush()
    if _Result.lost is not None:
        raise _Result.lost


class _Said(io.FileIO):
    """Standard error: what cannot be written is dropped."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _safe(stream: Any, number: int, kind: type[io.FileIO]) -> Any:
    """The process's own stream over a file that fails as ``kind`` does; a stream that somebody put in its place stays."""
    if stream is None:
        return open(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    buffer = getattr(stream, "buffer", None)
    if stream not in (sys.__stdout__, sys.__stderr__) or type(getattr(buffer, "raw", buffer)) is not io.FileIO:
        return stream
    stream.flush()
    at_once = stream.line_buffering or stream.write_through
    raw = io.BufferedWriter(kind(number, "w", closefd=False))
    return io.TextIOWrapper(raw, encoding=stream.encoding, errors=stream.errors, line_buffering=at_once)
