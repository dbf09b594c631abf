"""Where an update's time goes: a trace of a few steady updates, and a table of its parts beside what the machine can do.

On a CPU an operator's own time counts, and what no operator accounts for is the interpreter's and the loop's. On CUDA a kernel's time
counts, and the rest is time in which the device waited. Profiling watches and changes nothing: the weights are those of a run without.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, record_function

from finetune_cli import console
from finetune_cli.device import DevicePlan
from finetune_cli.run import Run
from finetune_cli.storage import json_bytes
from finetune_cli.tasks.sections import Table

WARM_UP, STEPS = 3, 5
"""Updates that are let pass, and updates that are looked at."""
STEP, DATA, UPDATE = "ftune: step", "ftune: data", "ftune: update"
"""Names of the stretches of an update in the trace."""
OTHER = "other, waiting"
PARTS = ("matrix products", "attention", "dropout and norm", "optimizer", "data", "other operators", OTHER)
BY_NAME = (
    ("attention", re.compile(r"attention|(?<!log)(?<!log_)softmax|flash|aten::(bmm|baddbmm)", re.IGNORECASE)),
    ("dropout and norm", re.compile(r"dropout|bernoulli|_Keep|layer_?norm|rms_?norm|LayerNorm|group_?norm", re.IGNORECASE)),
    ("matrix products", re.compile(r"^(aten::(mm|addmm|matmul|linear|addmv|mv|_scaled_mm)|mkldnn|onednn)", re.IGNORECASE)),
)
"""A part, and the operators that are its; products of batches of small matrices (``bmm``) are attention's in these models."""
SIDES = {"cpu": 1024, "cuda": 8192, "mps": 4096}
"""Rows of the square matrices whose product shows what the device reaches."""
PROBES = 5
TRACE, TABLE = "trace.json.gz", "parts.json"


@dataclass(frozen=True, slots=True)
class Profiled:
    """What some updates took, in seconds an update."""

    steps: int
    seconds: float
    parts: dict[str, float]
    """By part; they sum to ``seconds``."""
    operations: float
    """Floating-point operations of an update's matrix products."""
    peak: float
    """Those that the device does in a second."""
    precision: str

    def saved(self) -> dict[str, Any]:
        """JSON form; ``Profiled(**saved)`` makes it again."""
        return {name: getattr(self, name) for name in self.__slots__}

    def table(self) -> Table:
        """For the screen and the report."""
        rows: list[list[Any]] = [
            [name, f"{1e3 * taken:.2f}", f"{taken / self.seconds:.1%}", self._share(name, taken)] for name, taken in self.parts.items()
        ]
        rows.append(["an update", f"{1e3 * self.seconds:.2f}", f"{1:.1%}", f"{self.operations / self.seconds / self.peak:.1%}"])
        note = (
            f"Mean of {self.steps} updates. Peak: {self.peak / 1e9:,.0f} GFLOP/s, what one large matrix product reaches here "
            f"in {self.precision}. The trace is profile/{TRACE} (chrome://tracing, ui.perfetto.dev)."
        )
        return Table("Where an update's time goes", ["part", "ms", "share", "of the peak"], rows, note)

    def _share(self, name: str, taken: float) -> str | None:
        """How near the matrix products come to what the device reaches while it does nothing else."""
        return f"{self.operations / taken / self.peak:.1%}" if name == PARTS[0] and taken else None


class Profile:
    """Looks at some updates of a run, if it is ``wanted``, and writes what it saw; a context around all of them."""

    def __init__(self, run: Run | None = None, device: DevicePlan | None = None, *, wanted: bool = False) -> None:
        self._run, self._device, self._wanted = run, device, wanted and run is not None
        self._passed = 0
        self._profiler: Any = None

    @contextmanager
    def update(self) -> Iterator[None]:
        """Around one update."""
        if not self._wanted:
            yield
            return
        self._passed += 1
        if self._passed <= WARM_UP:
            yield
            return
        if self._profiler is None:
            self._profiler = self._begin()
        with record_function(STEP):
            yield
            self._settle()
        if self._passed == WARM_UP + STEPS:
            self._finish()

    def _begin(self) -> Any:
        assert self._device is not None
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self._device.device.type == "cuda")
        self._settle()
        profiler = torch.profiler.profile(activities=activities, record_shapes=True, with_flops=True)
        profiler.start()
        return profiler

    def _settle(self) -> None:
        """What was begun belongs to the update that began it."""
        assert self._device is not None
        if self._device.device.type == "cuda":
            torch.cuda.synchronize(self._device.device)

    def _finish(self) -> None:
        """Write trace and table, and say the table."""
        assert self._run is not None and self._device is not None
        profiler, self._profiler, self._wanted = self._profiler, None, False
        profiler.stop()
        found = measure(list(profiler.events()), self._device)
        with tempfile.TemporaryDirectory(prefix="ftune-profile-") as folder:
            trace = Path(folder) / TRACE
            profiler.export_chrome_trace(str(trace))
            self._run.write_profile({TRACE: trace, TABLE: json_bytes(found.saved())})
        table = found.table()
        console.table(table.title, table.columns, table.rows)
        console.say(table.note)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._profiler is not None and error is not None:
            self._profiler.stop()
        elif self._profiler is not None:
            self._finish()
        elif self._wanted and error is None:
            console.warn(f"nothing was profiled: the first {WARM_UP} updates are let pass, and there were {self._passed}")
        self._wanted = False


def tables(run: Run) -> list[Table]:
    """What the report shows of a run's profile, if it has one."""
    found = run.profile(TABLE)
    return [Profiled(**found).table()] if found else []


def measure(events: list[Any], device: DevicePlan) -> Profiled:
    """The parts of the updates in a trace; they sum to the updates' time."""
    on_host = device.device.type != "cuda"
    events = [event for event in events if str(event.device_type).endswith("CPU")]  # kernels are counted with what launched them
    steps = [event for event in events if event.name == STEP]
    seconds = sum(step.time_range.elapsed_us() for step in steps) / 1e6 / len(steps)
    parts = dict.fromkeys(PARTS, 0.0)
    operations = 0.0
    for event in events:
        inside = any(step.time_range.start <= event.time_range.start <= step.time_range.end for step in steps)
        if not inside or event.name == STEP:
            continue
        own = event.self_cpu_time_total if on_host else event.self_device_time_total
        part = part_of(event)
        parts[part] += own / 1e6 / len(steps)
        operations += (event.flops or 0) / len(steps) if part == PARTS[0] else 0
    parts[OTHER] += seconds - sum(parts.values())
    return Profiled(len(steps), seconds, parts, operations, peak(device), device.precision)


def part_of(event: Any) -> str:
    """The part of an update that an operator belongs to: by the stretch it lies in, else by its name or that of what called it."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    if DATA in names:
        return "data"
    if UPDATE in names:
        return "optimizer"
    for part, pattern in BY_NAME:
        if any(pattern.search(name) for name in names):
            return part
    return "other operators"


def peak(device: DevicePlan) -> float:
    """Floating-point operations a second of one large matrix product in the run's precision: the best of a few."""
    side = SIDES[device.device.type]
    draw = torch.Generator().manual_seed(0)  # its own: the run's draws are keyed
    left, right = (torch.randn(side, side, generator=draw).to(device.device, device.dtype) for _ in range(2))
    best = float("inf")
    for _ in range(PROBES):
        began = time.perf_counter()
        left @ right
        if device.device.type == "cuda":
            torch.cuda.synchronize(device.device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * side**3 / best
