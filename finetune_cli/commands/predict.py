"""``ftune predict``: labels new rows, one JSON line each, in input order, in constant memory."""

from __future__ import annotations

import errno
import glob
import gzip
import io
import os
import re
import socket
import stat
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from finetune_cli import console
from finetune_cli.config import Invocation, PredictConfig
from finetune_cli.config.choices import DataFormat
from finetune_cli.data import Caution, Rows, stream, texts
from finetune_cli.data.rows import count
from finetune_cli.data.sources import SUFFIXES, File, resolve, suffix_of
from finetune_cli.encoded import join
from finetune_cli.engine import together
from finetune_cli.engine.inference import Labelled, infer
from finetune_cli.engine.opened import Opened
from finetune_cli.engine.scoring import json_text
from finetune_cli.engine.signals import stoppable
from finetune_cli.engine.together import worked_at
from finetune_cli.errors import MachineError, UserError
from finetune_cli.run import run_around
from finetune_cli.world import Alone, follow_if_outside

_HANDLE = re.compile(r"/dev/(stdout|stderr|fd/\d+)|/proc/[^/]+/fd/\d+")


def run(config: PredictConfig, invocation: Invocation) -> float | None:
    """Read, label, write window after window; each window is flushed before the next is read."""
    follow_if_outside(together.__name__)
    _refuse_other_forms(config.output)
    if config.output is None and sys.__stdout__ is None:
        raise UserError("standard output is closed: the answers would go nowhere", where="standard output", fix="output=FILE.jsonl")
    source = _source(config)
    _refuse_losses(config.output, source)
    with stoppable() as stop, worked_at(config, stop) as (opened, world):
        started, done, cut = time.perf_counter(), 0, 0
        remarks: Counter[str] = Counter()
        notes: list[str] = []
        with sink(config.output) as out:
            format = DataFormat.text if opened.data.parallel else opened.data.format  # parallel files are text, whatever their names
            unlabelled = replace(opened.data, pattern=None, parallel=None, format=format)
            try:
                for rows in stream(source, unlabelled, format=config.format, offline=config.offline, notes=notes, say=console.say):
                    stop.check()
                    cut += _window(opened, rows, done, config.keep, out, world, remarks)
                    done += len(rows)
            except UserError as error:
                whole = config.output is not None and not _is_stream(Path(config.output))
                left = "nothing is written" if whole or not done else f"the {done:,} rows before are written"
                raise UserError(f"{error.what}; {left}", where=error.where, fix=error.fix) from error
        seconds = time.perf_counter() - started
        console.say(
            f"{count(done, 'row')} in {seconds:.1f} s, {done / max(seconds, 1e-9):.1f} rows a second"
            + (f", to {config.output}" if config.output else "")
        )
        if cut:
            console.warn(f"{cut} of {done} rows were cut at {opened.encoder.max_length} tokens")
        for note in dict.fromkeys(notes):
            (console.warn if isinstance(note, Caution) else console.say)(note)
        for told, number in remarks.items():
            console.warn(f"{number} of {done} rows {told}")
        return None


def _refuse_other_forms(output: str | None) -> None:
    """Raise UserError where the output's name promises something else than JSON Lines."""
    if output is None:
        return
    known = SUFFIXES.get(suffix_of(output))
    if known not in (None, DataFormat.jsonl, DataFormat.text):
        raise UserError(
            f"answers are written as JSON Lines, and the name says {known.value}",
            where=f"output={output}",
            fix=f"output={Path(output).name.partition('.')[0]}.jsonl, packed with .jsonl.gz or .jsonl.zst",
        )


def _refuse_losses(output: str | None, source: Any) -> None:
    """Raise UserError where the answers would stand in the place of the input, of a folder, or of a run's own records."""
    if output is None:
        return
    target = Path(output).expanduser()
    places = [] if hasattr(source, "read") else resolve(source, key="input", split="test")
    if target.exists() and any(isinstance(place, File) and os.path.samefile(target, place.path) for place in places):
        raise UserError("output would overwrite the input", where="output", fix="choose another file")
    if target.is_dir():
        raise UserError(f"{target} is a directory", where="output", fix="output=FILE.jsonl")
    if (run := run_around(target)) is not None:
        raise UserError(
            "the answers would lie in a run, whose files are its own", where=f"output={output}", fix=f"name a file outside {run}"
        )


def _source(config: PredictConfig) -> Any:
    """The input: what was named, or standard input where something is piped into it."""
    if config.input not in (None, "-"):
        return config.input
    if sys.stdin is None or sys.stdin.closed or (config.input is None and sys.stdin.isatty()):
        raise UserError("there is nothing to label", where="input", fix="input=FILE, or pipe texts in: ftune predict RUN < texts.txt")
    return sys.stdin.buffer


def _window(opened: Opened, rows: Rows, done: int, keep: list[str], out: BinaryIO, world: Alone, remarks: Counter[str]) -> int:
    """Label some rows and write them; returns how many were cut. A blank row has a null answer."""
    rows, roles, _ = opened.task.arrange(opened.task.config, rows, opened.data, labelled=False)
    if missing := [name for name in keep if not rows.has(name)]:
        raise UserError(f"the input has no column {missing[0]!r}", where="keep", fix=f"it has {', '.join(rows.columns)}")
    first = texts(rows, roles.text)
    second = texts(rows, roles.text_pair) if roles.text_pair else None
    kept = {name: rows.column(name) for name in keep}
    examples = join(list(opened.encoder.chunks(rows, roles, asked=True)))
    inferred = infer(
        opened.task,
        opened.model,
        world.share(Labelled(examples, None)),
        layout=opened.layout,
        plan=opened.plan,
        device=opened.device,
        check=world.pause,
        world=world,
    )
    remarks.update(opened.task.remarks(inferred.outputs, rows, roles))
    lines = []
    for i, answer in enumerate(opened.task.decode(inferred.outputs, rows, roles)):
        blank = not first[i].strip() and not (second and second[i].strip())
        line: dict[str, Any] = {"row": done + i + 1, "text": first[i]}
        if second is not None:
            line["text_pair"] = second[i]
        line |= dict.fromkeys(answer) if blank else answer
        for name, column in kept.items():
            line[f"input_{name}" if name in line else name] = column[i].as_py()
        lines.append(json_text(line))
    out.write(("\n".join(lines) + "\n").encode("utf-8", "backslashreplace") if lines else b"")
    out.flush()
    return examples.counts.cut_rows


@contextmanager
def sink(output: str | None) -> Iterator[BinaryIO]:
    """Standard output, a device or pipe, or a file that appears whole under its name (of a link: where it leads) when all is written."""
    if output is None:
        yield sys.stdout.buffer
        return
    target = Path(output).expanduser()
    with (
        _stream(target) if _is_stream(target) else _whole(Path(os.path.realpath(target))) as file,
        _packed(file, target.name.lower()) as out,
    ):
        yield out


def _is_stream(target: Path) -> bool:
    """Whether a place is written to and never replaced: a device, a pipe, or one of this process's own handles by name."""
    if _HANDLE.fullmatch(str(target)):
        return True
    try:
        mode = os.stat(target).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


@contextmanager
def _stream(target: Path) -> Iterator[BinaryIO]:
    """A character device, a pipe that somebody reads, or an open handle, written as it is."""
    try:
        if stat.S_ISBLK(os.stat(target).st_mode):
            raise UserError("that is a disk", where=f"output={target}", fix="choose another file")
        handle = os.open(
            target, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY
        )  # a pipe without a reader is refused, not waited for
    except OSError as error:
        unread = error.errno == errno.ENXIO
        what = "nobody reads the pipe" if unread else f"cannot write there: {error.strerror}"
        raise UserError(what, where=f"output={target}", fix="start its reader first" if unread else "choose another file") from error
    os.set_blocking(handle, True)
    try:
        with open(handle, "wb") as file:
            yield file
    except BrokenPipeError:
        raise  # as on standard output
    except OSError as error:
        raise MachineError(f"writing {target} failed: {error.strerror}", where="output", fix="another file") from error


@contextmanager
def _whole(target: Path) -> Iterator[BinaryIO]:
    """A new file beside the target that takes its place at the end."""
    mine = f".{target.name}.unfinished-{socket.gethostname()}-"
    _clear_away(target.parent, mine)
    unfinished = target.with_name(f"{mine}{os.getpid()}")
    try:
        file = open(unfinished, "wb")  # noqa: SIM115  # opened apart, so that its errors are the user's
    except OSError as error:
        raise UserError(f"cannot write there: {error.strerror}", where=f"output={target}", fix="choose another file") from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    except OSError as error:
        raise MachineError(f"writing {target} failed: {error.strerror}", where="output", fix="free space, or another disk") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _clear_away(folder: Path, begun: str) -> None:
    """Remove what predictions into the same file left that were killed on this machine."""
    if os.name != "posix":
        return  # elsewhere asking after a process would end it
    for path in folder.glob(f"{glob.escape(begun)}*"):
        pid = path.name.removeprefix(begun)
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            with suppress(OSError):
                path.unlink()
        except (OSError, ValueError):
            continue


@contextmanager
def _packed(file: BinaryIO, name: str) -> Iterator[BinaryIO]:
    """The file itself, or what packs into it, by the ending of its name."""
    if name.endswith(".gz"):
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as out:
            yield cast(BinaryIO, out)
    elif name.endswith(".zst"):
        import pyarrow as pa

        with pa.CompressedOutputStream(pa.PythonFile(_KeptOpen(file), "w"), "zstd") as packed:
            yield packed
    else:
        yield file


class _KeptOpen(io.RawIOBase):
    """A file that what writes into it cannot close: it is synced afterwards."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self.file.write(data)
