"""The one stderr of the process: what is live on it, and the log beside it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol, TextIO

from finetune_cli.console.columns import is_numeric, layout, narrow, too_narrow, width_of, wrapped

if TYPE_CHECKING:
    from rich.console import Console


class Bar(Protocol):
    """What is drawn while steps are made."""

    def phase(self, text: str) -> None:
        """What is being done while no step is made; empty: training again."""


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


class Screen:
    """The one stderr of the process, what is live on it, and the log beside it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # re-entrant: a signal handler may speak while a line is being written
        self.muted = False
        self.log: IO[bytes] | None = None
        self.live: Console | None = None
        self.bar: Bar | None = None

    def show(self, text: str, *, style: str = "", only_log: bool = False) -> None:
        if self.muted:
            return
        with self.lock:
            self._write_log(text)
            if only_log:
                return
            if self.live is None and not is_terminal():
                quiet = _Quiet(sys.stderr)
                quiet.write(text + "\n")
                quiet.flush()
                return
            from rich.text import Text

            console = self.live or rich_console()
            console.print(Text("\n".join(wrapped(text, console.width)), style=style), soft_wrap=True)

    def show_table(self, title: str, headers: list[str], rows: list[list[str]]) -> None:
        if self.live is None and not is_terminal():
            self.show(layout(title, headers, rows))
            return
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        with self.lock:
            plainly = layout(title, headers, rows)
            self._write_log(plainly)
            console = self.live or rich_console()
            if max(map(width_of, plainly.splitlines()), default=0) > console.width and too_narrow(headers, rows, console.width):
                console.print(
                    Text(title, style="bold"), *[Text(line) for line in narrow(headers, rows, console.width)], sep="\n", soft_wrap=True
                )
                return
            drawn = Table(title=Text(title, style="bold"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False, show_header=any(headers))
            for i, header in enumerate(headers):
                drawn.add_column(Text(header), justify="right" if is_numeric(r[i] for r in rows if i < len(r)) else "left")
            for row in rows:
                drawn.add_row(*map(Text, row))
            console.print(drawn)

    def show_marked(self, title: str, pieces: list[tuple[str, bool]]) -> None:
        told = title + "\n" + "".join(f"⟦{text}⟧" if mark else text for text, mark in pieces)
        if self.live is None and not is_terminal():
            self.show(told)
            return
        from rich.text import Text

        with self.lock:
            self._write_log(told)
            drawn = Text.assemble((title + "\n", "bold"), *((text, "green" if mark else "dim") for text, mark in pieces))
            (self.live or rich_console()).print(drawn, soft_wrap=True)

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        if self.bar is not None:
            self.bar.phase(text)
            try:
                yield
            finally:
                if self.bar is not None:
                    self.bar.phase("")
        elif is_terminal():
            from rich.text import Text

            console = rich_console()
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


screen = Screen()


def is_terminal() -> bool:
    try:
        return not screen.muted and sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return False


def rich_console() -> Console:
    from rich.console import Console

    return Console(file=_Quiet(sys.stderr), force_terminal=True, highlight=False, markup=False, emoji=False)  # type: ignore[arg-type]
