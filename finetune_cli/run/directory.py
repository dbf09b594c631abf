"""One run directory: made without races, written whole, opened again for resume, eval and predict.

Everything ftune knows of a run lies in it under a fixed name, and every path inside is relative, so a run can be moved or copied.
``metrics.jsonl`` holds what is the same on every repetition; whatever the clock says goes to ``timing.jsonl`` and ``status.json``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from finetune_cli.config.schema import RunConfig
from finetune_cli.errors import MachineError, UserError
from finetune_cli.run import layout, reading
from finetune_cli.run.claim import claim, numbered, unwritable
from finetune_cli.run.records import Records
from finetune_cli.said import command_line, without_secrets
from finetune_cli.storage import (
    REAL,
    Content,
    FileSystem,
    Lock,
    Store,
    cause,
    cleaned,
    discard,
    disk_trouble,
    json_bytes,
    machine_error,
    make_folders,
    point,
    read_regular,
    seal,
    sweep,
    unseal,
    write_folder,
    write_whole,
)

State = Literal["running", "done", "failed", "diverged", "stopped", "preempted"]
LIFE_SECONDS = 10.0
"""``running`` is written to status.json at most this often; any other state at once."""


class Run(Records):
    """A run directory at ``path`` (absolute). ``create`` makes one, ``open`` takes an existing one; writers hold ``lock()``."""

    def __init__(self, path: Path, *, root: Path | None = None, fs: FileSystem = REAL, keep: int | None = None) -> None:
        super().__init__(Path(os.path.abspath(path)), fs)
        self.root = Path(os.path.abspath(root)) if root is not None else None
        self.store = Store(self.path / layout.CHECKPOINTS, fs, keep)
        self._lock: Lock | None = None
        self._made: list[Path] = []
        self._started = _now()
        self._last_sign = -LIFE_SECONDS

    @classmethod
    def create(cls, config: RunConfig, *, name: str, now: datetime | None = None, fs: FileSystem = REAL, keep: int = 0) -> Run:
        """A new, locked run directory: ``run.dir``, or ``root/YYYY-MM-DD_HHMM-NAME`` with -2, -3 … where that is taken.

        ``UserError`` if it cannot be made or written, or if ``run.dir`` is in use or holds anything.
        """
        path, made, lock = claim(config, name=config.name or name, now=now or datetime.now(), fs=fs)
        run = cls(path, root=Path(config.root), fs=fs, keep=keep)
        run._made, run._lock = made, lock
        return run

    @classmethod
    def open(cls, path: Path | str, *, root: Path | str | None = None, fs: FileSystem = REAL, keep: int | None = None) -> Run:
        """An existing run, for reading; whoever writes gives ``keep`` and calls ``lock()`` first. ``UserError`` if no run is there."""
        path = Path(os.path.expanduser(path))
        if not layout.is_run(path):
            raise UserError("no run here (no config.yaml)", where=str(path), fix="name a directory that ftune train made")
        run = cls(path, root=layout.root_of(path) if root is None else Path(root), fs=fs, keep=keep)
        run._started = str(run.status().get("started", run._started))
        return run

    @staticmethod
    def exists(path: Path | str) -> bool:
        """Whether a directory holds a run that began (``resume=auto`` goes on with it)."""
        return layout.is_run(Path(os.path.expanduser(path)))

    def lock(self) -> Lock:
        """The lock of this run, taken now unless held already; ``UserError`` if another process has it.

        Whoever takes it also sweeps up what a dead process left half made.
        """
        if self._lock is None or not self._lock.held:
            layout.refuse_links(self.path)
            lock = Lock(self.path / layout.LOCK)
            try:
                for folder in (self.path, self.report_dir):
                    if folder.is_dir():
                        sweep(self.fs, folder)
                self.store.sweep()
            except BaseException:
                lock.release()
                raise
            self._lock = lock
        return self._lock

    def close(self) -> None:
        """Gives the lock back (death does it too)."""
        if self._lock is not None:
            self._lock.release()

    def abandon(self) -> None:
        """Removes a run that never began: the directory if we made it, else what we put into it; and folders made above it."""
        self.close()
        with contextlib.suppress(OSError):
            if self.path in self._made:
                self.fs.rmtree(self.path)
                for folder in reversed(self._made):
                    if folder != self.path:
                        os.rmdir(folder)
            else:
                layout.remove_early_files(self.path, self.fs)

    # -- whole files -----------------------------------------------------------------------------------------------------------

    def _write(self, name: str, data: bytes, *, durable: bool = True) -> None:
        with disk_trouble(self.fs, f"writing {name}", self.path / name):
            write_whole(self.fs, self.path / name, data, durable=durable)

    def write_config(self, text: str) -> None:
        """The resolved config; with it the run exists for ``open``, ``find`` and resume, so it is the last of the first files."""
        self._write(layout.CONFIG, reading.utf8(text))

    def config_sha256(self, text: str | None = None) -> str:
        """Hash of the config as it is on disk, or as ``text`` would be."""
        data = reading.read(self.config_path) if text is None else reading.utf8(text)
        return hashlib.sha256(data).hexdigest()

    @property
    def config_path(self) -> Path:
        return self.path / layout.CONFIG

    def write_command(self, argv: Sequence[str]) -> None:
        """What was typed, one line per start of the run; secrets are left out."""
        before = reading.read(self.path / layout.COMMAND)
        self._write(layout.COMMAND, before + reading.utf8(command_line(argv) + "\n"))

    def write_manifest(self, record: dict[str, Any]) -> None:
        """The sealed record of versions, hardware, plan, seed, files and labels."""
        self._write(layout.MANIFEST, seal(record))

    def manifest(self) -> dict[str, Any]:
        """The sealed record; ``UserError`` if it is missing or damaged."""
        path = self.path / layout.MANIFEST
        try:
            return unseal(read_regular(path))
        except (OSError, ValueError) as error:
            fault = "missing" if isinstance(error, FileNotFoundError) else str(error)
            what = f"the run's {layout.MANIFEST} is {fault}"
            raise UserError(what, where=str(path), fix="copy it back from a backup, or train again") from error

    def write_metrics(self, scores: Mapping[str, Any]) -> None:
        """The final scores per split."""
        self._write(layout.METRICS, json_bytes(scores))

    def metrics(self) -> dict[str, Any]:
        """The final scores per split; empty before the run is done."""
        return reading.object(self.path / layout.METRICS)

    def write_error(self, text: str) -> None:
        """The traceback of a bug (exit 1), as far as the disk lets us."""
        with contextlib.suppress(MachineError):
            self._write(layout.ERROR, reading.utf8(without_secrets(text)))

    # -- state -----------------------------------------------------------------------------------------------------------------

    def set_status(self, state: State, *, step: int, code: int | None = None) -> None:
        """How the run stands. ``running`` is a sign of life: cheap, and written at most every ten seconds.

        A bad end is written as far as the disk lets us: a full one must not hide what ended the run.
        """
        running = state == "running"
        if running and time.monotonic() - self._last_sign < LIFE_SECONDS:
            return
        self._last_sign = time.monotonic() if running else -LIFE_SECONDS
        status = {"state": state, "step": step, "exit_code": code, "pid": os.getpid(), "host": socket.gethostname()}
        with contextlib.suppress(*() if state in ("running", "done") else (MachineError,)):
            self._write(layout.STATUS, json_bytes({**status, "started": self._started, "time": _now()}), durable=not running)

    def status(self) -> dict[str, Any]:
        """The last status; empty if there is none. State ``running`` while we hold the lock: that process died without a word."""
        return reading.object(self.path / layout.STATUS)

    def link_latest(self) -> None:
        """Points ``latest`` in the root at this run, if it is done and lies under the root."""
        if self.root is None or self.root not in self.path.parents or self.status().get("state") != "done":
            return
        link = self.root / layout.LATEST
        if link.is_dir() and not link.is_symlink():
            return  # somebody's own directory
        with disk_trouble(self.fs, "linking latest", link):
            point(self.fs, link, self.path.relative_to(self.root).as_posix())

    # -- folders ---------------------------------------------------------------------------------------------------------------

    @property
    def log_path(self) -> Path:
        return self.path / layout.LOG

    @property
    def model_dir(self) -> Path:
        return self.path / layout.MODEL

    @property
    def base_dir(self) -> Path:
        return self.path / layout.BASE

    @property
    def report_dir(self) -> Path:
        return self.path / layout.REPORT

    def write_base(self, files: Mapping[str, Content]) -> Path:
        """Makes ``base/`` whole: the weights that the run's adapters stand on, where nothing else holds them."""
        with disk_trouble(self.fs, "writing the base", self.base_dir):
            write_folder(self.fs, self.base_dir, files, link=True)
        return self.base_dir

    def write_model(self, files: Mapping[str, Content | Mapping[str, Content]]) -> Path:
        """Makes ``model/`` whole, in place of any before; files given as paths share their bytes where possible.

        Space that was reserved for it is given back first.
        """
        self.release_reserve()
        with disk_trouble(self.fs, "writing the model", self.model_dir):
            write_folder(self.fs, self.model_dir, files, link=True)
        return self.model_dir

    def write_profile(self, files: Mapping[str, Content]) -> Path:
        """Makes ``profile/`` whole: what a profiler saw of some updates."""
        path = self.path / layout.PROFILE
        with disk_trouble(self.fs, "writing the profile", path):
            write_folder(self.fs, path, files)
        return path

    def profile(self, name: str) -> dict[str, Any]:
        """A JSON file of ``profile/``; empty if there is none."""
        return reading.object(self.path / layout.PROFILE / name)

    @property
    def crash_dir(self) -> Path:
        return self.path / layout.CRASH

    def write_crash(self, files: Mapping[str, Content]) -> bool:
        """Makes ``crash/`` whole: what is known of the end of a run that ended badly. False where the disk does not let us."""
        try:
            with disk_trouble(self.fs, "writing the crash", self.crash_dir):
                write_folder(self.fs, self.crash_dir, files)
        except MachineError:
            return False
        return True

    def crash(self) -> dict[str, Any]:
        """The summary of the last bad end; empty if there was none."""
        return reading.object(self.crash_dir / "crash.json")

    def crash_updates(self) -> list[dict[str, Any]]:
        """The last updates before it."""
        return reading.lines(self.crash_dir / "updates.jsonl")

    def write_replay(self, found: Mapping[str, Any]) -> None:
        """What a replay found, into ``crash/``."""
        with disk_trouble(self.fs, "writing the replay", self.crash_dir):
            make_folders(self.fs, self.crash_dir)
            write_whole(self.fs, self.crash_dir / "replay.json", json_bytes(found))

    def evaluation_dir(self, name: str, *, own: bool = False) -> Path:
        """A new folder ``eval/NAME`` (-2, -3 … where taken); ``./evals/NAME`` if the run cannot be written.

        ``own``: train's own evaluation, which a resume makes again in the same place.
        """
        parent = self.path / layout.EVALUATIONS
        layout.refuse_links(self.path)
        try:
            if own and (parent / layout.sanitise(name)).is_dir():
                self.fs.rmtree(parent / layout.sanitise(name))
            return _new_folder(self.fs, parent, name)
        except OSError as error:
            if own or not unwritable(error):
                raise machine_error(self.fs, f"making {parent}", parent, error) from error
            return new_evaluation_dir(name, fs=self.fs)

    def reserve(self, size: int) -> bool:
        """Sets ``size`` bytes of the disk aside for the final model; False where the platform cannot."""
        path = self.path / layout.RESERVE
        self.release_reserve()
        with disk_trouble(self.fs, "reserving space for the final model", path, needed=size), cleaned(self.fs, path):
            return self.fs.allocate(path, size)

    def release_reserve(self) -> None:
        """Gives reserved space back; without any it does nothing."""
        path = self.path / layout.RESERVE
        with disk_trouble(self.fs, "releasing reserved space", path):
            discard(self.fs, path)


def new_evaluation_dir(name: str, *, fs: FileSystem = REAL) -> Path:
    """A new folder ``./evals/NAME``, for scores of a model that is no run of ours or cannot be written to."""
    parent = Path(os.path.abspath(layout.OUTSIDE_EVALUATIONS))
    try:
        return _new_folder(fs, parent, name)
    except OSError as error:
        if unwritable(error):
            what = f"cannot write in {parent}: {cause(error)}"
            raise UserError(what, where=str(parent), fix="go to a directory that you may write in") from error
        raise machine_error(fs, f"making {parent}", parent, error) from error


def _new_folder(fs: FileSystem, parent: Path, name: str) -> Path:
    make_folders(fs, parent)
    for candidate in numbered(parent / layout.sanitise(name)):
        with contextlib.suppress(FileExistsError):
            fs.mkdir(candidate)
            fs.fsync_dir(parent)
            return candidate
    raise AssertionError("unreachable")


def _now() -> str:
    return datetime.now(UTC).astimezone().isoformat(timespec="milliseconds")
