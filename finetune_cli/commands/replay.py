"""``ftune replay``: one update of a run again, on the CPU in fp32, to learn which row and which part of the model made it go bad.

It changes nothing in the run but ``crash/replay.json``; what it found is one JSON object on stdout.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune_cli import console
from finetune_cli.config import DeviceName, Invocation, Precision, ReplayConfig, TrainConfig, TrainDeviceConfig, saved
from finetune_cli.engine import building, resume
from finetune_cli.engine.flight import told_rows
from finetune_cli.engine.prepared import prepare
from finetune_cli.engine.replay import Finding, advance, examine
from finetune_cli.engine.resume import Resumed
from finetune_cli.engine.signals import stoppable
from finetune_cli.errors import MachineError, UserError
from finetune_cli.run import Run
from finetune_cli.tasks import task_configs
from finetune_cli.world import Alone


def run(config: ReplayConfig, invocation: Invocation) -> None:
    """Go to the update from the last good checkpoint before it, look into it, and print what was found."""
    with stoppable() as stop:
        given = Path(config.ckpt)
        directory = Run.open(given.parent.parent if given.parent.name == "checkpoints" else given)
        crashed = directory.crash()
        step = config.step if config.step is not None else crashed.get("step")
        if step is None:
            raise UserError("no crash of the run is on record", where=str(directory.path), fix=f"ftune replay {directory.path} step=N")
        start = _start(directory, step)
        as_trained = _on_cpu(saved.load(directory.config_path, tasks=task_configs()), config)
        resumed = Resumed(directory, start, finished=False)
        prepared = prepare(as_trained, frozenset(), resumed, stop)
        resume.compare_files(directory.manifest()["files"], prepared.splits.sources, [])
        trainer = building.assembled(as_trained, prepared, directory, resumed, Alone(stop))
        if step > trainer.timetable.total:
            raise UserError(f"the run has {trainer.timetable.total} steps", where=f"step={step}", fix="name one of them")
        first = trainer.state.step
        console.say(f"replaying from {start.name if start else 'the beginning'} to step {step} on the CPU in fp32")
        step = advance(trainer, step)
        finding = examine(trainer)
        rows = trainer.train.examples.row[finding.rows]
        found = {
            "run": str(directory.path),
            "step": step,
            "from": first,
            **_recorded(directory, finding),
            **_told(finding),
            "rows": list(told_rows(prepared.splits.rows["train"], prepared.splits.roles, rows)),
        }
        try:
            directory.write_replay(found)
        except MachineError as error:
            console.warn(f"crash/replay.json is not written: {error.what}")
        print(json.dumps(found, ensure_ascii=False), flush=True)
        console.say(_sentence(finding, prepared.splits.rows["train"].named(rows)))


def _start(directory: Run, step: int) -> Path | None:
    """The last good checkpoint before an update."""
    before = [name for name in directory.store.steps() if int(name.rpartition("-")[2]) < step]
    for name in reversed(before):
        fault = directory.store.verify(directory.store.root / name)
        if fault is None:
            return directory.store.root / name
        console.warn(f"{name} is damaged ({fault}); it is passed over")
    return None


def _on_cpu(config: TrainConfig, asked: ReplayConfig) -> TrainConfig:
    """The run's own config, on a CPU in full precision."""
    device = TrainDeviceConfig(name=DeviceName.cpu, precision=Precision.fp32, processes=1, compile=False)
    return replace(config, data=asked.data, device=device, offline=asked.offline, resume=None, expect={})


def _recorded(directory: Run, finding: Finding) -> dict[str, Any]:
    """What the run itself had on record of the update's loss, and whether the replay gives the same."""
    then = next((update["loss"] for update in directory.crash_updates() if update["step"] == finding.step), None)
    now = finding.loss if finding.loss - finding.loss == 0 else str(finding.loss)
    return {"loss": now, "recorded_loss": then, "same_loss": None if then is None else then == now}


def _told(finding: Finding) -> dict[str, Any]:
    norm = finding.gradient_norm
    return {
        "gradient_norm": norm if norm - norm == 0 else str(norm),
        "wrong": finding.wrong,
        "reproduced": finding.wrong is not None,
        "other_rows_too": finding.others_too,
        "place": finding.place,
    }


def _sentence(finding: Finding, rows: str) -> str:
    if finding.wrong is None:
        return f"step {finding.step}: nothing is wrong with it here (loss {finding.loss:.6g}, gradient norm {finding.gradient_norm:.4g})"
    place = finding.place
    at = place.get("module") or place.get("operator") or place.get("parameter")
    first = f"first in the {place['pass']}" + ("" if place["pass"].endswith("s") else " pass") + (f", {at}" if at else "")
    more = ", and others too" if finding.others_too else ""
    return f"step {finding.step}: {finding.wrong}; rows: {rows or 'any'}{more}; {first}"
