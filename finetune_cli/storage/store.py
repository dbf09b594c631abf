"""The checkpoints of a run: each whole and verified, or not there.

A checkpoint is written into a temporary folder, file by file with its sha256, then its sealed manifest, everything synced; the
rename to ``step-N`` is the commit. Only after the commit is durable do the pointers move, and only then are old ones pruned
(renamed away first, so that a half-deleted folder never looks like a checkpoint). The manifests are the authority; the links
``best`` and ``last`` are for people and tools. Whoever writes holds the run's lock.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from finetune_cli.errors import MachineError, UserError
from finetune_cli.storage.files import (
    Content,
    checked_name,
    cleaned,
    discard,
    point,
    pointed,
    read_regular,
    sha256,
    sweep,
    temporary,
    write_new,
)
from finetune_cli.storage.records import plain, seal, unseal
from finetune_cli.storage.system import FileSystem
from finetune_cli.storage.trouble import disk_trouble, human_bytes

MANIFEST = "manifest.json"
FORMAT = 1
HELD = "held"
"""In a checkpoint's ``meta``: the step of an earlier one that stays for its sake, however few are kept."""
LOADED = {".safetensors", ".bin", ".json", ".yaml", ".txt", ".model", ".jinja"}
"""Endings of what may be read of a checkpoint."""
STEP = re.compile(r"step-(\d{8,})")
ASIDE = re.compile(r"\.aside-step-(\d{8,})-.*")
PAUSES = (0.1, 0.5, 2.0)
"""Seconds to wait before each retry of a save that met a passing fault (EIO, ESTALE)."""
HEADROOM = 1.1


class Store:
    """``root`` is the folder ``checkpoints`` of a run; ``keep`` newest checkpoints stay besides best and last (None: all)."""

    def __init__(self, root: Path, fs: FileSystem, keep: int | None = 0) -> None:
        self.root, self.fs, self.keep = Path(root), fs, keep

    # -- reading ---------------------------------------------------------------------------------------------------------------

    def steps(self) -> list[str]:
        """Names of the committed checkpoints, oldest first, by number."""
        if not self.root.is_dir():
            return []
        found = [name for name in os.listdir(self.root) if STEP.fullmatch(name) and (self.root / name).is_dir()]
        return sorted(found, key=_step)

    def read_manifest(self, path: Path) -> dict[str, Any]:
        """The sealed manifest of a checkpoint; ``ValueError`` with a one-line cause."""
        try:
            manifest = unseal(read_regular(path / MANIFEST))
        except FileNotFoundError:
            raise ValueError(f"{MANIFEST} is missing (the save did not finish)") from None
        except OSError as error:
            raise ValueError(f"{MANIFEST} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError):
            raise ValueError(f"{MANIFEST} is damaged (its own checksum does not match)") from None
        complete = isinstance(manifest.get("format"), int) and isinstance(manifest.get("files"), dict)
        if not complete:
            raise ValueError(f"{MANIFEST} is not that of a checkpoint")
        if manifest["format"] > FORMAT:
            raise ValueError(f"{MANIFEST} has format {manifest['format']}, this ftune reads {FORMAT}: upgrade ftune")
        if STEP.fullmatch(path.name) and manifest.get("step") != _step(path.name):
            raise ValueError(f"{MANIFEST} is that of step {manifest.get('step')}")
        return manifest

    def verify(self, path: Path) -> str | None:
        """Why a checkpoint cannot be used, or None: every file is there with the size and sha256 of the manifest."""
        try:
            manifest = self.read_manifest(path)
            for name, entry in manifest["files"].items():
                _check_size(path, name, entry)
            _check_listed(path, manifest["files"])
            with ThreadPoolExecutor(max_workers=4) as pool:
                list(pool.map(lambda item: _check_hash(path, item[0], item[1]), manifest["files"].items()))
        except (ValueError, TypeError, KeyError) as error:
            return str(error)
        return None

    def newest(self) -> tuple[Path | None, list[tuple[str, str]]]:
        """The newest checkpoint that verifies, and (name, cause) of each newer one that does not."""
        bad: list[tuple[str, str]] = []
        for name in reversed(self.steps()):
            fault = self.verify(self.root / name)
            if fault is None:
                return self.root / name, bad
            bad.append((name, fault))
        return None, bad

    def named(self, name: str) -> Path:
        """The checkpoint that a user named (``step-00000400``, ``400``, ``best``, ``last``), verified; no other is taken instead."""
        pointers = {"best": self.best, "last": self.last}
        path = pointers[name]() if name in pointers else self.root / _name(name) if _name(name) in self.steps() else None
        if path is None:
            there = ", ".join(self.steps()[-5:]) or "none"
            raise UserError(f"no checkpoint {name!r}; there are: {there}", where=str(self.root), fix="name one of those, or the run alone")
        fault = self.verify(path)
        if fault is not None:
            others = [other for other in reversed(self.steps()) if other != path.name]
            fix = f"use another checkpoint, such as {self.root / others[0]}" if others else "train again: the run has no other checkpoint"
            raise UserError(f"the checkpoint is damaged: {fault}", where=str(path), fix=fix)
        return path

    def best(self) -> Path | None:
        """The checkpoint that ``best`` points at; without a usable pointer the newest saved as best. Not verified here."""
        return self._pointed("best") or self._newest_best()

    def last(self) -> Path | None:
        """The checkpoint that ``last`` points at; without a usable pointer the newest. Not verified here."""
        steps = self.steps()
        return self._pointed("last") or (self.root / steps[-1] if steps else None)

    def _pointed(self, pointer: str) -> Path | None:
        name = pointed(self.root / pointer)
        return self.root / name if name in self.steps() else None

    def _newest_best(self, most: int | None = None) -> Path | None:
        """The newest checkpoint, up to step ``most``, whose manifest says that it was the best."""
        for name in reversed(self.steps()):
            if most is None or _step(name) <= most:
                with contextlib.suppress(ValueError):
                    if self.read_manifest(self.root / name).get("best") is True:
                        return self.root / name
        return None

    # -- writing ---------------------------------------------------------------------------------------------------------------

    def make(self) -> None:
        """Makes the folder itself, durable: else a power loss could take it, and the first checkpoint with it."""
        with disk_trouble(self.fs, "making the folder of checkpoints", self.root):
            self._make()

    def _make(self) -> None:
        if not self.root.is_dir():
            self.fs.mkdir(self.root)
        self.fs.fsync_dir(self.root.parent)  # also where a process was killed before it came to this

    def save(self, step: int, files: Mapping[str, Content], *, best: bool, meta: dict[str, Any]) -> Path:
        """Commits a checkpoint, moves the pointers, prunes; returns its folder. Content functions may be called again on a retry.

        A good checkpoint of that step with the same ``meta`` stays as it is (a resume saves the same bytes again; ``meta`` must tell
        histories apart, or ``rewind`` goes first); a bad one is renamed ``.corrupt-``; a good one of another history gives way.
        ``MachineError`` leaves the checkpoints of before untouched.
        """
        needed = self._estimate(files)
        with self._trouble(step, needed):
            for pause in (*PAUSES, None):
                try:
                    return self._save(step, files, best=best, meta=meta, needed=needed)
                except OSError as error:
                    if pause is None or error.errno not in (errno.EIO, errno.ESTALE):
                        raise
                    self.fs.wait(pause)
        raise AssertionError("unreachable")

    def _save(self, step: int, files: Mapping[str, Content], *, best: bool, meta: dict[str, Any], needed: int) -> Path:
        final = self.root / _name(step)
        if not self.root.is_dir():
            self._make()
        if not self._settled(final, best=best, meta=meta):
            self._require(step, needed)
            new = temporary(self.root, final.name)
            with cleaned(self.fs, new):
                self._fill(new, step, files, best=best, meta=meta)
                if final.is_dir():
                    self.fs.rename(final, temporary(self.root, final.name, kind="aside"))
                self.fs.rename(new, final)
        self.fs.fsync_dir(self.root)
        self._settle(final)
        return final

    def _settled(self, final: Path, *, best: bool, meta: dict[str, Any]) -> bool:
        """Whether this very checkpoint is there and good; a bad one is put out of the way."""
        if not final.is_dir():
            return False
        if self.verify(final) is not None:
            self.fs.rename(final, temporary(self.root, final.name, kind="corrupt"))
            return False
        manifest = self.read_manifest(final)
        same = manifest.get("best") == best and manifest.get("meta") == json.loads(json.dumps(plain(meta)))
        return bool(same)

    def _fill(self, folder: Path, step: int, files: Mapping[str, Content], *, best: bool, meta: dict[str, Any]) -> None:
        self.fs.mkdir(folder)
        entries = {}
        for name, content in files.items():
            if checked_name(name) == MANIFEST:
                raise ValueError(f"{MANIFEST} is the store's own")
            size, sha = write_new(self.fs, folder / name, content)
            entries[name] = {"bytes": size, "sha256": sha}
        manifest = {"format": FORMAT, "step": step, "best": best, "meta": meta, "files": entries}
        write_new(self.fs, folder / MANIFEST, seal(manifest))
        self.fs.fsync_dir(folder)

    def _settle(self, final: Path) -> None:
        """Pointers, then retention: after the commit is durable."""
        step = _step(final.name)
        self._point("last", final)
        self._point("best", self._best_at(step))
        self._prune(step)

    def _best_at(self, step: int) -> Path | None:
        """Where ``best`` should point after ``step``: it only moves on, so a damaged best one is refused by name rather than replaced."""
        now, newest = self._pointed("best"), self._newest_best(step)
        if now is None or newest is None:
            return now or newest
        return newest if _step(newest.name) > _step(now.name) or _step(now.name) > step else now

    def _point(self, name: str, path: Path | None) -> None:
        if path is None:
            discard(self.fs, self.root / name)
        elif pointed(self.root / name) != path.name:
            point(self.fs, self.root / name, path.name)

    def _prune(self, step: int) -> None:
        """Retention among the checkpoints up to ``step``; later ones (damaged, or of before a return) are left for ``rewind``."""
        if self.keep is None:
            return
        protected = {path.name for path in (self.best(), self.last()) if path is not None} | self._held()
        others = [name for name in self.steps() if name not in protected and _step(name) <= step]
        for name in others[: max(len(others) - self.keep, 0)]:
            self._trash(self.root / name)
        for name in os.listdir(self.root):
            aside = ASIDE.fullmatch(name)
            if aside and int(aside[1]) <= step:
                self._trash(self.root / name)

    def _held(self) -> set[str]:
        """The name of the checkpoint that stays for the sake of the last one."""
        try:
            last = self.last()
            step = None if last is None else self.read_manifest(last)["meta"].get(HELD)
        except (ValueError, KeyError, TypeError, AttributeError):
            return set()
        return {_name(step)} if type(step) is int else set()

    def _trash(self, path: Path) -> None:
        trash = temporary(self.root, path.name.lstrip("."), kind="trash")
        self.fs.rename(path, trash)
        self.fs.rmtree(trash)

    def sweep(self) -> None:
        """After any death: removes what was half made or half removed, and moves the pointers to what was committed after them."""
        if not self.root.is_dir():
            return
        sweep(self.fs, self.root)
        last = self._pointed("last")
        newer = [name for name in self.steps() if last is None or _step(name) > _step(last.name)]
        path = next((self.root / name for name in reversed(newer) if self.verify(self.root / name) is None), last)
        if path is not None:
            with disk_trouble(self.fs, "settling the checkpoints", self.root):
                self._settle(path)

    def rewind(self, step: int) -> list[str]:
        """Goes on from ``step``: later checkpoints are set aside, and removed once the run has passed them. Returns their names."""
        later = [name for name in self.steps() if _step(name) > step]
        with disk_trouble(self.fs, f"going back to step {step}", self.root):
            for name in later:
                self.fs.rename(self.root / name, temporary(self.root, name, kind="aside"))
            if later:
                self.fs.fsync_dir(self.root)
                self._point("last", self.last())
                self._point("best", self.best())
        return later

    # -- space -----------------------------------------------------------------------------------------------------------------

    def _estimate(self, files: Mapping[str, Content]) -> int:
        """Bytes that a save will need: what is known of its files, or what the newest readable checkpoint took, and a tenth."""
        known = sum(len(c) if isinstance(c, bytes) else c.stat().st_size if isinstance(c, Path) else 0 for c in files.values())
        before = 0
        for name in reversed(self.steps()):
            with contextlib.suppress(ValueError):
                before = sum(entry["bytes"] for entry in self.read_manifest(self.root / name)["files"].values())
                break
        return int(max(known, before) * HEADROOM)

    def _require(self, step: int, needed: int) -> None:
        if self.fs.free(self.root) < needed:
            self._prune(step - 1)
        if self.fs.free(self.root) < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.root))

    def preflight(self, checkpoint_bytes: int, *, other_bytes: int = 0) -> tuple[int, int]:
        """Refuses at the start a disk that cannot hold best, last, the one being written and ``keep`` more, and ``other_bytes``.

        Returns the bytes that are needed and those that are free.
        """
        folder = next(path for path in [self.root, *self.root.parents] if path.is_dir())
        needed = int(((self.keep or 0) + 3) * checkpoint_bytes * HEADROOM) + other_bytes
        free = self.fs.free(folder)
        if free < needed:
            what = f"the disk will not suffice: {human_bytes(needed)} for checkpoints and model, {human_bytes(free)} free"
            raise MachineError(what, where=str(folder), fix="free space, or choose another run.root; train.keep keeps fewer checkpoints")
        return needed, free

    def _trouble(self, step: int, needed: int) -> Any:
        last = self.last()
        fix = f"mend the disk or free space on it, then go on with resume=RUN; last good checkpoint: {last.name if last else 'none'}"
        return disk_trouble(self.fs, f"writing checkpoint step {step}", self.root, needed=needed, fix=fix)


def _name(step: int | str) -> str:
    return f"step-{int(step):08d}" if str(step).isdecimal() else str(step)


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def _check_listed(folder: Path, files: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for a file of a kind that is loaded and that the manifest does not answer for."""
    for path in sorted(folder.iterdir()):
        if path.suffix in LOADED and path.name not in (MANIFEST, *files) and not path.name.startswith("."):
            raise ValueError(f"{path.name} is not in its {MANIFEST}")


def _check_size(folder: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` unless ``name`` is a file of the folder itself with the manifest's size."""
    path = folder / checked_name(name)
    if not path.is_file():
        raise ValueError(f"{name} is missing")
    if path.resolve().parent != folder.resolve():
        raise ValueError(f"{name} is a link out of the checkpoint")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise ValueError(f"{name} has {size} bytes, the manifest says {entry['bytes']}")


def _check_hash(folder: Path, name: str, entry: Mapping[str, Any]) -> None:
    try:
        digest = sha256(folder / name)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from error
    if digest != entry["sha256"]:
        raise ValueError(f"{name} does not match its sha256 (corrupt)")
