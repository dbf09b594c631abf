"""Progress of training, on a terminal and in a log."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from finetune_cli.console.columns import duration
from finetune_cli.console.screen import is_terminal, rich_console, screen

SECONDS_BETWEEN_LINES = 5.0
WIDE = 100
"""Columns of a terminal from which the bar is drawn long."""


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
        screen.bar = self
        if is_terminal():
            self._bar = _live_bar(self.total, self.start)
            self._bar.start()
            screen.live = self._bar.console
            screen.live.show_cursor()  # rich hides it, and a shell that gets the terminal back by Ctrl-Z would have none
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        screen.bar = screen.live = None
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
            screen.show(text)

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
        screen.show("  ".join(parts), only_log=self._bar is not None and screen.live is not None)


def _reading(name: str, value: float) -> str:
    form = {"epoch": f"epoch {value:.2f}", "loss": f"loss {value:.4f}", "lr": f"lr {value:.3g}"}
    return form.get(name, f"{value:,.0f} {name}")


def _live_bar(total: int, start: int) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Column

    console = rich_console()
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
