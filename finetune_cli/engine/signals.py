"""Signals: the first asks to stop at the next safe place, a second Ctrl-C stops at once (after training any second signal)."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from finetune_cli import console
from finetune_cli.errors import STOPS, Exit, Interrupted, Stopped
from finetune_cli.world import Stopping

LOOK = 0.25
"""Seconds between two looks at the flag where a signal raises as it comes."""


class StopFlag:
    """What the handlers set and the loops look at; a handler says what will happen, and does nothing else."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.advice = "run the same command again"
        self.last_words = ""
        self.all_saved = False
        self.interrupted = False

    def began(self, run: Path) -> None:
        """From now on there is a run to go on with; its path goes to stdout however the process ends."""
        self.advice, self.last_words = f"go on with: ftune train {shlex.quote(f'resume={run}')}", f"{run}\n"

    def said(self) -> None:
        """The path is on stdout."""
        self.last_words = ""

    def trained(self) -> None:
        """From now on nothing can be lost: any second signal stops at once."""
        self.all_saved = True

    def check(self) -> None:
        """Raise Stopped or Interrupted if a signal has come."""
        if self.name is None:
            return
        if self.name == "SIGINT":
            raise Interrupted("interrupted by Ctrl-C", where="SIGINT", fix=self.advice)
        raise Stopped(f"stopped by {self.name}", where=self.name, fix=self.advice)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name, again = signal.Signals(number).name, self.name is not None
        if again and (self.all_saved or name == "SIGINT" and self.interrupted):
            os.write(2, f"stopped at once by {name}; {self.advice}\n".encode())
            os.write(1, self.last_words.encode())
            os._exit(Exit.INTERRUPTED if name == "SIGINT" else Exit.PREEMPTED)
        self.interrupted |= name == "SIGINT"
        if not again:
            self.name = name
            told = "a second one stops at once" if self.all_saved or name == "SIGINT" else "what is done is kept"
            line = f"{name}: stopping as soon as what is being done is whole; {told}"
            try:
                console.say(line)
            except RuntimeError:  # the signal came in the middle of a write to the same stream
                os.write(2, f"\n{line}\n".encode())


@contextmanager
def stoppable() -> Iterator[StopFlag]:
    """A flag that SIGINT, SIGTERM, SIGHUP and SIGUSR1 set while the block runs; the handlers of before come back after it."""
    flag = StopFlag()
    before = {}
    try:
        for number in STOPS:
            before[number] = signal.signal(number, flag._receive)
    except ValueError:  # not the main thread: signals stay with whoever owns them
        pass
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def at_once(stop: Stopping) -> Iterator[None]:
    """While something runs that looks at no flag and leaves nothing half done: a signal raises from wherever the program is.

    An alarm looks, and looks again, because what runs may take the first exception for an error of its own.
    """
    stop.check()
    try:
        before = signal.signal(signal.SIGALRM, lambda number, frame: stop.check())
    except (ValueError, AttributeError):  # not the main thread, or a system without alarms
        yield
        return
    try:
        signal.setitimer(signal.ITIMER_REAL, LOOK, LOOK)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
