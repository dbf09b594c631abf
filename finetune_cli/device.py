"""What to run on: device, precision and threads, found once, each with its reason, saved in the run and reused by it."""

from __future__ import annotations

import os
import platform
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from finetune_cli import machine
from finetune_cli.config.choices import DeviceName, Precision
from finetune_cli.config.schema import DeviceConfig, TrainDeviceConfig
from finetune_cli.errors import MachineError, UserError
from finetune_cli.world import outside

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """The choices and why; ``saved()`` goes into the run's plan and ``DevicePlan.of`` makes it again."""

    device: torch.device
    precision: str
    threads: int
    """Of all processes together."""
    deterministic: bool
    processes: int
    compiled: bool
    """Whether the layers are compiled for training."""
    reasons: dict[str, str]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the matrix products."""
        return DTYPES[self.precision]

    @property
    def own_threads(self) -> int:
        """Threads of this process."""
        return max(1, self.threads // self.processes)

    def split(self, processes: int, reason: str) -> DevicePlan:
        """The same plan for so many processes."""
        return replace(self, processes=processes, reasons={**self.reasons, "processes": reason})

    def compiling(self, compiled: bool, reason: str) -> DevicePlan:
        """The same plan with layers compiled or not; what is compiled promises no bits."""
        deterministic = self.deterministic and not compiled
        return replace(self, compiled=compiled, deterministic=deterministic, reasons={**self.reasons, "compile": reason})

    def of(self, local_rank: int) -> DevicePlan:
        """The same plan in the process that is the so many-th on its machine."""
        return self if self.device.type != "cuda" or self.processes == 1 else replace(self, device=torch.device("cuda", local_rank))

    def autocast(self) -> AbstractContextManager[Any]:
        """Matrix products in the plan's precision, everything else as the model has it."""
        return nullcontext() if self.precision == "fp32" else torch.autocast(self.device.type, self.dtype)

    def scaler(self) -> torch.amp.GradScaler | None:
        """fp16 gradients need their loss scaled; other precisions do not."""
        return torch.amp.GradScaler(self.device.type) if self.precision == "fp16" else None

    def apply(self) -> None:
        """Make the process run as planned."""
        torch.set_num_threads(self.own_threads)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            if self.deterministic:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
                torch.use_deterministic_algorithms(True)
                torch.backends.cudnn.benchmark = False
                torch.backends.cuda.enable_mem_efficient_sdp(False)
            torch.backends.cuda.matmul.allow_tf32 = self.precision != "fp32"

    def memory_mb(self) -> float:
        """Peak memory so far: of the device, or of the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        try:
            import resource
        except ImportError:
            return 0.0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if platform.system() == "Darwin" else 2**10)

    def saved(self) -> dict[str, Any]:
        """JSON form for the run's plan."""
        return {
            "device": str(self.device),
            "precision": self.precision,
            "threads": self.threads,
            "processes": self.processes,
            "deterministic": self.deterministic,
            "compiled": self.compiled,
            "reasons": self.reasons,
        }


def find(config: DeviceConfig, saved: dict[str, Any] | None = None, *, goes_on: bool = False) -> DevicePlan:
    """Look at the machine. What a run's ``saved`` plan chose on the same kind of device is kept where the config leaves it open.

    ``goes_on``: the run itself goes on, with as many processes as before. Raises UserError for a device or precision that is not here.
    """
    device, device_reason = _device(config)
    precision, reason = _precision(config.precision, device)
    threads, threads_reason = _threads(config.threads)
    processes, processes_reason = _processes(config, device)
    if saved and torch.device(saved["device"]).type == device.type:
        if config.precision == Precision.auto:
            precision, reason = saved["precision"], "as in the run's plan"
        if config.threads is None:
            threads, threads_reason = saved["threads"], "as in the run's plan"
        if goes_on and config.processes == "auto" and outside() is None:
            there = torch.cuda.device_count() if device.type == "cuda" else saved.get("processes", 1)
            processes = min(saved.get("processes", 1), there)
            processes_reason = "as in the run's plan" if processes == saved.get("processes", 1) else "there are fewer GPUs than before"
    plan = DevicePlan(
        device=device,
        precision=precision,
        threads=threads,
        deterministic=config.deterministic or device.type == "cpu",
        processes=processes,
        compiled=False,
        reasons={"device": device_reason, "precision": reason, "threads": threads_reason, "processes": processes_reason},
    )
    return plan.compiling(*_compiled(config, plan, saved if goes_on else None)) if isinstance(config, TrainDeviceConfig) else plan


def _compiled(config: TrainDeviceConfig, plan: DevicePlan, saved: dict[str, Any] | None) -> tuple[bool, str]:
    """Whether layers are compiled for training. Raises UserError where they cannot be."""
    if config.compile is True:
        where = "device.compile=true"
        if plan.device.type == "mps":
            raise UserError("nothing is compiled for MPS", where=where, fix="leave device.compile out")
        names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
        if os.name == "posix" and not any(shutil.which(name) for name in names):
            told = f"PyTorch needs a C++ compiler to compile layers, and finds no {' or '.join(names)}"
            raise UserError(told, where=where, fix="install one (Debian: apt install g++), or device.compile=false")
        return True, "asked for"
    if config.compile is False:
        return False, "asked for"
    if saved is not None and torch.device(saved["device"]).type == plan.device.type:
        return bool(saved.get("compiled")), "as in the run's plan"
    if plan.device.type != "cuda":
        return False, "nothing is won by it on a CPU" if plan.device.type == "cpu" else "nothing is compiled for MPS"
    return False, "bit-equal runs were asked for" if plan.deterministic else "not tried"


def _device(config: DeviceConfig) -> tuple[torch.device, str]:
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    name = config.name
    asked = name != DeviceName.auto
    if name == DeviceName.auto:
        name = DeviceName.cuda if cuda else DeviceName.mps if mps else DeviceName.cpu
    if name == DeviceName.cuda:
        if not cuda:
            build = "the CPU build" if torch.version.cuda is None else "built with CUDA, but finds no device"
            raise UserError(
                f"there is no CUDA device: torch {torch.__version__} is {build}", where="device=cuda", fix="device=cpu, or device=auto"
            )
        index = config.index or 0
        if index >= torch.cuda.device_count():
            raise UserError(f"there are {torch.cuda.device_count()} CUDA devices", where=f"device.index={index}", fix="device.index=0")
        return torch.device("cuda", index), f"{'asked for' if asked else 'found'}: {torch.cuda.get_device_name(index)}"
    if name == DeviceName.mps:
        if not mps:
            raise UserError("there is no MPS device here", where="device=mps", fix="device=cpu, or device=auto")
        _refuse_index(config)
        return torch.device("mps"), "asked for" if asked else "found, and no CUDA device"
    _refuse_index(config)
    return torch.device("cpu"), "asked for" if asked else "no CUDA or MPS device found"


def _refuse_index(config: DeviceConfig) -> None:
    """Raise UserError for an index among GPUs where none was found."""
    if config.index is not None and config.name == DeviceName.auto:
        what = "there is no CUDA device, of which device.index could be one"
        raise UserError(what, where=f"device.index={config.index}", fix="leave it out, or device.index=null")


def _processes(config: DeviceConfig, device: torch.device) -> tuple[int, str]:
    """How many processes share the work. Raises UserError where the number asked for cannot be had."""
    wanted, place = config.processes, outside()
    if place is not None:
        if wanted not in ("auto", place.size):
            raise UserError(
                f"{place.size} processes were started from outside",
                where=f"device.processes={wanted}",
                fix="leave device.processes out, or start ftune without torchrun",
            )
        return place.size, "started from outside (RANK and WORLD_SIZE are set)"
    if device.type != "cuda":
        if wanted == "auto":
            return 1, "on a CPU the threads of one process share the work"
        if device.type == "mps" and wanted != 1:
            raise UserError("there is one MPS device", where=f"device.processes={wanted}", fix="device.processes=1")
        return int(wanted), "asked for"
    there = torch.cuda.device_count()
    if config.index is not None:
        if wanted not in ("auto", 1):
            raise UserError(
                "device.index names one device for several processes", where=f"device.processes={wanted}", fix="leave device.index out"
            )
        return 1, "device.index names one device"
    if wanted == "auto":
        return there, "one a GPU"
    if int(wanted) > there:
        raise UserError(f"there are {there} CUDA devices", where=f"device.processes={wanted}", fix=f"device.processes={there} or less")
    return int(wanted), "asked for"


def _precision(wanted: Precision, device: torch.device) -> tuple[str, str]:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        bf16 = major >= 8
        if wanted == Precision.bf16 and not bf16:
            raise UserError(
                f"compute capability {major}.{minor} has no bf16 matrix units",
                where="device.precision=bf16",
                fix="device.precision=fp16 or auto",
            )
        if wanted == Precision.auto:
            chosen = "bf16" if bf16 else "fp16" if major >= 7 else "fp32"
            return chosen, f"compute capability {major}.{minor}"
    elif device.type == "mps":
        if wanted == Precision.fp16:
            raise UserError("fp16 training needs CUDA", where="device.precision=fp16", fix="device.precision=auto")
        if wanted == Precision.auto:
            return "fp32", "the safe choice on MPS"
    else:
        if wanted == Precision.fp16:
            raise UserError("fp16 training needs CUDA", where="device.precision=fp16", fix="device.precision=bf16, fp32 or auto")
        if wanted == Precision.auto:
            units = _bf16_units()
            return ("bf16", f"this CPU has {units}") if units else ("fp32", "this CPU has no bf16 instructions")
    return wanted.value, "asked for"


def _bf16_units() -> str | None:
    """The CPU's own bf16 instructions, if it has any. Asked of the processor, not measured: a busy machine must not change a run."""
    for name in ("amx_tile", "avx512_bf16"):
        if getattr(torch.cpu, f"_is_{name}_supported", bool)():
            return name
    return None


def _threads(wanted: int | None) -> tuple[int, str]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if wanted is not None:
        return wanted, "asked for"
    limit = os.environ.get("OMP_NUM_THREADS", "")
    if limit.isdigit() and int(limit) > 0:
        return int(limit), "OMP_NUM_THREADS"
    return usable, "every core this process may use"


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on the device or the host."""
    return isinstance(error, torch.OutOfMemoryError) or machine.memory_ran_out(error)


def no_room_for_one_row(tokens: int, plan: DevicePlan) -> MachineError:
    """The end of halving: one row alone does not fit."""
    return MachineError(
        f"out of memory on {plan.device} with a single row of {tokens} tokens",
        where="data.max_length",
        fix=f"data.max_length={max(16, tokens // 2)}, a smaller model.path, or a device with more memory",
    )


def free_host_memory() -> float:
    """Bytes that are free in the machine; 4 GiB where it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("MemAvailable"))
        return float(line.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return 4.0 * 2**30
