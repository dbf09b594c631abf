"""The run that is mistreated: a tiny real ``ftune train``, started as forks of one warmed process, and what must be equal at its end."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import json
import os
import pkgutil
import re
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from forked import FTUNE, SHARED, Forks
from ran import labelled_rows, write_rows

LIMIT_SECONDS = 120
ROWS = (("train", 32), ("validation", 8), ("test", 8))
OPTIONS = [
    *("model=tiny", "model.shape.layers=1", "model.shape.hidden=32", "model.shape.heads=2", "model.shape.intermediate=64"),
    *("model.shape.positions=64", "train.batch_size=8", "train.save_every=1", "train.eval_every=2", "train.log_every=1"),
    *("train.keep=1", "optimizer.lr=3e-3", "device=cpu", "device.threads=1", "resume=auto"),
    *(f"data.{name}=data/{name}.csv" for name, _ in ROWS),
]
MEMORY = 5e5
"""Bytes that are said to be free, so that a batch goes through in several micro-batches."""
RESUMED = re.compile(r"^resuming from step (\d+)", re.MULTILINE)
OF_THE_RUN = ("config.yaml", "metrics.json", "metrics.jsonl")
DEBRIS = (".tmp-", ".trash-", ".aside-", ".corrupt-", ".reserve")


def warm(forks: Forks) -> None:
    """Import all that a train needs, once; forks of this process pay nothing for it. No torch operation runs here."""
    import finetune_cli

    own = pkgutil.walk_packages(finetune_cli.__path__, "finetune_cli.")
    names = [module.name for module in own if not module.name.endswith((".__main__", ".reload_check"))]
    for name in [*SHARED, *FTUNE, "matplotlib.figure", *names]:
        with contextlib.suppress(ImportError):  # an extra that is not installed
            importlib.import_module(name)
    from finetune_cli.engine import environment, export

    export.subprocess = forks.reloading()
    environment.free_memory = lambda device: MEMORY
    gc.collect()
    gc.freeze()


@dataclass(frozen=True, slots=True)
class Ended:
    """How a train ended: exit code (negative: the signal that killed it), what it said, seconds of processor time it took."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def resumed(self) -> int:
        """The step that it went on from; 0: it began anew."""
        found = RESUMED.findall(self.err)
        return int(found[-1]) if found else 0

    @property
    def told(self) -> str:
        """Its last words."""
        return " | ".join(self.err.strip().splitlines()[-3:])


Before = Callable[[], Callable[[], None] | None]
"""Runs in the fork before the command; may return what runs after it."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A run of ``steps`` updates in ``home``; the same command starts it and goes on with it."""

    home: Path
    steps: int
    place: str = "run"

    @property
    def run(self) -> Path:
        return self.home / self.place

    @property
    def commits(self) -> Path:
        """Outside the run: the step of every checkpoint that got its name."""
        return self.home / "commits.txt"

    def fresh(self) -> Subject:
        """Itself, with data and without a run."""
        self.home.mkdir(exist_ok=True)
        _empty(self.home)
        for shift, (name, count) in enumerate(ROWS):
            write_rows(self.home / "data" / f"{name}.csv", labelled_rows(count, shift=100 * shift))
        return self

    def train(self, *more: str, before: Before | None = None, kill_after: float | None = None) -> Ended:
        """``ftune train`` to its end, or to SIGKILL after so many seconds of processor time: a busy machine changes no kill."""
        for name in ("out.txt", "err.txt"):  # a kill may come before the fork has made them
            (self.home / name).write_bytes(b"")
        child = os.fork()
        if child == 0:
            self._become([*OPTIONS, f"run.dir={self.place}", f"train.steps={self.steps}", *more], before)
        watched, deadline = os.pidfd_open(child), time.monotonic() + LIMIT_SECONDS
        try:
            while not select.select([watched], [], [], 1.0 if kill_after is None else max((kill_after - busy(child)) / 2, 0.0005))[0]:
                if time.monotonic() > deadline or kill_after is not None and busy(child) >= kill_after:
                    os.kill(child, signal.SIGKILL)
                    break
        finally:
            os.close(watched)
        _, status, usage = os.wait4(child, 0)
        out, err = ((self.home / name).read_text("utf-8", "replace") for name in ("out.txt", "err.txt"))
        return Ended(os.waitstatus_to_exitcode(status), out, err, usage.ru_utime + usage.ru_stime)

    def _become(self, arguments: Sequence[str], before: Before | None) -> None:
        """In the fork: the command as its own process would run it, up to its exit code."""
        code = 99
        try:
            os.chdir(self.home)
            for number, name, how in ((0, os.devnull, os.O_RDONLY), (1, "out.txt", os.O_WRONLY), (2, "err.txt", os.O_WRONLY)):
                handle = os.open(name, how | (os.O_CREAT | os.O_TRUNC if number else 0), 0o666)
                os.dup2(handle, number)
                os.close(handle)
            after = before() if before else None
            sys.argv = ["ftune", "train", *arguments]
            from finetune_cli.cli import entry

            try:
                entry()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            left = [t.name for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
            if left:
                print(f"threads that would keep the process alive: {left}", file=sys.stderr)
                code = 98
            if after:
                after()
        except BaseException:  # noqa: BLE001  # nothing may go on in the fork
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def reference(self) -> tuple[dict[str, str], float]:
        """What the run leaves in this very place when nobody disturbs it, and the processor time it takes; found out once."""
        known = self.home.parent / f"{self.home.name}-{self.place.replace('/', '-')}-{self.steps}.json"
        if not known.exists():
            ended = self.fresh().train()
            wrong = faults(self, ended, content(self.run) if not ended.code else {})
            if wrong:
                raise RuntimeError(f"the undisturbed run is bad already: {wrong}")
            known.write_text(json.dumps([content(self.run), ended.seconds]))
        found, seconds = json.loads(known.read_text())
        return found, seconds

    def committed(self) -> int:
        """The newest checkpoint that ever got its name."""
        return max(map(int, self.commits.read_text().split()), default=0) if self.commits.exists() else 0


def busy(process: int) -> float:
    """Seconds of processor time that a process has had so far."""
    return time.clock_gettime((~process << 3) | 2)  # Linux: the clock of a process, as clock_getcpuclockid gives it


def _empty(folder: Path) -> None:
    """Remove all in a folder but what is mounted there."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            _empty(entry)
            with contextlib.suppress(OSError):
                entry.rmdir()
        else:
            entry.unlink()


def content(run: Path) -> dict[str, str]:
    """What must be equal, by name: the sha256 of every file that does not tell the time or the machine, and where the links point.

    Weights, optimizer, counters, manifests, metrics.jsonl, metrics.json, the exported model, predictions.
    """
    found = {}
    for path in sorted(path for pattern in ("*.*", "checkpoints/step-*/*", "model/*", "eval/*/*") for path in run.glob(pattern)):
        if path.is_file() and (path.parent != run or path.name in OF_THE_RUN):
            found[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found | {name: os.readlink(run / "checkpoints" / name) for name in ("best", "last")}


def faults(subject: Subject, ended: Ended, reference: dict[str, str]) -> list[str]:
    """What is wrong with a run that has ended: not done, not equal to the one never disturbed, something left lying, a gap or double."""
    run = subject.run
    if ended.code:
        return [f"could not be finished: exit {ended.code}: {ended.told}"]
    wrong = [f"left behind: {path.name}" for path in sorted(run.rglob("*")) if path.name.startswith(DEBRIS)]
    found = content(run)
    wrong += [f"differs: {name}" for name in sorted(found.keys() | reference.keys()) if found.get(name) != reference.get(name)]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    if steps != list(range(1, subject.steps + 1)):
        wrong.append(f"metrics.jsonl has a gap or a double: {steps}")
    state = json.loads((run / "status.json").read_bytes()).get("state")
    if state != "done" or not (run / "report" / "index.html").is_file():
        wrong.append(f"no report, or not done: {state}")
    return wrong
