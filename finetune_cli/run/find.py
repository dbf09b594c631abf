"""What ``ckpt=X`` means: a run, a checkpoint in one, a model directory, ``latest``, or a name on the hub.

What exists on disk is a path; so is whatever looks like one. Only a bare name that is neither goes to the hub. Checkpoints of ftune are
verified before anything is loaded from them, and a damaged one is never replaced by another in silence.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from finetune_cli.errors import UserError
from finetune_cli.run import layout
from finetune_cli.storage import MANIFEST, REAL, Store, holder, is_debris, parsed, pointed, read_regular

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
FILE_ENDINGS = (
    *(".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".feather", ".txt", ".conll", ".gz", ".zst"),
    *(".yaml", ".yml", ".safetensors", ".bin", ".pt", ".pth", ".ckpt"),
)
MODEL_CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class Found:
    """Where the weights lie and what is known beside them; ``hub``: ``weights.as_posix()`` is the hub's name."""

    weights: Path
    run: Path | None
    config: Path | None
    kind: Literal["run", "checkpoint", "model", "hub"]
    checkpoint: str | None


def find(ckpt: str, *, root: str) -> Found:
    """Resolves ``ckpt`` (runs lie under ``root``); ``UserError`` with near names if it is not there, with the cause if damaged."""
    text = str(ckpt)
    if not text.strip():
        fix = "name a run, a checkpoint, a model directory, or latest"
        raise UserError("ckpt= is empty (an unset shell variable?)", where="ckpt", fix=fix)
    if text.startswith("hub:"):
        return _hub(text.removeprefix("hub:"))
    path, runs = Path(os.path.expanduser(text)), Path(os.path.expanduser(root))
    if _exists(path):
        return _on_disk(Path(os.path.abspath(path)), text)
    if text == layout.LATEST:
        return _run(_latest(runs))
    if looks_like_path(text, root=root):
        raise _missing(text, path, runs)
    return _hub(text)


def looks_like_path(text: str, *, root: str = "") -> bool:
    """Whether a value that is not on disk was meant as a path rather than as a name on the hub."""
    if text.startswith(("./", "../", "/", "~")) or text in (".", "..") or text.lower().endswith(FILE_ENDINGS):
        return True
    if not HUB_NAME.fullmatch(text) or layout.STAMP.match(text):
        return True
    first = text.split("/")[0]
    return "/" in text and (_exists(Path(first)) or first == os.path.basename(os.path.normpath(root or ".")))


def _hub(name: str) -> Found:
    if not HUB_NAME.fullmatch(name):
        fix = "write hub:OWNER/NAME, or the path of a run or model directory"
        raise UserError(f"{name!r} is no name of a hub model", where="ckpt", fix=fix)
    return Found(weights=Path(name), run=None, config=None, kind="hub", checkpoint=None)


def _exists(path: Path) -> bool:
    return os.path.lexists(path)


def _on_disk(path: Path, typed: str) -> Found:
    if path.parent.name == layout.CHECKPOINTS and path.name in ("best", "last"):
        return _checkpoint(_named(path.parent, path.name), typed)
    if not path.is_dir() and path.name == layout.LATEST and pointed(path):
        path = path.parent / str(pointed(path))
    if not path.is_dir():
        raise _not_a_folder(path, typed)
    path = path.resolve()
    if layout.is_run(path):
        return _run(path)
    if layout.lacks_config(path):
        fix = f"copy it back from a backup or from a checkpoint: cp {path}/checkpoints/step-…/{layout.CONFIG} {path}/"
        raise UserError(f"the run has no {layout.CONFIG}", where=str(path / layout.CONFIG), fix=fix)
    if (path / MANIFEST).is_file() or path.parent.name == layout.CHECKPOINTS:
        return _checkpoint(path, typed)
    if (path / MODEL_CONFIG).is_file():
        run = path.parent if path.name == layout.MODEL and layout.is_run(path.parent) else None
        config = _config(path, run)
        return Found(weights=path, run=run, config=config, kind="model", checkpoint=None)
    raise _nothing_here(path, typed)


def _run(path: Path) -> Found:
    """A run means its best checkpoint; trained without validation, its last; without any, its ``model/``."""
    path = path.resolve()
    store = Store(path / layout.CHECKPOINTS, REAL)
    name = "best" if store.best() else "last" if store.last() else None
    if name is not None:
        weights = _named(store.root, name)
        return Found(weights=weights, run=path, config=_config(weights, path), kind="run", checkpoint=weights.name)
    model = path / layout.MODEL
    if (model / MODEL_CONFIG).is_file():
        return Found(weights=model, run=path, config=_config(model, path), kind="run", checkpoint=None)
    if who := holder(path / layout.LOCK):
        raise UserError(f"the run has no checkpoint yet: {who} is training it", where=str(path), fix="wait for its first checkpoint")
    raise UserError("the run has no checkpoint yet", where=str(path), fix=f"go on with it: ftune train resume={path}")


def _named(checkpoints: Path, name: str) -> Path:
    return Store(checkpoints, REAL).named(name).resolve()


def _checkpoint(path: Path, typed: str) -> Found:
    """A checkpoint folder, in a run or copied out of one."""
    if is_debris(path.name) or path.name.startswith("."):
        raise UserError("this is no checkpoint, but what an unfinished or damaged one left", where=typed, fix=_others(path.parent))
    fault = Store(path.parent, REAL).verify(path)
    if fault is not None:
        raise UserError(f"the checkpoint is damaged: {fault}", where=typed, fix=_others(path.parent, but=path.name))
    parent = path.parent.parent
    run = parent if path.parent.name == layout.CHECKPOINTS and layout.is_run(parent) else None
    return Found(weights=path, run=run, config=_config(path, run), kind="checkpoint", checkpoint=path.name)


def _config(weights: Path, run: Path | None) -> Path | None:
    """The config beside the weights, else the run's."""
    beside = weights / layout.CONFIG
    return beside if beside.is_file() else run / layout.CONFIG if run is not None else None


def _others(checkpoints: Path, but: str = "") -> str:
    names = [name for name in Store(checkpoints, REAL).steps() if name != but]
    return f"use another checkpoint: {', '.join(names[-3:])}" if names else "name another run"


# -- latest --------------------------------------------------------------------------------------------------------------------------


def _runs(root: Path) -> list[Path]:
    """The runs under a root, jobs of sweeps too."""
    found: set[Path] = set()
    for pattern in ("*", f"{layout.SWEEPS}/*/*"):
        found.update(path for path in root.glob(pattern) if not path.is_symlink() and layout.is_run(path))
    return sorted(found)


def _status(run: Path) -> tuple[str, float]:
    """(state, time of the last sign of life) of a run."""
    try:
        status = parsed(read_regular(run / layout.STATUS))
        return str(status["state"]), datetime.fromisoformat(status["time"]).timestamp()
    except (OSError, ValueError, TypeError, KeyError):
        return "", 0.0


def _latest(root: Path) -> Path:
    """The run that finished last."""
    runs = _runs(root)
    done = [(time, run) for run in runs for state, time in [_status(run)] if state == "done"]
    if done:
        return max(done)[1]
    if runs:
        what, fix = f"none of the {len(runs)} runs under {root} is finished", f"name one, such as {runs[-1]}"
    else:
        what, fix = f"there is no run under {root}", "train one: ftune train +exp=sentiment; or set run.root"
    raise UserError(what, where=str(root), fix=fix)


# -- errors --------------------------------------------------------------------------------------------------------------------------


def _missing(typed: str, path: Path, root: Path) -> UserError:
    parent = path.parent
    while not os.path.isdir(parent) and parent != parent.parent:
        parent = parent.parent
    lost = path.relative_to(parent).parts[0] if path != parent else path.name
    near = _near(lost, [child for child in _children(parent) if child.is_dir()] + _runs(root))
    fix = f"did you mean {near}?" if near else "give the path of a run, a checkpoint or a model directory"
    return UserError(f"{typed}: no such run or model", where="ckpt", fix=fix)


def _near(name: str, candidates: Iterable[Path]) -> Path | None:
    by_name = {path.name: path for path in candidates}
    if name in by_name:
        return by_name[name]
    close = difflib.get_close_matches(name, by_name, n=1, cutoff=0.6)
    return by_name[close[0]] if close else None


def near_run(name: str, *, root: str) -> Path | None:
    """The newest run under ``root`` whose name is like this one, with or without its date."""
    runs = _runs(Path(os.path.expanduser(root)))
    by_name = {layout.STAMP.sub("", run.name): run for run in runs} | {run.name: run for run in runs}
    last = name.rpartition("/")[2]
    inside = [run for run in runs if len(last) > 2 and last.lower() in run.name.lower()]
    close = difflib.get_close_matches(last, by_name, n=1, cutoff=0.6)
    return inside[-1] if inside else by_name[close[0]] if close else None


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(child for child in folder.iterdir() if not child.name.startswith("."))
    except OSError:
        return []


def _not_a_folder(path: Path, typed: str) -> UserError:
    if path.is_symlink() and not path.exists():
        return UserError(f"{typed} is a link to {os.readlink(path)}, which is not there", where="ckpt", fix="mend the link, or name a run")
    folder = next((above for above in list(path.parents)[:3] if layout.is_run(above) or (above / MODEL_CONFIG).is_file()), None)
    fix = f"did you mean {folder}?" if folder else "name a run, a checkpoint or a model directory"
    return UserError(f"{typed} is a file, not a run or model directory", where="ckpt", fix=fix)


def _nothing_here(path: Path, typed: str) -> UserError:
    """A folder that is neither; the runs or models in it, or the run around it, are named."""
    if who := holder(path / layout.LOCK):
        raise UserError(f"the run is only just beginning: it is in use by {who}", where=str(path), fix="wait for it or stop it")
    inside = _runs(path) or [child for child in _children(path) if (child / MODEL_CONFIG).is_file()]
    around = [above for above in list(path.parents)[:2] if layout.is_run(above)]
    near = around or inside[::-1]
    fix = f"did you mean {near[0]}?" if near else "name a run, a checkpoint in one, or a directory with config.json"
    return UserError(f"{typed}: no run or model in this directory", where="ckpt", fix=fix)
