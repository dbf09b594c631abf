"""The heaviest batch, tried before step 1: memory that does not suffice is found out at once, and not hours later.

On a GPU the allocator itself holds to a budget. On a CPU the peak of the process is read, and what the optimizer and a checkpoint's copy
will take is added. A batch that is too heavy is cut into smaller passes, which never changes the mathematics.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch

from finetune_cli import console, models
from finetune_cli.batching import micro_batches, padded
from finetune_cli.device import no_room_for_one_row, out_of_memory
from finetune_cli.engine.signals import at_once
from finetune_cli.engine.trainer import Trainer
from finetune_cli.errors import MachineError

LOOKED_AT = 2_000
"""Batches of the first epoch among which the heaviest is sought."""
COPIES = 5
"""Times the trained weights that are not there yet: two moments, and a checkpoint's copy of all three."""


def rehearse(trainer: Trainer, budget: float | None) -> None:
    """Try the heaviest pass of the first epoch, with smaller ones until it fits. ``budget`` in GiB; without one only a GPU is tried.

    Raises MachineError where one row alone does not fit. Nothing but the plan changes.
    """
    if trainer.device.compiled and not trainer.state.finished and trainer.state.step < trainer.timetable.total:
        _compile(trainer)
    device = trainer.device.device
    if device.type == "cuda" and budget is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget * 2**30 / total), device)
    elif device.type != "cuda" and budget is None:
        return
    with console.working("trying the heaviest batch"):
        while not _fits(trainer, part := heaviest(trainer), budget):
            longest = int(trainer.lengths[part].max())
            if len(part) == 1 or trainer.plan.whole:
                raise no_room_for_one_row(longest, trainer.device) if budget is None else _over(budget, longest)
            trainer.go_by(trainer.plan.halved())
            console.warn(f"the heaviest batch does not fit: {trainer.plan.micro_tokens} tokens at a time, and the same mathematics")


def _compile(trainer: Trainer) -> None:
    """Compile what the run's first batch needs, which takes a minute; a signal of one process alone does not wait for it."""
    stop = trainer.world.stop
    with console.working("compiling the layers"):
        try:
            with at_once(stop) if trainer.world.size == 1 else nullcontext():
                trainer.backward()
        except MachineError:
            stop.check()  # the compiler got the signal too
            raise
        finally:
            trainer.updater.drop_gradients()


def heaviest(trainer: Trainer) -> np.ndarray:
    """The rows that pass through the device together and cost most, as indices of examples."""
    batches = [trainer.rows_of(step) for step in range(min(trainer.timetable.per_epoch, LOOKED_AT))]
    parts = [part for rows in batches for part in micro_batches(rows, trainer.lengths, plan=trainer.plan)]
    return max(parts, key=lambda part: _cost(part, trainer.lengths, packed=trainer.plan.packed))


def _cost(part: np.ndarray, lengths: np.ndarray, *, packed: bool) -> int:
    """Tokens that are computed for some rows."""
    return int(lengths[part].sum()) if packed else len(part) * padded(int(lengths[part].max()))


def _fits(trainer: Trainer, part: np.ndarray, budget: float | None) -> bool:
    """Whether forward and backward of some rows stay within what there is."""
    on_cpu = trainer.device.device.type == "cpu"
    if on_cpu:
        _forget_peak()
    try:
        trainer.model.train()
        batch = trainer.batch(part).to(trainer.device.device)
        trainer.propagate(batch, batch.weights)
        if trainer.device.device.type == "cuda":
            torch.cuda.synchronize(trainer.device.device)
    except Exception as error:
        if not out_of_memory(error):
            raise
        return False
    finally:
        trainer.updater.drop_gradients()
    if not on_cpu or budget is None:
        return True
    trained, _ = models.parameters(trainer.model)
    return _peak() + COPIES * 4 * trained <= budget * 2**30


def _over(budget: float, tokens: int) -> MachineError:
    return MachineError(
        f"training with a single row of {tokens} tokens takes more than {budget:g} GiB",
        where=f"device.memory_budget={budget:g}",
        fix="a larger device.memory_budget, a smaller data.max_length or model.path, or model.gradient_checkpointing=true",
    )


def _forget_peak() -> None:
    """Let the process's peak be counted from now on, where the system can."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return


def _peak() -> int:
    """Bytes that this process held at most since ``_forget_peak``; 0 where the system does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            line = next(line for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024
