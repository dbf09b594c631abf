"""One process or several on a CPU: tried before a long run, because machines differ.

Several processes have no operator that waits for every core, and pay with smaller matrix products and a sum of gradients. Short runs are
not worth the question, and stay one process: what they compute never depends on how busy a machine was.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from finetune_cli import console
from finetune_cli.config import TrainConfig
from finetune_cli.device import DevicePlan
from finetune_cli.engine import environment
from finetune_cli.engine.building import assembled
from finetune_cli.engine.prepared import Prepared
from finetune_cli.engine.signals import StopFlag
from finetune_cli.engine.timetable import Timetable
from finetune_cli.engine.together import gathered
from finetune_cli.engine.trainer import Trainer
from finetune_cli.run import Run
from finetune_cli.world import Alone, Group, outside

LEAST_UPDATES = 1_000
"""Runs with fewer are not looked at."""
WORTH = 1_800.0
"""Seconds of training from which on it is worth it to start processes for the trial."""
GAIN = 1.1
"""So many times faster several processes must be; less may be chance."""
UPDATES = 3
"""Of which the median is taken, after one that is not counted."""
LEAST_ROWS = 4
"""Rows of a batch that each process has at least."""
COPIES = 4
"""Times the weights: themselves, their gradients and two moments, in every process."""


def chosen(config: TrainConfig, p: Prepared, directory: Run, stop: StopFlag) -> DevicePlan:
    """The plan of a new run, with as many processes as were found faster on its own first batch; nothing else changes."""
    plan = p.device
    processes = min(plan.threads, config.train.batch_size // LEAST_ROWS)
    updates = Timetable.of(config.train, len(p.data["train"].examples)).total
    settled = plan.device.type != "cpu" or config.device.processes != "auto" or outside() is not None or p.task.rows_interact
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
        trainer.backward()
        trainer.updater.drop_gradients()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


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
