"""The flight recorder: the last updates of a run, written into its ``crash/`` where it ends badly.

What a device computes stays there: losses and norms are kept as the tensors that the update has anyway and read only at the end, so that
recording makes nobody wait.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from finetune_cli.data import Roles, Rows, text_of
from finetune_cli.errors import Diverged, Exit, FtuneError, UserError
from finetune_cli.run import Run
from finetune_cli.storage import json_bytes, json_line

if TYPE_CHECKING:
    from finetune_cli.engine.trainer import Trainer

KEPT = 50
"""Updates that are written at a bad end."""
UNREAD = 1000
"""Updates at most between two looks at a device that are kept beside them: the first bad one may be as old."""
CUT = 200
"""Characters of a row's text."""
SUMMARY, UPDATES, ROWS = "crash.json", "updates.jsonl", "rows.jsonl"


@dataclass(slots=True, eq=False)
class Update:
    """What is known of one update; what it did not come to is None."""

    step: int
    rows: np.ndarray
    """Indices of its examples."""
    lr: float
    began: float
    loss: Tensor | None = None
    norms: tuple[list[int], Tensor] | None = None
    """Which parameters had a gradient, and the norm of each, before clipping."""
    seconds: float | None = None
    memory_mb: float | None = None


@dataclass(slots=True)
class Recorder:
    """The last updates, oldest first."""

    memory_mb: Callable[[], float]
    between_looks: int
    updates: deque[Update] = field(init=False)

    def __post_init__(self) -> None:
        self.updates = deque(maxlen=KEPT + min(self.between_looks, UNREAD))

    def begin(self, step: int, rows: np.ndarray, lr: float) -> Update:
        """An update that has begun; what is learnt of it is put into what this returns."""
        update = Update(step, rows, lr, time.perf_counter())
        self.updates.append(update)
        return update

    def end(self, update: Update) -> None:
        """The update is done, or on its way on a device."""
        update.seconds = time.perf_counter() - update.began
        update.memory_mb = self.memory_mb()

    def until(self, step: int | None) -> list[Update]:
        """The last ones up to ``step``: a device that withholds a bad update withholds those after it."""
        return [update for update in self.updates if step is None or update.step <= step][-KEPT:]


def offender(trainer: Trainer) -> Update | None:
    """The update that was not finite, or the one that was begun and not ended."""
    updates = trainer.flight.updates
    try:
        first = trainer.updater.bad_step()
    except RuntimeError:  # a device that is lost tells nothing any more
        first = None
    if first is not None:
        return next((update for update in updates if update.step == first), Update(first, trainer.rows_of(first - 1), math.nan, 0.0))
    return updates[-1] if updates and updates[-1].seconds is None else None


def crash(trainer: Trainer, run: Run, rows: Rows, roles: Roles, error: BaseException) -> None:
    """Write ``crash/`` as far as the disk lets us, and let an error that ftune foresees name the rows and the folder."""
    code = error.code if isinstance(error, FtuneError) else Exit.BUG
    if code not in (Exit.BUG, Exit.DIVERGED, Exit.MACHINE) or not trainer.flight.updates or not trainer.world.leads:
        return
    bad = offender(trainer)
    of_bad = None if bad is None else trainer.train.examples.row[bad.rows]
    summary = {
        "step": bad.step if bad is not None else trainer.state.step,
        "exit_code": int(code),
        "error": str(error),
        "update_ended": bad is None,
        "device": trainer.device.saved() | {"reasons": None},
        "micro_tokens": trainer.plan.micro_tokens,
        **_measured(bad),
    }
    files = {SUMMARY: json_bytes(summary), UPDATES: b"".join(_lines(trainer, rows, None if bad is None else bad.step))}
    if of_bad is not None:
        files[ROWS] = b"".join(json_line(row) for row in told_rows(rows, roles, of_bad))
    if run.write_crash(files) and isinstance(error, Diverged):
        at = f", rows {rows.named(of_bad)}" if of_bad is not None else ""
        error.where = f"{error.where}{at}; the last {KEPT} updates are in {run.crash_dir}"


def _measured(update: Update | None) -> dict[str, Any]:
    if update is None:
        return {}
    return {"loss": _number(update.loss), "gradient_norm": _total(update), "lr": _number(update.lr)}


def told_rows(rows: Rows, roles: Roles, indices: np.ndarray) -> Iterator[dict[str, Any]]:
    """Where rows stand, the sha256 of their texts, and how they begin."""
    for i in map(int, indices):
        text = _text(rows, roles, i)
        yield {
            "file": rows.files[int(rows.file_of[i])],
            "line": int(rows.line_of[i]) or None,
            "row": int(rows.row_of[i]),
            "sha256": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
            "text": text[:CUT],
        }


def _text(rows: Rows, roles: Roles, i: int) -> str:
    """The row's text; all that it holds where that is more than a text."""
    try:
        return text_of(rows, roles, i)
    except UserError:
        return json_line(rows.slice(i, 1).table.to_pylist()[0]).decode().strip()


def _lines(trainer: Trainer, rows: Rows, until: int | None) -> Iterator[bytes]:
    names = _blocks(trainer.model, trainer.updater.parameters)
    for update in trainer.flight.until(until):
        yield json_line(
            {
                "step": update.step,
                "loss": _number(update.loss),
                "gradient_norm": _total(update),
                "blocks": _by_block(update, names),
                "lr": update.lr,
                "seconds": None if update.seconds is None else round(update.seconds, 6),
                "memory_mb": None if update.memory_mb is None else round(update.memory_mb, 1),
                "rows": _by_file(rows, trainer.train.examples.row[update.rows]),
            }
        )


def _by_file(rows: Rows, indices: np.ndarray) -> dict[str, list[int]]:
    """Data rows, by file."""
    found: dict[str, list[int]] = {}
    for i in map(int, indices):
        found.setdefault(rows.files[int(rows.file_of[i])], []).append(int(rows.row_of[i]))
    return found


def _blocks(model: nn.Module, parameters: list[nn.Parameter]) -> list[str]:
    """The block of layers of each parameter: its name up to the first number, else its module's."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [block_of(names.get(id(p), "?")) for p in parameters]


def block_of(name: str) -> str:
    """``bert.encoder.layer.0`` of ``bert.encoder.layer.0.attention.self.query.weight``; ``classifier`` of ``classifier.weight``."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[: number + 1] if number is not None else parts[:-1][:2]) or name


def _by_block(update: Update, names: list[str]) -> dict[str, Any] | None:
    """The gradient norm of each block, in the order of the parameters."""
    values = _values(update)
    if values is None or update.norms is None:
        return None
    squares: dict[str, float] = {}
    for place, value in zip(update.norms[0], values, strict=True):
        squares[names[place]] = squares.get(names[place], 0.0) + value * value
    return {name: _number(math.sqrt(square)) for name, square in squares.items()}


def _total(update: Update) -> Any:
    values = _values(update)
    return None if values is None else _number(math.sqrt(sum(value * value for value in values)))


def _values(update: Update) -> list[float] | None:
    """The norms, where the device still gives them."""
    try:
        return None if update.norms is None else [float(value) for value in update.norms[1].float().cpu().tolist()]
    except RuntimeError:
        return None


def _number(value: Any) -> Any:
    """A number as JSON has it; what is not finite in words, what cannot be read as null."""
    try:
        number = float("nan") if value is None else float(value)
    except RuntimeError:
        return None
    return None if value is None else number if math.isfinite(number) else str(number)
