"""Signals: the first asks to stop at the next safe place, a second Ctrl-C stops at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from finetune_cli.errors import Exit, Interrupted, Stopped

PREEMPTIONS = ("SIGTERM", "SIGHUP", "SIGUSR1")


class StopFlag:
    """What the handlers set and the loops look at; nothing else happens inside a handler."""

    def __init__(self) -> None:
        self.name: str | None = None

    def check(self) -> None:
        """Raise Stopped or Interrupted if a signal has come."""
        if self.name is None:
            return
        fix = "go on with resume=RUN"
        if self.name == "SIGINT":
            raise Interrupted("interrupted by Ctrl-C", where="SIGINT", fix=fix)
        raise Stopped(f"stopped by {self.name}", where=self.name, fix=fix)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == "SIGINT" and self.name == "SIGINT":
            os._exit(Exit.INTERRUPTED)
        self.name = name


@contextmanager
def stoppable() -> Iterator[StopFlag]:
    """A flag that SIGINT, SIGTERM, SIGHUP and SIGUSR1 set while the block runs; the handlers of before come back after it."""
    flag = StopFlag()
    before = {}
    try:
        for name in ("SIGINT", *PREEMPTIONS):
            if hasattr(signal, name):
                before[name] = signal.signal(getattr(signal, name), flag._receive)
    except ValueError:  # not the main thread: signals stay with whoever owns them
        pass
    try:
        yield flag
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
