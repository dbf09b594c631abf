"""Commands and jobs in processes of their own: how long they took, and how much memory their whole tree held.

A job is a function of a benchmark, run as ``python FILE --job NAME JSON``; what it returns is the last line of its stdout, as JSON.
Memory is sampled: of every process of the tree its proportional set size (PSS), in which a page that several share counts once in all,
and the high-water mark of each one's resident set (RSS), which the kernel keeps.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
SAMPLE_SECONDS = 0.1
"""Between two looks at the memory of a command; longer where looking takes long, so that it costs a tenth of one core at most."""
Popen: Any = subprocess.Popen
"""What starts every process; the tests put forks in its place, which begin sooner."""
Jobs = Mapping[str, Callable[..., Any]]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Memory:
    """The most that a tree of processes held at one time, in MB (2^20 bytes)."""

    tree_mb: float
    """PSS summed over the tree."""
    process_mb: float
    """RSS of its largest process."""
    processes: int
    """How many processes there were when the tree was largest."""


@dataclass(frozen=True)
class Ended:
    """How a process ended and what it took."""

    code: int
    out: str
    err: str
    wall_seconds: float
    cpu_seconds: float
    """Of the process and of all that it waited for."""
    memory: Memory | None

    @property
    def result(self) -> dict[str, Any]:
        """What a job returned."""
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found

    @property
    def took(self) -> dict[str, Any]:
        """Times and memory as they stand in a result file."""
        memory = {} if self.memory is None else asdict(self.memory)
        return {"wall_seconds": self.wall_seconds, "cpu_seconds": self.cpu_seconds, **memory}


def run(command: Sequence[str], *, watch: bool = False, expect: int = 0, env: Mapping[str, str] | None = None) -> Ended:
    """Run a command to its end; the script ends where the command's exit code is not the expected one. ``watch``: sample its memory."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        before, began = _children_seconds(), time.monotonic()
        process = Popen(list(command), stdin=subprocess.DEVNULL, stdout=out, stderr=err, env={**os.environ, **_package(), **(env or {})})
        watched = _Watch(process.pid) if watch else None
        try:
            while watched is not None and process.poll() is None:
                _, looking = timed(watched.look)
                time.sleep(max(SAMPLE_SECONDS, 9 * looking))
            process.wait()
        except BaseException:
            process.kill()
            raise
        wall, cpu = time.monotonic() - began, _children_seconds() - before
        told = []
        for stream in (out, err):
            stream.seek(0)
            told.append(stream.read().decode("utf-8", "replace"))
    if process.returncode != expect:
        sys.exit(f"exit {process.returncode}, not {expect}: {' '.join(command)}\n{told[1]}")
    return Ended(process.returncode, *told, wall, cpu, watched.most if watched else None)


def ftune(*arguments: str, watch: bool = False, expect: int = 0, env: Mapping[str, str] | None = None) -> Ended:
    """A command of ftune, with a token cache of its own that is empty: tokenising is part of the work."""
    with tempfile.TemporaryDirectory(prefix="ftune-cache-") as cold:
        command = [sys.executable, "-m", "finetune_cli", *arguments]
        return run(command, watch=watch, expect=expect, env={"FTUNE_CACHE": cold, **(env or {})})


def job_command(file: str, name: str, given: Mapping[str, Any]) -> list[str]:
    """What ``job`` runs."""
    return [sys.executable, file, "--job", name, json.dumps(given, default=str)]


def job(file: str, name: str, given: Mapping[str, Any], *, watch: bool = False, env: Mapping[str, str] | None = None) -> Ended:
    """A job of the benchmark ``file``, in a process of its own."""
    return run(job_command(file, name, given), watch=watch, env=env)


def begin(main: Callable[[], None], jobs: Jobs) -> None:
    """What a benchmark does when it is run: one of its jobs if asked for, else its main part."""
    if sys.argv[1:2] == ["--job"]:
        print(json.dumps(jobs[sys.argv[2]](**json.loads(sys.argv[3]))), flush=True)
    else:
        main()


def timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """What the work returns, and its seconds."""
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def remove(folder: Path) -> None:
    """A folder that a benchmark made, and all in it."""
    shutil.rmtree(folder, ignore_errors=True)


def resident_mb() -> tuple[float, float]:
    """(now, at most so far) of this process's resident memory."""
    lines = _lines(f"/proc/{os.getpid()}/status")
    return tuple(_kilobytes(lines, name) / 1024 for name in ("VmRSS:", "VmHWM:"))  # type: ignore[return-value]


def _package() -> dict[str, str]:
    """The ftune beside these scripts is the one that is measured, in whatever directory a command stands."""
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class _Watch:
    """The memory of a process and of all below it, looked at again and again."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.tree = self.process = 0.0
        self.processes = 0

    @property
    def most(self) -> Memory | None:
        """None where the system does not tell (it is Linux that does)."""
        return Memory(self.tree / 1024, self.process / 1024, self.processes) if self.tree else None

    def look(self) -> None:
        tree, members = 0, _tree(self.pid)
        for pid in members:
            tree += _kilobytes(_lines(f"/proc/{pid}/smaps_rollup"), "Pss:")
            self.process = max(self.process, _kilobytes(_lines(f"/proc/{pid}/status"), "VmHWM:"))
        if tree > self.tree:
            self.tree, self.processes = tree, len(members)


def _tree(root: int) -> list[int]:
    """The process and all its descendants that live."""
    found = [root]
    for pid in found:  # which grows
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, "".join(_lines(str(task))).split())
    return found


def _lines(file: str) -> list[str]:
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # it has ended, or there is no /proc
        return []


def _kilobytes(lines: Sequence[str], name: str) -> int:
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0)
