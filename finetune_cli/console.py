"""What a person sees on stderr: lines, warnings, tables, progress. Results go to stdout, never here.

On a terminal rich draws a live bar and colours; anywhere else the same facts come as plain lines, the first at once and then one
every few seconds. Text may hold data rows, so characters that steer a terminal are taken out. A broken or closed stderr is
ignored: it must never end a training run. Whatever is said can be written to a log file too (``attach``).
"""

from __future__ import annotations

import os
import sys
import textwrap
import threading
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self, TextIO

from finetune_cli.said import sayable

if TYPE_CHECKING:
    from rich.console import Console

SECONDS_BETWEEN_LINES = 5.0
FEW_ROWS = 4
"""A table of so many rows is turned on its side where it is too wide."""
WIDE = 100
"""Columns of a terminal from which the bar is drawn long."""


def say(text: object) -> None:
    """One or several lines for the person at the screen."""
    _screen.show(sayable(text))


def warn(text: object) -> None:
    """Something that is not an error but should be seen."""
    _screen.show(f"warning: {sayable(text)}", style="yellow")


def table(title: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A small table; numbers are set to the right."""
    _screen.show_table(sayable(title), [cell(h) for h in headers], [[cell(value) for value in row] for row in rows])


def marked(title: str, pieces: Sequence[tuple[str, bool]]) -> None:
    """A text whose marked stretches stand out: in colour on a terminal, in brackets elsewhere."""
    _screen.show_marked(sayable(title), [(sayable(text), mark) for text, mark in pieces])


def layout(title: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The plain form of a table, for a log or for stdout."""
    lines = [[cell(h) for h in headers], *([cell(value) for value in row] for row in rows)]
    count = max(map(len, lines))
    lines = [line + [""] * (count - len(line)) for line in lines]
    widths = [max(_width(line[i]) for line in lines) for i in range(count)]
    right = [_is_numeric(line[i] for line in lines[1:]) for i in range(count)]
    text = ["  " + "  ".join(map(_pad, line, widths, right)).rstrip() for line in lines if any(line)]
    return "\n".join([sayable(title), *text] if title else text)


def narrow(headers: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """A table as lines for a screen that it is too wide for: turned on its side where that fits, else a block for each row.

    Text is broken at spaces, values never; one that is longer than the screen runs over its edge.
    """
    if not any(headers):
        return [line for row in rows for line in _hanging(row[0], "  ".join(row[1:]), max(len(r[0]) for r in rows), width)]
    count = max(map(len, [headers, *rows]))
    full = [[*row, *[""] * (count - len(row))] for row in (list(headers), *map(list, rows))]
    first = max(map(_width, full[0]))
    room = (width - 2 - first) // max(len(rows), 1) - 2
    if max((_width(word) for row in full[1:] for value in row for word in value.split()), default=0) <= room:
        columns = [
            [textwrap.wrap(value, room, break_long_words=False, break_on_hyphens=False) or [""] for value in row] for row in full[1:]
        ]
        widths = [max(_width(part) for parts in column for part in parts) for column in columns]
        right = [_is_numeric(row[i] for row in full[1:]) for i in range(count)]
        lines = []
        for i, header in enumerate(full[0]):
            for n in range(max((len(column[i]) for column in columns), default=1)):
                parts = [column[i][n] if n < len(column[i]) else "" for column in columns]
                told = map(_pad, parts, widths, [right[i]] * len(parts))
                lines.append(("  " + "  ".join([_pad(header if not n else "", first, False), *told])).rstrip())
        return lines
    lines = []
    for number, row in enumerate(full[1:]):
        lines += [""] * bool(number)
        lines += [line for header, value in zip(full[0], row, strict=True) for line in _hanging(header, value, first, width)]
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    """Lines broken at spaces; a word that is longer than the screen, such as a path, stays whole."""
    found = []
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip(" ")))
        broken = textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        found += broken if _width(line) > width else [line]
    return found


def _hanging(name: str, text: str, indent: int, width: int) -> list[str]:
    """A name and its text, broken at spaces, each further line under the first."""
    room = max(width - indent - 4, 20)
    parts = _wrapped(text, room)
    return [("  " + _pad(name if not n else "", indent, False) + "  " + part).rstrip() for n, part in enumerate(parts)]


def cell(value: object) -> str:
    """A table cell on one line: floats with four digits, counts with thousands marks, nothing as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return " ".join(sayable(value).split())


def mute() -> None:
    """From now on nothing is said: another process speaks for this one."""
    _screen.muted = True


@contextmanager
def unsaid() -> Iterator[None]:
    """Around what will be said again."""
    before, _screen.muted = _screen.muted, True
    try:
        yield
    finally:
        _screen.muted = before


def attach(path: Path) -> None:
    """From now on also append everything said to this file, as plain text."""
    _screen.attach(path)


def detach() -> None:
    """Stop writing to the attached file and close it."""
    _screen.detach()


@contextmanager
def working(text: str) -> Iterator[None]:
    """Around something slow: a spinner on a terminal, else a line at once; the time it took, where it was long."""
    began = time.monotonic()
    with _screen.busy(sayable(text)):
        yield
    took = time.monotonic() - began
    if took >= SECONDS_BETWEEN_LINES and not _screen.bar:
        _screen.show(f"{sayable(text)}: took {duration(took)}")


def duration(seconds: float) -> str:
    """``0:07``, ``12:30``, ``1:02:03``."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """Progress of training: a live bar on a terminal, else a line at once and then every few seconds.

    A value that is not given keeps its last reading, so a step that reads nothing from the device can still be counted; a line says
    which step a reading is of, where it is not the line's own.
    """

    def __init__(self, total_steps: int, *, start: int = 0) -> None:
        self.total, self.start, self.step = total_steps, start, start
        self.facts: dict[str, str] = dict.fromkeys(("epoch", "loss", "lr", "samples/s", "tokens/s", "MB"), "")
        self._began = time.monotonic()
        self._last_line = float("-inf")
        self._said = ""
        self._doing, self._read_at = "training", start
        self._bar: Any = None

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        _screen.bar = self
        if _is_terminal():
            self._bar = _live_bar(self.total, self.start)
            self._bar.start()
            _screen.live = self._bar.console
            _screen.live.show_cursor()  # rich hides it, and a shell that gets the terminal back by Ctrl-Z would have none
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _screen.bar = _screen.live = None
        if self._bar is not None:
            self._bar.stop()
        if self._said and self._said != self._told():
            self._line()

    def update(
        self,
        step: int,
        epoch: float | None = None,
        loss: float | None = None,
        lr: float | None = None,
        samples_per_second: float | None = None,
        tokens_per_second: float | None = None,
        memory_mb: float | None = None,
    ) -> None:
        """``step`` optimizer steps are done."""
        self.step = step
        self.facts["epoch"] = "" if epoch is None else _reading("epoch", epoch)
        given = {"loss": loss, "lr": lr, "samples/s": samples_per_second, "tokens/s": tokens_per_second, "MB": memory_mb}
        readings = {name: _reading(name, value) for name, value in given.items() if value is not None}
        self.facts |= readings
        self._read_at = step if readings else self._read_at
        self._draw()
        if self.is_due():
            self._line()

    def phase(self, text: str) -> None:
        """What is being done while no step is made (scoring, saving); empty: training again."""
        self._doing = text or "training"
        if self._bar is not None:
            self._draw()
        elif text and self.is_due():
            self._last_line = time.monotonic()
            _screen.show(text)

    def is_due(self) -> bool:
        """Whether the last plain line is some seconds old."""
        return time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES

    def _draw(self) -> None:
        """What the bar shows, as many of the readings as the terminal has room for."""
        if self._bar is None:
            return
        width = self._bar.console.width
        room = width - len(self._doing) - _bar_width(width) - 2 * len(str(self.total)) - 12
        told = ""
        for fact in filter(None, self.facts.values()):
            if len(told) + len(fact) + 2 > room:
                break
            told += f"  {fact}" if told else fact
        self._bar.update(self._bar.task_ids[0], description=self._doing, completed=self.step, facts=told)

    def _told(self) -> str:
        epoch, *readings = (text for text in self.facts.values())
        known = "  ".join(filter(None, readings))
        stale = known and self._read_at != self.step
        return "  ".join(filter(None, [f"step {self.step}/{self.total}", epoch, f"(step {self._read_at}: {known})" if stale else known]))

    def _line(self) -> None:
        self._last_line, self._said = time.monotonic(), self._told()
        parts = [self._said]
        done = self.step - self.start
        if 0 < done and self.step < self.total:
            parts.append("left " + duration((time.monotonic() - self._began) / done * (self.total - self.step)))
        _screen.show("  ".join(parts), only_log=self._bar is not None and _screen.live is not None)


def _reading(name: str, value: float) -> str:
    form = {"epoch": f"epoch {value:.2f}", "loss": f"loss {value:.4f}", "lr": f"lr {value:.3g}"}
    return form.get(name, f"{value:,.0f} {name}")


def _live_bar(total: int, start: int) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Column

    console = _rich_console()
    columns = [
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=_bar_width(console.width)),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[facts]}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
    ]
    bar = RichProgress(*columns, console=console, redirect_stdout=False, redirect_stderr=True, refresh_per_second=4, expand=True)
    bar.add_task("training", total=total, completed=start, facts="")
    return bar


def _bar_width(columns: int) -> int:
    return 16 if columns >= WIDE else 8


def _is_terminal() -> bool:
    try:
        return not _screen.muted and sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return False


def _width(text: str) -> int:
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _pad(text: str, width: int, right: bool) -> str:
    space = " " * (width - _width(text))
    return space + text if right else text + space


def _is_numeric(cells: Iterator[str]) -> bool:
    seen = [c for c in cells if c not in ("", "-")]
    return bool(seen) and all(c[0].isdigit() or c[0] in "+-.≥<>±" and len(c) > 1 for c in seen)


def _too_narrow(headers: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> bool:
    """Whether a drawn table would be hard to read: it has no header or few rows, or words that do not fit."""
    if not any(headers) or len(rows) <= FEW_ROWS:
        return True
    columns = zip_longest(headers, *rows, fillvalue="")
    return sum(max(map(_width, " ".join(column).split()), default=0) + 2 for column in columns) > width


class _Quiet:
    """A stream whose failures are swallowed: a closed terminal or a full pipe must not end a run."""

    encoding = "utf-8"

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            if self.stream is not None:
                self.stream.write(text)
        except (OSError, ValueError, RuntimeError):  # broken pipe; closed; a signal handler speaking into a half-written line
            self.stream = None
        return len(text)

    def flush(self) -> None:
        try:
            if self.stream is not None:
                self.stream.flush()
        except (OSError, ValueError, RuntimeError):
            self.stream = None

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2 if self.stream is None else self.stream.fileno()


def _rich_console() -> Console:
    from rich.console import Console

    return Console(file=_Quiet(sys.stderr), force_terminal=True, highlight=False, markup=False, emoji=False)  # type: ignore[arg-type]


class _Screen:
    """The one stderr of the process, what is live on it, and the log beside it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # re-entrant: a signal handler may speak while a line is being written
        self.muted = False
        self.log: IO[bytes] | None = None
        self.live: Console | None = None
        self.bar: Progress | None = None

    def show(self, text: str, *, style: str = "", only_log: bool = False) -> None:
        if self.muted:
            return
        with self.lock:
            self._write_log(text)
            if only_log:
                return
            if self.live is None and not _is_terminal():
                quiet = _Quiet(sys.stderr)
                quiet.write(text + "\n")
                quiet.flush()
                return
            from rich.text import Text

            console = self.live or _rich_console()
            console.print(Text("\n".join(_wrapped(text, console.width)), style=style), soft_wrap=True)

    def show_table(self, title: str, headers: list[str], rows: list[list[str]]) -> None:
        if self.live is None and not _is_terminal():
            self.show(layout(title, headers, rows))
            return
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        with self.lock:
            plainly = layout(title, headers, rows)
            self._write_log(plainly)
            console = self.live or _rich_console()
            if max(map(_width, plainly.splitlines()), default=0) > console.width and _too_narrow(headers, rows, console.width):
                console.print(
                    Text(title, style="bold"), *[Text(line) for line in narrow(headers, rows, console.width)], sep="\n", soft_wrap=True
                )
                return
            drawn = Table(title=Text(title, style="bold"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False, show_header=any(headers))
            for i, header in enumerate(headers):
                drawn.add_column(Text(header), justify="right" if _is_numeric(r[i] for r in rows if i < len(r)) else "left")
            for row in rows:
                drawn.add_row(*map(Text, row))
            console.print(drawn)

    def show_marked(self, title: str, pieces: list[tuple[str, bool]]) -> None:
        told = title + "\n" + "".join(f"⟦{text}⟧" if mark else text for text, mark in pieces)
        if self.live is None and not _is_terminal():
            self.show(told)
            return
        from rich.text import Text

        with self.lock:
            self._write_log(told)
            drawn = Text.assemble((title + "\n", "bold"), *((text, "green" if mark else "dim") for text, mark in pieces))
            (self.live or _rich_console()).print(drawn, soft_wrap=True)

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        if self.bar is not None:
            self.bar.phase(text)
            try:
                yield
            finally:
                if self.bar is not None:
                    self.bar.phase("")
        elif _is_terminal():
            from rich.text import Text

            console = _rich_console()
            with console.status(Text(text + " …")):
                console.show_cursor()  # as for the bar
                self.live = console
                try:
                    self._write_log(text + " …")
                    yield
                finally:
                    self.live = None
        else:
            self.show(text + " …")
            yield

    def attach(self, path: Path) -> None:
        self.detach()
        with self.lock:
            self.log = path.open("ab", buffering=0)

    def detach(self) -> None:
        with self.lock:
            log, self.log = self.log, None
            if log is not None:
                log.close()

    def _write_log(self, text: str) -> None:
        try:
            if self.log is not None:
                self.log.write((text + "\n").encode("utf-8", "backslashreplace"))
        except OSError:  # a full disk is reported by whoever writes what matters
            self.log = None


_screen = _Screen()
