"""What a person sees on stderr: lines, warnings, tables, progress. Results go to stdout, never here.

On a terminal rich draws a live bar and colours; anywhere else the same facts come as plain lines, the first at once and then one
every few seconds. Text may hold data rows, so characters that steer a terminal are taken out. A broken or closed stderr is
ignored: it must never end a training run. Whatever is said can be written to a log file too (``attach``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from finetune_cli.console.columns import cell, duration, layout, narrow
from finetune_cli.console.progress import SECONDS_BETWEEN_LINES, Progress
from finetune_cli.console.screen import screen
from finetune_cli.said import sayable

__all__ = [
    "Progress",
    "attach",
    "cell",
    "detach",
    "duration",
    "layout",
    "marked",
    "mute",
    "narrow",
    "say",
    "table",
    "unsaid",
    "warn",
    "working",
]


def say(text: object) -> None:
    """One or several lines for the person at the screen."""
    screen.show(sayable(text))


def warn(text: object) -> None:
    """Something that is not an error but should be seen."""
    screen.show(f"warning: {sayable(text)}", style="yellow")


def table(title: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A small table; numbers are set to the right."""
    screen.show_table(sayable(title), [cell(h) for h in headers], [[cell(value) for value in row] for row in rows])


def marked(title: str, pieces: Sequence[tuple[str, bool]]) -> None:
    """A text whose marked stretches stand out: in colour on a terminal, in brackets elsewhere."""
    screen.show_marked(sayable(title), [(sayable(text), mark) for text, mark in pieces])


def mute() -> None:
    """From now on nothing is said: another process speaks for this one."""
    screen.muted = True


@contextmanager
def unsaid() -> Iterator[None]:
    """Around what will be said again."""
    before, screen.muted = screen.muted, True
    try:
        yield
    finally:
        screen.muted = before


def attach(path: Path) -> None:
    """From now on also append everything said to this file, as plain text."""
    screen.attach(path)


def detach() -> None:
    """Stop writing to the attached file and close it."""
    screen.detach()


@contextmanager
def working(text: str) -> Iterator[None]:
    """Around something slow: a spinner on a terminal, else a line at once; the time it took, where it was long."""
    began = time.monotonic()
    with screen.busy(sayable(text)):
        yield
    took = time.monotonic() - began
    if took >= SECONDS_BETWEEN_LINES and not screen.bar:
        screen.show(f"{sayable(text)}: took {duration(took)}")
