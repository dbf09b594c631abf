"""The records of a run, one JSON object a line: metrics.jsonl, timing.jsonl and witness.jsonl, appended to and cut back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune_cli.errors import UserError
from finetune_cli.run import layout, reading
from finetune_cli.storage import FileSystem, disk_trouble, is_number, json_line, write_whole


class Records:
    """Of the run directory at ``path``."""

    def __init__(self, path: Path, fs: FileSystem) -> None:
        self.path, self.fs = path, fs
        self._tidy: set[str] = set()
        self._hashed = 0, hashlib.sha256()

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds a line to metrics.jsonl: only what is the same on every repetition. NaN is written as null."""
        self._append(layout.HISTORY, step, values)

    def record_time(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds a line to timing.jsonl: whatever the clock or the machine says."""
        self._append(layout.TIMING, step, values)

    def record_witness(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds a line to witness.jsonl: the loss of the first update after a checkpoint, which a resume from there computes again."""
        self._append(layout.WITNESS, step, values)

    def witness(self, step: int) -> dict[str, Any] | None:
        """What was last recorded of the update that ended in ``step``."""
        found = [record for record in self._witnesses() if record["step"] == step]
        return found[-1] if found else None

    def _witnesses(self) -> list[dict[str, Any]]:
        """The whole records of witness.jsonl, which is not synced: what a power loss left of it is no reason to stop."""
        kinds = {"step": int, "grounds": dict}
        records = [record for record in reading.whole_lines(self.path / layout.WITNESS) if reading.hex_number(record.get("loss"))]
        return [record for record in records if all(isinstance(record.get(key), kind) for key, kind in kinds.items())]

    def cut_witness(self, step: int) -> None:
        """Forgets for good what was recorded after ``step``: those updates are made again, perhaps otherwise."""
        path = self.path / layout.WITNESS
        kept = b"".join(json_line(record) for record in self._witnesses() if record["step"] <= step)
        if kept != reading.read(path):
            with disk_trouble(self.fs, f"cutting {layout.WITNESS}", path):
                write_whole(self.fs, path, kept)

    def _append(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        first = {"step": step, **({"epoch": values["epoch"]} if "epoch" in values else {})}
        rest = {key: values[key] for key in sorted(values) if key not in first}
        path = self.path / name
        with disk_trouble(self.fs, f"writing {name}", path):
            if name not in self._tidy:
                reading.drop_torn_line(self.fs, path)
                self._tidy.add(name)
            self.fs.append(path, json_line({**first, **rest}))

    def metrics_bytes(self, *, durable: bool = True) -> int:
        """Length of metrics.jsonl: what a checkpoint remembers. ``durable`` up to there, as it must be before the checkpoint is."""
        path = self.path / layout.HISTORY
        if not path.exists():
            return 0
        size = path.stat().st_size
        if durable:
            with disk_trouble(self.fs, f"writing {layout.HISTORY}", path):
                self.fs.fsync(path)
                self.fs.fsync_dir(self.path)
        return size

    def metrics_sha256(self, size: int) -> str:
        """Hash of the first ``size`` bytes of metrics.jsonl, which a checkpoint remembers too; read on from where the last call ended."""
        known, digest = self._hashed if self._hashed[0] <= size else (0, hashlib.sha256())
        digest = digest.copy()
        if size > known:
            digest.update(reading.read(self.path / layout.HISTORY, start=known, size=size - known))
        self._hashed = size, digest
        return digest.hexdigest()

    def check_metrics(self, offset: int, sha256: str = "") -> None:
        """Raise UserError where metrics.jsonl does not begin with the ``offset`` bytes, of that hash, that a checkpoint was made at."""
        path = self.path / layout.HISTORY
        size, fix = path.stat().st_size if path.exists() else 0, "copy the file back from where the run came from, or start a new run"
        if size < offset:
            raise UserError(f"{layout.HISTORY} has {size} bytes, the checkpoint was made at {offset}", where=str(path), fix=fix)
        if sha256 and sha256 != self.metrics_sha256(offset):  # older checkpoints have none
            what = f"the first {offset} bytes of {layout.HISTORY} are not those that the checkpoint was made at (sha256 differs)"
            raise UserError(what, where=str(path), fix=fix)

    def cut_metrics(self, offset: int) -> None:
        """Forgets the records after ``offset`` (they are made again). ``UserError`` if there are fewer bytes than that."""
        self.check_metrics(offset)
        path = self.path / layout.HISTORY
        if self._hashed[0] > offset:
            self._hashed = 0, hashlib.sha256()
        if path.exists() and path.stat().st_size > offset:
            with disk_trouble(self.fs, f"cutting {layout.HISTORY}", path):
                self.fs.truncate(path, offset)
                self.fs.fsync(path)

    def history(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl, in order."""
        return reading.lines(self.path / layout.HISTORY)

    def timing(self) -> list[dict[str, Any]]:
        """The numbers in the records of timing.jsonl; of steps done again after a resume the last ones. What is spoilt is passed over."""
        records = reading.whole_lines(self.path / layout.TIMING)
        numbers = [{key: value for key, value in record.items() if is_number(value)} for record in records]
        return list({record["step"]: record for record in numbers if "step" in record}.values())
