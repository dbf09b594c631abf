"""The names of what lies in a run directory, and names that can be given to one."""

from __future__ import annotations

import contextlib
import os
import re
import unicodedata
from datetime import datetime
from pathlib import Path

from finetune_cli.errors import UserError
from finetune_cli.storage import FileSystem, is_debris

CONFIG = "config.yaml"
COMMAND = "command.txt"
MANIFEST = "manifest.json"
STATUS = "status.json"
LOG = "log.txt"
ERROR = "error.txt"
HISTORY = "metrics.jsonl"
TIMING = "timing.jsonl"
WITNESS = "witness.jsonl"
METRICS = "metrics.json"
CHECKPOINTS = "checkpoints"
MODEL = "model"
BASE = "base"
EVALUATIONS = "eval"
REPORT = "report"
PROFILE = "profile"
CRASH = "crash"
LOCK = ".lock"
RESERVE = ".reserve"

LATEST = "latest"
SWEEPS = "sweeps"
OUTSIDE_EVALUATIONS = "evals"
EARLY = {LOCK, LOG, COMMAND, MANIFEST, STATUS, ERROR, RESERVE}
"""What a run may hold before its config is written; a directory with nothing else holds no run."""
OF_THE_DISK = {"lost+found", ".DS_Store", "Thumbs.db"}
"""What systems put into empty directories."""
STAMP = re.compile(r"\d{4}-\d\d-\d\d_\d{4}-")


def is_run(path: Path) -> bool:
    """Whether a directory is a run that began: it has a config and what only a run has beside it."""
    return os.path.isfile(path / CONFIG) and any(os.path.exists(path / name) for name in (STATUS, COMMAND, LOCK))


def lacks_config(path: Path) -> bool:
    """Whether a directory is a run that began, but for its config."""
    return not os.path.lexists(path / CONFIG) and os.path.isdir(path / CHECKPOINTS) and os.path.isfile(path / COMMAND)


def run_around(path: Path) -> Path | None:
    """The run that a file lies in, or would, wherever links lead it; None where it lies in none."""
    return next((above for above in Path(os.path.realpath(path)).parents if is_run(above)), None)


def root_of(path: Path) -> Path | None:
    """The root that a run of ours lies under, told by its name; None where the user chose the directory."""
    path = Path(os.path.abspath(path))
    if path.parent.parent.name == SWEEPS:
        return path.parent.parent.parent
    return path.parent if STAMP.match(path.name) else None


def is_unused(path: Path) -> bool:
    """Whether a directory is empty but for what a system, or a run that died before it began, left there."""
    names = {entry.name for entry in path.iterdir()} - OF_THE_DISK
    ours = {name for name in names if name in EARLY or is_debris(name)}
    return not names or (LOCK in names and ours == names)


def remove_early_files(path: Path, fs: FileSystem, *, but: str = "") -> None:
    """Removes what a run that never began put into a directory of the user's."""
    for entry in list(path.iterdir()):
        if entry.name != but and (entry.name in EARLY or entry.name == CONFIG or is_debris(entry.name)):
            with contextlib.suppress(OSError):
                fs.unlink(entry)


def refuse_links(run: Path) -> None:
    """Raise UserError where something that ftune would write or empty leads out of the run, or is no file at all."""
    for name in (*EARLY, CONFIG, HISTORY, TIMING, WITNESS, METRICS):
        path = run / name
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise UserError(f"{name} of the run is a link or no file: nothing is written through it", where=str(path), fix="remove it")
    for name in (CHECKPOINTS, MODEL, EVALUATIONS, REPORT, PROFILE, CRASH):  # a base may be linked: it is read, and proved
        path = run / name
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            what = f"{name} of the run is a link or no folder: nothing is written or removed through it"
            raise UserError(what, where=str(path), fix="put the folder itself there, or link the whole run")


def sanitise(name: str) -> str:
    """A name that needs no quoting anywhere: letters and digits of any script, ``.``, ``_`` and ``-``; at most 80 bytes."""
    text = re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", name))
    text = re.sub(r"-{2,}", "-", text).strip("-._")
    return text.encode()[:80].decode("utf-8", "ignore").strip("-._") or "run"


def stamped(name: str, now: datetime) -> str:
    """The name of a run directory; sorts by time."""
    return f"{now:%Y-%m-%d_%H%M}-{sanitise(name)}"
