"""What is tried before a long run, because machines differ: one process or several on a CPU, layers compiled or not on CUDA.

Several processes have no operator that waits for every core, and pay with smaller matrix products and a sum of gradients. Compiled layers
launch less, and are compiled first. Short runs are not worth the question: what they compute never depends on how busy a machine was.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from finetune_cli import console, packing
from finetune_cli.config import TrainConfig
from finetune_cli.device import DevicePlan
from finetune_cli.engine import environment
from finetune_cli.engine.building import assembled
from finetune_cli.engine.prepared import Prepared
from finetune_cli.engine.signals import StopFlag, at_once
from finetune_cli.engine.timetable import Timetable
from finetune_cli.engine.together import gathered
from finetune_cli.engine.trainer import Trainer
from finetune_cli.errors import MachineError
from finetune_cli.run import Run
from finetune_cli.world import Alone, Group, outside

LEAST_UPDATES = 1_000
"""Runs with fewer are not looked at."""
WORTH = 1_800.0
"""Seconds of training from which on it is worth it to start processes, or to compile, for the trial."""
GAIN = 1.1
"""So many times faster what was tried must be; less may be chance."""
UPDATES = 3
"""Of which the median is taken, after one that is not counted."""
LEAST_ROWS = 4
"""Rows of a batch that each process has at least."""
COPIES = 4
"""Times the weights: themselves, their gradients and two moments, in every process."""


def chosen(config: TrainConfig, p: Prepared, directory: Run, stop: StopFlag) -> DevicePlan:
    """The plan of a new run, with what was found faster on its own first batch; nothing else changes."""
    return _processes(config, p, directory, stop) if p.device.device.type == "cpu" else _compiled(config, p, directory, stop)


def _processes(config: TrainConfig, p: Prepared, directory: Run, stop: StopFlag) -> DevicePlan:
    """One process or several, on a CPU."""
    plan = p.device
    processes = min(plan.threads, config.train.batch_size // LEAST_ROWS)
    updates = Timetable.of(config.train, len(p.data["train"].examples)).total
    settled = config.device.processes != "auto" or outside() is not None or p.task.rows_interact
    if settled or processes < 2 or updates < LEAST_UPDATES:
        return plan
    with console.working("trying one process"), console.unsaid():
        trainer = assembled(config, p, directory, None, Alone(stop))
        alone = seconds(trainer)
    if updates * alone < WORTH:
        return plan.split(1, f"{updates:,} updates of {alone:.2g} s are too few to try more")
    weights = sum(tensor.numel() * tensor.element_size() for tensor in trainer.model.parameters())
    del trainer
    if COPIES * weights * processes > environment.free_memory(plan.device) / 2:
        return plan.split(1, f"{processes} copies of the model do not fit beside each other")
    shared = _shared(config, replace(p, device=plan.split(processes, "tried")), directory, stop)
    told = f"tried: an update takes {shared:.3g} s in {processes} processes, {alone:.3g} s in one"
    console.say(told)
    return plan.split(processes if alone > GAIN * shared else 1, told)


def seconds(trainer: Trainer) -> float:
    """Of the gradients of the run's first batch, of all processes; nothing is changed by it."""
    times = []
    for _ in range(1 + UPDATES):
        began = time.perf_counter()
        float(trainer.backward())  # what is computed on a device is waited for
        trainer.updater.drop_gradients()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _compiled(config: TrainConfig, p: Prepared, directory: Run, stop: StopFlag) -> DevicePlan:
    """Layers as they are or compiled, on one device; several share the answer. What compiling takes counts against the run."""
    plan = p.device
    updates = Timetable.of(config.train, len(p.data["train"].examples)).total
    settled = config.device.compile != "auto" or plan.deterministic or outside() is not None
    if settled or plan.device.type != "cuda" or updates < LEAST_UPDATES:
        return plan
    one = replace(p, device=plan.split(1, "tried"))
    with console.working("trying the layers as they are"), console.unsaid():
        trainer = assembled(config, one, directory, None, Alone(stop))
        plain = seconds(trainer)
    if updates * plain < WORTH:
        return plan.compiling(False, f"{updates:,} updates of {plain:.2g} s are too few to try it")
    try:
        with console.working("trying the layers compiled"), console.unsaid(), at_once(stop):
            packing.compile_layers(trainer.model)
            began = time.perf_counter()
            compiled = seconds(trainer)
            cost = time.perf_counter() - began - UPDATES * compiled
    except MachineError as error:
        stop.check()  # the compiler got the signal too
        console.warn(error.what)
        return plan.compiling(False, error.what)
    told = f"tried: an update takes {compiled:.3g} s with compiled layers, {plain:.3g} s without, and compiling took {cost:.0f} s"
    console.say(told)
    return plan.compiling(plain > GAIN * compiled and updates * (plain - compiled) > cost, told)


@dataclass(frozen=True, slots=True)
class _Tried:
    """What the others are given."""

    config: TrainConfig
    prepared: Prepared
    run: Path


def _shared(config: TrainConfig, p: Prepared, directory: Run, stop: StopFlag) -> float:
    """The same of several processes, which are there for this alone."""
    world = gathered(p.device, stop, __name__)
    try:
        world.share(_Tried(config, p.for_others(), directory.path))
        with console.working(f"trying {p.device.processes} processes"), console.unsaid():
            took = seconds(assembled(config, p, directory, None, world))
        world.close()
    finally:
        world.abandon()
    return took


def follow(world: Group) -> None:
    """What a process does that does not lead."""
    tried: _Tried = world.share(cast(_Tried, None))
    seconds(assembled(tried.config, tried.prepared, Run(tried.run), None, world))
    world.close()
