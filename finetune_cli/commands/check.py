"""``ftune check``: everything that ``ftune train`` looks at before its first step, and nothing after it. No run is left behind."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune_cli import console, models
from finetune_cli.config import CheckConfig, Invocation, TrainConfig
from finetune_cli.data.rows import count
from finetune_cli.engine import building
from finetune_cli.engine.optimizer import warmup_steps
from finetune_cli.engine.prepared import Prepared, prepare
from finetune_cli.engine.rehearsal import rehearse
from finetune_cli.engine.signals import stoppable
from finetune_cli.engine.trainer import Trainer
from finetune_cli.errors import FtuneError, UserError
from finetune_cli.run import Run, run_around
from finetune_cli.storage import REAL, disk_trouble, json_bytes, write_whole
from finetune_cli.world import Alone

_BEGINNING = b'{\n  "ready": true,\n  "task": '
"""Of every ledger."""


def run(config: CheckConfig, invocation: Invocation) -> float | None:
    """Check, say what a run would do, and write the ledger: to a file, or to standard output where a program reads it."""
    train = config.train_config()
    target = _target(config.ledger)
    with stoppable() as stop:
        prepared = prepare(train, invocation.user_set, None, stop)
        directory = Run.create(train.run, name="check", keep=train.train.keep)
        try:
            trainer = building.assembled(train, prepared, directory, None, Alone(stop))
            rehearse(trainer, train.device.memory_budget)
            disk = trainer.room_on_disk()[:2]
        except FtuneError as error:
            error.of_run(None)
            raise
        finally:
            directory.abandon()
        stop.check()
    found = _ledger(train, prepared, trainer, disk)
    _say(found, prepared)
    if target is not None:
        with disk_trouble(REAL, "writing the ledger", target, fix="free space on that disk, or name a ledger= on another"):
            write_whole(REAL, target, json_bytes(found))
        console.say(f"written: {target}")
    elif not sys.stdout.isatty():
        print(json.dumps(found, ensure_ascii=False, default=str), flush=True)
    return None


def _target(name: str | None) -> Path | None:
    """Where the ledger goes. Raises UserError, before anything is read, for a place that cannot be written."""
    if name is None:
        return None
    target, where = Path(name).expanduser(), f"ledger={name}"
    if (run := run_around(target)) is not None:
        raise UserError("the ledger would lie in a run, whose files are its own", where=where, fix=f"name a file outside {run}")
    if target.is_file() and not _is_ledger(target):
        raise UserError("there is a file already, and it is no ledger: it is not overwritten", where=where, fix="name a new file")
    if target.exists() and not target.is_file() and not target.is_dir():
        raise UserError("that is a device or a pipe, no file", where=where, fix="leave ledger out: it goes to standard output when piped")
    target = Path(os.path.realpath(target))
    if target.is_dir() or not os.access(target if target.exists() else target.parent, os.W_OK):
        raise UserError("the ledger cannot be written there", where=where, fix="name a file in a folder that can be written")
    return target


def _is_ledger(path: Path) -> bool:
    """Whether a file begins as the ledgers of ftune do."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_BEGINNING)) == _BEGINNING
    except OSError:
        return False


def _ledger(config: TrainConfig, p: Prepared, trainer: Trainer, disk: tuple[int, int]) -> dict[str, Any]:
    """What was found, JSON-ready: every file with its sha256, every split in numbers, and what a run would be made of."""
    trainable, everything = models.parameters(trainer.model)
    timetable, adapter = trainer.timetable, trainer.saver.adapter
    warmup = warmup_steps(config.optimizer, timetable.total)
    return {
        "ready": True,
        "task": p.task.name,
        "facts": p.task.facts,
        "files": p.splits.sources,
        "columns": p.splits.roles.options,
        "splits": {name: asdict(row) for name, row in p.table.splits.items()},
        "notes": list(p.splits.notes),
        "warnings": list(p.table.warnings),
        "model": asdict(p.source) if p.source else None,
        "parameters": {"trainable": trainable, "all": everything},
        "max_length": p.max_length,
        "seed": config.train.seed,
        "steps": {"total": timetable.total, "an_epoch": timetable.per_epoch, "warmup": warmup},
        "adapter": adapter.told if adapter else None,
        "plan": trainer.saver.knowledge.plan,
        "disk": {"needed_bytes": disk[0], "free_bytes": disk[1]},
    }


def _say(found: dict[str, Any], p: Prepared) -> None:
    """What a run would do, for the person at the screen."""
    batches, steps, disk, reasons = found["plan"]["batches"], found["steps"], found["disk"], p.device.reasons
    lines = [
        ("device", f"{p.device.device} ({reasons['device']}), {p.device.precision} ({reasons['precision']})"),
        ("processes", f"{p.device.processes} ({reasons['processes']})"),
        ("compile", f"{'the layers' if p.device.compiled else 'nothing'} ({reasons['compile']})"),
        ("parameters", f"{found['parameters']['trainable']:,} trainable of {found['parameters']['all']:,}"),
        *p.task.told_facts(),
        ("batch", f"{batches['batch_size']} rows an update, at most {batches['micro_tokens']:,} tokens at a time"),
        ("layout", batches["reasons"]["layout"]),
        ("steps", f"{steps['total']} ({steps['an_epoch']} an epoch), {steps['warmup']} of warmup"),
        ("disk", f"{disk['needed_bytes'] / 2**20:,.0f} MiB needed, {disk['free_bytes'] / 2**20:,.0f} MiB free"),
    ]
    console.table("a run would do", ["", ""], lines)
    console.say(f"checked: config, data, model, disk and device; {count(len(found['warnings']), 'warning')}; ftune train can start")
