"""Power loss: the calls of a real run are recorded; after each of them every state that the disk may be in is built and recovered from.

Recovery is what a start does first: lock, sweep, the newest checkpoint that verifies, its state, the records up to it. Of every so many
states the command itself is run to its end. The table of syncs leaves out each kind of sync and counts the states that lose something.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crew import Crew
from disks import Call, Disk, Recorder, crash_states, lay_out
from enemies import COMMIT, take_over
from figures import Figure
from kills import signalled
from subject import OPTIONS, Subject, faults

from finetune_cli import checkpoint
from finetune_cli.config import saved
from finetune_cli.config.schema import RunConfig
from finetune_cli.engine import resume
from finetune_cli.errors import FtuneError
from finetune_cli.run import Run
from finetune_cli.storage import REAL
from finetune_cli.tasks import task_configs

KEEP = next(int(option.rpartition("=")[2]) for option in OPTIONS if option.startswith("train.keep="))
DONE = 10**9
"""Acknowledged when the command has ended with exit code 0."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What one command did to a disk that held ``start`` (a folder; None: nothing), and what must come out of it."""

    calls: list[Call]
    start: Path | None
    manifests: dict[int, bytes]
    """Of every checkpoint; they hold the sha256 of its files."""
    records: bytes
    """metrics.jsonl at the end."""
    whole: dict[str, bytes]
    """Every other file at the end that is the same each time, by name."""


def recorded(subject: Subject, start: Path | None = None) -> Trace:
    """Run the command on a fresh disk, or go on with what is in the subject's run (``start``: a copy of it)."""
    told = subject.home / "calls.json"

    def before() -> Callable[[], None]:
        take_over(Recorder(subject.home))
        return lambda: told.write_text(json.dumps(REAL.__dict__["calls"], default=lambda data: {"bytes": data.hex()})) and None

    ended = subject.train(before=before)
    if ended.code:
        raise RuntimeError(f"the recorded run is bad already: {ended.told}")
    run = subject.run
    calls = acknowledged([call for call in map(_from_json, json.loads(told.read_text())) if call[1][:1] in ((), (subject.place,))])
    manifests = dict(_manifests(calls, start))
    names = ("metrics.json", "model", "eval", "report/index.html", "report/report.md")
    files = [file for name in names for file in ([run / name] if (run / name).is_file() else sorted((run / name).rglob("*")))]
    whole = {str(file.relative_to(run)): file.read_bytes() for file in files if file.is_file()}
    return Trace(calls, start, manifests, (run / "metrics.jsonl").read_bytes(), whole)


def _from_json(part: Any) -> Any:
    """A call, or a part of one, from its JSON."""
    if isinstance(part, list):
        return tuple(map(_from_json, part))
    return bytes.fromhex(part["bytes"]) if isinstance(part, dict) else part


def acknowledged(calls: Iterable[Call]) -> list[Call]:
    """The calls, with an acknowledgement where a checkpoint is committed, pointed at, and its name synced; and one of the end."""
    found: list[Call] = []
    pointed: int | None = None
    newest = 0
    for call in calls:
        name, parts = call[0], call[1]
        if name == "move" and len(parts) == 3 and (match := COMMIT.fullmatch(parts[-1])):
            newest = int(match[1])
        elif name == "move" and parts[1:] == ("checkpoints", "last"):
            pointed = newest
        found.append(call)
        if name == "fsync_dir" and parts[1:] == ("checkpoints",) and pointed:
            found.append(("acknowledge", pointed))
            pointed = None
    return [*found, ("acknowledge", DONE)]


def _manifests(calls: list[Call], start: Path | None) -> Iterator[tuple[int, bytes]]:
    if start is not None:
        for file in start.glob("checkpoints/step-*/manifest.json"):
            yield int(file.parent.name[5:]), file.read_bytes()
    disk = _disk(start)
    for call in calls:
        if call[0] != "acknowledge":
            disk.do(*call)
            if call[0] == "move" and (match := COMMIT.fullmatch(call[1][-1])):
                yield int(match[1]), disk.at((*call[1], "manifest.json")).data


def _disk(start: Path | None) -> Disk:
    return Disk(start.parent if start is not None else None)


# -- recovery ------------------------------------------------------------------------------------------------------------------------


def losses(trace: Trace, run: Path, acknowledged: int) -> list[str]:
    """What is lost or wrong in the run that a power loss left at ``run``; it is recovered on the way."""
    with contextlib.redirect_stderr(io.StringIO()):
        return _losses(trace, run, acknowledged)


def _losses(trace: Trace, run: Path, acknowledged: int) -> list[str]:
    if not Run.exists(run):
        if acknowledged:
            return ["the run is gone"]
        with contextlib.closing(Run.create(RunConfig(dir=str(run)), name="again")):
            return []
    try:
        done = Run.open(run).status().get("state") == "done"
        manifest = Run.open(run).manifest()
        saved.load(run / "config.yaml", tasks=task_configs())
        wrong = [] if manifest["plan"] else ["no plan"]
        if done:
            return wrong + _missing(trace, run)
        if acknowledged == DONE:
            wrong.append("the command had ended well, and the run is not done")
        return wrong + _recovered(trace, run, min(acknowledged, max(trace.manifests)))
    except FtuneError as error:
        return [error.what]


def _recovered(trace: Trace, path: Path, acknowledged: int) -> list[str]:
    found = resume.open_run(str(path), keep=KEEP)
    run = found.run
    with contextlib.closing(run):
        step = int(found.checkpoint.name[5:]) if found.checkpoint else 0
        wrong = [f"step {acknowledged} was acknowledged, {step} is there"] if step < acknowledged else []
        offset = 0
        if found.checkpoint:
            if (found.checkpoint / "manifest.json").read_bytes() != trace.manifests.get(step):
                wrong.append(f"{found.checkpoint.name} is not what was saved")
            offset = checkpoint.load_state(found.checkpoint)["metrics_bytes"]
        if any(b'"best": true' in data for known, data in trace.manifests.items() if known <= acknowledged):
            best = run.store.best()
            if best is None or run.store.verify(best) is not None:
                wrong.append("the best checkpoint is gone")
        run.cut_metrics(offset)
        run.timing()
        if (path / "metrics.jsonl").exists() and (path / "metrics.jsonl").read_bytes() != trace.records[:offset]:
            wrong.append("metrics.jsonl differs before the checkpoint")
        folders = (path, path / "checkpoints", path / "report")  # eval/NAME is made anew
        wrong += [f"left behind: {entry}" for folder in folders for entry in folder.glob(".t*-*")]
    return wrong


def _missing(trace: Trace, run: Path) -> list[str]:
    """A run that says it is done must be whole."""
    wrong = [f"done, but {name} is not whole" for name, data in trace.whole.items() if _read(run / name) != data]
    if _read(run / "metrics.jsonl") != trace.records:
        wrong.append("done, but metrics.jsonl is not whole")
    store = Run.open(run).store
    return wrong + [f"done, but {name} is not whole" for name in store.steps() if store.verify(store.root / name) is not None]


def _read(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def placed(subject: Subject, state: dict[str, Any]) -> None:
    """Make a crash state the subject's run. The lock's file is not written through the layer; it is there where the run is."""
    shutil.rmtree(subject.run, ignore_errors=True)
    if isinstance(run := state.get(subject.place), dict):
        lay_out(subject.run, run)
        (subject.run / ".lock").touch()


# -- the figures ---------------------------------------------------------------------------------------------------------------------


def traces(subject: Subject) -> list[Trace]:
    """A run from its beginning; and one that goes on after a kill in the middle of a save, over what that left."""
    subject.fresh()
    found = [recorded(subject)]
    subject.fresh()
    subject.train(before=lambda: signalled(9, 9))
    debris = subject.run / "checkpoints" / ".tmp-step-00000002-killed"
    debris.mkdir()
    (debris / "model.safetensors").write_bytes(b"half")
    with open(subject.run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 2, "torn')
    start = subject.home / "start" / subject.place
    shutil.copytree(subject.run, start, symlinks=True)
    return [*found, recorded(subject, start)]


def power_losses(*, steps: int, every: int, whole_every: int, crew: Crew) -> Figure:
    """Every ``every``-th state; of these every ``whole_every``-th is gone on with to the end."""

    def work(home: Path, mine: Sequence[int]) -> dict[str, Any]:
        figure, subject = Figure(name=""), Subject(home, steps)
        reference, _ = subject.reference()
        for trace in traces(subject):
            for number, (call, known, state) in enumerate(crash_states(trace.calls, trace.start and trace.start.parent)):
                if number // every % crew.cores != mine[0] or number % every:
                    continue
                placed(subject, state)
                wrong = losses(trace, subject.run, known)
                if number // every // crew.cores % whole_every == 0:
                    placed(subject, state)
                    wrong += faults(subject, subject.train(), reference)
                    figure.notes["gone on with to the end"] += 1
                figure.trial(f"after call {call} {trace.calls[call][:2]}", wrong)
        return figure.part()

    parts = crew.share(range(crew.cores), work)
    return Figure.joined("states after a power loss", max(130 // every, 1), parts)


def kinds_of(calls: list[Call], number: int) -> list[str]:
    """Which kinds of sync the call is, in words; none where it is no sync."""
    name = calls[number][0]
    if name not in ("fsync", "fsync_dir"):
        return []
    if not calls[number][1]:
        return ["name of the run itself"]
    parts = calls[number][1][1:]
    if parts[:1] == ("checkpoints",):
        if len(parts) > 1 and name == "fsync":
            return ["data of a checkpoint's manifest" if parts[-1] == "manifest.json" else "data of a checkpoint's files"]
        if len(parts) > 1:
            return ["names in a new checkpoint"]
        moved = next(call[1][-1] for call in reversed(calls[:number]) if call[0] == "move" and call[1][1:2] == ("checkpoints",))
        return [BOTH, f"names of checkpoints: after {'a pointer' if moved in ('best', 'last') else 'a commit'} alone"]
    if name == "fsync_dir":
        return [f"names in {_place(parts) or 'the run'}"]
    if len(parts) == 1 and parts[0].startswith(".tmp-"):
        return [f"data of {next(call[1][-1] for call in calls[number:] if call[0] == 'move')}"]
    return [f"data of {_place(parts)}"]


def _place(parts: Sequence[str]) -> str:
    """The first folder or the file of a path, as people call it."""
    first = "model" if parts and parts[0].startswith(".tmp-model") else parts[0] if parts else ""
    return f"{first}/" if len(parts) > 1 or first in ("model", "eval", "report") else first


BOTH = "names of checkpoints"
COVERED = {
    "names of checkpoints: after a commit alone": "the sync after the pointer covers it: pruning comes after both",
    "names of checkpoints: after a pointer alone": "the sync after the commit covers it, and a pointer is a hint",
    "data of command.txt": "for people only",
}
"""Kinds of sync that lose nothing when left out alone, and why."""


def syncs_left_out(*, steps: int, crew: Crew) -> tuple[Figure, list[dict[str, Any]]]:
    """For each kind of sync: without it, how many new states there are and in how many something is lost; all but COVERED must."""

    def work(home: Path, mine: Sequence[int]) -> dict[str, Any]:
        subject = Subject(home, steps).fresh()
        trace = recorded(subject)
        known: set[Any] = set()
        for _ in crash_states(trace.calls, seen=known):
            pass
        kinds = [kinds_of(trace.calls, number) for number in range(len(trace.calls))]
        order = list(dict.fromkeys(kind for found in kinds for kind in found))
        rows = []
        for kind in order[mine[0] :: crew.cores]:
            calls = [call for call, found in zip(trace.calls, kinds, strict=True) if kind not in found]
            rows.append({"sync": kind, "calls": len(trace.calls) - len(calls), **_count(trace, calls, subject, set(known))})
        return {"rows": rows, "order": order}

    parts = crew.share(range(crew.cores), work)
    rows = sorted((row for part in parts for row in part["rows"]), key=lambda row: parts[0]["order"].index(row["sync"]))
    figure = Figure(name="syncs that carry weight, or are covered by another", wanted=len(rows))
    for row in rows:
        row["covered"] = COVERED.get(row["sync"], "")
        figure.trial(row["sync"], [] if row["lost"] or row["covered"] else ["nothing is lost without it"])
    return figure, rows


def _count(trace: Trace, calls: list[Call], subject: Subject, seen: set[Any]) -> dict[str, Any]:
    causes: Counter[str] = Counter()
    states = 0
    for _, known, state in crash_states(calls, seen=seen):
        placed(subject, state)
        states += 1
        causes.update(losses(trace, subject.run, known)[:1])
    return {"states": states, "lost": causes.total(), "cause": next((cause for cause, _ in causes.most_common(1)), "")}
