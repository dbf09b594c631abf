"""Whether a run may be gone on with: the same experiment on the same rows, unless the user allows a difference by name."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from finetune_cli import console
from finetune_cli.config import saved
from finetune_cli.config.choices import OnSpike
from finetune_cli.config.schema import TrainConfig, leaves
from finetune_cli.errors import UserError
from finetune_cli.run import Run
from finetune_cli.tasks import task_configs

HARMLESS = ("run.", "device.", "resume", "expect", "offline", "train.log_every", "train.save_every", "train.keep")
"""Keys (or their beginnings) whose change leaves the run what it is."""
ANOTHER = ("task.", "model.", "data.text", "data.label", "optimizer.name", "train.batch_size", "train.order", "train.monitor")
"""Keys (or their beginnings) that a checkpoint's weights, moments, facts or best score stand on: with others it is another experiment."""
WITHIN = ("model.gradient_checkpointing", "model.trust_remote_code")
"""Of those, what changes no number."""
OF_JUMPS = ("train.log_every", "train.save_every")
"""Of the harmless ones, what decides where a run goes back to under ``train.on_spike=rewind``, and so bends it."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """The run to go on with, and the checkpoint to start from; None: it was stopped before its first."""

    run: Run
    checkpoint: Path | None
    finished: bool


def wanted(config: TrainConfig) -> str | None:
    """The run or checkpoint to go on with; None for a new run."""
    if config.resume is None:
        return None
    if config.resume != "auto":
        return config.resume
    if config.run.dir is None:
        raise UserError("resume=auto needs to know the run directory", where="resume", fix="set run.dir=DIRECTORY")
    return config.run.dir if Run.exists(config.run.dir) else None


def refuse_another_place(path: str, config: TrainConfig, user_set: Collection[str]) -> None:
    """A run goes on where it is and under its name: refuse, by name, what the user says of another place."""
    given = Path(os.path.realpath(os.path.expanduser(path)))
    run = given.parent.parent if given.parent.name == "checkpoints" else given
    if not Run.exists(run):
        return
    begun = saved.load(run / "config.yaml", tasks=task_configs()).run
    here = {
        "run.dir": config.run.dir is not None and os.path.realpath(config.run.dir) == str(run),
        "run.name": config.run.name == begun.name,
        "run.root": config.resume == "auto" or run.is_relative_to(os.path.realpath(config.run.root)),
    }
    for key, same in here.items():
        if key in user_set and not same:
            fix = f"leave {key} out, or start a new run from its weights: ftune train model.path={run} …"
            raise UserError(f"the run goes on where it is, {run}, and {key} says otherwise", where=key, fix=fix)


def open_run(path: str, *, keep: int) -> Resumed:
    """Open and lock the run; find its newest good checkpoint, or take the one that was named.

    Damaged checkpoints are named in a warning; where all are damaged that is a UserError, never a silent start from zero.
    """
    given = Path(path).expanduser()
    inside = given.parent.name == "checkpoints"
    run = Run.open(given.parent.parent if inside else given, keep=keep)
    if run.status().get("state") == "done":
        return Resumed(run, None, finished=True)
    run.lock()
    _say_if_it_died(run)
    run.store.sweep()
    if inside:
        checkpoint = run.store.named(given.resolve().name)
        run.store.rewind(int(checkpoint.name.rpartition("-")[2]))
        return Resumed(run, checkpoint, finished=False)
    newest, damaged = run.store.newest()
    for name, cause in damaged:
        console.warn(f"{name} is damaged ({cause}); it is passed over")
    if newest is None and damaged:
        raise UserError(
            "every checkpoint of the run is damaged", where=str(run.path), fix="copy one back from a backup, or start a new run"
        )
    return Resumed(run, newest, finished=False)


def begun(run: Run) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """The plan that a run began with, and its files with their sha256. Raises UserError for a record that is not of ftune's making."""
    record = run.manifest()
    try:
        plan, files = record["plan"], {split: dict(named) for split, named in record["files"].items()}
        if type(plan["device"]["threads"]) is not int or not isinstance(plan["batches"]["packed"], bool):
            raise TypeError("a plan has threads and batches")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"the run's manifest.json holds no plan or no files: {type(error).__name__}: {error}"
        raise UserError(what, where=str(run.path), fix="copy it back from a backup, or train again") from error
    return plan, files


def _say_if_it_died(run: Run) -> None:
    """A process that was killed could not say so; we hold its lock, so it is gone."""
    if run.status().get("state") != "running":
        return
    last: dict[str, Any] = next(reversed(run.timing()), {})
    used = f"; it had used {last['memory_mb']:,.0f} MB" if "memory_mb" in last else ""
    known = run.status().get("step", 0)
    step = max(int(last.get("step", 0)), known if type(known) is int else 0)
    console.warn(f"the process before died without a word after step {step}: killed, by hand or for want of memory{used}")


def refuse_changes(run: Run, now: TrainConfig) -> None:
    """A finished run has nothing left to do with a changed key, allowed or not: say so instead of ignoring it."""
    changed = changes(saved.load(run.config_path, tasks=task_configs()), now, allowed=())
    if changed:
        raise UserError(
            f"the run is finished, and cannot go on with another config: {'; '.join(changed[:5])}",
            where=changed[0].split(" was ")[0],
            fix=f"start a new run from its weights: ftune train model.path={run.path} …",
        )


def refuse_edits(run: Run, checkpoint: Path | None) -> None:
    """Refuse a config.yaml that is neither what the run began with nor says what the checkpoint's own says."""
    begun = run.manifest().get("config_sha256")  # older runs have none
    if begun in (None, run.config_sha256()):
        return
    told, fix = "", "copy it back from a backup, or start a new run"
    if checkpoint is not None:
        sealed = checkpoint / run.config_path.name
        old, now = (dict(_every_key(saved.load(path, tasks=task_configs()))) for path in (sealed, run.config_path))
        edited = [f"{key} was {old.get(key)!r}, is {value!r}" for key, value in now.items() if old.get(key) != value]
        if not edited:
            return
        told, fix = f": {'; '.join(edited[:5])}", f"cp {sealed} {run.config_path}"
    what = f"the run's config was changed by hand{told}"
    raise UserError(what, where=str(run.config_path), fix=f"{fix}; what a resume may change is given on the command line")


def _every_key(config: TrainConfig) -> Iterator[tuple[str, Any]]:
    """What the run itself is made of: where it lies, and how it was gone on with, may differ between a run and its checkpoints."""
    return ((key, _plain(value)) for key, value, _ in leaves(config) if not key.startswith(("run.", "resume")))


def compare(before: TrainConfig, now: TrainConfig) -> None:
    """Refuse by name every changed key that would bend the run, unless ``resume_allow`` lists it; and what no list can allow."""
    changed = changes(before, now, allowed=())
    foreign = [text for text in changed if text.startswith(ANOTHER) and not text.startswith(WITHIN)]
    if foreign:
        raise UserError(
            f"that is another experiment, which a resume cannot become: {'; '.join(foreign[:5])}",
            where=foreign[0].split(" was ")[0],
            fix="leave it as it was, or start a new run from its weights: ftune train model.path=RUN …",
        )
    bent = [text for text in changed if text.split(" was ")[0] not in now.resume_allow]
    if bent:
        keys = ",".join(text.split(" was ")[0] for text in changed)
        raise UserError(
            f"the run was made with another config: {'; '.join(bent[:5])}",
            where=bent[0].split(" was ")[0],
            fix=f"leave it as it was, or resume_allow=[{keys}] (the run is then no longer what one run would have been)",
        )


def changes(before: TrainConfig, now: TrainConfig, *, allowed: Collection[str]) -> list[str]:
    """Keys that differ and matter, each with both values."""
    old = {key: value for key, value, _ in leaves(before)}
    bending = OF_JUMPS if now.train.on_spike == OnSpike.rewind else ()
    return [
        f"{key} was {_plain(old.get(key))!r}, is {_plain(value)!r}"
        for key, value, _ in leaves(now)
        if _plain(old.get(key)) != _plain(value) and (key in bending or not key.startswith(HARMLESS)) and key not in allowed
    ]


def compare_files(before: dict[str, dict[str, str]], now: dict[str, dict[str, str]], allowed: list[str]) -> None:
    """Refuse data files whose bytes changed since the run began."""
    for split, files in now.items():
        old = sorted(before.get(split, {}).values())
        if old != sorted(files.values()) and f"data.{split}" not in allowed:
            name = next((f for f, sha in files.items() if sha not in old), next(iter(files), split))
            raise UserError(
                f"{name} is not the file that the run began with (sha256 differs)",
                where=f"data.{split}",
                fix=f"restore the file, or resume_allow=[data.{split}] (the run is then no longer what one run would have been)",
            )


def in_its_words(now: dict[str, Any], begun: dict[str, Any]) -> dict[str, Any]:
    """A plan that is as the run began but for its reasons, with the reasons of then: later checkpoints stay the same to the byte."""
    if {**now, "reasons": None} != {**begun, "reasons": None}:
        return now
    return {**now, "reasons": {name: begun["reasons"].get(name, told) for name, told in now["reasons"].items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return list(value) if isinstance(value, (list, tuple)) else value
